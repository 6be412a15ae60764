"""What the ablations show: the mean validation loss of a recipe against that of its base.

The ruler is the standard deviation between seeds, pooled over the recipes that have several. A
difference counts when it lies outside its 95 % interval by Student's t distribution. Confidence
depends on the teacher: with one, the loss is compared at the temperature that fits it best.
"""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import scipy.stats

LOSS, SCALED, ACCURACY = "validation_loss", "validation_loss_scaled", "validation_accuracy"
Tables = dict[str, dict[str, dict]]  # table -> row -> what the run measured
Place = tuple[str, str]  # a table, and the name of a recipe in it
TEACHERS = "10 epochs, teachers"
COMPARED = {  # base -> the tables of its variants
    ("10 epochs", "NetDilated"): ["10 epochs", "10 epochs, other code"],
    (TEACHERS, "no teacher"): [TEACHERS, f"{TEACHERS}, other code"],
    ("30 epochs", "NetDilated"): ["30 epochs", "30 epochs, other code"],
}


class Verdict(NamedTuple):
    """How far a mean is from that of the base, and how far chance alone would bring it."""

    difference: float
    half_width: float  # of the 95 % interval
    seeds: int  # of the side that has fewer

    @property
    def outside(self) -> bool:
        """Is the difference more than chance?"""
        return abs(self.difference) > self.half_width

    @property
    def word(self) -> str:
        """The verdict of a loss. With a question mark, a second seed has to confirm it."""
        word = "better" if self.difference < 0 else "worse"
        return f"{word}{'?' if self.seeds < 2 else ''}" if self.outside else "inside"


def ablations() -> Tables:
    """Return the rows of all ablations, by table."""
    return json.loads(Path(__file__).with_name("ablations.json").read_text())


def by_recipe(rows: dict[str, dict]) -> dict[str, list[dict]]:
    """Return the runs of each recipe of a table: their names differ in the seed alone."""
    recipes = {}
    for name, row in rows.items():
        recipes.setdefault(re.sub(r", seed \d+$", "", name), []).append(row)
    return recipes


def is_corrupted(name: str, row: dict) -> bool:
    """Did the run see corrupted images? A row without its recipe says so in its name."""
    return bool(row["recipe"].get("corruption")) if "recipe" in row else "corruption" in name


def pooled_deviation(tables: Tables, corrupted: bool, key: str = LOSS) -> tuple[float, int]:
    """Return the standard deviation between seeds, and its degrees of freedom.

    It is pooled over the recipes that have several seeds, either those with corruption or those
    without: the squared deviations from the recipe's mean, divided by the degrees of freedom.
    Where no recipe has several seeds, they are zero.
    """
    squares, degrees = 0.0, 0
    for rows in tables.values():
        for name, runs in by_recipe(rows).items():
            values = [run[key] for run in runs if key in run]
            if len(values) > 1 and is_corrupted(name, runs[0]) == corrupted:
                squares += statistics.variance(values) * (len(values) - 1)
                degrees += len(values) - 1
    return (squares / max(degrees, 1)) ** 0.5, degrees


def judge(tables: Tables, place: Place, base: Place, key: str | None = None) -> Verdict | None:
    """Compare a recipe with its base, by the loss if no other key is given.

    With t of the pooled degrees of freedom, the interval is ± t s √(1 / seeds + 1 / seeds of the
    base). If either side has corrupted images, s is the deviation with corruption. Where a figure
    is missing, or every s, there is no verdict.
    """
    sides = [by_recipe(tables[table])[name] for table, name in (place, base)]
    runs = [run for side in sides for run in side]
    taught = any(run.get("recipe", {}).get("teacher") for run in runs)
    key = key or (SCALED if taught else LOSS)
    corrupted = any(
        is_corrupted(name, side[0]) for (_, name), side in zip((place, base), sides, strict=True)
    )
    deviation, degrees = pooled_deviation(tables, corrupted, key)
    if not degrees or any(key not in run for run in runs):
        return None
    after, before = (statistics.mean(run[key] for run in side) for side in sides)
    error = deviation * sum(1 / len(side) for side in sides) ** 0.5
    half_width = scipy.stats.t.ppf(0.975, degrees) * error
    return Verdict(after - before, half_width, min(map(len, sides)))


def variants(tables: Tables) -> Iterator[tuple[Place, Place]]:
    """Yield every recipe that differs from a base, and that base."""
    for base, names in COMPARED.items():
        for table in names:
            for recipe in by_recipe(tables.get(table, {})):
                if (table, recipe) != base:
                    yield (table, recipe), base
