"""The tables of the ablations, for the README and ablations.md."""

import math
import statistics

from benchmarks.verdicts import (
    ACCURACY,
    COMPARED,
    LOSS,
    SCALED,
    TEACHERS,
    ablations,
    by_recipe,
    judge,
    pooled_deviation,
    variants,
)
from checker.tables import markdown_table

PLAIN = "10 epochs, other code", "plain kernels, 96, 128 and 176 channels in C2 to C4"
BASE = "10 epochs", "NetDilated"
EARLIER = "10 epochs, earlier networks with plain kernels"
UPSAMPLED = EARLIER, "upsampled to 64x64"

IDEAS = {  # idea -> the recipe with it, and the one without
    "mirrored kernels": (BASE, PLAIN),
    "upsampling to 64x64 (plain kernels)": (UPSAMPLED, (EARLIER, "without upsampling")),
    "a teacher of equal size": ((TEACHERS, "our teacher"), (TEACHERS, "no teacher")),
    "Muon in place of SGD": (BASE, ("10 epochs", "SGD in place of Muon")),
}
COLUMNS = {  # head -> the figure of a row, and how it is written
    "parameters:": ("parameters", "{:,}".format),
    "MACs, M:": ("macs", lambda macs: f"{macs / 1e6:.1f}"),
    "training accuracy, %:": ("train_accuracy", "{:.1f}".format),
    "validation accuracy, %:": (ACCURACY, "{:.2f}".format),
    "validation loss:": (LOSS, "{:.3f}".format),
    "loss at the fitted temperature:": (SCALED, "{:.3f}".format),
    "corrupted %:": ("mean_accuracy_under_corruptions", "{:.1f}".format),
    "CIFAR-10-C, %:": ("mean_accuracy_cifar10c", "{:.1f}".format),
}


def ideas() -> str:
    """What each idea changes in ten epochs on held-out images, the largest gain first."""
    tables = ablations()
    gains = {name: judge(tables, *places, ACCURACY) for name, places in IDEAS.items()}
    rows = [
        (
            name,
            *(_mean(tables, place, ACCURACY, 2) for place in reversed(IDEAS[name])),
            _with_interval(gain, 2),
            _with_interval(judge(tables, *IDEAS[name]), 4),
        )
        for name, gain in sorted(gains.items(), key=lambda gain: -gain[1].difference)
    ]
    head = "idea", "without, %:", "with, %:", "gain, points:", "change of loss:"
    return markdown_table(head, rows)


def judged() -> str:
    """Every variant against its base, by the loss: the best first."""
    tables, rows = ablations(), []
    for base in COMPARED:
        verdicts = {
            place: judge(tables, place, base) for place, of in variants(tables) if of == base
        }
        rows.append(_judged_row(tables, base, f"**{base[1]}**", "", "base"))
        rows += [
            _judged_row(
                tables,
                place,
                place[1],
                _with_interval(verdict, 4),
                verdict.word if verdict else "",
                _with_interval(judge(tables, place, base, ACCURACY), 2),
            )
            for place, verdict in sorted(verdicts.items(), key=_best_first)
        ]
    head = "recipe", "epochs:", "seeds:", "loss:", "change:", "verdict", "accuracy, %:", "points:"
    return markdown_table(head, rows)


def _judged_row(tables, place, name, change, verdict, points=""):
    """Return a row of the table of verdicts."""
    table, recipe = place
    seeds = len(by_recipe(tables[table])[recipe])
    loss, accuracy = _mean(tables, place, LOSS, 4), _mean(tables, place, ACCURACY, 2)
    return name, table.split()[0], str(seeds), loss, change, verdict, accuracy, points


def _best_first(item):
    """Sort pairs of a place and a verdict: those without one are the last."""
    return item[1].difference if item[1] else math.inf


def _mean(tables, place, key, digits):
    """Write the mean of a figure over the seeds of a recipe, or nothing where it is missing."""
    table, name = place
    values = [row[key] for row in by_recipe(tables[table])[name] if key in row]
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def _with_interval(verdict, digits):
    """Write a difference and half of its interval."""
    if not verdict:
        return "not comparable"
    return f"{verdict.difference:+.{digits}f} ± {verdict.half_width:.{digits}f}"


def deviations() -> str:
    """The deviation between seeds in a sentence."""
    tables = ablations()
    (plain, degrees), (corrupted, few) = (
        pooled_deviation(tables, corrupted) for corrupted in (False, True)
    )
    return (
        f"Between seeds the loss deviates by {plain:.4f} ({degrees} degrees of freedom), with "
        f"corruption by {corrupted:.4f} ({few})."
    )


def all_ablations() -> str:
    """All ablations, a table for each schedule, with the columns of which it has figures."""
    return "\n\n".join(f"### {name}\n\n{_runs(rows)}" for name, rows in ablations().items())


def _runs(rows):
    columns = {
        head: column
        for head, column in COLUMNS.items()
        if any(column[0] in row for row in rows.values())
    }
    cells = [
        (name, *(write(row[key]) if key in row else "" for key, write in columns.values()))
        for name, row in rows.items()
    ]
    return markdown_table(("variant", *columns), cells)
