"""Mirrored kernels in an ONNX model: half is stored, and the model makes the rest."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.layers import Convolution, unfold


def share(model: onnx.ModelProto, convolutions: list[Convolution]) -> onnx.ModelProto:
    """Return the model with half of each mirrored kernel, and half of the biases and scales.

    Nodes in front make the whole arrays; a runtime computes them once, when it loads the model. An
    initialiser belongs to a convolution if its name begins with that of the convolution and a dot.
    """
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    initializers, nodes = _slice_arguments(), []
    for initializer in model.graph.initializer:
        kind = _kind(initializer.name, convolutions)
        half = _half(numpy_helper.to_array(initializer), kind)
        if half is None:
            initializers.append(initializer)
        else:
            initializers.append(numpy_helper.from_array(half, f"{initializer.name}.half"))
            nodes += _unfold(initializer.name, half.shape, kind)
    nodes += model.graph.node
    for field, values in (("initializer", initializers), ("node", nodes)):
        shared.graph.ClearField(field)
        getattr(shared.graph, field).extend(values)
    onnx.checker.check_model(shared, full_check=True)
    return shared


def _kind(name, convolutions):
    """Return the kind of the convolution to which an initialiser belongs, or None."""
    for convolution in convolutions:
        if name.startswith(f"{convolution.name}."):
            return convolution.kind
    return None


def _half(value, kind):
    """Return the half that makes an array, or None where it belongs to no mirrored pairs."""
    if kind and value.ndim:
        half = value[: len(value) // 2]
        if np.array_equal(value, unfold(half, kind)):
            return half
    return None


def _slice_arguments():
    """Return the initialisers with which Slice flips the last axis: from the end to the start."""
    values = {"start": -1, "end": np.iinfo(np.int64).min, "axis": 3, "step": -1}
    return [numpy_helper.from_array(np.int64([value]), key) for key, value in values.items()]


def _unfold(name, shape, kind):
    """Return the nodes that make the array `name` of its half, as `layers.unfold` does."""
    half, other, nodes = f"{name}.half", f"{name}.half", []
    if len(shape) == 4 and shape[3] > 1:
        nodes.append(_node("Slice", [other, "start", "end", "axis", "step"], [f"{name}.flipped"]))
        other = f"{name}.flipped"
    if len(shape) == 4 and kind in ("standard", "pointwise"):
        halves = [f"{name}.a", f"{name}.b"]
        nodes.append(_node("Split", [other], halves, axis=1))
        other = f"{name}.swapped"
        nodes.append(_node("Concat", halves[::-1], [other], axis=1))
    return [*nodes, _node("Concat", [half, other], [name], axis=0)]


def _node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, outputs[0], **attributes)
