"""NetDilated as two ONNX files and a page: `python -m export`, or with a folder of other weights.

The files of the committed weights go to export/ and page/, with their accuracy on CIFAR-10's test
images, and results.json says what was measured. Those of other weights go beside these, and claim
no accuracy.
"""

import argparse
import sys
from datetime import date
from pathlib import Path

try:
    import onnx
    import onnxruntime

    from dataset import CLASSES, load_dataset
    from evaluate import temperature_of
    from export.graph import build
    from export.int8 import quantise, saturates
    from export.layers import count_parameters, fold
    from export.page import write_page
    from export.runtime import accuracy, open_model
    from export.shared import share
    from model import NetDilated
    from pretrained import WEIGHTS, load, write_file, write_json
except ModuleNotFoundError as error:
    sys.exit(f"export needs {error.name}: pip install -r requirements-export.txt")

HERE = Path(__file__).resolve().parent
FLOAT32, INT8 = "NetDilated.onnx", "NetDilated-int8.onnx"
CALIBRATION = 500  # of the sample's training images


def main(arguments: list[str] | None = None) -> None:
    """Export the weights that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=WEIGHTS, help="of the weights (default weights)"
    )
    try:
        export(parser.parse_args(arguments).folder)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"export: {error}")


def export(folder: Path) -> None:
    """Write the ONNX files and the page of the weights in a folder.

    Raises:
        ValueError, RuntimeError, OSError: the weights are damaged or missing, CIFAR-10 is not at
            hand, or a file can't be written.
    """
    model, metrics = load(NetDilated, folder)
    metrics["temperature"] = temperature_of(metrics)
    committed = folder.resolve() == WEIGHTS
    float32 = build(model, metrics["temperature"])
    calibration = load_dataset("train", "sample").data[:CALIBRATION]
    models = {FLOAT32: float32, INT8: quantise(float32, calibration)}
    models = {name: share(each, fold(model)) for name, each in models.items()}
    measured = {}
    if committed:
        wide = quantise(float32, calibration, reduce_range=False)
        measured = measure({**models, "8-bit weights": wide})
        write_json(HERE / "results.json", {**provenance(model, metrics), "models": measured})
    else:
        metrics.pop("test_accuracy", None)
    for name, each in models.items():
        onnx.helper.set_model_props(each, metadata(model, metrics, measured.get(name)))
        write_file((HERE if committed else folder) / name, each.SerializeToString())
    page = HERE.parent / "page" if committed else folder
    write_page(model, metrics, page / "index.html")
    print(f"{FLOAT32} and {INT8} are in {HERE if committed else folder}, index.html is in {page}")


def measure(models: dict[str, onnx.ModelProto]) -> dict[str, dict]:
    """Return the accuracy in percent of each model, on CIFAR-10's test images and on the sample's.

    An int8 model has two on CIFAR-10: as it runs here, and fake-quantised (see `open_model`).
    """
    test, sample = (load_dataset("test", data) for data in ("CIFAR-10", "sample"))
    results = {}
    for name, proto in models.items():
        content = proto.SerializeToString()
        session = open_model(content)
        results[name] = {
            "test_accuracy": accuracy(session, test.data, test.targets),
            "sample_accuracy": accuracy(session, sample.data, sample.targets),
        }
        if name != FLOAT32:
            exact = accuracy(open_model(content, fake_quantised=True), test.data, test.targets)
            results[name]["test_accuracy_fake_quantised"] = exact
        print(f"{name}: {results[name]}", flush=True)
    return results


def provenance(model: NetDilated, metrics: dict) -> dict:
    """Return of which weights, where and with what the results were measured."""
    return {
        "sha256": metrics["sha256"],
        "parameters": count_parameters(model),
        "saturates": saturates(),
        "date": date.today().isoformat(),
        "versions": {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }


def metadata(model: NetDilated, metrics: dict, measured: dict | None) -> dict[str, str]:
    """Return what a file says of itself; no accuracy and no origin where nothing was measured."""
    facts = {
        "labels": ",".join(CLASSES),
        "input": "images: uint8 (N, 32, 32, 3), RGB, not normalised",
        "outputs": f"logits; probabilities: softmax of logits / {metrics['temperature']:.4f}",
        "parameters": str(count_parameters(model)),
        "weights_sha256": metrics["sha256"],
        "origin": "NetDilated of S9",
    }
    if measured:
        where = "x86 without VNNI" if saturates() else "no saturation"
        facts["test_accuracy"] = (
            f"{measured['test_accuracy']:.2f} % of CIFAR-10's 10,000 test images, in ONNX Runtime "
            f"{onnxruntime.__version__} ({where})"
        )
        facts["origin"] += ", trained from scratch on CIFAR-10 (A. Krizhevsky, 2009)"
        facts["license"] = "MIT"
    return facts


if __name__ == "__main__":
    main()
