"""The tables of the ONNX files, from what `make export` measured: export/*.json."""

import json
from pathlib import Path

from checker.tables import markdown_table
from pretrained import WEIGHTS, load_metrics

EXPORT = Path(__file__).resolve().parent.parent / "export"
NAMES = {
    "PyTorch": "PyTorch, fp32",
    "NetDilated.onnx": "ONNX, fp32",
    "NetDilated-int8.onnx": "ONNX, int8",
}
MLPERF_TINY = [  # image classification
    (
        "[MLPerf Tiny](https://github.com/mlcommons/tiny) IC01, published",
        "78,666",
        "12.5",
        "",
        "87.19 (target: 85)",
        "",
        "",
    ),
    ("MLPerf Tiny IC02, published", "479,480", "76.5", "512, int8", "(target: 91)", "", ""),
]


def exported() -> str:
    """The network in PyTorch and as ONNX files, and the networks of MLPerf Tiny."""
    metrics, results = load_metrics("NetDilated"), _read("results.json")
    rows = [_row("PyTorch", WEIGHTS / "NetDilated.pt", metrics["parameters"], metrics)]
    for name, measured in results["models"].items():
        if name in NAMES:
            rows.append(_row(name, EXPORT / name, results["parameters"], measured))
    head = "", "parameters:", "MACs, M:", "file, kB:", "test accuracy, %:"
    head += "ms, 1 image, 1 thread:", f"images/s, {_cores()} threads:"
    return markdown_table(head, rows + MLPERF_TINY)


def _row(name, path, parameters, measured):
    accuracy, simulated = f"{measured['test_accuracy']:.2f}", "test_accuracy_fake_quantised"
    if simulated in measured and _read("results.json")["saturates"]:
        accuracy += f" without VNNI, {measured[simulated]:.2f} with it (simulated)"
    macs = f"{load_metrics('NetDilated')['macs'] / 1e6:.1f}"
    size = f"{path.stat().st_size / 1000:.0f}"
    speed = _speed(name, 1, "ms_for_one_image"), _speed(name, _cores(), "images_per_second")
    return NAMES[name], f"{parameters:,}", macs, size, accuracy, *speed


def quantised() -> str:
    """The accuracy of int8 where sums saturate and where not, with weights of 7 and of 8 bits."""
    results, rows = _read("results.json"), []
    for name, title in (("NetDilated-int8.onnx", "7 bits"), ("8-bit weights", "8 bits")):
        here, fake = (
            f"{results['models'][name][key]:.2f}"
            for key in ("test_accuracy", "test_accuracy_fake_quantised")
        )
        rows.append((title, here, fake))
    where = "where sums saturate" if results["saturates"] else "on this processor"
    return markdown_table(("weights", f"{where}, %:", "fake-quantised, %:"), rows)


def runtimes() -> str:
    """How fast PyTorch and ONNX Runtime are, on one thread and on all cores."""
    latency = _read("latency.json")
    rows = [
        (
            NAMES[row["name"]],
            str(row["threads"]),
            f"{row['ms_for_one_image']:.1f}",
            f"{row['images_per_second']:.0f}",
        )
        for row in latency["rows"]
    ]
    head = "", "threads:", "ms for one image:", f"images/s in batches of {latency['batch']}:"
    return markdown_table(head, rows) + f"\n\nHardware: {latency['hardware'].split(',')[0]}."


def _cores():
    return max(row["threads"] for row in _read("latency.json")["rows"])


def _speed(name, threads, key):
    """Write a figure of latency.json."""
    rows = _read("latency.json")["rows"]
    (row,) = (row for row in rows if (row["name"], row["threads"]) == (name, threads))
    return f"{row[key]:.1f}" if key == "ms_for_one_image" else f"{row[key]:.0f}"


def _read(name):
    return json.loads((EXPORT / name).read_text())
