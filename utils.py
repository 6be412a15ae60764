"""Training, testing, the log of a run, and metrics; the plots of plots.py are here, too."""

import contextlib
import copy
import math
import os
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from dataset import CIFAR10, corrupt, load_dataset, normalise
from device import autocast, hardware, versions
from loader import make_loader
from plots import (  # noqa: F401
    plot_accuracy,
    plot_augmentations,
    plot_confusion,
    plot_corrupted_images,
    plot_corruptions,
    plot_kernels,
    plot_loss,
    plot_mirror,
    plot_misclassified,
    plot_receptive_field,
    plot_reliability,
    plot_schedule,
)
from pretrained import inner_network, write_file
from recipe import Recipe

# ---------------------------------------------------------------- training


def train(
    model: nn.Module,
    loader: Iterable,
    recipe: Recipe,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    scaler: torch.amp.GradScaler | None = None,
    teacher: nn.Module | None = None,
) -> tuple[float, float]:
    """Train one epoch, counted from 0; return its mean cross entropy and its accuracy in percent.

    Args:
        loader: batches of uint8 (N, 32, 32, 3) images and (N,) labels, as of `make_loader`.
        recipe: the size of the images in this epoch, the corruption, and the distillation.
        scheduler: stepped after each batch.
        scaler: of the gradients of fp16, see `make_scaler`.
        teacher: a trained network in evaluation mode. It sees the images clean, at full size.

    Raises:
        RuntimeError: the memory of the GPU is too small for the batch.
    """
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    size = [recipe.image_size(epoch)] * 2
    losses, correct, counts = [], [], []
    model.train()
    for images, labels in loader:
        # bytes go to the device, which normalises them: a quarter of the traffic
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        images = normalise(images)
        with _full_memory_explained(device, len(labels)):
            # progressive resizing: the network sees smaller images in early epochs
            seen = resize(corrupt(images, recipe.corruption, recipe.corruption_types), size)
            with autocast(device):
                logits = model(seen)
            loss = objective = F.cross_entropy(logits.float(), labels)
            if teacher is not None:
                with torch.no_grad(), autocast(device):
                    targets = teacher(images).float()
                distillation = distillation_loss(
                    logits.float(), targets, recipe.distillation_temperature
                )
                weight = recipe.distillation_weight
                objective = (1 - weight) * loss + weight * distillation
            optimizer.zero_grad()
            scaler.scale(objective).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
        scaler.update()
        # the scaler skips a step whose gradients overflow and lowers its scale
        if scheduler and scaler.get_scale() >= scale:
            scheduler.step()
        # tensors, not numbers: each number would wait for the GPU
        losses.append(loss.detach())
        correct.append((logits.argmax(1) == labels).sum())
        counts.append(len(labels))
    # weighted by the sizes of the batches: the last one may be smaller
    counts = torch.tensor(counts)
    losses, correct = (torch.stack(values).cpu().double() for values in (losses, correct))
    mean_loss, accuracy = (losses * counts).sum() / counts.sum(), correct.sum() / counts.sum()
    return mean_loss.item(), 100 * accuracy.item()


