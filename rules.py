"""The assignment's rules, measured on any network by running it, and what they are measured with.

`check_rules` is the table of rules; `trace` lists the operations of a network; `receptive_field`, `count_macs` and
`count_parameters` are single figures.
"""
import contextlib
import copy
import random
from typing import NamedTuple

import albumentations as A
import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from dataset import FILL

PARAMETER_LIMIT, RECEPTIVE_FIELD_LIMIT = 200_000, 44  # the assignment's "fewer than" and "above"
Row = tuple[str, str, bool | None]
VERDICTS = {True: "holds", False: "BROKEN", None: "undecided"}


# ---------------------------------------------------------------- the rules

def check_rules(model: nn.Module, transform: A.Compose | None = None) -> list[Row]:
    """Measure the assignment's rules on any network by running it, and on its training transform if there is one.

    Args:
        model: from (N, 3, 32, 32) images to (N, 10) logits.
        transform: from uint8 (H, W, 3) to uint8 (32, 32, 3).

    Returns:
        rows of (rule, what was measured, verdict). The verdict is None where the layout leaves it undecided.

    Raises:
        ValueError: the network does not run on such an image, or returns something else.
    """
    operations = _trace_any(model)
    pooling = [operation for operation in operations if "pooling" in operation.kind]
    last, early = (pooling[-1], pooling[:-1]) if pooling else (None, [])
    is_global = last is not None and last.kind == "global average pooling"
    body = operations[:operations.index(last)] if is_global else operations
    head = [operation.kind for operation in operations[operations.index(last) + 1:]] if last else []
    early = early if is_global or last is None else pooling
    units = convolution_units(body)
    pairs = sum(len(unit) == 2 for unit in units)
    dilations = [operation for unit in units for operation in unit if operation.dilation > 1 and operation.kernel > 1]
    field, whole = measure_receptive_field(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        *_check_blocks(body, units),
        ("no pooling but the final one", ", ".join(operation.name for operation in early) or "none", not early),
        (f"receptive field above {RECEPTIVE_FIELD_LIMIT}",
         f"{field}" if whole else f"{field} or more" if field else "can't tell: no map before the end",
         field > RECEPTIVE_FIELD_LIMIT if whole or field > RECEPTIVE_FIELD_LIMIT else None),
        ("a depthwise-separable convolution", f"{pairs}", pairs > 0),
        ("a dilated convolution", f"{len(dilations)}", bool(dilations)),
        ("global average pooling at the end", f"{last.kind} of {last.size[0]}x{last.size[0]}" if last else "none",
         is_global),
        ("then at most one fully connected layer", ", ".join(head) or "nothing", head in ([], ["fully connected"])),
        (f"fewer than {PARAMETER_LIMIT:,} parameters", f"{parameters:,}", parameters < PARAMETER_LIMIT),
        *(_check_transform(transform) if transform else []),
    ]


def _trace_any(model: nn.Module) -> list["Operation"]:
    """Return the operations of a network that anybody wrote. A ValueError says that it is none for this task."""
    try:
        with torch.no_grad():
            shape = tuple(copy.deepcopy(model).eval()(torch.zeros(2, 3, 32, 32)).shape)
        operations = trace(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} does not run on (2, 3, 32, 32) images ({reason}): it has to take "
                         "(N, 3, 32, 32) and return (N, 10)") from error
    if shape != (2, 10):
        raise ValueError(f"{type(model).__name__} turns (2, 3, 32, 32) images into {shape}: it has to return (N, 10)")
    return operations


def _check_blocks(body, units):
    """Return the rows about blocks, which are the convolutions that begin at the same resolution.

    The rows are undecided if the resolution changes by other means than strides and pooling, or if other operations
    than convolutions mix channels. The network may begin with upsampling the image.
    """
    upsampled = body and "upsample" in body[0].name and body[0].size[0] < body[0].size[1]
    note = f" on images upsampled to {body[0].size[1]}x{body[0].size[1]}" if upsampled else ""
    strange = [operation.name for operation in body[bool(upsampled):]
               if operation.kind == "resize" or (operation.kind == "fully connected" and operation.size[0] > 1)]
    rules = ("four blocks", "three convolutions in each", "stride 2 in the last of each, only there")
    if strange:
        return [(rule, f"can't tell: {strange[0]} before the end", None) for rule in rules]
    jumps = sorted({unit[0].jump for unit in units})
    blocks = [[max(operation.stride for operation in unit) for unit in units if unit[0].jump == jump] for jump in jumps]
    measured = [f"{len(blocks)}{note}", " ".join(str(len(block)) for block in blocks),
                " | ".join(" ".join(map(str, block)) for block in blocks)]
    holds = [len(blocks) == 4, all(len(block) == 3 for block in blocks),
             all(block[-1] == 2 and set(block[:-1]) <= {1} for block in blocks)]
    return list(zip(rules, measured, holds, strict=True))


