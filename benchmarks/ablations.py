"""What each idea is worth: runs on the first training images, judged on the last ones, which are held out.

`python -m benchmarks.ablations` makes the rows of `RECIPES` that benchmarks/ablations.json lacks, or those named as
arguments. An interrupted run goes on. Other rows of that file are of ideas that left the program again; commit e528d18
has their code in benchmarks/tries.py.
"""
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from recipe import Recipe
from train import run

HERE = Path(__file__).resolve().parent
TEN = Recipe(epochs=10, sizes=(16, 24, 32), augmentation=0.25, teacher=None, validation_size=10_000)
THIRTY = Recipe(epochs=30, teacher=None, validation_size=10_000)
NINETY = Recipe(teacher=None, validation_size=5_000)
RECIPES = {  # table -> row -> recipe
    "NetDilated, 10 epochs, one idea less": {
        "SGD in place of Muon": replace(TEN, optimizer="SGD"),
        "no EMA": replace(TEN, ema=False),
    },
    "NetDilated, 10 epochs, one idea more": {
        "batches of 128": replace(TEN, batch_size=128),
    },
    "NetDilated, 30 epochs": {
        "max_lr 0.3": THIRTY,
        "max_lr 0.15": replace(THIRTY, max_lr=0.15),
        "max_lr 0.6": replace(THIRTY, max_lr=0.6),
    },
    "90 epochs": {
        "NetDilated": NINETY,
        "NetDilated, distilled from that run": replace(NINETY, teacher="weights/teacher"),
        "NetDilated, batches of 128, distilled from the distilled run": replace(
            NINETY, teacher="weights/held-out", batch_size=128),
    },
}


def main(names: list[str], output: Path = HERE / "ablations.json",
         folder: Path = HERE.parent / "checkpoints" / "ablations") -> None:
    """Make the rows of these names, or all that are missing, and write each as soon as it is there."""
    rows = json.loads(output.read_text()) if output.exists() else {}
    for table, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            if name in rows.get(table, {}) or (names and name not in names):
                continue
            metrics = run(replace(recipe, folder=str(folder / table / name)))[1]
            rows.setdefault(table, {})[name] = {
                key: metrics[key] for key in ("parameters", "macs", "train_accuracy", "validation_accuracy",
                                              "validation_loss", "hardware", "date", "recipe")
            } | {"seconds_an_epoch": statistics.median(metrics["history"]["seconds"])}
            output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
