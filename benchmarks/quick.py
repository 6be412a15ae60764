"""The quick recipe with three seeds: writes benchmarks/quick.json.

`python -m benchmarks.quick` measures it on the test images, whose mean accuracy passes 85 %.
`python -m benchmarks.quick --held-out` measures it on 5,000 held-out training images, the spread of
which tells a reader of the notebook what is noise. Each goes on where it was interrupted, and
leaves the other's part of the file as it is.
"""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from pretrained import write_json
from recipe import Recipe
from train import run

HERE = Path(__file__).resolve().parent
RECIPE = Recipe.quick()
OUTPUT = HERE / "quick.json"


def main(
    held_out: int = 0,
    recipe: Recipe = RECIPE,
    seeds: tuple[int, ...] = (0, 1, 2),
    output: Path = OUTPUT,
    folder: Path = HERE.parent / "checkpoints" / "quick",
) -> None:
    """Run the recipe with each seed and write the metrics of all runs.

    With `held_out`, they hold out so many training images, and are measured on those.
    """
    recipe = replace(recipe, validation_size=held_out)
    name = f"{folder}-{recipe.split}"
    runs = [run(replace(recipe, seed=seed, folder=f"{name}-{seed}"))[1] for seed in seeds]
    accuracies = [metrics[f"{recipe.split}_accuracy"] for metrics in runs]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    result = {"mean_accuracy": mean, "standard_deviation": deviation, "runs": runs}
    results = json.loads(output.read_text()) if output.exists() else {}
    write_json(output, {**results, recipe.split: result})
    print(f"seeds {seeds}, {recipe.split} accuracy: {mean:.2f} +- {deviation:.2f} %")


if __name__ == "__main__":
    main(held_out=5000 if "--held-out" in sys.argv else 0)
