"""Training and testing, metrics, and the plots."""

import copy
import io
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)
from torchvision.transforms.v2.functional import gaussian_blur, resize

from checker.layout import convolution_units
from checker.operations import (
    count_macs,
    count_parameters,
    gradients_of_the_middle,
    receptive_field,
    trace,
    whole_pixels,
)
from checker.tables import markdown_table
from checkpoint import write_file
from checks import positive, require
from dataset import CIFAR10, A, load_dataset, make_loader, mean_and_std, normalise
from device import autocast, hardware, versions
from recipe import Recipe, make_scheduler

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"  # Okabe and Ito: safe for all eyes
BLUE, ORANGE = COLOURS[:2]
CORRUPTIONS = {  # of test images, at five severities; JPEG and more brightness are not in training, see `corrupt`
    "noise": [
        A.GaussNoise((strength, strength), p=1) for strength in (0.02, 0.04, 0.06, 0.08, 0.1)
    ],
    "blur": [A.GaussianBlur(0, (sigma, sigma), p=1) for sigma in (0.4, 0.6, 0.8, 1, 1.2)],
    "JPEG": [
        A.ImageCompression("jpeg", (quality, quality), p=1) for quality in (80, 65, 50, 35, 20)
    ],
    "brightness": [
        A.RandomBrightnessContrast((more, more), 0, p=1) for more in (0.1, 0.2, 0.3, 0.4, 0.5)
    ],
    "darkness": [
        A.MultiplicativeNoise((factor, factor), p=1) for factor in (0.8, 0.65, 0.5, 0.35, 0.2)
    ],
}
PUBLISHED = {  # epochs and test accuracy in percent, as the published answers state them
    "PublishedDilated": ("fewer than 175", "more than 85"),
    "PublishedDepthwise": ("120", "85.24"),
}


# ---------------------------------------------------------------- training and testing


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
    """Train one epoch, counted from 0, and return its mean cross entropy and its accuracy in
    percent.

    Args:
        loader: batches of uint8 (N, 32, 32, 3) images and (N,) labels, as of `make_loader`.
        recipe: the size of the images in this epoch, and the distillation.
        scheduler: stepped after each batch.
        scaler: of the gradients of fp16, see `make_scaler`.
        teacher: a trained network in evaluation mode. It sees the images at full size.

    Raises:
        RuntimeError: the memory of the GPU is too small for the batch.
    """
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    model.train()
    losses, correct, counts = [], [], []
    for images, labels in loader:
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        try:
            loss, objective, logits = _forward(
                model, normalise(images), labels, recipe, epoch, teacher
            )
            optimizer.zero_grad()
            scaler.scale(objective).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"the memory of {hardware(device)} is too small for batch_size {len(labels)}: "
                f"try {max(2, len(labels) // 2)}"
            ) from error
        scaler.update()
        if (
            scheduler and scaler.get_scale() >= scale
        ):  # the scaler skips a step whose gradients overflow
            scheduler.step()
        losses.append(loss.detach())
        correct.append((logits.argmax(1) == labels).sum())
        counts.append(len(labels))
    counts = torch.tensor(counts)
    losses, correct = (torch.stack(values).cpu().double() for values in (losses, correct))
    return ((losses * counts).sum() / counts.sum()).item(), (
        100 * correct.sum() / counts.sum()
    ).item()


def _forward(model, images, labels, recipe, epoch, teacher):
    """Return the cross entropy, the objective (with a teacher, a mix with the distillation loss)
    and the logits.
    """
    device = images.device
    seen = resize(corrupt(images, recipe.corruption), [recipe.image_size(epoch)] * 2)
    with autocast(device):
        logits = model(seen)
    loss = F.cross_entropy(logits.float(), labels)
    if teacher is None:
        return loss, loss, logits
    with torch.no_grad(), autocast(device):
        teacher_logits = teacher(images).float()
    distillation = distillation_loss(
        logits.float(), teacher_logits, recipe.distillation_temperature
    )
    weight = recipe.distillation_weight
    return loss, (1 - weight) * loss + weight * distillation, logits


