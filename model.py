"""The networks: NetDilated, ours, and the assignment's two published answers; and how to measure them.

Every network takes (N, 3, 32, 32) normalised images and returns (N, num_classes) logits. `C1` to `C4` are its
blocks, so that `C4(C3(C2(C1(enlarge(x)))))` is the feature map, at any input size.
"""
import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary


class Depthwise(nn.Conv2d):
    """A depthwise convolution: one k x k kernel for each channel, (N, C, H, W) to (N, C, H', W').

    On a CPU under bf16 autocast only the plain case (3x3, stride 1, dilation 1, padding 1) has a fast backward pass.
    More padding is therefore added first, which halves its time; a dilated kernel, which works on every other pixel,
    works on each of these smaller images as a plain one; the other cases run in fp32, 4 to 24 times as fast.
    """

    def __init__(self, channels, kernel_size=3, stride=1, dilation=1, padding=None):
        padding = dilation * (kernel_size // 2) if padding is None else padding
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False)
        self.margin = padding - 1 if (kernel_size, stride, dilation) == (3, 1, 1) else -1  # beyond the plain case
        self.plain_apart = (kernel_size, stride) == (3, 1) and padding == dilation

    def forward(self, x):
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or self.margin == 0:
            return super().forward(x)
        if self.margin > 0:
            return F.conv2d(F.pad(x, 4 * [self.margin]), self.weight, padding=1, groups=self.groups)
        step = self.dilation[0]
        if self.plain_apart and x.shape[2] % step == x.shape[3] % step == 0:
            kernels = self.weight.repeat_interleave(step * step, 0)
            return F.pixel_shuffle(F.conv2d(F.pixel_unshuffle(x, step), kernels, padding=1, groups=len(kernels)), step)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU: PyTorch draws a random number for each element there, one after the other, which
    takes a third of PublishedDepthwise's training step. Here one draw of 64 bits decides about four elements, so that
    p is rounded to 1/65536."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        numbers = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        kept = torch.empty_like(x)  # in the memory order of x
        kept.as_strided((x.numel(),), (1,)).copy_(numbers[:x.numel()] >= round(2**16 * self.p) - 2**15)
        return x * kept.div_(1 - self.p)


def conv(channels_in, channels_out, kernel_size=3, stride=1, dilation=1, padding=None, bias=False):
    """Return a standard convolution that keeps the size (divided by the stride) unless `padding` says otherwise."""
    padding = dilation * (kernel_size // 2) if padding is None else padding
    return nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, dilation, bias=bias)


def separable(channels_in, channels_out, stride=1, dilation=1, padding=None):
    """Return a depthwise-separable convolution: a 3x3 depthwise one, then a pointwise (1x1) one.

    Howard et al., MobileNets, https://arxiv.org/abs/1704.04861.
    """
    return nn.Sequential(
        Depthwise(channels_in, 3, stride, dilation, padding), conv(channels_in, channels_out, 1)
    )


def blueprint(channels_in, channels_out, stride=1, dilation=1):
    """Return a depthwise-separable convolution the other way round: pointwise (1x1) first, then 3x3 depthwise.

    Haase and Amthor, Blueprint separable convolutions, https://arxiv.org/abs/2003.13549.
    """
    return nn.Sequential(conv(channels_in, channels_out, 1), Depthwise(channels_out, 3, stride, dilation))


class Unit(nn.Sequential):
    """One convolution (a separable pair counts as one), batch norm and SiLU; the input is added to the output
    where their shapes agree: (N, C, H, W) to (N, channels, H', W')."""

    def __init__(self, convolution, channels):
        super().__init__(convolution, nn.BatchNorm2d(channels), nn.SiLU())

    def forward(self, x):
        y = super().forward(x)
        return x + y if x.shape == y.shape else y


class Network(nn.Module):
    """Blocks C1 to C4 on images that may be enlarged first, then the output: global average pooling and one linear
    layer. (N, 3, H, W) to (N, classes)."""

    def __init__(self, C1, C2, C3, C4, O, enlarge=1):
        super().__init__()
        self.enlarge = nn.Upsample(scale_factor=enlarge, mode="bilinear") if enlarge > 1 else nn.Identity()
        self.C1, self.C2, self.C3, self.C4, self.O = (nn.Sequential(*block) for block in (C1, C2, C3, C4, O))

    def forward(self, x):
        return self.O(self.C4(self.C3(self.C2(self.C1(self.enlarge(x))))))


