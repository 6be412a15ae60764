"""What shows the network in a notebook: diagrams, drawn from the model itself, and its source."""

import ast
import copy
import inspect
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch, Rectangle

from dataset import CIFAR10, normalise
from model import MirrorSeparableConv2d, NetDilated
from plots import COLOURS, finish_figure, show_image

KINDS = {
    "standard convolution": COLOURS[0],
    "separable convolution": COLOURS[2],
    "separable, dilated": COLOURS[3],
}


def plot_network(model: NetDilated, path: str | Path) -> plt.Figure:
    """Draw the feature maps of the network from left to right, a box for each convolution.

    Save the figure to `path` and return it, as the functions of `plots` do.
    The height of a box is the side of its map, its width grows with the channels. Above it are the
    kernel, stride and dilation, below it channels and side. "+" marks a residual connection.
    """
    figure, axis = plt.subplots(figsize=(10, 3.8), layout="constrained")
    left, spans = 0.0, {}
    for block, layer, (channels, side) in _feature_maps(model):
        width = 15 + channels / 18
        kind, text = _describe(layer) if layer else ("", block)
        colour = KINDS.get(kind, "lightgrey")
        axis.add_patch(Rectangle((left, -side / 2), width, side, color=colour, alpha=0.75))
        middle, style = left + width / 2, {"ha": "center", "fontsize": 9}
        axis.text(middle, 36, text, va="bottom", **style)
        axis.text(middle, -36, f"{channels}\n{side}x{side}", va="top", **style)
        if layer:
            start, _ = spans.get(block, (left, left))
            spans[block] = start, left + width
        left += width + 6
    for block, span in spans.items():
        axis.plot(span, (56, 56), color="black", linewidth=1)
        axis.text(sum(span) / 2, 58, block, fontsize=11, weight="bold", ha="center")
    head = f"mean of\npositions\nand pairs,\nlinear:\n{model.O[-1].out_features} logits"
    axis.text(left, 0, head, va="center", fontsize=10)
    axis.set(xlim=(-2, left + 34), ylim=(-56, 82))
    axis.axis("off")
    handles = [Patch(color=colour, alpha=0.75, label=kind) for kind, colour in KINDS.items()]
    axis.legend(handles=handles, loc="upper left", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"{type(model).__name__}: kernels above, channels and sides of the maps below")
    return finish_figure(figure, path)


def _feature_maps(model):
    """Yield the name, the layer and (channels, side) of each feature map, the input's first."""
    x = torch.zeros(1, 3, 32, 32)
    yield "input", None, x.shape[1:3]
    x = model.upsample(x)
    yield "up-\nsampled", None, x.shape[1:3]
    for name in ("C1", "C2", "C3", "C4"):
        for layer in copy.deepcopy(getattr(model, name)).cpu().eval():
            with torch.no_grad():
                x = layer(x)
            yield name, layer, x.shape[1:3]


def _describe(layer):
    """Return the kind of a `ConvNormAct`, and its kernel, stride and dilation in short."""
    kind, conv = "standard convolution", layer.conv
    if isinstance(conv, MirrorSeparableConv2d):
        kind, conv = "separable convolution", conv.depthwise
    side = conv.weight.shape[-1]
    text = f"{side}x{side}{' +' if layer.residual else ''}"
    if conv.stride > 1:
        text += f"\nstride {conv.stride}"
    if getattr(conv, "dilation", 1) > 1:
        kind, text = "separable, dilated", text + f"\ndilation {conv.dilation}"
    return kind, text


def plot_mirrored_pair(model: NetDilated, dataset: CIFAR10, path: str | Path) -> plt.Figure:
    """Draw how the second convolution makes a mirrored pair of maps from another: A, B, A', B'.

    The maps are of the first image of the data set. Of all pairs, one with large weights is shown.
    Save the figure to `path` and return it.
    """
    model = copy.deepcopy(model).cpu().eval()
    lift, conv = model.C1[0], model.C1[1].conv
    with torch.no_grad():
        maps = lift(model.upsample(normalise(dataset.data[:1])))[0]
        half = len(maps) // 2
        first, second = conv.weight[:, :half], conv.weight[:, half:]  # all A, all B
        sizes = first.abs().amax((2, 3)).minimum(second.abs().amax((2, 3)))
        out, pair = divmod(sizes.argmax().item(), half)
        a, b = first[out, pair], second[out, pair]
        x = torch.stack([maps[pair], maps[pair + half]])[None]
        kernel = torch.stack([torch.stack([a, b]), torch.stack([b.flip(1), a.flip(1)])])
        y = torch.nn.functional.conv2d(x, kernel, padding=1)[0]
    figure, axes = plt.subplots(
        2, 5, figsize=(9, 3.9), width_ratios=(2, 1, 1, 2, 2), layout="constrained"
    )
    show_image(axes[0, 0], dataset.data[0])
    axes[0, 0].set_title("an image", fontsize=10)
    axes[1, 0].axis("off")
    largest = max(a.abs().max(), b.abs().max()).item()
    names = ("A", "B"), ("B'", "A'")
    for row in range(2):
        for column in range(2):
            axis = axes[row, 1 + column]
            values = kernel[row, column].numpy()
            axis.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest)
            axis.set_title(names[row][column], fontsize=10)
        left, right = names[row]
        results = (
            (x[0, row], f"x{row + 1}, a channel of the pair"),
            (y[row], f"y{row + 1} = {left} * x1 + {right} * x2"),
        )
        for axis, (values, title) in zip(axes[row, 3:], results, strict=True):
            axis.imshow(values.numpy(), cmap="viridis")
            axis.set_title(title, fontsize=10)
        for axis in axes[row]:
            axis.axis("off")
    figure.suptitle(
        "A mirrored pair of kernels: two kernels, their mirror images, two feature maps"
    )
    return finish_figure(figure, path)


def source_of(*objects: object) -> str:
    """Return the source code of functions and classes in Markdown, without their docstrings."""
    texts = []
    for each in objects:
        lines = inspect.getsource(each).splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                docstring = node.body[0]
                last = docstring.end_lineno
                if lines[last] == "":
                    last += 1  # and the empty line after it
                lines[docstring.lineno - 1 : last] = [None] * (last - docstring.lineno + 1)
        texts.append("\n".join(line for line in lines if line is not None))
    return "```python\n" + "\n\n\n".join(texts) + "\n```"
