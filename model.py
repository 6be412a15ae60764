"""The networks: NetDilated, ours, and two published answers to the assignment.

Every network takes (N, 3, 32, 32) normalised images and returns (N, num_classes) logits. `C1` to
`C4` are its blocks, so that `C4(C3(C2(C1(upsample(x)))))` is the last feature map, at any image
size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


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
    return nn.Sequential(*[nn.ZeroPad2d(padding - 1)] * (padding > 1), depthwise, pointwise)


class MirrorConv2d(nn.Module):
    """A flip-equivariant convolution, (N, in_channels, H, W) to (N, out_channels, H', W').

    Cohen and Welling, Group equivariant convolutional networks, https://arxiv.org/abs/1602.07576,
    with the group of identity and horizontal flip (this group is not `groups` of nn.Conv2d).
    Channel i of the first half and channel i of the second half are a mirrored pair: a regular
    representation of that group. Flip the input and swap its halves, and the output is flipped and
    its halves are swapped.

    `weight`, (out_channels / 2, in_channels, k, k), makes the first half. With the halves [A B] of
    its input channels, the whole kernel is [[A B], [B' A']], where A' is A flipped. With `lifting`,
    the input is an image, whose channels are no pairs, and the kernel is [A, A']. The padding is (k
    - 1) // 2, and there is no bias. The positions of the kernel must be symmetric: k is odd with
    stride 1, or it is 4 with stride 2 and the width is even. Others run, too, but are not
    equivariant.

    Raises:
        ValueError: a number of channels is odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        lifting: bool = False,
    ):
        super().__init__()
        self.stride, self.padding, self.lifting = stride, (kernel_size - 1) // 2, lifting
        if not lifting:
            half_channels(in_channels)  # only checks it
        self.weight = nn.Parameter(
            torch.empty(half_channels(out_channels), in_channels, kernel_size, kernel_size)
        )
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Conv2d does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flipped = self.weight.flip(3)
        if not self.lifting:
            flipped = flipped.roll(flipped.shape[1] // 2, 1)  # [B' A']
        return F.conv2d(
            x, torch.cat([self.weight, flipped]), stride=self.stride, padding=self.padding
        )

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, stride={self.stride}, lifting={self.lifting}"


class MirrorDepthwise(nn.Module):
    """A flip-equivariant depthwise convolution, (N, channels, H, W) to (N, channels, H', W'): see
    `MirrorConv2d`.

    `weight`, (channels / 2, 1, k, k), makes the first half of the channels; flipped, it makes the
    second half. A ValueError says that the number of channels is odd.
    """

    def __init__(self, channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.in_channels, self.stride, self.dilation = channels, stride, dilation
        self.weight = nn.Parameter(
            torch.empty(half_channels(channels), 1, kernel_size, kernel_size)
        )
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(
            x, torch.cat([self.weight, self.weight.flip(3)]), self.stride, self.dilation
        )

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, stride={self.stride}, dilation={self.dilation}"


def half_channels(channels: int) -> int:
    """Return half of a number of channels; a ValueError says that it is odd."""
    if channels % 2:
        raise ValueError(f"{channels} channels can't be mirrored pairs: choose an even number")
    return channels // 2


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, stride: int = 1, dilation: int = 1
) -> torch.Tensor:
    """Return the depthwise convolution of (N, C, H, W) with (C, 1, k, k), padded by (k - 1) // 2
    times the dilation.

    In bf16 on a CPU, only stride 1 with dilation 1 has a fast backward pass. A kernel with dilation
    2 works on every other pixel, so it is applied without dilation to four smaller images. Other
    cases run in fp32, which is several times as fast. Without gradients, bf16 is the faster one.
    """
    backward_in_bf16 = (
        torch.is_grad_enabled() and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    )
    if backward_in_bf16 and (stride, dilation) != (1, 1):
        if stride == 1 and x.shape[2] % dilation == x.shape[3] % dilation == 0:
            return batch_to_space(depthwise_conv2d(space_to_batch(x, dilation), weight), dilation)
        with torch.autocast("cpu", enabled=False):
            return depthwise_conv2d(x.float(), weight.float(), stride, dilation).bfloat16()
    padding = (weight.shape[2] - 1) // 2 * dilation
    return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])


