"""Two published answers to the assignment, rebuilt layer by layer, and all networks by name.

Like `NetDilated`, they take (N, 3, 32, 32) normalised images and return (N, num_classes) logits.
What their authors state: `published_accuracy` on the test set in percent, and `published_result`.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from model import NetDilated, Network


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    bias: bool = False,
) -> nn.Conv2d:
    """Return a standard convolution, (N, in_channels, H, W) to (N, out_channels, H', W').

    By default, the padding of an odd kernel keeps the size of the map (divided by the stride).
    """
    padding = dilation * (kernel_size // 2) if padding is None else padding
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias)


def depthwise_separable(
    in_channels: int, out_channels: int, padding: int = 1, pointwise_padding: int = 0
) -> nn.Sequential:
    """Return a depthwise-separable convolution, 3x3 depthwise, then pointwise (1x1).

    (N, in_channels, H, W) to (N, out_channels, H', W'), where H' is H + 2 (padding - 1) + 2
    pointwise_padding. The padding is 1 or more. Padding above 1 is a layer of its own: in bf16 on a
    CPU, only the usual padding has a fast backward pass. Howard et al., MobileNets,
    https://arxiv.org/abs/1704.04861.
    """
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
    pointwise = conv(in_channels, out_channels, 1, padding=pointwise_padding)
    if padding > 1:
        return nn.Sequential(nn.ZeroPad2d(padding - 1), depthwise, pointwise)
    return nn.Sequential(depthwise, pointwise)


class PublishedDilated(Network):
    """A published answer of 195,508 parameters, weaknesses kept.

    Its 1x1 convolutions with stride 2 leave out three pixels of four, other 1x1 convolutions pad
    with zeros, its logits pass ReLU, batch norm and dropout, and only three blocks have a stride.
    """

    published_accuracy = 85.0
    published_result = "more than 85 in fewer than 175 epochs"

    def __init__(self, num_classes: int = 10):
        def unit(convolution, channels):
            return nn.Sequential(
                convolution, nn.ReLU(), nn.BatchNorm2d(channels), nn.Dropout2d(0.05)
            )

        def transition(in_channels, out_channels):
            return nn.Sequential(conv(in_channels, out_channels, 1, stride=2, bias=True), nn.ReLU())

        super().__init__(
            C1=[  # output, receptive field
                unit(conv(3, 64), 64),  # 64 x 32 x 32,  3
                unit(conv(64, 128), 128),  # 128 x 32 x 32, 5
                transition(128, 64),  # 64 x 16 x 16,  5
            ],
            C2=[
                unit(conv(64, 64), 64),  # 64 x 16 x 16,  9
                unit(depthwise_separable(64, 64, pointwise_padding=1), 64),  # 64 x 18 x 18,  13
                transition(64, 32),  # 32 x 9 x 9,    13
            ],
            C3=[
                unit(conv(32, 64, dilation=2, padding=1), 64),  # 64 x 7 x 7,    29
                unit(conv(64, 64), 64),  # 64 x 7 x 7,    37
                transition(64, 32),  # 32 x 4 x 4,    37
            ],
            C4=[
                unit(conv(32, 32), 32),  # 32 x 4 x 4,    53
                unit(
                    depthwise_separable(32, num_classes, pointwise_padding=1), num_classes
                ),  # 10 x 6 x 6,    69
            ],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        )


class PublishedDepthwise(Network):
    """A published answer of 198,776 parameters, weaknesses kept.

    It pads by 2 everywhere, so that much of each map is border, and has no activation after its
    strided convolutions. (Its log-softmax is part of our loss.)
    """

    published_accuracy = 85.24
    published_result = "85.24 in 120 epochs"

    def __init__(self, num_classes: int = 10):
        def unit(convolution, channels):
            return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(channels), nn.Dropout(0.01))

        def down(in_channels, out_channels):
            convolution = conv(in_channels, out_channels, stride=2, dilation=2, padding=2)
            return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.Dropout(0.01))

        super().__init__(
            C1=[  # output, receptive field
                unit(conv(3, 128, padding=2), 128),  # 128 x 34 x 34, 3
                unit(depthwise_separable(128, 64, padding=2), 64),  # 64 x 36 x 36,  5
                down(64, 32),  # 32 x 18 x 18,  9
            ],
            C2=[
                unit(depthwise_separable(32, 256, padding=2), 256),  # 256 x 20 x 20, 13
                unit(depthwise_separable(256, 70, padding=2), 70),  # 70 x 22 x 22,  17
                down(70, 32),  # 32 x 11 x 11,  25
            ],
            C3=[
                unit(depthwise_separable(32, 128, padding=2), 128),  # 128 x 13 x 13, 33
                unit(depthwise_separable(128, 128, padding=2), 128),  # 128 x 15 x 15, 41
                down(128, 32),  # 32 x 8 x 8,    57
            ],
            C4=[
                unit(depthwise_separable(32, 100, padding=2), 100),  # 100 x 10 x 10, 73
                unit(depthwise_separable(100, 64, padding=2), 64),  # 64 x 12 x 12,  89
                nn.Sequential(
                    conv(64, 80, stride=2, padding=2), nn.BatchNorm2d(80)
                ),  # 80 x 7 x 7, 105
            ],
            O=[nn.AdaptiveAvgPool2d(1), conv(80, num_classes, 1), nn.Flatten()],
        )


NETWORKS = {
    network.__name__: network for network in (NetDilated, PublishedDilated, PublishedDepthwise)
}


def find_network(name: str) -> Callable[[], nn.Module]:
    """Return the class of a network, by its name in `NETWORKS` or as FILE.py:CLASS.

    The file is executed.

    Raises:
        ValueError: there is no such network; the message names the known ones.
    """
    file, _, class_name = name.rpartition(":")
    if not file and name in NETWORKS:
        return NETWORKS[name]
    known = f"one of {', '.join(NETWORKS)}, or FILE.py:CLASS"
    if not (file.endswith(".py") and Path(file).is_file()):
        raise ValueError(f"network is {name!r}: choose {known}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # it may import its neighbours
    spec.loader.exec_module(module)
    if not callable(getattr(module, class_name, None)):
        raise ValueError(f"network is {name!r}: {file} has no {class_name}; choose {known}")
    return getattr(module, class_name)