def corrupt(images: torch.Tensor, probability: float) -> torch.Tensor:
    """Return normalised (N, 3, H, W) images. Each gets noise, blur or low contrast, one of them,
    with `probability`.

    Each of them has a random strength from 0 to 1. Gaussian noise has a standard deviation of 0.1
    times the strength squared, as a share of the range of pixels, so it is mostly weak. Blur is
    between the image (strength 0) and its Gaussian blur of 1.2 pixels (1). Low contrast is a mix of
    the image with one random grey from black to white, at most 80 % of it. Values are not clipped.
    The strongest noise and blur, and the strongest mix with black, are those of severity 5 in
    `CORRUPTIONS`.
    """
    if not probability:
        return images
    shape = len(images), 1, 1, 1
    draw, strength, brightness = torch.rand(3, *shape, device=images.device)
    kind = torch.randint(3, shape, device=images.device)
    mean, std = (each.view(3, 1, 1) for each in mean_and_std(images.device))
    noise = images + 0.1 * strength**2 / std * torch.randn_like(images)
    blur = torch.lerp(images, gaussian_blur(images, 9, 1.2), strength)
    low_contrast = torch.lerp(images, (brightness - mean) / std, 0.8 * strength)
    for number, corrupted in enumerate((noise, blur, low_contrast)):
        images = torch.where((draw < probability) & (kind == number), corrupted, images)
    return images


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence KL(teacher || student), times the temperature
    squared.

    Both (N, classes) logits are divided by the temperature first. The factor keeps the gradients of
    the same size whatever the temperature is. Hinton et al., Distilling the knowledge in a neural
    network, https://arxiv.org/abs/1503.02531.
    """
    ours, theirs = (F.log_softmax(values / temperature, 1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (N, classes) logits and the (N,) labels of a whole loader, on the CPU, without
    mixed precision.

    The model is left in evaluation mode. On a GPU, PyTorch's default lets convolutions round their
    inputs to TF32.
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
    """Return the mean cross entropy and the accuracy in percent of (N, classes) logits, given the
    (N,) labels.
    """
    return F.cross_entropy(logits, labels).item(), 100 * (
        logits.argmax(1) == labels
    ).double().mean().item()


# ---------------------------------------------------------------- metrics


def run_metrics(
    model: nn.Module, recipe: Recipe, history: dict[str, list[float]], data: str
) -> dict:
    """Return what is known of a finished run, for `checkpoint.save`. `data` is the title of the
    data set.

    `macs` are of one image, `seconds` of all epochs with evaluation. The losses and accuracies (in
    percent) are those of the last epoch, `history` has all, and `recipe` the settings that affect
    the result.
    """
    last = {column: values[-1] for column, values in history.items() if column != "seconds"}
    return {
        "network": type(model).__name__,
        "data": data,
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "receptive_field": receptive_field(model),
        **last,
        "seconds": sum(history["seconds"]),
        "hardware": hardware(next(model.parameters()).device),
        "date": date.today().isoformat(),
        "versions": versions(),
        "recipe": recipe.to_json(),
        "history": history,
    }


def sample_mistakes(model: nn.Module) -> list[int]:
    """Return which test images of the sample the network gets wrong, by their numbers: a
    fingerprint of its weights.
    """
    logits, labels = predict(model, make_loader(load_dataset("test", "sample"), 500))
    return (logits.argmax(1) != labels).nonzero().flatten().tolist()


def accuracy_by_class(dataset: CIFAR10, logits: torch.Tensor) -> dict[str, float]:
    """Return the accuracy in percent of (N, classes) logits on the images of each class, by its
    name.
    """
    classes = dataset.classes
    accuracies = 100 * multiclass_accuracy(
        logits, torch.tensor(dataset.targets), len(classes), average="none"
    )
    return dict(zip(classes, accuracies.tolist(), strict=True))


def calibration_error(dataset: CIFAR10, logits: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error of (N, classes) logits in percent.

    It is the mean distance of confidence and accuracy, over bins of confidence. Guo et al., On
    calibration of modern neural networks, https://arxiv.org/abs/1706.04599.
    """
    labels = torch.tensor(dataset.targets)
    return (
        100 * multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], bins).item()
    )


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the temperature at which (N, classes) logits fit the (N,) labels best, by cross
    entropy.

    The images should be ones that the network was neither trained nor is tested on. Guo et al.,
    temperature scaling, https://arxiv.org/abs/1706.04599.
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


