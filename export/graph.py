"""NetDilated as an ONNX model of float32, written node by node: exporters copy each kernel."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dataset import MEAN, STD
from export.layers import Convolution, fold, unfold
from model import NetDilated

OPSET = 13  # the lowest in which each channel of a kernel can have its own scale
IR_VERSION = 7  # the one of that opset


class Graph:
    """The nodes and initialisers of an ONNX graph; a node has the name of its output."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initialiser and return its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output


def build(model: NetDilated, temperature: float) -> onnx.ModelProto:
    """Return the model, with whole kernels: `share` in shared.py keeps half of each.

    Its input is `images`, uint8 (N, 32, 32, 3), RGB. Its outputs are `logits` and `probabilities`,
    the softmax of logits / temperature, both float32 (N, classes).
    """
    graph = Graph()
    x = _upsampled(graph, model.upsample.scale_factor)
    for convolution in fold(model):
        if convolution.kind != "depthwise":
            layer_input = x
        x = _convolution(graph, convolution, x)
        if convolution.bias is not None:
            x = graph.add("Mul", [x, graph.add("Sigmoid", [x], f"{x}.sigmoid")], f"{x}.silu")
        if convolution.residual:
            x = graph.add("Add", [x, layer_input], f"{convolution.name}.sum")
    _outputs(graph, x, model.O[-1], temperature)
    return _model(graph, len(model.O[-1].bias))


def _upsampled(graph, factor):
    """Add what makes normalised images, channels first, and upsamples them."""
    x = graph.add("Cast", ["images"], "float", to=TensorProto.FLOAT)
    x = graph.add("Transpose", [x], "channels_first", perm=[0, 3, 1, 2])
    mean, std = (255 * np.float32(value).reshape(3, 1, 1) for value in (MEAN, STD))
    x = graph.add("Sub", [x, graph.constant("mean", mean)], "centred")
    x = graph.add("Div", [x, graph.constant("std", std)], "normalised")
    scales = graph.constant("scales", np.float32([1, 1, factor, factor]))
    return graph.add("Resize", [x, "", scales], "upsampled", mode="linear")  # half-pixel centres


def _convolution(graph, convolution: Convolution, x):
    kernel, name = convolution.kernel, convolution.name
    inputs = [x, graph.constant(f"{name}.weight", kernel)]
    if convolution.bias is not None:
        inputs.append(graph.constant(f"{name}.bias", unfold(convolution.bias, convolution.kind)))
    return graph.add(
        "Conv",
        inputs,
        name,
        kernel_shape=kernel.shape[2:],
        strides=2 * [convolution.stride],
        pads=4 * [convolution.padding],
        dilations=2 * [convolution.dilation],
        group=len(kernel) if convolution.kind == "depthwise" else 1,
    )


def _outputs(graph, x, linear, temperature):
    """Add global average pooling, the mean of each mirrored pair, and the linear layer."""
    x = graph.add("GlobalAveragePool", [x], "pooled")
    pairs = graph.constant("pairs", np.int64([0, 2, -1]))
    x = graph.add("Reshape", [x, pairs], "halves")
    x = graph.add("ReduceMean", [x], "features", axes=[1], keepdims=0)
    weight, bias = (value.detach().numpy() for value in (linear.weight, linear.bias))
    inputs = [x, graph.constant("O.weight", weight), graph.constant("O.bias", bias)]
    x = graph.add("Gemm", inputs, "logits", transB=1)
    x = graph.add("Div", [x, graph.constant("temperature", np.float32(temperature))], "scaled")
    graph.add("Softmax", [x], "probabilities", axis=1)


def _model(graph, classes):
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 32, 32, 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", classes])
        for name in ("logits", "probabilities")
    ]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "NetDilated", [images], outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="S9",
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto
