"""The run of the notebook as a command: `python train.py --quick --seed 1 --folder runs/seed-1`."""

import argparse
import ast
import copy
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import utils
from checkpoint import Checkpoint
from checks import require
from dataset import A, load_dataset, train_transform
from device import hardware, keep_freed_memory, make_scaler, pick_device, to_device
from loader import make_loader, refuse_while_importing
from model import NetDilated
from pretrained import add_metrics, inner_network, load, save
from published import NETWORKS, find_network
from recipe import Recipe, make_optimizer, make_scheduler, seed_everything


def run(
    recipe: Recipe,
    build: Callable[[], nn.Module] | None = None,
    transform: A.Compose | None = None,
    restart: bool = False,
) -> tuple[nn.Module, dict]:
    """Train a network, save it in the folder of the recipe, and return both.

    A run whose checkpoint is there goes on, or is loaded if it was finished. With a
    `validation_size`, the metrics have the temperature that fits the validation images best.

    Args:
        recipe: every setting of the run.
        build: makes another network than the recipe's, as its class does. `load(build, folder)`
            gets it back.
        transform: augments the training images in place of `train_transform(recipe.augmentation)`.
            The metrics tell which one it was.
        restart: see `Checkpoint`.

    Returns:
        the network, and its metrics.

    Raises:
        ValueError, RuntimeError, FloatingPointError: see `fit` and `load_dataset`.
        FileNotFoundError: there is no teacher.
    """
    refuse_while_importing()
    keep_freed_memory()
    device = pick_device(recipe.device)
    seed_everything(recipe.seed)  # the weights are drawn from here
    augment = transform or train_transform(recipe.augmentation)
    train_set = load_dataset("train", recipe.data, recipe.validation_size, augment, recipe.seed)
    test_set = load_dataset(recipe.split, recipe.data, recipe.validation_size)
    train_loader = make_loader(train_set, recipe.batch_size, True, recipe.num_workers, recipe.seed)
    test_loader = make_loader(test_set, min(500, len(test_set)))
    model = to_device((build or NETWORKS[recipe.network])(), device)
    teacher = recipe.teacher and load_teacher(recipe, train_set.targets)
    history = fit(model, recipe, train_loader, test_loader, teacher, restart)
    metrics = utils.run_metrics(model, recipe, history, test_set.title)
    if transform:
        metrics["transform"] = str(transform).splitlines()
    metrics = save(model, metrics, recipe.folder)
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
    restart: bool = False,
) -> dict[str, list[float]]:
    """Train the model as the loop of the notebook does, and return the history: see `utils.Log`.

    With a `wise_ft_alpha`, the model begins with the teacher's weights. Those at the end of each
    epoch are averaged. The mean, interpolated with the teacher's, is evaluated after each epoch and
    left in the model at the end.

    Raises:
        ValueError: the checkpoint in the folder is damaged or of another run, the loader's order
            can't be restored, the run has fewer than three steps, or the teacher, whose weights
            shall be fine-tuned, is another network.
        RuntimeError: another process trains in this folder, or the GPU's memory is too small, or a
            worker imports a script that trains.
        FloatingPointError: the loss is no longer finite.
    """
    refuse_while_importing()
    device = next(model.parameters()).device
    teacher = teacher and to_device(teacher, device)
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(device)
    scheduler = make_scheduler(optimizer, recipe, len(train_loader))
    network = inner_network(model)  # the one that is saved
    fine_tuning = recipe.wise_ft_alpha is not None
    if fine_tuning:
        init_from_teacher(network, teacher)
        averaged = AveragedModel(network, use_buffers=True)

    def evaluated():
        if not fine_tuning:
            return model
        return interpolate_weights(teacher, averaged.module, recipe.wise_ft_alpha)

    path = Path(recipe.folder, f"{type(network).__name__}.ckpt")
    log = utils.Log(path.with_suffix(".csv"), recipe)
    parts = {
        "model": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "log": log,
    }
    if fine_tuning:
        parts["averaged"] = averaged
    print(
        f"on {hardware(device)}, data: {train_loader.dataset.title}, epochs: {recipe.epochs}, "
        f"written to {recipe.folder}/"
    )
    checkpoint = Checkpoint(path, recipe, train_loader, parts, teacher, restart)
    seed_everything(recipe.seed, train_loader)  # whatever was drawn since the weights
    with checkpoint, log:
        for epoch in log.remaining_epochs():
            start = time.perf_counter()
            train_metrics = utils.train(
                model,
                log.progress(train_loader),
                recipe,
                epoch,
                optimizer,
                scheduler,
                scaler,
                teacher,
            )
            if fine_tuning:
                averaged.update_parameters(network)
            test_metrics = utils.test(evaluated(), test_loader)
            log.add(*train_metrics, *test_metrics, time.perf_counter() - start)
            checkpoint.save()
    if fine_tuning:
        network.load_state_dict(evaluated().state_dict())
    return log.history


# ---------------------------------------------------------------- fine-tuning


def init_from_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Give the model the teacher's weights. A ValueError says that it is another network."""
    name, known = type(model).__name__, type(teacher).__name__
    require("network", name, f"{known}, the teacher's, whose weights are fine-tuned", name == known)
    model.load_state_dict(teacher.state_dict())


def interpolate_weights(start: nn.Module, end: nn.Module, alpha: float) -> nn.Module:
    """Return a network between two: alpha 0 is the start, 1 the end. So are running statistics.

    A network that was fine-tuned on corrupted images is then more accurate on clean ones, and
    nearly as robust. Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT),
    https://arxiv.org/abs/2109.01903.
    """
    result = copy.deepcopy(start)
    values = (each.state_dict().values() for each in (result, start, end))
    for value, first, last in zip(*values, strict=True):
        value.copy_(first + alpha * (last - first))
    return result


# ---------------------------------------------------------------- the teacher


def load_teacher(recipe: Recipe, labels: list[int]) -> nn.Module:
    """Return the NetDilated saved in the folder `recipe.teacher`, in evaluation mode.

    `labels` are those of the student's training images. A folder that is not where the program was
    started is looked for in the repository.

    Raises:
        ValueError: it was trained on other data, or perhaps on images that the student holds out;
            or see `load`.
        FileNotFoundError: there is no teacher.
    """
    folder = Path(recipe.teacher)
    if not folder.exists():
        folder = Path(__file__).resolve().parent / folder
    try:
        teacher, metrics = load(NetDilated, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"teacher is {recipe.teacher!r}, which lacks NetDilated.pt or NetDilated.json: choose "
            "None, or train one (benchmarks/reproduce.md has the command)"
        ) from error
    data, held_out = metrics["recipe"]["data"], metrics["recipe"]["validation_size"]
    choose = f"teacher is {recipe.teacher!r}: choose None, or the folder of one"
    if data != recipe.data:
        raise ValueError(f"{choose} trained on {recipe.data}, not on {data}")
    if held_out < recipe.validation_size:
        raise ValueError(
            f"{choose} that held out {recipe.validation_size} training images, as the student "
            f"does, not {held_out}"
        )
    seen = labels[: len(labels) + recipe.validation_size - held_out]
    if recipe.validation_size and metrics.get("labels_sha256") != labels_sha256(seen):
        raise ValueError(
            f"{choose} whose training images had the order that they have here: this one may have "
            "seen those that are held out (benchmarks/reproduce.md has the command that trains a "
            "teacher)"
        )
    return teacher


def labels_sha256(labels: list[int]) -> str:
    """Return the SHA-256 of the labels, 0 to 255, which tells in which order the images were."""
    return hashlib.sha256(bytes(labels)).hexdigest()


# ---------------------------------------------------------------- the time that a run takes


def estimate(
    recipe: Recipe,
    images: int,
    device: torch.device,
    build: Callable[[], nn.Module] | None = None,
) -> float:
    """Return about how many seconds the training steps of a run take on this device.

    Two steps are timed at each image size, of untrained networks, and no evaluation. `images` is
    the size of the training set. The random generators of the CPU and of CUDA stay as they were.
    """
    count, seconds = min(recipe.batch_size, images), 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = to_device((build or NETWORKS[recipe.network])(), device)
        teacher = to_device(NetDilated(), device).eval() if recipe.teacher else None
        optimizer = make_optimizer(model, recipe)
        batch = (
            torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8),
            torch.randint(10, (count,)),
        )
        batches = [batch] * 2
        sizes = [recipe.image_size(epoch) for epoch in range(recipe.epochs)]
        for size in set(sizes):
            epoch = sizes.index(size)
            step = partial(utils.train, model, batches, recipe, epoch, optimizer, teacher=teacher)
            step()  # warms up
            start = time.perf_counter()
            step()
            seconds += (time.perf_counter() - start) / 2 * images / count * sizes.count(size)
    return seconds


def announce(recipe: Recipe, build: Callable[[], nn.Module] | None = None) -> str:
    """Return in one line how long a run takes here.

    Raises:
        ValueError, RuntimeError: the batch is larger than the training set, or the device is not
            here; or see `load_dataset`.
    """
    keep_freed_memory()
    device = pick_device(recipe.device)
    train_set = load_dataset("train", recipe.data, recipe.validation_size)
    make_loader(train_set, recipe.batch_size)  # which refuses a batch that is too large
    seconds = estimate(recipe, len(train_set), device, build)
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    hint = "; Recipe.quick() takes minutes (--quick)" if seconds > 3600 else ""
    return (
        f"a whole run of {epochs}: about {duration(seconds)} of training steps on "
        f"{hardware(device)}{hint}"
    )


def duration(seconds: float) -> str:
    """Return a time in the units that a person would use, such as "3 h 10 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe that the arguments name: every field of `Recipe` is one."""
    options = vars(_parser().parse_args(arguments))
    try:
        build = None
        if ":" in options.get("network", ""):
            build = find_network(options.pop("network"))
        recipe = options.pop("recipe")(**options)
        print(announce(recipe, build), flush=True)
        _, metrics = run(recipe, build)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    accuracy = metrics[f"{recipe.split}_accuracy"]
    print(f"{metrics['data']}: {recipe.split} accuracy {accuracy:.2f} %, in {recipe.folder}/")


def _parser():
    """Return the parser of the command line, in which every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(recipe=Recipe)
    for name, meaning in (
        ("quick", "two epochs, more than 85 %%"),
        ("medium", "30 epochs without a teacher, more than 94 %%"),
        ("robust", "fine-tunes the committed weights on corrupted images"),
    ):
        parser.add_argument(
            f"--{name}",
            dest="recipe",
            action="store_const",
            const=getattr(Recipe, name),
            help=f"begin with Recipe.{name}(): {meaning}",
        )
    for each in fields(Recipe):
        default = each.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        text = f"{each.metadata['meaning']} (default {default}; {each.metadata['allowed']})"
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=str
            if each.type is str
            else partial(parse, several=isinstance(each.default, tuple)),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text.replace("%", "%%"),
        )
    return parser


def parse(text: str, several: bool = False) -> object:
    """Return the value of an argument: a number, None, a list such as 16,24,32, or the text itself.

    With `several`, it is a list, of numbers or of words: a single one is a list of one.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(text.split(",")) if several else text
    return (value,) if several and not isinstance(value, (tuple, list)) else value


if __name__ == "__main__":
    main()
