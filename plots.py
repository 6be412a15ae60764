"""The figures of data and results. Each function saves its figure to `path` and returns it."""

import copy
import io
from collections.abc import Collection
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from torch import nn
from torch.utils.data import Subset
from torchmetrics.functional.classification import multiclass_confusion_matrix

from checks import positive, require
from dataset import CIFAR10, normalise
from loader import make_loader
from pretrained import advice, write_file
from recipe import Recipe, make_scheduler

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"  # Okabe and Ito: colour-blind safe
BLUE, ORANGE = COLOURS[:2]
TARGET = 85  # percent of test accuracy that the assignment asks for


# ---------------------------------------------------------------- data


def plot_augmentations(
    dataset: CIFAR10, path: str | Path, rows: int = 5, columns: int = 10
) -> plt.Figure:
    """Draw training images (first row), and augmented versions of each below it."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(10, 1.05 * rows + 0.6), layout="constrained", squeeze=False
    )
    indices = np.linspace(0, len(dataset) - 1, columns, dtype=int).tolist()
    for column, index in zip(axes.T, indices, strict=True):
        # one batch of the same image, since a loader decides the augmentations by its indices
        ((augmented, _),) = make_loader(Subset(dataset, [index] * (rows - 1)), rows - 1)
        for axis, image in zip(column, [dataset.data[index], *augmented.numpy()], strict=True):
            show_image(axis, image)
        column[0].set_title(dataset.classes[dataset.targets[index]], fontsize=10)
    figure.suptitle(f"{dataset.title}: training images, and {rows - 1} augmented versions of each")
    return finish_figure(figure, path)


def plot_corrupted_images(
    versions: dict[str, np.ndarray], severity: int, path: str | Path, data: str = "CIFAR-10"
) -> plt.Figure:
    """Draw an image and what corruptions of a severity make of it: uint8 (H, W, 3), by name."""
    rows = -(-len(versions) // 8)
    figure, axes = plt.subplots(
        rows, 8, figsize=(10, 1.5 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, version) in zip(axes.flat, versions.items(), strict=False):
        show_image(axis, version)
        axis.set_title(name.replace("_", " "), fontsize=9)
    figure.suptitle(f"{data}: a test image and its corruptions of severity {severity}")
    return finish_figure(figure, path)


# ---------------------------------------------------------------- training


def plot_schedule(recipe: Recipe, path: str | Path, steps_per_epoch: int = 100) -> plt.Figure:
    """Draw the learning rate and the size of the training images over the epochs."""
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
    ticks, top = sorted({0, *sizes}), max(sizes) + 4
    lower.set(xlabel="epoch", ylabel="image size, pixels", ylim=(0, top), yticks=ticks)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    return finish_figure(figure, path)


def plot_loss(
    history: dict[str, list[float]], path: str | Path, recipe: Recipe, data: str = "CIFAR-10"
) -> plt.Figure:
    """Draw the training and test loss over the epochs, on a logarithmic axis."""
    figure, axis = _plot_curves(history, "loss", recipe)
    axis.set(ylabel="cross entropy", title=f"Loss on {data}", yscale="log")
    axis.yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)),
        major_formatter="{x:g}",
        minor_locator=NullLocator(),
    )
    axis.legend()
    return finish_figure(figure, path)


def plot_accuracy(
    history: dict[str, list[float]], path: str | Path, recipe: Recipe, data: str = "CIFAR-10"
) -> plt.Figure:
    """Draw the training and test accuracy over the epochs, and a line at the assignment's 85 %.

    The axis of a run of ten epochs or more begins at 60 %, below which it is only for a moment.
    """
    figure, axis = _plot_curves(history, "accuracy", recipe)
    axis.axhline(TARGET, color=COLOURS[2], linewidth=1, label=f"asked for: {TARGET} %")
    axis.set(ylabel="accuracy, %", title=f"Accuracy on {data}")
    if recipe.epochs >= 10 and max(axis.lines[0].get_ydata()) > 60:
        axis.set_ylim(60, 100)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.07))  # above the sizes of the images
    return finish_figure(figure, path)


def _plot_curves(history, name, recipe):
    """Draw the two columns of a history with that name, and where the size of the images grows."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    changes = " (augmented, some corrupted)" if recipe.corruption else " (augmented)"
    columns = [column for column in history if column.endswith(name)]
    for column, colour, style in zip(columns, (BLUE, ORANGE), ("--", "-"), strict=True):
        split, values = column.removesuffix(f"_{name}"), history[column]
        label = f"{split}{changes if split == 'train' else ''}: {values[-1]:#.4g} at the end"
        epochs = range(1, len(values) + 1)
        axis.plot(epochs, values, style, color=colour, marker="o", markersize=3, label=label)
    for epoch in range(recipe.epochs):
        size = recipe.image_size(epoch)
        if epoch == 0 or size != recipe.image_size(epoch - 1):
            axis.axvline(epoch + 0.5, color="grey", linestyle=":", linewidth=1)
            place = epoch + 0.7, 0.02
            transform = axis.get_xaxis_transform()
            axis.text(*place, f"{size} pixels", color="grey", fontsize=9, transform=transform)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    return figure, axis