def accuracy_under_corruptions(
    model: nn.Module, dataset: CIFAR10, images: int = 2000
) -> dict[str, list[float]]:
    """Return six accuracies in percent by kind of corruption: on clean images, and corrupted at
    five severities.

    They are those of the first images of the data set, `images` of them at most.

    After Hendrycks and Dietterich, Benchmarking neural network robustness,
    https://arxiv.org/abs/1903.12261.
    """
    first = copy.copy(dataset)
    first.data, first.targets = dataset.data[:images], dataset.targets[:images]
    loader = make_loader(first, min(500, len(first)))
    clean = test(model, loader)[1]
    accuracies = {name: [clean] for name in CORRUPTIONS}
    for name, transforms in CORRUPTIONS.items():
        for transform in transforms:
            first.transform = A.Compose([transform])
            accuracies[name].append(test(model, loader)[1])
    return accuracies


def mean_accuracy_under_corruptions(
    accuracies: dict[str, list[float]], kinds: Iterable[str] = tuple(CORRUPTIONS)
) -> float:
    """Return the mean over the severities of these kinds of corruption, without the clean images,
    in percent.

    `accuracies` is the result of `accuracy_under_corruptions`.
    """
    return np.mean([accuracies[kind][1:] for kind in kinds]).item()


def comparison_table(all_metrics: list[dict]) -> str:
    """Return the metrics of several networks as a Markdown table, the published accuracies beside
    ours.
    """
    head = (
        "network",
        "parameters:",
        "receptive field:",
        "epochs:",
        "test accuracy %:",
        "published accuracy %:",
    )
    return markdown_table(
        head,
        [
            (
                metrics["network"],
                f"{metrics['parameters']:,}",
                str(metrics["receptive_field"]),
                str(metrics["recipe"]["epochs"]),
                f"{metrics['test_accuracy']:.2f}",
                PUBLISHED.get(metrics["network"], ("", ""))[1],
            )
            for metrics in all_metrics
        ],
    )


# ---------------------------------------------------------------- plots


def plot_augmentations(
    dataset: CIFAR10, path: str | Path, rows: int = 5, columns: int = 10
) -> plt.Figure:
    """Draw training images (first row), and augmented versions of each below it; save to `path`,
    return the figure.
    """
    figure, axes = plt.subplots(
        rows, columns, figsize=(10, 1.05 * rows + 0.6), layout="constrained", squeeze=False
    )
    for line, index in zip(
        axes.T, np.linspace(0, len(dataset) - 1, columns, dtype=int).tolist(), strict=True
    ):
        augmented = dataset.__getitems__([index] * (rows - 1))
        label = augmented[0][1]
        for axis, image in zip(
            line, [dataset.data[index], *(image for image, _ in augmented)], strict=True
        ):
            show_image(axis, image)
        line[0].set_title(dataset.classes[label], fontsize=10)
    figure.suptitle(f"{dataset.title}: training images, and {rows - 1} augmented versions of each")
    return finish_figure(figure, path)


def plot_schedule(recipe: Recipe, path: str | Path, steps_per_epoch: int = 100) -> plt.Figure:
    """Draw the learning rate and the size of the training images over the epochs; save to `path`,
    return the figure.
    """
    optimizer = torch.optim.SGD([torch.zeros(())], recipe.max_lr, momentum=0.9)
    scheduler, rates = make_scheduler(optimizer, recipe, steps_per_epoch), []
    for _ in range(recipe.epochs * steps_per_epoch):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 4), layout="constrained", sharex=True)
    upper.plot(np.arange(len(rates)) / steps_per_epoch, rates, color=BLUE)
    upper.set(ylabel="learning rate", title="The schedule of the training")
    sizes = [recipe.image_size(epoch) for epoch in range(recipe.epochs)]
    lower.step(range(recipe.epochs + 1), [*sizes, sizes[-1]], where="post", color=ORANGE)
    lower.set(
        xlabel="epoch",
        ylabel="image size, pixels",
        ylim=(0, max(sizes) + 4),
        yticks=sorted({0, *sizes}),
    )
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    return finish_figure(figure, path)


def plot_loss(
    history: dict[str, list[float]], path: str | Path, recipe: Recipe, data: str = "CIFAR-10"
) -> plt.Figure:
    """Draw the training and test loss over the epochs; save to `path`, return the figure."""
    return _plot_curves(history, "loss", "cross entropy", path, recipe, data)


def plot_accuracy(
    history: dict[str, list[float]], path: str | Path, recipe: Recipe, data: str = "CIFAR-10"
) -> plt.Figure:
    """Draw the training and test accuracy over the epochs; save to `path`, return the figure."""
    return _plot_curves(history, "accuracy", "accuracy, %", path, recipe, data)