class NetDilated(Network):
    """Our network: twelve convolutions, the last of each block with stride 2, on images enlarged twofold.

    Four strides leave 2x2 positions of an image of 32x32 pixels, too few for C3 and C4 to work on, and 4x4 of 64x64.
    """

    def __init__(self, num_classes=10):
        super().__init__(
            enlarge=2,
            C1=[                                                        # output, receptive field in pixels of the image
                Unit(conv(3, 16), 16),                                  # 16 x 64 x 64,  3
                Unit(conv(16, 16), 16),                                 # 16 x 64 x 64,  4
                Unit(conv(16, 64, stride=2), 64),                       # 64 x 32 x 32,  5
            ],
            C2=[
                Unit(blueprint(64, 96), 96),                            # 96 x 32 x 32,  7
                Unit(blueprint(96, 96), 96),                            # 96 x 32 x 32,  9
                Unit(blueprint(96, 96, stride=2), 96),                  # 96 x 16 x 16,  11
            ],
            C3=[
                Unit(blueprint(96, 128), 128),                          # 128 x 16 x 16, 15
                Unit(blueprint(128, 128, dilation=2), 128),             # 128 x 16 x 16, 23
                Unit(blueprint(128, 128, stride=2), 128),               # 128 x 8 x 8,   27
            ],
            C4=[
                Unit(blueprint(128, 176), 176),                         # 176 x 8 x 8,   35
                Unit(blueprint(176, 176), 176),                         # 176 x 8 x 8,   43
                Unit(blueprint(176, 176, stride=2), 176),               # 176 x 4 x 4,   51
            ],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(176, num_classes)],
        )


class PublishedDilated(Network):
    """A published answer of 195,508 parameters, weaknesses kept: 1x1 convolutions that leave out three pixels of
    four, zeros around 1x1 convolutions, logits behind ReLU, batch norm and dropout, only three strided blocks."""

    def __init__(self, num_classes=10):
        def unit(convolution, channels):
            return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(channels), nn.Dropout2d(0.05))

        def transition(channels_in, channels_out):
            return nn.Sequential(conv(channels_in, channels_out, 1, stride=2, bias=True), nn.ReLU())

        def padded_separable(channels_in, channels_out):
            return nn.Sequential(Depthwise(channels_in), conv(channels_in, channels_out, 1, padding=1))

        super().__init__(
            C1=[                                                        # output, receptive field
                unit(conv(3, 64), 64),                                  # 64 x 32 x 32,  3
                unit(conv(64, 128), 128),                               # 128 x 32 x 32, 5
                transition(128, 64),                                    # 64 x 16 x 16,  5
            ],
            C2=[
                unit(conv(64, 64), 64),                                 # 64 x 16 x 16,  9
                unit(padded_separable(64, 64), 64),                     # 64 x 18 x 18,  13
                transition(64, 32),                                     # 32 x 9 x 9,    13
            ],
            C3=[
                unit(conv(32, 64, dilation=2, padding=1), 64),          # 64 x 7 x 7,    29
                unit(conv(64, 64), 64),                                 # 64 x 7 x 7,    37
                transition(64, 32),                                     # 32 x 4 x 4,    37
            ],
            C4=[
                unit(conv(32, 32), 32),                                 # 32 x 4 x 4,    53
                unit(padded_separable(32, num_classes), num_classes),   # 10 x 6 x 6,    69
            ],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        )


class PublishedDepthwise(Network):
    """A published answer of 198,776 parameters, weaknesses kept: padding 2 everywhere, so that much of each map is
    border, and no activation behind the strided convolutions. (Its log-softmax is part of our loss.)"""

    def __init__(self, num_classes=10):
        def unit(convolution, channels):
            return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(channels), Dropout(0.01))

        def down(channels_in, channels_out):
            convolution = conv(channels_in, channels_out, stride=2, dilation=2, padding=2)
            return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), Dropout(0.01))

        super().__init__(
            C1=[                                                        # output, receptive field
                unit(conv(3, 128, padding=2), 128),                     # 128 x 34 x 34, 3
                unit(separable(128, 64, padding=2), 64),                # 64 x 36 x 36,  5
                down(64, 32),                                           # 32 x 18 x 18,  9
            ],
            C2=[
                unit(separable(32, 256, padding=2), 256),               # 256 x 20 x 20, 13
                unit(separable(256, 70, padding=2), 70),                # 70 x 22 x 22,  17
                down(70, 32),                                           # 32 x 11 x 11,  25
            ],
            C3=[
                unit(separable(32, 128, padding=2), 128),               # 128 x 13 x 13, 33
                unit(separable(128, 128, padding=2), 128),              # 128 x 15 x 15, 41
                down(128, 32),                                          # 32 x 8 x 8,    57
            ],
            C4=[
                unit(separable(32, 100, padding=2), 100),               # 100 x 10 x 10, 73
                unit(separable(100, 64, padding=2), 64),                # 64 x 12 x 12,  89
                nn.Sequential(conv(64, 80, stride=2, padding=2), nn.BatchNorm2d(80)),  # 80 x 7 x 7, 105
            ],
            O=[nn.AdaptiveAvgPool2d(1), conv(80, num_classes, 1), nn.Flatten()],
        )


NETWORKS = {network.__name__: network for network in (NetDilated, PublishedDilated, PublishedDepthwise)}


def build_network(name, num_classes=10):
    """Return the network of that name; a ValueError names the known ones."""
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes)


def count_parameters(model):
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model, shape=(3, 32, 32)):
    """Return the multiply-accumulates of the convolutions and linear layers for one image of that shape."""
    with FlopCounterMode(display=False) as counter:
        _run_once(model, shape)
    return counter.get_total_flops() // 2


