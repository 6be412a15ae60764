"""The networks: NetDilated, ours, and the assignment's two published answers.

Every network takes (N, 3, 32, 32) normalised images and returns (N, num_classes) logits. `C1` to `C4` are its blocks,
so that `C4(C3(C2(C1(upsample(x)))))` is the last feature map, at any image size.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1,
         padding: int | None = None, bias: bool = False) -> nn.Conv2d:
    """Return a standard convolution. By default its padding keeps the size of the map (divided by the stride)."""
    padding = dilation * (kernel_size // 2) if padding is None else padding
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias)


def depthwise(channels: int, padding: int = 1) -> nn.Conv2d:
    """Return a plain 3x3 depthwise convolution: one kernel for each channel."""
    return nn.Conv2d(channels, channels, 3, padding=padding, groups=channels, bias=False)


class Depthwise(nn.Conv2d):
    """A 3x3 depthwise convolution, (N, C, H, W) to (N, C, H', W'), that is fast in bf16 on a CPU.

    There, only stride 1 with dilation 1 has a fast backward pass. A dilated kernel works on every other pixel, so it is
    applied as a plain kernel to each of these smaller images. The other cases run in fp32, 4 to 24 times as fast.
    """

    def __init__(self, channels: int, stride: int = 1, dilation: int = 1):
        super().__init__(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stride, dilation = self.stride[0], self.dilation[0]
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or (stride, dilation) == (1, 1):
            return super().forward(x)
        if stride == 1 and x.shape[2] % dilation == x.shape[3] % dilation == 0:
            kernels = self.weight.repeat_interleave(dilation**2, 0)
            y = F.conv2d(F.pixel_unshuffle(x, dilation), kernels, padding=1, groups=len(kernels))
            return F.pixel_shuffle(y, dilation)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).bfloat16()


def depthwise_separable(in_channels: int, out_channels: int, padding: int = 1,
                        pointwise_padding: int = 0) -> nn.Sequential:
    """Return a depthwise-separable convolution: 3x3 depthwise, then pointwise (1x1).

    Howard et al., MobileNets, https://arxiv.org/abs/1704.04861.
    """
    return nn.Sequential(depthwise(in_channels, padding), conv(in_channels, out_channels, 1, padding=pointwise_padding))


def bsconv(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return a blueprint separable convolution (BSConv-U): pointwise (1x1) first, then 3x3 depthwise.

    Haase and Amthor, Rethinking depthwise separable convolutions, https://arxiv.org/abs/2003.13549.
    """
    return nn.Sequential(conv(in_channels, out_channels, 1), Depthwise(out_channels, stride, dilation))


class ConvBNAct(nn.Sequential):
    """A convolution (a separable pair counts as one), batch norm and SiLU, (N, C, H, W) to (N, channels, H', W').

    The input is added to the output where their shapes agree: He et al., https://arxiv.org/abs/1512.03385.
    """

    def __init__(self, convolution: nn.Module, channels: int):
        super().__init__(convolution, nn.BatchNorm2d(channels), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return x + y if x.shape == y.shape else y


class Network(nn.Module):
    """Blocks C1 to C4, then the output O: (N, 3, H, W) images to (N, num_classes) logits.

    The images are upsampled first if `upsample` is above 1.
    """

    def __init__(self, C1: Sequence[nn.Module], C2: Sequence[nn.Module], C3: Sequence[nn.Module],
                 C4: Sequence[nn.Module], O: Sequence[nn.Module], upsample: float = 1):  # noqa: E741
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=upsample, mode="bilinear") if upsample > 1 else nn.Identity()
        self.C1, self.C2, self.C3, self.C4, self.O = (nn.Sequential(*block) for block in (C1, C2, C3, C4, O))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.O(self.C4(self.C3(self.C2(self.C1(self.upsample(x))))))


