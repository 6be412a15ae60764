"""NetDilated in int8: static quantisation by ONNX Runtime."""

import contextlib
import io
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from export.graph import IR_VERSION, OPSET
from export.runtime import open_model


class _Batches(CalibrationDataReader):
    """Images in batches of one size, as ONNX Runtime's calibration takes them."""

    def __init__(self, images: np.ndarray, size: int = 50):
        self.batches = iter(np.split(images[: len(images) // size * size], len(images) // size))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def quantise(
    model: onnx.ModelProto, images: np.ndarray, reduce_range: bool = True
) -> onnx.ModelProto:
    """Return the model with its convolutions and its linear layer in int8 (QDQ).

    Activations are uint8 with a scale for each tensor, weights int8 with one for each channel; the
    rest stays float32. See https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Args:
        model: of `graph.build`, with whole kernels.
        images: uint8 (N, 32, 32, 3) training images, for the calibration: an activation's range is
            that of 99.99 % of its values.
        reduce_range: whether weights have 7 of the 8 bits, so that no sum of two products
            saturates (see `saturates`).
    """
    with tempfile.TemporaryDirectory() as folder, _silence():
        float32, int8 = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, float32)
        quantize_static(
            float32,
            int8,
            _Batches(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm"],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": 99.99},
        )
        quantised = onnx.load(int8)
    quantised.producer_name = model.producer_name
    return quantised


def saturates() -> bool:
    """Whether a sum of two products of uint8 and int8 saturates here, at 16 bits.

    It does on x86 without VNNI, in ONNX Runtime: 255 * 127 + 255 * 127 is above 2**15.
    """
    names = ("a", TensorProto.UINT8), ("b", TensorProto.INT8), ("sum", TensorProto.INT32)
    a, b, total = (helper.make_tensor_value_info(name, type, [64, 64]) for name, type in names)
    product = helper.make_node("MatMulInteger", ["a", "b"], ["sum"])
    graph = helper.make_graph([product], "probe", [a, b], [total])
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    largest = {"a": np.full((64, 64), 255, np.uint8), "b": np.full((64, 64), 127, np.int8)}
    sums = open_model(model.SerializeToString()).run(None, largest)[0]
    return bool((sums != 64 * 255 * 127).any())


@contextlib.contextmanager
def _silence():
    """Keep back what the calibration prints, and its advice to optimise the graph first."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