# ---------------------------------------------------------------- results


def plot_misclassified(
    dataset: CIFAR10,
    logits: torch.Tensor,
    path: str | Path,
    rows: int = 3,
    columns: int = 8,
    most_confident: bool = False,
) -> plt.Figure:
    """Draw test images that the (N, classes) logits get wrong.

    They are the first ones, or the most confidently wrong ones. Above each are the predicted class
    and its probability, below it the true class.
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
        name = dataset.classes[predicted[index]]
        axis.set_title(f"{name} {confidence[index]:.1%}", fontsize=9, color=ORANGE, pad=3)
        text, style = f"is {dataset.classes[labels[index]]}", {"ha": "center", "va": "top"}
        axis.text(0.5, -0.04, text, fontsize=9, color=BLUE, transform=axis.transAxes, **style)
    shown = min(len(wrong), rows * columns)
    which = f"the {shown} most confident" if most_confident else f"the first {shown}"
    figure.suptitle(
        f"{dataset.title}: {len(wrong):,} of {len(labels):,} test images are misclassified; "
        f"{which} of them"
    )
    return finish_figure(figure, path)


def plot_confusion(dataset: CIFAR10, logits: torch.Tensor, path: str | Path) -> plt.Figure:
    """Draw the confusion matrix of (N, classes) logits, a row a true class."""
    labels, classes = torch.tensor(dataset.targets), len(dataset.classes)
    matrix = multiclass_confusion_matrix(logits, labels, classes, normalize="true")
    shares = 100 * matrix.numpy()
    figure, axis = plt.subplots(figsize=(8, 6.6), layout="constrained")
    # the diagonal stays white: it would outshine the mistakes
    mistakes = np.where(np.eye(classes, dtype=bool), np.nan, shares)
    axis.imshow(mistakes, cmap="Oranges", vmin=0, vmax=20)
    for row, column in np.ndindex(shares.shape):
        text, weight = f"{shares[row, column]:.1f}", "bold" if row == column else "normal"
        axis.text(column, row, text, ha="center", va="center", fontsize=9, fontweight=weight)
    axis.set_xticks(range(classes), dataset.classes, rotation=45, ha="right")
    axis.set_yticks(range(classes), dataset.classes)
    title = f"{dataset.title}: confusion matrix, % of each true class"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return finish_figure(figure, path)


def plot_reliability(
    dataset: CIFAR10,
    logits: torch.Tensor,
    path: str | Path,
    temperature: float = 1.0,
    bins: int = 15,
) -> plt.Figure:
    """Draw the reliability diagram of (N, classes) logits: accuracy against confidence, in bins.

    The bins have equal width, and the area of a marker is the bin's number of images. The logits
    are drawn as they are and, if that is not 1, divided by the temperature, each with its expected
    calibration error (`utils.calibration_error`).
    """
    require("temperature", temperature, "a number above 0", positive(temperature))
    figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
    axis.plot([0, 100], [0, 100], color="grey", linestyle="--", label="perfect calibration")
    for divisor, colour, marker in zip(
        dict.fromkeys((1.0, temperature)), COLOURS, "os", strict=False
    ):
        confidence, predicted = (logits / divisor).softmax(1).max(1)
        right = (predicted == torch.tensor(dataset.targets)).numpy()
        confidence = confidence.double().numpy()
        places = np.minimum((confidence * bins).astype(int), bins - 1)
        filled, counts = np.unique(places, return_counts=True)
        accuracy, mean = (
            np.array([100 * values[places == place].mean() for place in filled])
            for values in (right, confidence)
        )
        error = np.average(abs(accuracy - mean), weights=counts)
        label = f"temperature {divisor:.3g}: ECE {error:.1f} %"
        area = np.maximum(300 * counts / len(places), 12)
        axis.scatter(mean, accuracy, area, colour, marker=marker, alpha=0.7, label=label)
    axis.set(
        xlabel="confidence, %",
        ylabel="accuracy of the images in a bin, %",
        xlim=(0, 103),
        ylim=(0, 103),
        title=f"{dataset.title}: reliability diagram",
    )
    for handle in axis.legend(loc="upper left", title="area: images in a bin").legend_handles[1:]:
        handle.set_sizes([40])
    return finish_figure(figure, path)


def plot_corruptions(
    accuracies: dict[str, float],
    others: dict[str, dict[str, float]],
    path: str | Path,
    near_training: Collection[str] = (),
    data: str = "CIFAR-10",
) -> plt.Figure:
    """Draw the accuracies in percent by kind of corruption as bars, the best on top.

    The bars of kinds that are near those in training are pale. Other networks, accuracies by kind
    by name, are markers.
    """
    kinds = sorted(accuracies, key=accuracies.get)
    figure, axis = plt.subplots(figsize=(8, 0.25 * len(kinds) + 1.6), layout="constrained")
    for pale in (False, True):
        places = [place for place, kind in enumerate(kinds) if (kind in near_training) == pale]
        values = [accuracies[kinds[place]] for place in places]
        if places:
            label = f"the network, {'near' if pale else 'unlike'} its training"
            axis.barh(places, values, color=BLUE, alpha=0.4 if pale else 1, label=label)
    for (name, values), colour, marker in zip(others.items(), COLOURS[1:], "Do^v", strict=False):
        places = [place for place, kind in enumerate(kinds) if kind in values]
        values = [values[kinds[place]] for place in places]
        axis.plot(values, places, marker, color=colour, markeredgecolor="white", label=name)
    labels = [f"{kind.replace('_', ' ')}  {accuracies[kind]:.1f}" for kind in kinds]
    axis.set_yticks(range(len(kinds)), labels)
    axis.set(xlim=(0, 100), xlabel="accuracy, %, mean over the severities")
    axis.set_title(f"Accuracy on corrupted {data}")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return finish_figure(figure, path)


# ---------------------------------------------------------------- what a network does


def plot_kernels(layers: dict[str, nn.Module], path: str | Path) -> plt.Figure:
    """Draw on which input positions one output position of each depthwise layer works."""
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


def plot_mirror(model: nn.Module, dataset: CIFAR10, path: str | Path) -> plt.Figure:
    """Draw the first image of a data set and its mirror image, and the logits of three images."""
    images = np.stack([dataset.data[0], dataset.data[0][:, ::-1], dataset.data[1]])
    with torch.no_grad():
        logits = model.eval()(normalise(images).to(next(model.parameters()).device)).cpu()
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 2.8), width_ratios=(2, 2, 5), layout="constrained"
    )
    names = "the image", "its mirror image", "another image"
    for axis, image, name in zip(axes, images, names[:2], strict=False):
        show_image(axis, image)
        axis.set_title(name, fontsize=10)
    for name, row, colour, shift in zip(names, logits, COLOURS, (-0.27, 0, 0.27), strict=False):
        axes[2].bar(np.arange(len(row)) + shift, row.numpy(), 0.27, color=colour, label=name)
    axes[2].set_xticks(range(len(dataset.classes)), dataset.classes, rotation=45, ha="right")
    axes[2].set_title("logits", fontsize=10)
    axes[2].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{dataset.title}: an image, its mirror image, and the logits of both")
    return finish_figure(figure, path)


def plot_receptive_field(
    model: nn.Module, sides: list[float], dataset: CIFAR10, path: str | Path, mosaics: int = 4
) -> plt.Figure:
    """Draw the effective receptive field after each convolution of a `Network`.

    It is how much each pixel weighs in one position of the map: the size of the gradient, summed
    over mosaics of 4x4 images of the data set, and drawn as its square root. Luo et al.,
    Understanding the effective receptive field, https://arxiv.org/abs/1701.04128. The theoretical
    one is a square; `sides` are its sides in pixels, as of `checker.layout.receptive_fields`.
    """
    model = copy.deepcopy(model).cpu().eval()  # it gets hooks
    layers = [layer for block in (model.C1, model.C2, model.C3, model.C4) for layer in block]
    places = [f"C{1 + number // 3}, {1 + number % 3}" for number in range(len(layers))]
    images = normalise(dataset.data[: 16 * mosaics]).reshape(mosaics, 4, 4, 3, 32, 32)
    images = images.permute(0, 3, 1, 4, 2, 5).reshape(mosaics, 3, 128, 128)
    weights = _gradients_of_the_middle(model, images, layers)
    figure, axes = plt.subplots(2, -(-len(layers) // 2), figsize=(10, 4.4), layout="constrained")
    half = 0.6 * sides[-1]
    for axis, place, side, weight in zip(axes.flat, places, sides, weights, strict=True):
        axis.imshow((weight / weight.max()).sqrt().numpy(), cmap="viridis")
        rows, columns = weight.nonzero().T
        row, column = ((indices.min() + indices.max()).item() / 2 for indices in (rows, columns))
        corner = column - side / 2, row - side / 2
        axis.add_patch(plt.Rectangle(corner, side, side, fill=False, color=ORANGE))
        axis.set(xlim=(column - half, column + half), ylim=(row + half, row - half))
        axis.set_title(f"{place}: {int(side)} pixels", fontsize=10)
        axis.axis("off")
    figure.suptitle("Effective receptive field after each convolution, theoretical one as a square")
    return finish_figure(figure, path)


def _gradients_of_the_middle(model, images, layers):
    """Return how much each pixel of the images weighs in the middle of what each layer returns.

    The result is (layers, H, W): the magnitudes of the gradient, summed over channels and images.
    """
    maps, totals = [], torch.zeros(len(layers), *images.shape[2:])
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
    for image in images.split(1):
        maps.clear()
        with torch.enable_grad():
            model(image.requires_grad_())
        for total, output in zip(totals, maps, strict=True):
            height, width = output.shape[2:]
            with torch.enable_grad():
                middle = output[..., height // 2, width // 2].sum()
            (gradient,) = torch.autograd.grad(middle, image, retain_graph=True)
            total += gradient.abs().sum((0, 1))
    return totals


# ---------------------------------------------------------------- all figures


def show_image(axis: plt.Axes, image: np.ndarray) -> None:
    """Draw a uint8 (H, W, 3) image without ticks."""
    axis.imshow(image)
    axis.axis("off")


def finish_figure(figure: plt.Figure, path: str | Path) -> plt.Figure:
    """Save a figure and return it closed, so that a notebook shows it once.

    It has 256 colours, a third of the bytes. Its titles are the alternative text.
    """
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, "png", optimize=True)
    png, titles = buffer.getvalue(), [axis.get_title() for axis in figure.axes[:12]]
    alt = ", ".join(filter(None, [figure.get_suptitle(), *titles]))
    bundle = {"image/png": png}, {"image/png": {"alt": alt}}
    figure._repr_mimebundle_ = lambda include=None, exclude=None: bundle
    try:
        write_file(path, png)
    except OSError as error:
        print(
            f"{path} could not be written ({error.strerror}): the figure is only shown; choose "
            f"another folder to keep it{advice(error)}"
        )
    plt.close(figure)
    return figure
