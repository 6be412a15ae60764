"""NetDilated, our network, and its layers. This file needs torch and no other file.

It takes (N, 3, H, W) normalised images and returns (N, num_classes) logits. Its weights load with
`NetDilated().load_state_dict(torch.load("NetDilated.pt", weights_only=True))`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- layers of mirrored pairs


class MirrorConv2d(nn.Module):
    """A flip-equivariant convolution, (N, in_channels, H, W) to (N, out_channels, H', W').

    Cohen and Welling, Group equivariant convolutional networks, https://arxiv.org/abs/1602.07576,
    with the group of identity and horizontal flip (this group is not `groups` of nn.Conv2d).
    Channel i of the first half and channel i of the second half are a mirrored pair: a regular
    representation of that group. Flip the input and swap its halves, and the output is flipped and
    its halves are swapped.

    `weight`, (out_channels / 2, in_channels, k, k), makes the first half. With the halves [A B] of
    its input channels, the whole kernel is [[A B], [B' A']], where A' is A flipped. With `lifting`,
    the input is an image, whose channels are no pairs, and the kernel is [A, A']. The padding is
    (k - 1) // 2, and there is no bias.

    The layer is equivariant where the kernel's last position is as far from the right border as
    its first one is from the left: where W + 2 padding - k is divisible by the stride. So any odd k
    is with stride 1; with stride 2, an even k needs an even width and an odd k an odd one.

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
        shape = half_channels(out_channels), in_channels, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Conv2d does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flipped = self.weight.flip(3)
        if not self.lifting:
            flipped = flipped.roll(flipped.shape[1] // 2, 1)  # [B' A']
        kernel = torch.cat([self.weight, flipped])
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, stride={self.stride}, lifting={self.lifting}"


class MirrorDepthwiseConv2d(nn.Module):
    """A flip-equivariant depthwise convolution, (N, channels, H, W) to (N, channels, H', W').

    `weight`, (channels / 2, 1, k, k), makes the first half of the channels; flipped, it makes the
    second half: see `MirrorConv2d`. A ValueError says that the number of channels is odd.
    """

    def __init__(self, channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.in_channels, self.stride, self.dilation = channels, stride, dilation
        shape = half_channels(channels), 1, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = torch.cat([self.weight, self.weight.flip(3)])
        return depthwise_conv2d(x, kernel, self.stride, self.dilation)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, stride={self.stride}, dilation={self.dilation}"


class MirrorSeparableConv2d(nn.Module):
    """A separable convolution of mirrored pairs.

    (N, in_channels, H, W) to (N, out_channels, H', W'). It is pointwise (1x1) first, then
    depthwise: a blueprint separable convolution (BSConv-U). Haase and Amthor, Rethinking depthwise
    separable convolutions, https://arxiv.org/abs/2003.13549. A ValueError says that a number of
    channels is odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
    ):
        super().__init__()
        self.pointwise = MirrorConv2d(in_channels, out_channels, kernel_size=1)
        self.depthwise = MirrorDepthwiseConv2d(out_channels, kernel_size, stride, dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.pointwise(x))


class MirrorBatchNorm2d(nn.Module):
    """Batch norm of mirrored pairs, (N, channels, H, W): a pair shares its affine parameters.

    `weight` and `bias` are (channels / 2). In training each channel has its own statistics, as in
    nn.BatchNorm2d. Half of the training images are flipped, so those of a pair differ only by
    chance. In evaluation both channels have the mean of their running statistics, which makes the
    layer exactly equivariant. (The usual batch norm of such networks shares the statistics in
    training, too. In PyTorch on a CPU, that takes six times as long for the 16 channels of C1.)
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
        weight, bias = self.weight.repeat(2), self.bias.repeat(2)
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, eps={self.eps}, momentum={self.momentum}"


class MirrorMean(nn.Module):
    """Group pooling: the mean of each mirrored pair, (N, C) to (N, C / 2).

    After global average pooling, flipping the image only swaps the two values of a pair. So their
    mean is invariant.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (2, -1)).mean(1)


def half_channels(channels: int) -> int:
    """Return half of a number of channels; a ValueError says that it is odd."""
    if channels % 2:
        raise ValueError(f"{channels} channels can't be mirrored pairs: choose an even number")
    return channels // 2


# ---------------------------------------------------------------- the network


class ConvNormAct(nn.Module):
    """A convolution (a separable one counts as one), batch norm and SiLU.

    (N, C, H, W) to (N, channels, H', W'). With `residual`, the input is added after the activation:
    both need the same shape. A ValueError says that `channels` is odd.
    """

    def __init__(self, conv: nn.Module, channels: int, residual: bool = False):
        super().__init__()
        self.conv, self.norm, self.act = conv, MirrorBatchNorm2d(channels), nn.SiLU()
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


def standard(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    lifting: bool = False,
) -> ConvNormAct:
    """Return a `ConvNormAct` with a standard convolution; the arguments are `MirrorConv2d`'s.

    It is residual where the number of channels and the size of the map stay the same.
    """
    conv = MirrorConv2d(in_channels, out_channels, kernel_size, stride, lifting)
    return ConvNormAct(conv, out_channels, residual=in_channels == out_channels and stride == 1)


def separable(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    dilation: int = 1,
) -> ConvNormAct:
    """Return a `ConvNormAct` with a separable convolution, as `MirrorSeparableConv2d` has it.

    It is residual where the number of channels and the size of the map stay the same.
    """
    conv = MirrorSeparableConv2d(in_channels, out_channels, kernel_size, stride, dilation)
    return ConvNormAct(conv, out_channels, residual=in_channels == out_channels and stride == 1)


class Network(nn.Module):
    """Blocks C1 to C4, then the output O: (N, 3, H, W) images to (N, num_classes) logits.

    The images are upsampled first if `upsample` is above 1. So C4(C3(C2(C1(upsample(x))))) is the
    last feature map, at any image size. A ValueError says that `upsample` is below 1.
    """

    def __init__(
        self,
        C1: Sequence[nn.Module],
        C2: Sequence[nn.Module],
        C3: Sequence[nn.Module],
        C4: Sequence[nn.Module],
        O: Sequence[nn.Module],  # noqa: E741
        upsample: float = 1,
    ):
        super().__init__()
        if upsample < 1:
            raise ValueError(f"upsample is {upsample}: choose a factor of 1 or more")
        self.upsample = nn.Identity()
        if upsample > 1:
            self.upsample = nn.Upsample(scale_factor=upsample, mode="bilinear")
        self.C1, self.C2, self.C3, self.C4, self.O = (
            nn.Sequential(*block) for block in (C1, C2, C3, C4, O)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.O(self.C4(self.C3(self.C2(self.C1(self.upsample(x))))))


class NetDilated(Network):
    """Our network: twelve convolutions of mirrored pairs, the last of each block with stride 2.

    The images are upsampled to twice their size. In evaluation, an image and its mirror image have
    the same logits, up to rounding, if the width is a multiple of 8.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__(
            upsample=2,
            C1=[  # output,        receptive field in pixels
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


# ---------------------------------------------------------------- fast depthwise convolutions


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, stride: int = 1, dilation: int = 1
) -> torch.Tensor:
    """Return the depthwise convolution of (N, C, H, W) with (C, 1, k, k).

    The padding is (k - 1) // 2 times the dilation. On a CPU, dilation has a slow backward pass. A
    kernel with dilation 2 works on every other pixel, so it is applied without dilation to four
    smaller images. In bf16, strides are slow, too: they run in fp32, which is several times as
    fast. Without gradients, none of this is needed.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and (stride, dilation) != (1, 1):
        if stride == 1 and x.shape[2] % dilation == x.shape[3] % dilation == 0:
            return batch_to_space(depthwise_conv2d(space_to_batch(x, dilation), weight), dilation)
        if x.dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                return depthwise_conv2d(x.float(), weight.float(), stride, dilation).bfloat16()
    padding = (weight.shape[2] - 1) // 2 * dilation
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


def space_to_batch(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return every size-th row and column of (N, C, H, W) images as images.

    The result is (size**2 * N, C, H / size, W / size), in channels_last memory. Where x is, too,
    this is several times as fast as `F.pixel_unshuffle`.
    """
    x = x.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return x.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def batch_to_space(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return the images of which `space_to_batch` made x."""
    x = x.permute(0, 2, 3, 1).unflatten(0, (size, size, -1))
    return x.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
