"""NetDilated as a list of convolutions with batch norm folded in, as another program needs it."""

from dataclasses import dataclass

import numpy as np
import torch

from model import ConvNormAct, MirrorConv2d, MirrorSeparableConv2d, NetDilated


@dataclass
class Convolution:
    """One convolution; what belongs to the mirrored pairs is kept once, as in `MirrorConv2d`.

    Attributes:
        name: as in the state dict, "C2.0.pointwise".
        kind: "lifting", "standard", "pointwise" or "depthwise".
        weight: float32, (out / 2, in, k, k); (out / 2, 1, k, k) if depthwise. Flipped, it makes the
            other half of the output channels; the halves of the input channels are swapped there,
            unless it is lifting or depthwise.
        bias: float32, (out / 2), shared by both halves, or None for a pointwise convolution, which
            no batch norm and no activation follows.
        stride, padding, dilation: of rows and columns.
        residual: whether the input of the layer, a pointwise one's for a depthwise one, is added
            after the activation.
    """

    name: str
    kind: str
    weight: np.ndarray
    bias: np.ndarray | None
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    residual: bool = False

    @property
    def kernel(self) -> np.ndarray:
        """The whole kernel, (out, in, k, k), (out, 1, k, k) if depthwise."""
        return unfold(self.weight, self.kind)


def unfold(half: np.ndarray, kind: str) -> np.ndarray:
    """Return the whole of an array whose first axis has half of the output channels.

    A kernel, (out / 2, in, k, k), is mirrored; a bias or scale, (out / 2), is the same for a pair.
    """
    other = half
    if half.ndim == 4:
        other = half[..., ::-1]
        if kind in ("standard", "pointwise"):
            other = np.roll(other, other.shape[1] // 2, 1)
    return np.concatenate([half, other])


def fold(model: NetDilated) -> list[Convolution]:
    """Return the convolutions of C1 to C4 in order, with batch norm folded into kernel and bias.

    In evaluation, batch norm is y = (x - mean) * weight / sqrt(var + eps) + bias for each channel,
    which a convolution before it can do itself. See Jacob et al., Quantization and training of
    neural networks for efficient integer-arithmetic-only inference,
    https://arxiv.org/abs/1712.05877, section 3.2.
    """
    return [
        convolution
        for block in ("C1", "C2", "C3", "C4")
        for number, layer in enumerate(getattr(model, block))
        for convolution in _convolutions(f"{block}.{number}", layer)
    ]


def count_parameters(model: NetDilated) -> int:
    """Return how many weights and biases are left: batch norm's scales are in the kernels."""
    arrays = [array for each in fold(model) for array in (each.weight, each.bias)]
    linear = sum(each.numel() for each in model.O[-1].parameters())
    return linear + sum(array.size for array in arrays if array is not None)


def _convolutions(name, layer: ConvNormAct):
    """Return the convolution of a layer, or the two of a separable one."""
    scale, bias = _batch_norm(layer.norm)
    conv, first = layer.conv, []
    if isinstance(conv, MirrorSeparableConv2d):
        pointwise = conv.pointwise.weight.detach().numpy()
        first = [Convolution(f"{name}.pointwise", "pointwise", pointwise, None)]
        name, kind, conv = f"{name}.depthwise", "depthwise", conv.depthwise
    else:
        kind = "lifting" if conv.lifting else "standard"
    weight = conv.weight.detach() * scale[:, None, None, None]
    dilation = 1 if isinstance(conv, MirrorConv2d) else conv.dilation
    padding = (weight.shape[2] - 1) // 2 * dilation
    last = Convolution(
        name, kind, weight.numpy(), bias.numpy(), conv.stride, padding, dilation, layer.residual
    )
    return [*first, last]


@torch.no_grad()
def _batch_norm(norm):
    """Return the scale and the bias of batch norm in evaluation, (channels / 2) each."""
    mean, var = (values.view(2, -1).mean(0) for values in (norm.running_mean, norm.running_var))
    scale = norm.weight / (var + norm.eps).sqrt()
    return scale, norm.bias - mean * scale