@contextlib.contextmanager
def _full_memory_explained(device, batch_size):
    """Turn a GPU's error of full memory into one line that names a smaller batch size."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the memory of {hardware(device)} is too small for batch_size {batch_size}: "
            f"try {max(2, batch_size // 2)}"
        ) from error


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence KL(teacher || student) times temperature squared.

    Both (N, classes) logits are divided by the temperature first. The factor keeps the gradients of
    the same size whatever the temperature is. Hinton et al., Distilling the knowledge in a neural
    network, https://arxiv.org/abs/1503.02531.
    """
    ours, theirs = (F.log_softmax(values / temperature, 1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Log:
    """The log of a run: a context manager that shows a table and a progress bar.

    Each epoch is a row of the table and of a CSV file, which can be read while the run goes on. Its
    state is part of a `Checkpoint`. On entry the epochs that are done are shown again, and the file
    is cut back to them.

    Args:
        path: of the CSV file.
        recipe: the `Recipe` of the run.

    Attributes:
        history: a list for each column, an entry for each epoch: train_loss, train_accuracy (in
            percent), the same of the test images (or of the validation images, if the recipe holds
            out some), seconds.
    """

    row = "{:5d}  {:10.4f}  {:11.2f}  {:10.4f}  {:11.2f}  {:7.1f}"

    def __init__(self, path: str | Path, recipe: Recipe):
        self.path, self.recipe, split = Path(path), recipe, recipe.split
        names = f"train_loss train_accuracy {split}_loss {split}_accuracy seconds"
        self.history = {name: [] for name in names.split()}

    def state_dict(self) -> dict[str, list[float]]:
        """Return the history, for a checkpoint."""
        return self.history

    def load_state_dict(self, history: dict[str, list[float]]) -> None:
        """Take the history of a checkpoint."""
        self.history = history

    def epochs_done(self) -> int:
        """Return the number of epochs that are finished."""
        return len(self.history["seconds"])

    def remaining_epochs(self) -> range:
        """Return the epochs to come, counted from 0."""
        return range(self.epochs_done(), self.recipe.epochs)

    def __enter__(self) -> "Log":
        split = self.recipe.split[:5]
        print(f"epoch  train loss  train acc %  {split:>5} loss  {split:>5} acc %  seconds")
        rows = list(zip(*self.history.values(), strict=True))
        for epoch, row in enumerate(rows, 1):
            print(self.row.format(epoch, *row))
        lines = [["epoch", *self.history], *([epoch, *row] for epoch, row in enumerate(rows, 1))]
        self._write(lambda: write_file(self.path, "".join(map(_csv_line, lines)).encode()))
        pixels = [self.recipe.image_size(epoch) ** 2 for epoch in range(self.recipe.epochs)]
        self.bar = tqdm(
            total=sum(pixels),
            initial=sum(pixels[: self.epochs_done()]),
            leave=False,
            smoothing=0,
            bar_format="{percentage:3.0f} % |{bar}| {elapsed}, {remaining} to go",
            disable=bool(os.environ.get("TQDM_DISABLE")),
        )
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()

    def progress(self, loader: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return the batches of the next epoch, while the bar moves on by the pixels of images."""
        pixels = self.recipe.image_size(self.epochs_done()) ** 2
        for batch in loader:
            yield batch
            self.bar.update(pixels / len(loader))

    def add(self, *row: float) -> None:
        """Add an epoch: its row has the columns of `history`.

        Raises:
            FloatingPointError: a loss is no longer finite. The last checkpoint is of the epoch
                before.
        """
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(
                f"epoch {self.epochs_done() + 1}: the training loss is {row[0]} and the "
                f"{self.recipe.split} loss {row[2]}: try a max_lr below {self.recipe.max_lr}"
            )
        for column, value in zip(self.history.values(), row, strict=True):
            column.append(value)
        self.bar.clear()
        print(self.row.format(self.epochs_done(), *row), flush=True)
        self.bar.refresh()
        self._write(lambda: self._append(_csv_line([self.epochs_done(), *row])))

    def _append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)

    def _write(self, write):
        try:
            write()
        except OSError as error:  # the history is in the checkpoint, too
            print(f"{self.path} could not be written ({error.strerror}): training goes on")


def _csv_line(values):
    return ",".join(map(str, values)) + "\n"


# ---------------------------------------------------------------- testing


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (N, classes) logits and the (N,) labels of a whole loader, on the CPU.

    The model is left in evaluation mode. It runs without mixed precision; on a GPU, PyTorch's
    default lets convolutions round their inputs to TF32.
    """
    device = next(model.parameters()).device
    model.eval()
    batches = []
    for images, labels in loader:
        batches.append((model(normalise(images.to(device))).cpu(), labels))
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


def test(model: nn.Module, loader: Iterable) -> tuple[float, float]:
    """Return the mean cross entropy and the accuracy in percent on a loader."""
    return loss_and_accuracy(*predict(model, loader))


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return mean cross entropy and accuracy in percent of (N, classes) logits and (N,) labels."""
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return F.cross_entropy(logits, labels).item(), 100 * accuracy


# ---------------------------------------------------------------- metrics


def run_metrics(
    model: nn.Module, recipe: Recipe, history: dict[str, list[float]], data: str
) -> dict:
    """Return what is known of a finished run, for `pretrained.save`.

    `data` is the title of the data set. `macs` are of one image, `seconds` of all epochs with
    evaluation. The losses and accuracies (in percent) are those of the last epoch, `history` has
    all, and `recipe` the settings that affect the result.
    """
    last = {column: values[-1] for column, values in history.items() if column != "seconds"}
    model = inner_network(model)
    return {
        "network": type(model).__name__,
        "data": data,
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        **last,
        "seconds": sum(history["seconds"]),
        "hardware": hardware(next(model.parameters()).device),
        "date": date.today().isoformat(),
        "versions": versions(),
        "recipe": recipe.to_json(),
        "history": history,
    }


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


def count_macs(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> int:
    """Return the multiply-accumulates of convolutions and linear layers for an image of a shape."""
    model = copy.deepcopy(model).eval()  # the modes of its layers stay as they are
    image = torch.zeros(1, *shape, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2  # an addition and a multiplication each


def sample_mistakes(model: nn.Module) -> list[int]:
    """Return the numbers of the sample's test images that the network gets wrong.

    They are a fingerprint of its weights.
    """
    logits, labels = predict(model, make_loader(load_dataset("test", "sample"), 500))
    return (logits.argmax(1) != labels).nonzero().flatten().tolist()


def accuracy_by_class(dataset: CIFAR10, logits: torch.Tensor) -> dict[str, float]:
    """Return the accuracy in percent of (N, classes) logits for each class, by its name."""
    classes, labels = dataset.classes, torch.tensor(dataset.targets)
    accuracies = 100 * multiclass_accuracy(logits, labels, len(classes), average="none")
    return dict(zip(classes, accuracies.tolist(), strict=True))


def calibration_error(dataset: CIFAR10, logits: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error of (N, classes) logits in percent.

    It is the mean distance of confidence and accuracy, over bins of confidence. Guo et al., On
    calibration of modern neural networks, https://arxiv.org/abs/1706.04599.
    """
    labels, classes = torch.tensor(dataset.targets), logits.shape[1]
    return 100 * multiclass_calibration_error(logits.softmax(1), labels, classes, bins).item()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the temperature at which (N, classes) logits fit the (N,) labels best.

    It minimises cross entropy. The images should be ones that the network was neither trained nor
    is tested on. Guo et al., temperature scaling, https://arxiv.org/abs/1706.04599.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().item()