def _plot_curves(history, name, unit, path, recipe, data):
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    changes = " (augmented, some corrupted)" if recipe.corruption else " (augmented)"
    for column, colour, style in zip(
        [column for column in history if column.endswith(name)],
        (BLUE, ORANGE),
        ("--", "-"),
        strict=True,
    ):
        split, values = column.removesuffix(f"_{name}"), history[column]
        axis.plot(
            range(1, len(values) + 1),
            values,
            style,
            color=colour,
            marker="o",
            markersize=3,
            label=f"{split}{changes if split == 'train' else ''}: {values[-1]:#.4g} at the end",
        )
    for epoch in range(recipe.epochs):
        if epoch == 0 or recipe.image_size(epoch) != recipe.image_size(epoch - 1):
            axis.axvline(epoch + 0.5, color="grey", linestyle=":", linewidth=1)
            axis.text(
                epoch + 0.7,
                0.02,
                f"{recipe.image_size(epoch)} pixels",
                color="grey",
                fontsize=8,
                transform=axis.get_xaxis_transform(),
            )
    axis.set(xlabel="epoch", ylabel=unit, title=f"{name.capitalize()} on {data}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if name == "loss":
        axis.set_yscale("log")
        axis.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter="{x:g}",
            minor_locator=NullLocator(),
        )
    axis.grid(alpha=0.3)
    axis.legend()
    return finish_figure(figure, path)


def plot_misclassified(
    dataset: CIFAR10,
    logits: torch.Tensor,
    path: str | Path,
    rows: int = 3,
    columns: int = 8,
    most_confident: bool = False,
) -> plt.Figure:
    """Draw test images that the (N, classes) logits get wrong: the first ones, or the most
    confidently wrong ones.

    Above each are the predicted class and its probability, below it the true class. Save to `path`,
    return the figure.
    """
    labels = torch.tensor(dataset.targets)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    if most_confident:
        wrong = wrong[confidence[wrong].argsort(descending=True)]
    figure, axes = plt.subplots(
        rows, columns, figsize=(10, 1.6 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong.tolist(), strict=False):
        show_image(axis, dataset.data[index])
        axis.set_title(
            f"{dataset.classes[predicted[index]]} {confidence[index]:.1%}",
            fontsize=9,
            color=ORANGE,
            pad=3,
        )
        axis.text(
            0.5,
            -0.04,
            f"is {dataset.classes[labels[index]]}",
            fontsize=9,
            color=BLUE,
            ha="center",
            va="top",
            transform=axis.transAxes,
        )
    shown = min(len(wrong), rows * columns)
    which = f"the {shown} most confident" if most_confident else f"the first {shown}"
    figure.suptitle(
        f"{dataset.title}: {len(wrong):,} of {len(labels):,} test images are misclassified; "
        f"{which} of them"
    )
    return finish_figure(figure, path)


def plot_confusion(dataset: CIFAR10, logits: torch.Tensor, path: str | Path) -> plt.Figure:
    """Draw the confusion matrix of (N, classes) logits, a row a true class; save to `path`, return
    the figure.
    """
    labels, classes = torch.tensor(dataset.targets), len(dataset.classes)
    shares = 100 * multiclass_confusion_matrix(logits, labels, classes, normalize="true").numpy()
    figure, axis = plt.subplots(figsize=(8, 6.6), layout="constrained")
    axis.imshow(
        np.where(np.eye(classes, dtype=bool), np.nan, shares), cmap="Oranges", vmin=0, vmax=20
    )
    for row, column in np.ndindex(shares.shape):
        axis.text(
            column,
            row,
            f"{shares[row, column]:.1f}",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold" if row == column else "normal",
        )
    axis.set_xticks(range(classes), dataset.classes, rotation=45, ha="right")
    axis.set_yticks(range(classes), dataset.classes)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{dataset.title}: confusion matrix, % of each true class",
    )
    return finish_figure(figure, path)