class NetDilated(Network):
    """Our network: twelve convolutions, the last of each block with stride 2, on images upsampled to 64x64.

    Four strides leave 2x2 positions of a map of 32x32, too few for C3 and C4 to work on, and 4x4 of one of 64x64.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__(
            upsample=2,
            C1=[                                                        # output, receptive field in pixels of the image
                ConvBNAct(conv(3, 16), 16),                             # 16 x 64 x 64,  3
                ConvBNAct(conv(16, 16), 16),                            # 16 x 64 x 64,  4
                ConvBNAct(conv(16, 64, stride=2), 64),                  # 64 x 32 x 32,  5
            ],
            C2=[
                ConvBNAct(bsconv(64, 96), 96),                          # 96 x 32 x 32,  7
                ConvBNAct(bsconv(96, 96), 96),                          # 96 x 32 x 32,  9
                ConvBNAct(bsconv(96, 96, stride=2), 96),                # 96 x 16 x 16,  11
            ],
            C3=[
                ConvBNAct(bsconv(96, 128), 128),                        # 128 x 16 x 16, 15
                ConvBNAct(bsconv(128, 128, dilation=2), 128),           # 128 x 16 x 16, 23
                ConvBNAct(bsconv(128, 128, stride=2), 128),             # 128 x 8 x 8,   27
            ],
            C4=[
                ConvBNAct(bsconv(128, 176), 176),                       # 176 x 8 x 8,   35
                ConvBNAct(bsconv(176, 176), 176),                       # 176 x 8 x 8,   43
                ConvBNAct(bsconv(176, 176, stride=2), 176),             # 176 x 4 x 4,   51
            ],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(176, num_classes)],
        )


class PublishedDilated(Network):
    """A published answer of 195,508 parameters, weaknesses kept.

    Its 1x1 convolutions with stride 2 leave out three pixels of four, other 1x1 convolutions pad with zeros, its
    logits pass ReLU, batch norm and dropout, and only three blocks have a stride.
    """

    def __init__(self, num_classes: int = 10):
        def unit(convolution, channels):
            return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(channels), nn.Dropout2d(0.05))

        def transition(in_channels, out_channels):
            return nn.Sequential(conv(in_channels, out_channels, 1, stride=2, bias=True), nn.ReLU())

        super().__init__(
            C1=[                                                        # output, receptive field
                unit(conv(3, 64), 64),                                  # 64 x 32 x 32,  3
                unit(conv(64, 128), 128),                               # 128 x 32 x 32, 5
                transition(128, 64),                                    # 64 x 16 x 16,  5
            ],
            C2=[
                unit(conv(64, 64), 64),                                 # 64 x 16 x 16,  9
                unit(depthwise_separable(64, 64, pointwise_padding=1), 64),  # 64 x 18 x 18,  13
                transition(64, 32),                                     # 32 x 9 x 9,    13
            ],
            C3=[
                unit(conv(32, 64, dilation=2, padding=1), 64),          # 64 x 7 x 7,    29
                unit(conv(64, 64), 64),                                 # 64 x 7 x 7,    37
                transition(64, 32),                                     # 32 x 4 x 4,    37
            ],
            C4=[
                unit(conv(32, 32), 32),                                 # 32 x 4 x 4,    53
                unit(depthwise_separable(32, num_classes, pointwise_padding=1), num_classes),  # 10 x 6 x 6,    69
            ],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        )


class PublishedDepthwise(Network):
    """A published answer of 198,776 parameters, weaknesses kept.

    It pads by 2 everywhere, so that much of each map is border, and has no activation after its strided convolutions.
    (Its log-softmax is part of our loss.)
    """

    def __init__(self, num_classes: int = 10):
        def unit(convolution, channels):
            return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(channels), nn.Dropout(0.01))

        def down(in_channels, out_channels):
            convolution = conv(in_channels, out_channels, stride=2, dilation=2, padding=2)
            return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.Dropout(0.01))

        super().__init__(
            C1=[                                                        # output, receptive field
                unit(conv(3, 128, padding=2), 128),                     # 128 x 34 x 34, 3
                unit(depthwise_separable(128, 64, padding=2), 64),      # 64 x 36 x 36,  5
                down(64, 32),                                           # 32 x 18 x 18,  9
            ],
            C2=[
                unit(depthwise_separable(32, 256, padding=2), 256),     # 256 x 20 x 20, 13
                unit(depthwise_separable(256, 70, padding=2), 70),      # 70 x 22 x 22,  17
                down(70, 32),                                           # 32 x 11 x 11,  25
            ],
            C3=[
                unit(depthwise_separable(32, 128, padding=2), 128),     # 128 x 13 x 13, 33
                unit(depthwise_separable(128, 128, padding=2), 128),    # 128 x 15 x 15, 41
                down(128, 32),                                          # 32 x 8 x 8,    57
            ],
            C4=[
                unit(depthwise_separable(32, 100, padding=2), 100),     # 100 x 10 x 10, 73
                unit(depthwise_separable(100, 64, padding=2), 64),      # 64 x 12 x 12,  89
                nn.Sequential(conv(64, 80, stride=2, padding=2), nn.BatchNorm2d(80)),  # 80 x 7 x 7, 105
            ],
            O=[nn.AdaptiveAvgPool2d(1), conv(80, num_classes, 1), nn.Flatten()],
        )


NETWORKS = {network.__name__: network for network in (NetDilated, PublishedDilated, PublishedDepthwise)}


def build_network(name: str, num_classes: int = 10) -> nn.Module:
    """Return the network of that name; a ValueError names the known ones."""
    if name not in list(NETWORKS):
        raise ValueError(f"network {name!r} is unknown: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes)