class Step(NamedTuple):
    """One operation of a network on one image that looks around, mixes channels or changes the size of the map."""

    kind: str  # "convolution", "pooling", "global average pooling", "fully connected", "resize"
    operation: str  # PyTorch's own name of it
    channels: tuple  # in, out
    size: tuple  # side of the input, of the output, in pixels
    kernel: int
    stride: int
    dilation: int
    groups: int
    jump: float  # image pixels between neighbouring positions of its input
    receptive_field: float  # side of the square of image pixels that one output position can see
    source: int  # the place in the list of the step whose result it works on, -1 for the image


def trace(model, shape=(3, 32, 32)):
    """Run the network on one image of that shape and return its `Step`s in order.

    What counts is what is computed, not what the modules are called: functional calls and reshapes are seen as well.
    The receptive field grows by (kernel - 1) * dilation * jump at every window, the jump (pixels between neighbouring
    positions) by the stride; where paths meet, the longest one counts. Interpolation has a stride too, below 1 where it
    enlarges, and its pixels are no whole number then. See Araujo et al., Computing receptive fields of
    convolutional neural networks, https://distill.pub/2019/computing-receptive-fields/.
    """
    with _Tracer() as tracer:
        _run_once(model, shape, tracer)
    return tracer.steps


def receptive_field(model):
    """Return the theoretical receptive field, in whole pixels, of one position before the global pooling."""
    steps = trace(model)
    return int(max([1] + [step.receptive_field for step in steps[:_end_of_map(steps)]]))


def measure_receptive_field(model, sides=(32, 64, 128, 256, 512)):
    """Measure the receptive field of the middle position before the global pooling, from gradients, on random images.

    Returns (pixels, whole): the side of the square of pixels whose gradient is not zero, and whether it lies within
    the image; otherwise it may be larger, and is 0 for a network that holds no (N, C, H, W) map there. The images grow
    until it does, or until the network can't take them. They are the same every time. See Luo et al., Understanding the
    effective receptive field, https://arxiv.org/abs/1701.04128.
    """
    end, field, generator = _end_of_map(trace(model)), 0, torch.Generator().manual_seed(0)
    for side in sides:
        try:
            images = torch.randn(3, 3, side, side, generator=generator)  # a ReLU hides a path in one image, hardly in three
            reached = gradient_of_the_middle(model, images, end).ne(0)
        except Exception:  # as a network with a layer of fixed size does on other images
            break
        inside = [index for axis in (0, 1) for index in reached.any(axis).nonzero().flatten().tolist()] or [0]
        field = max(inside) - min(inside) + 1
        if 0 < min(inside) and max(inside) < side - 1:
            return field, True
    return field, False


def gradient_of_the_middle(model, images, end):
    """Return how much each pixel of the (N, 3, H, W) images weighs in the middle of the map before step `end` of
    `trace`: the (H, W) magnitudes of its gradient, summed over channels and images."""
    total = torch.zeros(images.shape[2:])
    for image in images.split(1):
        image = image.requires_grad_()
        with torch.enable_grad(), _Tracer(end) as tracer, contextlib.suppress(_End):
            _run(model, image, tracer)
        height, width = tracer.last.shape[2:]
        (gradient,) = torch.autograd.grad(tracer.last[..., height // 2, width // 2].sum(), image)
        total += gradient.abs().sum((0, 1))
    return total


def _end_of_map(steps):
    """Return the place of the final global pooling, or of whatever follows the last convolution."""
    kinds = [step.kind for step in steps]
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
    """How a tensor came from the image: receptive field and jump of its positions, its side, its last step."""

    field: int
    jump: int
    side: int
    source: int


class _End(Exception):
    """The tracer has come to the step at which it was to stop."""


class _Tracer(TorchDispatchMode):
    """Writes down the steps that PyTorch executes on the image and on what comes of it, up to step `end`."""

    def __init__(self, end=None):
        super().__init__()
        self.steps, self.end, self.last = [], end, None  # the last (N, C, H, W) map
        self.paths = WeakTensorKeyDictionary()  # tensor -> _Path

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf in self.paths]
        if not inputs:  # it works on weights only
            return func(*args, **(kwargs or {}))
        if inputs[0].ndim == 4:
            self.last = inputs[0]  # and what is flattened of it is still the same map, until a step mixes it
        path, name = max(self.paths[tensor] for tensor in inputs), func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            return result
        side = _side(outputs[0], path)
        window = _window(name, args, outputs, path, side)
        if window:
            if len(self.steps) == self.end:
                raise _End
            kind, kernel, stride, dilation, groups = window
            field = path.field + (kernel - 1) * dilation * path.jump
            self.steps.append(Step(kind, name, (inputs[0].shape[1], outputs[0].shape[1]), (path.side, side),
                                   kernel, stride, dilation, groups, path.jump, field, path.source))
            path = _Path(field, path.jump * stride, side, len(self.steps) - 1)
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
    """Return (kind, kernel, stride, dilation, groups) of an ATen operation on data, or None if it is no step."""
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
