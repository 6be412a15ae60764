"""The exported network in ONNX Runtime: open it, classify, measure. This file needs no torch."""

from pathlib import Path

import numpy as np
import onnxruntime


def open_model(model: str | Path | bytes, threads: int = 0, fake_quantised: bool = False):
    """Return a session of an ONNX model, on the CPU.

    Args:
        model: the path of its file, or its bytes.
        threads: how many compute one operator; 0 for one on each core.
        fake_quantised: whether an int8 model computes in float32, on values rounded to int8. Then
            no sum saturates, on any processor.

    Raises:
        ValueError: it is no model, or ONNX Runtime is too old for it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised
    if fake_quantised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    name, source = ("the model", model) if isinstance(model, bytes) else (model, str(model))
    try:
        return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    except Exception as error:  # of many classes, all ONNX Runtime's own
        reason = " ".join(str(error).split())[:150]
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} can't open {name} ({reason}): try "
            "pip install -U onnxruntime, or make the file again"
        ) from error


def predict(session, images: np.ndarray, output: str = "logits", batch_size: int = 100):
    """Return an output, float32 (N, classes), for uint8 (N, 32, 32, 3) images."""
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return np.concatenate([session.run([output], {"images": batch})[0] for batch in batches])


def accuracy(session, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the images that are classified correctly, in percent."""
    return 100 * float(np.mean(predict(session, images).argmax(1) == labels))
