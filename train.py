"""The run of the notebook as a command: `python train.py --quick --seed 1 --folder weights/seed-1`."""
import argparse
import ast
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import utils
from checkpoint import Checkpoint, add_metrics, load_teacher, save
from dataset import load_dataset, make_loader, title_of, train_transform
from device import hardware, make_scaler, pick_device
from model import build_network
from recipe import Recipe, make_ema, make_optimizer, make_scheduler, seed_everything


def run(recipe: Recipe, build: Callable[[], nn.Module] | None = None) -> tuple[nn.Module, dict]:
    """Train a network from scratch, save it with its metrics in the folder of the recipe, and return both.

    A run that was interrupted goes on, and a finished one is loaded. `build` makes another network than the recipe's.
    With a `validation_size`, the metrics have the temperature that fits the validation images best.
    """
    device, split = pick_device(), "validation" if recipe.validation_size else "test"
    seed_everything(recipe.seed)
    train_set = load_dataset("train", recipe.data, recipe.validation_size, train_transform(recipe.augmentation),
                             recipe.seed)
    test_set = load_dataset(split, recipe.data, recipe.validation_size)
    train_loader = make_loader(train_set, recipe.batch_size, True, recipe.num_workers, recipe.seed)
    test_loader = make_loader(test_set, min(500, len(test_set)))
    model = (build() if build else build_network(recipe.network)).to(device, memory_format=torch.channels_last)
    teacher = recipe.teacher and load_teacher(recipe.teacher, recipe.data)
    history = fit(model, recipe, train_loader, test_loader, teacher)
    metrics = save(model, utils.run_metrics(model, recipe, history, title_of(test_set)), recipe.folder)
    measured = {f"{split}_accuracy_tta": utils.loss_and_accuracy(*utils.predict(model, test_loader, tta=True))[1]}
    if recipe.validation_size:
        measured["temperature"] = utils.fit_temperature(*utils.predict(model, test_loader))
    return model, add_metrics(metrics, recipe.folder, **measured)


def fit(model: nn.Module, recipe: Recipe, train_loader: DataLoader, test_loader: DataLoader,
        teacher: nn.Module | None = None) -> dict[str, list[float]]:
    """Train the model as the loop of the notebook does, and return the history: see `Checkpoint`.

    Raises:
        ValueError: the checkpoint in the folder is damaged or of another run.
        RuntimeError: another process trains in this folder, or the GPU's memory is too small.
        FloatingPointError: the loss is no longer finite.
    """
    device = next(model.parameters()).device
    teacher = teacher and teacher.to(device, memory_format=torch.channels_last)
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(device)
    scheduler = make_scheduler(optimizer, recipe, len(train_loader))
    ema = make_ema(model, recipe, len(train_loader))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema}
    print(f"{recipe.epochs} epochs on {hardware(device)}, data: {title_of(train_loader.dataset)}")
    with Checkpoint(Path(recipe.folder, f"{type(model).__name__}.ckpt"), recipe, train_loader, teacher, parts) as run:
        for epoch in run.remaining_epochs():
            start = time.perf_counter()
            train_metrics = utils.train(model, train_loader, recipe, epoch, optimizer, scheduler, scaler, ema, teacher)
            test_metrics = utils.test(utils.averaged(model, ema), test_loader)
            run.log(*train_metrics, *test_metrics, time.perf_counter() - start)
            run.save()
    model.load_state_dict(utils.averaged(model, ema).state_dict())
    return run.history


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe that the arguments name: every field of `Recipe` is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="begin with Recipe.quick(), which passes 85 %%")
    for each in fields(Recipe):
        meaning = each.metadata["meaning"].replace("%", "%%")
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=parse, default=argparse.SUPPRESS,
                            metavar="VALUE", help=f"{meaning} ({each.default})")
    options = vars(parser.parse_args(arguments))
    try:
        _, metrics = run(Recipe.quick(**options) if options.pop("quick") else Recipe(**options))
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    split = "validation" if metrics["recipe"]["validation_size"] else "test"
    print(f"{metrics['data']}: {split} accuracy {metrics[f'{split}_accuracy']:.2f} %")


def parse(text: str) -> object:
    """Return the value of an argument: a number, None, a list such as 16,24,32, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