def _check_transform(transform):
    """Return the rows of the rules about augmentation, from what the transforms do to plain images."""
    steps = {type(step).__name__: step for step in transform.transforms}
    rows = []
    for name in ("HorizontalFlip", "ShiftScaleRotate"):
        share = _measure_share(steps[name]) if name in steps else 0
        rows.append((name, f"changes {share:.0%} of the images" if name in steps else "missing", share > 0))
    hole, colour = _measure_hole(steps["CoarseDropout"]) if "CoarseDropout" in steps else ("missing", None)
    rows.append(("CoarseDropout: one 16x16 hole", hole, hole == "16x16"))
    text = "missing" if colour is None else " ".join(f"{channel:.0f}" for channel in colour)
    rows.append(("... filled with the mean colour", text, colour is not None and np.allclose(colour, FILL, atol=1)))
    side = "x".join(map(str, transform(image=np.zeros((40, 40, 3), np.uint8))["image"].shape[:2]))
    return [*rows, ("Resize", f"40x40 becomes {side}", "Resize" in steps and side == "32x32")]


def _measure_share(step, draws=1000):
    """Return the share of images that the transform changes, from draws that are the same every time."""
    step = copy.deepcopy(step)
    step.set_random_state(np.random.default_rng(0), random.Random(0))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return float(np.mean([(step(image=image)["image"] != image).any() for _ in range(draws)]))


def _measure_hole(coarse_dropout, draws=50):
    """Return the size of the largest hole, as "16x16", and its colour; "... of another shape" if not one rectangle."""
    coarse_dropout = copy.deepcopy(coarse_dropout)
    coarse_dropout.p = 1
    heights, widths, colours = [], [], []
    for base in np.resize((0, 255), draws):
        image = coarse_dropout(image=np.full((32, 32, 3), base, np.uint8))["image"]
        hole = (image != base).any(2)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        if hole.sum() != rows * columns or not hole.any():
            return "none or of another shape", None
        heights, widths, colours = [*heights, rows], [*widths, columns], [*colours, image[hole]]
    return f"{max(heights)}x{max(widths)}", np.concatenate(colours).mean(0)


def format_rules(rows: list[Row]) -> str:
    """Return the rows of `check_rules` as a text table."""
    lines = [f"{rule:42} {measured:38} {VERDICTS[holds]}" for rule, measured, holds in rows]
    return "\n".join([f"{'rule':42} {'measured':38}", *lines])