def space_to_batch(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return every size-th row and column of (N, C, H, W) images as images: (size**2 * N, C, H /
    size, W / size).

    Both are in channels_last memory, where this is several times as fast as `F.pixel_unshuffle`.
    """
    x = x.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return x.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def batch_to_space(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return the images of which `space_to_batch` made x."""
    x = x.permute(0, 2, 3, 1).unflatten(0, (size, size, -1))
    return x.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class MirrorBatchNorm2d(nn.Module):
    """Batch norm of mirrored pairs, (N, channels, H, W): a pair shares its affine parameters, each
    (channels / 2).

    In training each channel has its own statistics, as in nn.BatchNorm2d. Half of the training
    images are flipped, so those of a pair differ only by chance. In evaluation both channels have
    the mean of their running statistics, which makes the layer exactly equivariant. (The usual
    batch norm of such networks shares the statistics in training, too. In PyTorch on a CPU, that
    takes six times as long for the 16 channels of C1.)
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(half_channels(channels)))
        self.bias = nn.Parameter(torch.zeros(half_channels(channels)))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        if not self.training:
            mean, var = (values.view(2, -1).mean(0).repeat(2) for values in (mean, var))
        return F.batch_norm(
            x,
            mean,
            var,
            self.weight.repeat(2),
            self.bias.repeat(2),
            self.training,
            self.momentum,
            self.eps,
        )

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, eps={self.eps}, momentum={self.momentum}"


class MirrorMean(nn.Module):
    """Group pooling: the mean of each mirrored pair, (N, C) to (N, C / 2).

    After global average pooling, flipping the image only swaps the two values of a pair. So their
    mean is invariant.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (2, -1)).mean(1)


class ConvBNAct(nn.Sequential):
    """A convolution (a separable one counts as one), batch norm and SiLU, (N, C, H, W) to (N,
    channels, H', W').

    Where their shapes agree, there is a residual connection: the input is added after the
    activation. A ValueError says that `channels` is odd.
    """

    def __init__(self, convolution: nn.Module, channels: int):
        super().__init__(convolution, MirrorBatchNorm2d(channels), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return x + y if x.shape == y.shape else y


def standard(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    lifting: bool = False,
) -> ConvBNAct:
    """Return a `ConvBNAct` with a standard convolution of mirrored pairs; the arguments are those
    of `MirrorConv2d`.
    """
    return ConvBNAct(
        MirrorConv2d(in_channels, out_channels, kernel_size, stride, lifting), out_channels
    )


def separable(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1
) -> ConvBNAct:
    """Return a `ConvBNAct` with a separable convolution of mirrored pairs: pointwise (1x1) first,
    then depthwise.

    That order is a blueprint separable convolution (BSConv-U): Haase and Amthor, Rethinking
    depthwise separable convolutions, https://arxiv.org/abs/2003.13549.
    """
    convolution = nn.Sequential(
        MirrorConv2d(in_channels, out_channels, 1),
        MirrorDepthwise(out_channels, kernel_size, stride, dilation),
    )
    return ConvBNAct(convolution, out_channels)


class Network(nn.Module):
    """Blocks C1 to C4, then the output O: (N, 3, H, W) images to (N, num_classes) logits.

    The images are upsampled first if `upsample` is above 1.
    """

    def __init__(
        self,
        C1: Sequence[nn.Module],
        C2: Sequence[nn.Module],
        C3: Sequence[nn.Module],
        C4: Sequence[nn.Module],
        O: Sequence[nn.Module],
        upsample: float = 1,
    ):  # noqa: E741
        super().__init__()
        self.upsample = (
            nn.Upsample(scale_factor=upsample, mode="bilinear") if upsample > 1 else nn.Identity()
        )
        self.C1, self.C2, self.C3, self.C4, self.O = (
            nn.Sequential(*block) for block in (C1, C2, C3, C4, O)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.O(self.C4(self.C3(self.C2(self.C1(self.upsample(x))))))


class NetDilated(Network):
    """Our network: twelve convolutions of mirrored pairs, the last of each block with stride 2, on
    upsampled images.

    In evaluation, an image and its mirror image have the same logits, up to rounding, if the width
    is a multiple of 8.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__(
            upsample=2,
            C1=[  # output,         receptive field in pixels
                standard(3, 16, lifting=True),  # 16 x 64 x 64,   3
                standard(16, 16),  # 16 x 64 x 64,   4
                standard(16, 64, kernel_size=4, stride=2),  # 64 x 32 x 32,   5
            ],
            C2=[
                separable(64, 96),  # 96 x 32 x 32,   7
                separable(96, 96),  # 96 x 32 x 32,   9
                separable(96, 96, kernel_size=4, stride=2),  # 96 x 16 x 16,   12
            ],
            C3=[
                separable(96, 192),  # 192 x 16 x 16,  16
                separable(192, 192, dilation=2),  # 192 x 16 x 16,  24
                separable(192, 192, kernel_size=4, stride=2),  # 192 x 8 x 8,   30
            ],
            C4=[
                separable(192, 288),  # 288 x 8 x 8,    38
                separable(288, 288),  # 288 x 8 x 8,    46
                separable(288, 288, kernel_size=4, stride=2),  # 288 x 4 x 4,   58
            ],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten(), MirrorMean(), nn.Linear(144, num_classes)],
        )


class PublishedDilated(Network):
    """A published answer of 195,508 parameters, weaknesses kept.

    Its 1x1 convolutions with stride 2 leave out three pixels of four, other 1x1 convolutions pad
    with zeros, its logits pass ReLU, batch norm and dropout, and only three blocks have a stride.
    """

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


def build_network(name: str, num_classes: int = 10) -> nn.Module:
    """Return the network of that name; a ValueError names the known ones."""
    if name not in list(NETWORKS):
        raise ValueError(f"network {name!r} is unknown: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes)