def plot_reliability(
    dataset: CIFAR10,
    logits: torch.Tensor,
    path: str | Path,
    temperature: float = 1.0,
    bins: int = 15,
) -> plt.Figure:
    """Draw the reliability diagram of (N, classes) logits: accuracy against confidence, in bins of
    equal width.

    The logits are drawn as they are and, if that is not 1, divided by the temperature, each with
    its calibration error. Save to `path`, return the figure.
    """
    require("temperature", temperature, "a number above 0", positive(temperature))
    figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
    axis.plot([0, 100], [0, 100], color="grey", linestyle="--", label="perfect calibration")
    for divisor, colour, marker in zip(
        dict.fromkeys((1.0, temperature)), COLOURS, "os", strict=False
    ):
        confidence, predicted = (logits / divisor).softmax(1).max(1)
        confidence, right = (
            confidence.double().numpy(),
            (predicted == torch.tensor(dataset.targets)).numpy(),
        )
        places = np.minimum((confidence * bins).astype(int), bins - 1)
        accuracy, mean = (
            [100 * values[places == place].mean() for place in np.unique(places)]
            for values in (right, confidence)
        )
        error = calibration_error(dataset, logits / divisor, bins)
        axis.plot(
            mean,
            accuracy,
            color=colour,
            marker=marker,
            linewidth=1,
            label=f"temperature {divisor:.3g}: ECE {error:.1f} %",
        )
    axis.set(
        xlabel="confidence, %",
        ylabel="accuracy of the images in a bin, %",
        xlim=(0, 100),
        ylim=(0, 103),
        title=f"{dataset.title}: reliability diagram",
    )
    axis.legend(loc="upper left")
    return finish_figure(figure, path)