def rules_table(rows: list[Row]) -> str:
    """Return the rows of `check_rules` as a Markdown table."""
    return markdown_table(("rule", "measured", "verdict"),
                          [(rule, measured, VERDICTS[holds]) for rule, measured, holds in rows])


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table. Columns whose heads end in a colon are aligned to the right."""
    align = ["---:" if name.endswith(":") else "---" for name in head]
    lines = [[name.rstrip(":") for name in head], align, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------- the operations of a network

def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> int:
    """Return the multiply-accumulates of the convolutions and linear layers for one image of that shape."""
    with FlopCounterMode(display=False) as counter:
        _run_once(model, shape)
    return counter.get_total_flops() // 2


class Operation(NamedTuple):
    """One operation of a network on one image that looks around, mixes channels or changes the size of the map."""

    kind: str  # "convolution", "pooling", "global average pooling", "fully connected", "resize"
    name: str  # PyTorch's own name of it
    channels: tuple  # in, out
    size: tuple  # side of the input, of the output, in pixels
    kernel: int
    stride: int
    dilation: int
    groups: int
    jump: float  # image pixels between neighbouring positions of its input
    receptive_field: float  # side of the square of image pixels that one output position can see
    source: int  # the place in the list of the operation whose result it works on, -1 for the image


def trace(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> list[Operation]:
    """Run the network on one image of that shape and return its `Operation`s in order.

    It sees what is computed, whatever the modules are called, functional calls included.

    The jump is the distance of neighbouring positions in pixels of the image. A stride multiplies it. Every window adds
    (kernel - 1) * dilation * jump to the receptive field; where paths meet, the longest one counts. Upsampling has a
    stride below 1, so its jump is a fraction. Araujo et al., Computing receptive fields of convolutional neural
    networks, https://distill.pub/2019/computing-receptive-fields/.
    """
    with _Tracer() as tracer:
        _run_once(model, shape, tracer)
    return tracer.operations


def receptive_field(model: nn.Module) -> int:
    """Return the theoretical receptive field, in whole pixels, of one position before the global pooling."""
    operations = trace(model)
    return int(max([1] + [operation.receptive_field for operation in operations[:_end_of_map(operations)]]))


def measure_receptive_field(model: nn.Module, sides: tuple[int, ...] = (32, 64, 128, 256, 512)) -> tuple[int, bool]:
    """Measure the receptive field of the middle position before the global pooling, from gradients.

    The images are random, the same every time, and grow until the receptive field lies within them, or until the
    network can't take them. Luo et al., Understanding the effective receptive field, https://arxiv.org/abs/1701.04128.

    Returns:
        (pixels, whole): the side of the square of pixels whose gradient is not zero, and whether it lies within the
        image. If not, it may be larger. It is 0 for a network without an (N, C, H, W) map there.
    """
    end, field, generator = _end_of_map(trace(model)), 0, torch.Generator().manual_seed(0)
    for side in sides:
        try:
            # three images: a ReLU hides a path in one, hardly in three
            images = torch.randn(3, 3, side, side, generator=generator)
            reached = gradient_of_the_middle(model, images, end).ne(0)
        except Exception:  # as a network with a layer of fixed size does on other images
            break
        inside = [index for axis in (0, 1) for index in reached.any(axis).nonzero().flatten().tolist()] or [0]
        field = max(inside) - min(inside) + 1
        if 0 < min(inside) and max(inside) < side - 1:
            return field, True
    return field, False


def gradient_of_the_middle(model: nn.Module, images: torch.Tensor, end: int) -> torch.Tensor:
    """Return how much each pixel of (N, 3, H, W) images weighs in the middle of a feature map.

    The map is the one before operation number `end` of `trace`. The result is (H, W): the magnitudes of the gradient,
    summed over channels and images.
    """
    total = torch.zeros(images.shape[2:])
    for image in images.split(1):
        image = image.requires_grad_()
        with torch.enable_grad(), _Tracer(end) as tracer, contextlib.suppress(_End):
            _run(model, image, tracer)
        height, width = tracer.last.shape[2:]
        (gradient,) = torch.autograd.grad(tracer.last[..., height // 2, width // 2].sum(), image)
        total += gradient.abs().sum((0, 1))
    return total


def _end_of_map(operations):
    """Return the place of the final global pooling, or of whatever follows the last convolution."""
    kinds = [operation.kind for operation in operations]
    ends = [place for place, kind in enumerate(kinds) if kind == "global average pooling"]
    if ends and "convolution" not in kinds[ends[-1]:]:
        return ends[-1]
    return max((place + 1 for place, kind in enumerate(kinds) if kind == "convolution"), default=0)


def _run_once(model, shape, tracer=None):
    """Run the model on one blank image."""
    with torch.no_grad():
        return _run(model, torch.zeros(1, *shape), tracer)


def _run(model, image, tracer=None):
    """Run the model in evaluation mode, as it is trained or not, and leave its state as it was."""
    parameter, modes = next(model.parameters(), image), [(module, module.training) for module in model.modules()]
    image = image.to(parameter.device, parameter.dtype)
    if tracer:
        tracer.paths[image] = _Path(1, 1, image.shape[-1], -1)
    try:
        return model.eval()(image)
    finally:
        for module, training in modes:
            module.training = training


class _Path(NamedTuple):
    """How a tensor came from the image: receptive field and jump of its positions, its side, its last operation."""

    field: int
    jump: int
    side: int
    source: int


class _End(Exception):
    """The tracer has come to the operation at which it was to stop."""


class _Tracer(TorchDispatchMode):
    """Writes down the operations that PyTorch executes on the image and on what comes of it, up to operation `end`."""

    def __init__(self, end=None):
        super().__init__()
        self.operations, self.end, self.last = [], end, None  # the last (N, C, H, W) map
        self.paths = WeakTensorKeyDictionary()  # tensor -> _Path

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf in self.paths]
        if not inputs:  # it works on weights only
            return func(*args, **(kwargs or {}))
        if inputs[0].ndim == 4:
            self.last = inputs[0]  # and what is flattened of it is still the same map, until an operation mixes it
        path, name = max(self.paths[tensor] for tensor in inputs), func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            return result
        side = _side(outputs[0], path)
        window = _window(name, args, outputs, path, side)
        if window:
            if len(self.operations) == self.end:
                raise _End
            kind, kernel, stride, dilation, groups = window
            field = path.field + (kernel - 1) * dilation * path.jump
            channels = inputs[0].shape[1], outputs[0].shape[1]
            self.operations.append(Operation(kind, name, channels, (path.side, side), kernel, stride, dilation, groups,
                                             path.jump, field, path.source))
            path = _Path(field, path.jump * stride, side, len(self.operations) - 1)
        for tensor in outputs:
            self.paths[tensor] = path._replace(side=side)
        if window and outputs[0].ndim != 4:
            self.last = None
        return result


def _side(tensor, path):
    """Return the side of the map that a tensor holds, be it (N, C, H, W), tokens (N, L, C), or flattened (1, C)."""
    if tensor.ndim == 4:
        return tensor.shape[-1]
    return 1 if tensor.ndim == 2 and tensor.shape[0] == 1 else path.side


def _window(name, args, outputs, path, side):
    """Return (kind, kernel, stride, dilation, groups) of an ATen call on data, or None if it is no `Operation`."""
    if name == "convolution":
        data, weight, _, stride, _, dilation, transposed, _, groups = args
        kind = "fully connected" if data.shape[2:] == weight.shape[2:] == (1, 1) else "convolution"
        return "resize" if transposed else kind, max(weight.shape[2:]), max(stride), max(dilation), groups
    if name in ("addmm", "mm", "bmm", "baddbmm"):
        return "fully connected", 1, 1, 1, 1
    if name in ("mean", "sum", "amax", "max") and len(args) > 1 and path.side > 1:
        return _global_pooling(name, args[0], args[1], path.side)
    if "pool" in name and side == 1 < path.side:
        return "pooling" if "max" in name else "global average pooling", path.side, 1, 1, 1
    if "pool" in name and path.side > 1:
        kernel = max(args[1]) if "adaptive" not in name else path.side // side
        stride = max(args[2]) if "adaptive" not in name and len(args) > 2 and args[2] else kernel
        return "pooling", kernel, stride, 1, 1
    if outputs[0].ndim != 4 or side == path.side or name == "constant_pad_nd":
        return None
    if "upsample" in name:  # which is PyTorch's name for all interpolation
        return "resize", 2 if "linear" in name else 4 if "cubic" in name else 1, path.side / side, 1, 1
    return "resize", 1, 1, 1, 1


def _global_pooling(name, data, axes, side):
    """Return the window of a reduction over all positions of a map or of its tokens, or None if it is another one."""
    axes = {axis % data.ndim for axis in ([axes] if isinstance(axes, int) else axes)}
    over_map = data.ndim == 4 and axes == {2, 3}
    over_tokens = data.ndim == 3 and len(axes) == 1 and 0 not in axes and data.shape[axes.pop()] in (side, side * side)
    if not (over_map or over_tokens):
        return None
    return "pooling" if "max" in name else "global average pooling", side, 1, 1, 1


def layers_table(model: nn.Module) -> str:
    """Return the convolutions of a network as a Markdown table: output shape, receptive field and jump, in pixels."""
    rows = []
    for unit in convolution_units(trace(model)):
        last = unit[-1]
        kernels = " + ".join("pointwise" if _role(each) == "pointwise" else f"{each.kernel}x{each.kernel} {_role(each)}"
                             for each in unit)
        strides = "".join(f", {name} {max(values)}" for name, values in (
            ("dilation", [each.dilation for each in unit]), ("stride", [each.stride for each in unit]))
            if max(values) > 1)
        rows.append((str(len(rows) + 1), kernels + strides, f"{last.channels[1]} x {last.size[1]} x {last.size[1]}",
                     f"{last.receptive_field:g}", f"{last.jump * last.stride:g}"))
    return markdown_table(("", "convolution", "output", "receptive field:", "jump:"), rows)


def convolution_units(operations: list[Operation]) -> list[tuple[Operation, ...]]:
    """Return the convolutions, each as a tuple of operations.

    A depthwise convolution and the pointwise one that works on its result, in either order, are one unit.
    """
    units = []
    for operation in operations:
        if operation.kind != "convolution":
            continue
        if units and len(units[-1]) == 1 and {_role(units[-1][0]), _role(operation)} == {"depthwise", "pointwise"} and (
                operation.source >= 0 and operations[operation.source] is units[-1][0]):
            units[-1] = (*units[-1], operation)
        else:
            units.append((operation,))
    return units


def _role(operation):
    if operation.groups > 1 and operation.groups == operation.channels[0]:
        return "depthwise"
    return "pointwise" if (operation.kernel, operation.stride, operation.groups) == (1, 1, 1) else "standard"
