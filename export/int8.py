"""NetDilated in int8: static quantisation by ONNX Runtime."""

import contextlib
import io
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)


class _Batches(CalibrationDataReader):
    """Images in batches of one size, as ONNX Runtime's calibration takes them."""

    def __init__(self, images: np.ndarray, size: int = 50):
        self.batches = iter(np.split(images[: len(images) // size * size], len(images) // size))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def quantise(model: onnx.ModelProto, images: np.ndarray, bits: int = 7) -> onnx.ModelProto:
    """Return the model with its convolutions and its linear layer in int8 (QDQ).

    Activations are uint8 with a scale for each tensor, weights int8 with one for each channel; the
    rest stays float32. An activation's range leaves out the outermost 0.01 % of its values.

    Args:
        model: of `graph.build`, with whole kernels.
        images: uint8 (N, 32, 32, 3) training images, for the ranges of the activations.
        bits: of the weights. With 7, the sum of two products fits into 16 bits. x86 without VNNI
            adds them there and cuts off what is larger, so that 8 bits cost accuracy on it. See
            https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
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
            reduce_range=bits == 7,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": 99.99},
        )
        quantised = onnx.load(int8)
    quantised.producer_name = model.producer_name
    return quantised


@contextlib.contextmanager
def _silence():
    """Keep back what the calibration prints, and its advice to optimise the graph first."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
