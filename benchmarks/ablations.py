"""What each idea is worth: runs that are evaluated on held-out training images, the last ones.

`python -m benchmarks.ablations` makes the rows of `RECIPES` that benchmarks/ablations.json lacks.
With names of rows as arguments it makes those, in every table that has them, and replaces what the
file says of them. An interrupted run in checkpoints/ablations goes on, a finished one is loaded:
remove its folder to train it again. ablations.md says where the other rows of that file come from.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from benchmarks import cifar10c
from benchmarks.corruptions import CORRUPTIONS
from checks import require
from dataset import CIFAR10, load_dataset
from loader import make_loader
from pretrained import write_json
from recipe import Recipe
from train import run
from utils import loss_and_accuracy, predict

HERE = Path(__file__).resolve().parent
PLAIN = Recipe(teacher=None, corruption=0, validation_size=10_000)
TEN = replace(PLAIN, epochs=10, sizes=(16, 24, 32), augmentation=0.25)
RECIPES = {  # table -> row -> recipe
    "10 epochs": {
        "NetDilated": TEN,
        "NetDilated, seed 1": replace(TEN, seed=1),
        "NetDilated, seed 2": replace(TEN, seed=2),
        "SGD in place of Muon": replace(TEN, optimizer="SGD"),
        "batch size 128": replace(TEN, batch_size=128),
        "max_lr 0.2": replace(TEN, max_lr=0.2),
        "max_lr 0.45": replace(TEN, max_lr=0.45),
        "max_lr 0.6": replace(TEN, max_lr=0.6),
        "weight decay 0.0002": replace(TEN, weight_decay=2e-4),
        "weight decay 0.002": replace(TEN, weight_decay=2e-3),
        "corruption 0.2": replace(TEN, corruption=0.2),
        "corruption 0.2, seed 1": replace(TEN, corruption=0.2, seed=1),
    },
    "10 epochs, teachers": {
        "no teacher": replace(TEN, validation_size=5000),
        "our teacher": replace(TEN, validation_size=5000, teacher=Recipe.teacher),
    },
    "30 epochs": {
        "NetDilated": replace(PLAIN, epochs=30),
        "max_lr 0.45": replace(PLAIN, epochs=30, max_lr=0.45),
    },
}


def main(
    names: list[str],
    output: Path = HERE / "ablations.json",
    folder: Path = HERE.parent / "checkpoints" / "ablations",
) -> None:
    """Make the rows of these names, or all that are missing, and write each as soon as it is there.

    Raises:
        ValueError: there is no row of that name.
    """
    rows = read(output)
    known = [name for recipes in RECIPES.values() for name in recipes]
    for name in names:
        require("row", name, f"one of {', '.join(dict.fromkeys(known))}", name in known)
    for table, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            if name not in (names or recipes.keys() - rows.get(table, {}).keys()):
                continue
            print(f"\n{table}: {name}")
            row = make_row(replace(recipe, folder=str(folder / table / name)))
            rows = read(output)  # another process may have added rows in the meantime
            rows.setdefault(table, {})[name] = row
            write_json(output, rows)


def read(output: Path) -> dict[str, dict[str, dict]]:
    """Return the rows that are in the file, by table."""
    return json.loads(output.read_text()) if output.exists() else {}


def make_row(recipe: Recipe, build: Callable[[], nn.Module] | None = None) -> dict:
    """Train by the recipe, and return its row. `build` makes another network than the recipe's."""
    model, metrics = run(recipe, build)
    row = {
        key: metrics[key]
        for key in (
            "parameters",
            "macs",
            "train_accuracy",
            "validation_accuracy",
            "validation_loss",
            "hardware",
            "date",
            "recipe",
        )
    }
    held_out = load_dataset("validation", recipe.data, recipe.validation_size)
    logits, labels = predict(model, make_loader(held_out, min(500, len(held_out))))
    scaled, _ = loss_and_accuracy(logits / metrics["temperature"], labels)
    return {
        **row,
        "validation_loss_scaled": scaled,  # at the temperature that fits best, to compare teachers
        "mean_accuracy_cifar10c": mean_accuracy_cifar10c(model, held_out),
    }


def mean_accuracy_cifar10c(model: nn.Module, dataset: CIFAR10, count: int = 500) -> float:
    """Return the mean accuracy in percent of the first images, under all corruptions but frost.

    So it is the same wherever it is measured.
    """
    images, labels = dataset.data[:count], dataset.targets[:count]
    kinds = [kind for kind in CORRUPTIONS if kind != "frost"]
    return cifar10c.mean(
        {kind: cifar10c.accuracies_of(model, kind, images, labels) for kind in kinds}
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"ablations: {error}")
