"""The run of the notebook as a command: `python train.py --quick --seed 1 --folder
weights/quick-1`.

The headline run needs a teacher: `benchmarks/reproduce.md` has the command that trains ours.
"""

import argparse
import ast
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import utils
from checkpoint import Checkpoint, add_metrics, labels_sha256, load_teacher, save
from dataset import load_dataset, make_loader, train_transform
from device import hardware, make_scaler, pick_device, to_device
from model import build_network
from recipe import Recipe, make_optimizer, make_scheduler, seed_everything


def run(recipe: Recipe, build: Callable[[], nn.Module] | None = None) -> tuple[nn.Module, dict]:
    """Train a network from scratch, save it with its metrics in the folder of the recipe, and
    return both.

    A run whose checkpoint is there goes on, or is loaded if it was finished. `build` makes another
    network than the recipe's, which `load` does not know. With a `validation_size`, the metrics
    have the temperature that fits the validation images best.

    Raises:
        ValueError, RuntimeError, FloatingPointError: see `fit` and `load_dataset`.
        FileNotFoundError: there is no teacher.
    """
    device = pick_device()
    seed_everything(recipe.seed)
    train_set = load_dataset(
        "train",
        recipe.data,
        recipe.validation_size,
        train_transform(recipe.augmentation),
        recipe.seed,
    )
    test_set = load_dataset(recipe.split, recipe.data, recipe.validation_size)
    train_loader = make_loader(train_set, recipe.batch_size, True, recipe.num_workers, recipe.seed)
    test_loader = make_loader(test_set, min(500, len(test_set)))
    model = to_device(build() if build else build_network(recipe.network), device)
    teacher = recipe.teacher and load_teacher(recipe, train_set.targets)
    history = fit(model, recipe, train_loader, test_loader, teacher)
    metrics = save(model, utils.run_metrics(model, recipe, history, test_set.title), recipe.folder)
    measured = {
        "sample_mistakes": utils.sample_mistakes(model),
        "labels_sha256": labels_sha256(train_set.targets),
    }
    if recipe.validation_size:
        measured["temperature"] = utils.fit_temperature(*utils.predict(model, test_loader))
    return model, add_metrics(metrics, recipe.folder, **measured)


def fit(
    model: nn.Module,
    recipe: Recipe,
    train_loader: DataLoader,
    test_loader: DataLoader,
    teacher: nn.Module | None = None,
) -> dict[str, list[float]]:
    """Train the model as the loop of the notebook does, and return the history: see `Checkpoint`.

    Raises:
        ValueError: the checkpoint in the folder is damaged or of another run, the loader's order
            can't be restored, or the run has fewer than three steps.
        RuntimeError: another process trains in this folder, or the GPU's memory is too small.
        FloatingPointError: the loss is no longer finite.
    """
    device = next(model.parameters()).device
    teacher = teacher and to_device(teacher, device)
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(device)
    scheduler = make_scheduler(optimizer, recipe, len(train_loader))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    print(f"{recipe.epochs} epochs on {hardware(device)}, data: {train_loader.dataset.title}")
    path = Path(recipe.folder, f"{type(model).__name__}.ckpt")
    with Checkpoint(path, recipe, train_loader, teacher, parts) as checkpoint:
        for epoch in checkpoint.remaining_epochs():
            start = time.perf_counter()
            train_metrics = utils.train(
                model,
                checkpoint.batches(epoch),
                recipe,
                epoch,
                optimizer,
                scheduler,
                scaler,
                teacher,
            )
            test_metrics = utils.test(model, test_loader)
            checkpoint.log(*train_metrics, *test_metrics, time.perf_counter() - start)
            checkpoint.save()
    return checkpoint.history


def estimate(recipe: Recipe, images: int, device: torch.device) -> float:
    """Return about how many seconds the training steps of a run take on this device, without
    evaluation.

    Two steps are timed at each image size, of untrained networks. `images` is the size of the
    training set. The random generators of the CPU and of CUDA stay as they were.
    """
    count, seconds = min(recipe.batch_size, images), 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = to_device(build_network(recipe.network), device)
        teacher = to_device(build_network("NetDilated"), device).eval() if recipe.teacher else None
        optimizer = make_optimizer(model, recipe)
        batch = (
            torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8),
            torch.randint(10, (count,)),
        )
        sizes = [recipe.image_size(epoch) for epoch in range(recipe.epochs)]
        for size in set(sizes):
            step = partial(
                utils.train,
                model,
                [batch] * 2,
                recipe,
                sizes.index(size),
                optimizer,
                teacher=teacher,
            )
            step()  # warms up
            start = time.perf_counter()
            step()
            seconds += (time.perf_counter() - start) / 2 * images / count * sizes.count(size)
    return seconds


def announce(recipe: Recipe) -> str:
    """Return in one line how long a run takes here, and after it time and accuracy of the quick
    run, if it is another.

    Raises:
        ValueError, RuntimeError: the batch is larger than the training set; or see `load_dataset`.
    """
    device = pick_device()
    train_set = load_dataset("train", recipe.data, recipe.validation_size)
    make_loader(train_set, recipe.batch_size)  # which refuses a batch that is too large
    text = (
        f"a whole run of {recipe.epochs} epochs: about {duration(estimate(recipe, len(train_set), device))} of "
        f"training steps on {hardware(device)}"
    )
    if recipe == Recipe.quick(seed=recipe.seed):
        return text
    quick = json.loads((Path(__file__).parent / "benchmarks" / "quick.json").read_text())
    return (
        f"{text}; Recipe.quick() takes about {duration(estimate(Recipe.quick(), 50_000, device))} and reaches "
        f"{quick['mean_test_accuracy']:.1f} % on CIFAR-10"
    )


def duration(seconds: float) -> str:
    """Return a time in the units that a person would use, such as "3 h 10 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe that the arguments name: every field of `Recipe` is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="begin with Recipe.quick(), which passes 85 %%"
    )
    for each in fields(Recipe):
        meaning = each.metadata["meaning"].replace("%", "%%")
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=str if each.type is str else parse,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{meaning} ({each.default})",
        )
    options = vars(parser.parse_args(arguments))
    try:
        recipe = Recipe.quick(**options) if options.pop("quick") else Recipe(**options)
        print(announce(recipe), flush=True)
        _, metrics = run(recipe)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{metrics['data']}: {recipe.split} accuracy {metrics[f'{recipe.split}_accuracy']:.2f} %")


def parse(text: str) -> object:
    """Return the value of an argument: a number, None, a list such as 16,24,32, or else the text
    itself.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