def plot_corruptions(
    accuracies: dict[str, list[float]], path: str | Path, data: str = "CIFAR-10"
) -> plt.Figure:
    """Draw the result of `accuracy_under_corruptions` over the severity; save to `path`, return the
    figure.
    """
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (name, values), colour, marker in zip(accuracies.items(), COLOURS, "osD^v", strict=True):
        axis.plot(range(len(values)), values, color=colour, marker=marker, markersize=5, label=name)
    axis.set(
        xlabel="severity of the corruption",
        ylabel="accuracy, %",
        xticks=range(len(values)),
        title=f"Accuracy on corrupted {data}",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    return finish_figure(figure, path)


def plot_corrupted_images(dataset: CIFAR10, path: str | Path) -> plt.Figure:
    """Draw an image of the data set for each kind in `CORRUPTIONS`, clean and corrupted; save to
    `path`, return it.
    """
    figure, axes = plt.subplots(len(CORRUPTIONS), 6, figsize=(8, 6.8), layout="constrained")
    for line, image, (name, transforms) in zip(
        axes, dataset.data, CORRUPTIONS.items(), strict=False
    ):
        corrupted = [
            A.Compose([transform], seed=0)(image=image)["image"] for transform in transforms
        ]
        for severity, (axis, each) in enumerate(zip(line, [image, *corrupted], strict=True)):
            show_image(axis, each)
            axis.set_title(f"{name} {severity}" if severity else "clean", fontsize=10)
    figure.suptitle(f"{dataset.title}: test images and their corruptions of severity 1 to 5")
    return finish_figure(figure, path)


def plot_receptive_field(
    model: nn.Module, dataset: CIFAR10, path: str | Path, mosaics: int = 4
) -> plt.Figure:
    """Draw the effective receptive field after each convolution of a `Network`, the theoretical one
    as a square.

    It is how much each pixel weighs in one position of the map: the size of the gradient, summed
    over mosaics of 4x4 images of the data set, and drawn as its square root. Luo et al.,
    Understanding the effective receptive field, https://arxiv.org/abs/1701.04128. Save to `path`,
    return the figure.
    """
    operations = trace(model)
    images = normalise(dataset.data[: 16 * mosaics]).reshape(mosaics, 4, 4, 3, 32, 32)
    images = images.permute(0, 3, 1, 4, 2, 5).reshape(mosaics, 3, 128, 128)
    units = convolution_units(operations)
    figure, axes = plt.subplots(2, -(-len(units) // 2), figsize=(10, 4.4), layout="constrained")
    half = 0.6 * units[-1][-1].receptive_field
    weights = gradients_of_the_middle(
        model, images, [operations.index(unit[-1]) + 1 for unit in units]
    )
    for number, (axis, unit, weight) in enumerate(zip(axes.flat, units, weights, strict=False)):
        axis.imshow((weight / weight.max()).sqrt().numpy(), cmap="viridis")
        field = unit[-1].receptive_field
        row, column = (
            (index.min() + index.max()) / 2 for index in map(torch.flatten, weight.nonzero().T)
        )
        axis.add_patch(
            plt.Rectangle(
                (column - field / 2, row - field / 2), field, field, fill=False, color=ORANGE
            )
        )
        axis.set(xlim=(column - half, column + half), ylim=(row + half, row - half))
        axis.set_title(
            f"C{number // 3 + 1}, {number % 3 + 1}: {whole_pixels(field)} pixels", fontsize=10
        )
        axis.axis("off")
    figure.suptitle(
        "Effective receptive field after each convolution, the theoretical one as a square"
    )
    return finish_figure(figure, path)


def plot_mirror(
    model: nn.Module, kernel: torch.Tensor, dataset: CIFAR10, path: str | Path
) -> plt.Figure:
    """Draw a (k, k) kernel and the first image of a data set, their mirror images, and the logits
    of three images.

    Batch norm uses the statistics of the batch, so the model need not be trained. The batch has the
    mirror image of each image, so both channels of a pair have the same statistics. Save to `path`,
    return the figure.
    """
    images, kernel = dataset.data[:8], kernel.detach().cpu().numpy()
    batch = normalise(np.concatenate([images, images[:, :, ::-1]])).to(
        next(model.parameters()).device
    )
    with torch.no_grad():
        logits = copy.deepcopy(model).train()(batch).cpu()
    image = images[0]
    bars = {
        "the image": logits[0],
        "its mirror image": logits[len(images)],
        "another image": logits[1],
    }
    figure, axes = plt.subplots(
        1, 5, figsize=(11, 2.6), width_ratios=(2, 2, 2, 2, 4), layout="constrained"
    )
    parts = [
        ("a kernel", kernel),
        ("its mirror image", kernel[:, ::-1]),
        ("an image", image),
        ("its mirror image", image[:, ::-1]),
    ]
    for axis, (title, part) in zip(axes, parts, strict=False):
        axis.imshow(
            part, cmap="RdBu", vmin=-abs(kernel).max(), vmax=abs(kernel).max()
        )  # colours of the kernel
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    for (name, row), colour, shift in zip(bars.items(), COLOURS, (-0.27, 0, 0.27), strict=False):
        axes[4].bar(np.arange(len(row)) + shift, row.numpy(), 0.27, color=colour, label=name)
    axes[4].set_xticks(range(len(dataset.classes)), dataset.classes, rotation=90, fontsize=8)
    axes[4].set_title("logits", fontsize=10)
    axes[4].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"A kernel and an image of {dataset.title}, their mirror images, and the logits of both images"
    )
    return finish_figure(figure, path)


def plot_kernels(layers: dict[str, nn.Module], path: str | Path) -> plt.Figure:
    """Draw which positions of its input one output position of each depthwise layer, by title,
    works on.

    Save to `path`, return the figure.
    """
    figure, axes = plt.subplots(
        1, len(layers), figsize=(3 * len(layers), 3.2), layout="constrained", squeeze=False
    )
    for axis, (title, layer) in zip(axes.flat, layers.items(), strict=True):
        x = torch.zeros(1, layer.in_channels, 9, 9, requires_grad=True)
        with torch.enable_grad():
            copy.deepcopy(layer).cpu()(x)[0, :, 4, 4].sum().backward()
        axis.imshow(x.grad[0].abs().sum(0).ne(0).numpy(), cmap="Blues", vmax=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(np.arange(8) + 0.5, [])
        axis.set_yticks(np.arange(8) + 0.5, [])
        axis.grid(color="lightgrey")
        axis.tick_params(length=0)
    return finish_figure(figure, path)


def show_image(axis: plt.Axes, image: np.ndarray) -> None:
    """Draw a uint8 (H, W, 3) image without ticks."""
    axis.imshow(image)
    axis.axis("off")


def finish_figure(figure: plt.Figure, path: str | Path) -> plt.Figure:
    """Save the figure and return it closed, so that a notebook shows it once, its titles as the
    alternative text.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    png = buffer.getvalue()
    alt = ", ".join(
        filter(None, [figure.get_suptitle(), *(axis.get_title() for axis in figure.axes[:12])])
    )
    figure._repr_mimebundle_ = lambda include=None, exclude=None: (
        {"image/png": png},
        {"image/png": {"alt": alt}},
    )
    try:
        write_file(path, png)
    except OSError as error:
        print(
            f"{path} could not be written ({error.strerror}): the figure is only shown; make room or choose another "
            "folder to keep it"
        )
    plt.close(figure)
    return figure
