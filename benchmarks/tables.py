"""The tables of the README, of benchmarks/ and of export/, from the committed files: `make tables`.

A table stands between `<!-- NAME -->` and `<!-- end -->` in a Markdown file, where NAME is one of
`TABLES`.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ablation_tables import all_ablations, deviations, ideas, judged
from benchmarks.corruption_tables import cifar10c, corruptions
from benchmarks.exported import exported, quantised, runtimes
from checker.rows import HOLDS, OPTIONAL
from checker.rules import check_rules
from checker.tables import markdown_table
from checks import require
from dataset import load_dataset, normalise, train_transform
from model import NetDilated
from plots import TARGET
from pretrained import WEIGHTS, load, load_metrics
from published import NETWORKS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FILES = [ROOT / "README.md", ROOT / "export" / "README.md"]
FILES += [HERE / name for name in ("README.md", "ablations.md", "reproduce.md")]
EQUAL_EPOCHS = WEIGHTS / "30-epochs"
TEACHER = WEIGHTS / "teacher"


def main() -> None:
    """Bring every table up to date."""
    for path in FILES:
        text = updated(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8", newline="\n")


def updated(text: str) -> str:
    """Return the text of a Markdown file with its tables made anew."""

    def replace(match: re.Match) -> str:
        require("name of a table", match[1], f"one of {', '.join(TABLES)}", match[1] in TABLES)
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


# ---------------------------------------------------------------- results


def runs() -> list[dict]:
    """Return the metrics of the headline runs that are finished, in the order of their seeds."""
    folders = [WEIGHTS, *(path.parent for path in WEIGHTS.glob("seed-*/NetDilated.json"))]
    return sorted(
        (load_metrics("NetDilated", folder) for folder in folders),
        key=lambda run: run["recipe"]["seed"],
    )


def mean_and_deviation() -> str:
    """Return the mean test accuracy of the seeds in percent, and its standard deviation."""
    accuracies = [metrics["test_accuracy"] for metrics in runs()]
    deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}{deviation}"


def headline() -> str:
    """The result in a sentence."""
    verdicts = check_rules(NetDilated(), train_transform())
    broken = [rule for rule, _, verdict in verdicts if verdict not in (HOLDS, OPTIONAL)]
    kept = f"broken rules: {', '.join(broken)}" if broken else "every rule of the assignment kept"
    seeds = f"mean of {len(runs())} seeds" if len(runs()) > 1 else "one run"
    return (
        f"**{mean_and_deviation()} % test accuracy** ({seeds}) with "
        f"**{runs()[0]['parameters']:,} parameters**, {kept}."
    )


def results() -> str:
    """The headline runs, its teacher, and the three networks after equal epochs without one."""
    first, teacher = runs()[0], load_metrics("NetDilated", TEACHER)
    rows = [
        _result("NetDilated, headline recipe", first, f"**{mean_and_deviation()}**"),
        _result("the teacher: without one, without corruption, 45,000 images", teacher),
    ]
    for name, network in NETWORKS.items():
        published = getattr(network, "published_result", "")
        rows.append(_result(name, load_metrics(name, EQUAL_EPOCHS), published=published))
    head = (
        "network",
        "parameters:",
        "MACs, M:",
        "epochs:",
        "test accuracy, %:",
        "published result, %",
    )
    return markdown_table(head, rows)


def _result(name, metrics, accuracy="", published=""):
    """Return a row of the table of results."""
    return (
        name,
        f"{metrics['parameters']:,}",
        f"{metrics['macs'] / 1e6:.1f}",
        str(metrics["recipe"]["epochs"]),
        accuracy or f"{metrics['test_accuracy']:.2f}",
        published,
    )


def seeds() -> str:
    """Each run of the headline recipe."""
    return markdown_table(
        ("seed", "test accuracy %:", "test loss:"),
        [
            (str(run["recipe"]["seed"]), f"{run['test_accuracy']:.2f}", f"{run['test_loss']:.4f}")
            for run in runs()
        ],
    )


def constraints() -> str:
    """What the assignment asks, and what was measured on our network."""
    notes = {"a depthwise-separable convolution": ", pointwise first; each counts as one"}
    rows = [
        (rule, measured + notes.get(rule, ""), "✓" if verdict == HOLDS else verdict)
        for rule, measured, verdict in check_rules(NetDilated(), train_transform())
    ]
    reached = statistics.mean(run["test_accuracy"] for run in runs()) >= TARGET
    accuracy = f"{mean_and_deviation()} %"
    rows.append((f"at least {TARGET} % test accuracy", accuracy, "✓" if reached else "BROKEN"))
    difference = mirror_difference()
    same = "up to rounding" if difference < 1e-4 else f"they differ by {difference:.0e}"
    rows.append(("*not asked:* the same logits for an image and its mirror image", same, ""))
    return markdown_table(("asked", "measured", ""), rows)


def mirror_difference() -> float:
    """Return the largest difference between the logits of images and of their mirror images."""
    model, images = load(NetDilated)[0], normalise(load_dataset("test", "sample").data[:50])
    with torch.no_grad():
        return (model(images) - model(images.flip(3))).abs().max().item()


# ---------------------------------------------------------------- speed


def bench() -> dict:
    """Return the measurements of `make bench`."""
    return json.loads((HERE / "bench.json").read_text())


def training_step() -> str:
    """Images a second of the training step."""
    return markdown_table(
        ("training step", "images/s:", "min to max:", "peak MB:", "relative time:"),
        [
            (
                name,
                f"{row['median']:.0f}",
                f"{row['min']:.0f} to {row['max']:.0f}",
                f"{row['peak_mb']:.0f}",
                f"{row['speedup']:.2f}x",
            )
            for name, row in bench()["training step"].items()
        ],
    )


def whole_runs() -> str:
    """The time of the training steps of whole runs."""
    rows = bench()["whole runs, minutes"]
    if not rows:  # see bench.whole_runs
        return "not measured: the quick recipe comes first, `python -m benchmarks.quick`"
    quick = next(iter(rows.values()))
    return markdown_table(
        ("run", "minutes:", "times the quick recipe's:"),
        [
            (name, f"{minutes:,.{0 if minutes > 10 else 1}f}", f"{minutes / quick:.0f}x")
            for name, minutes in rows.items()
        ],
    )


def input_pipeline() -> str:
    """Images a second of the loaders."""
    return markdown_table(
        ("input pipeline", "images/s:", "min to max:", "of albumentations alone:"),
        [
            (
                name,
                f"{row['median']:,.0f}",
                f"{row['min']:,.0f} to {row['max']:,.0f}",
                f"{row['of_the_limit']:.0%}",
            )
            for name, row in bench()["input pipeline"].items()
        ],
    )


def other_measurements() -> str:
    """The other measurements."""
    measured, rate = bench(), bench()["rate of arithmetic, GFLOP/s"]
    evaluation = measured["evaluation, seconds"]
    return markdown_table(
        ("measured", "value:"),
        [
            ("hardware", measured["hardware"]),
            ("torch", measured["versions"]["torch"]),
            ("date", measured["date"]),
            ("the loop waits for data", f"{measured['waiting for data, %']:.1f} % of its time"),
            (f"evaluating {evaluation['images']:,} images", f"{evaluation['median']:.1f} s"),
            (
                "FLOP/s of the training step, in % of those of a large matrix product",
                f"{rate['share']:.0%} ({rate['training step']:.0f} of "
                f"{rate['matrix product']:.0f} GFLOP/s)",
            ),
        ],
    )


def latency() -> str:
    """The time of the network for one image and for a batch."""
    measured = bench()["latency"]
    rows = [
        (name, f"{row['ms']:.1f}", f"{row['images_per_second']:.0f}")
        for name, row in measured["rows"].items()
    ]
    table = markdown_table(("without gradients, fp32", "ms:", "images/s:"), rows)
    return f"{table}\n\nMeasured on: {measured['hardware']}."


def quick() -> str:
    """The runs of the quick recipe."""
    return markdown_table(
        ("seed", "test accuracy %:", "minutes:", "hardware"),
        [
            (
                str(run["recipe"]["seed"]),
                f"{run['test_accuracy']:.2f}",
                f"{run['seconds'] / 60:.1f}",
                run["hardware"],
            )
            for run in json.loads((HERE / "quick.json").read_text())["test"]["runs"]
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        headline,
        corruptions,
        cifar10c,
        ideas,
        results,
        seeds,
        constraints,
        training_step,
        whole_runs,
        input_pipeline,
        latency,
        other_measurements,
        quick,
        judged,
        deviations,
        all_ablations,
        exported,
        quantised,
        runtimes,
    )
}


if __name__ == "__main__":
    main()
