"""How fast PyTorch and the ONNX files are here: `python -m export.latency` writes latency.json.

Each is measured in processes of its own, so that the threads of one don't disturb the other. So
this file imports torch only where it is measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
NAMES = "PyTorch", "NetDilated.onnx", "NetDilated-int8.onnx"
BATCH = 256
KEYS = "ms_for_one_image", "images_per_second"  # the second in batches


def main(arguments: list[str] | None = None) -> None:
    """Measure all of them in turn, or, in a process of its own, one."""
    parser = argparse.ArgumentParser(prog="python -m export.latency", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each (3)")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (3)")
    parser.add_argument("--output", type=Path, default=HERE / "latency.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.one:
            print(json.dumps(measure(options.one[0], int(options.one[1]), options.seconds)))
        else:
            compare(options)
    except (ValueError, OSError) as error:
        sys.exit(f"export.latency: {error}")
    except subprocess.CalledProcessError:
        sys.exit(1)  # that process said why


def compare(options: argparse.Namespace) -> None:
    """Write the medians over the repeats, on one thread and on all cores."""
    from device import hardware, pick_device
    from loader import CORES
    from pretrained import write_json

    sides = [(threads, name) for threads in sorted({1, CORES}) for name in NAMES]
    runs = [
        [in_a_process(*side, options.seconds) for side in sides] for _ in range(options.repeats)
    ]
    rows = []
    for (threads, name), *results in zip(sides, *runs, strict=True):
        medians = {key: statistics.median(result[key] for result in results) for key in KEYS}
        rows.append({"name": name, "threads": threads, **medians})
        print(
            "{:22}{:2} threads{:8.2f} ms for one image{:8.0f} images/s".format(*rows[-1].values())
        )
    where = {"hardware": hardware(pick_device("cpu")), "date": date.today().isoformat()}
    where["versions"] = {name: version(name) for name in ("torch", "onnxruntime")}
    write_json(options.output, {**where, "batch": BATCH, "rows": rows})


def in_a_process(threads: int, name: str, seconds: float) -> dict[str, float]:
    """Return what `measure` returns in a new process."""
    command = [sys.executable, "-m", "export.latency", "--seconds", str(seconds)]
    command += ["--one", name, str(threads)]
    output = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output)


def measure(name: str, threads: int, seconds: float) -> dict[str, float]:
    """Return the medians of the time for one image and of the rate in batches."""
    classify = pytorch(threads) if name == "PyTorch" else onnx_runtime(name, threads)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    one, batch = (median_time(classify, images[:count], seconds) for count in (1, BATCH))
    return dict(zip(KEYS, (1000 * one, BATCH / batch), strict=True))


def pytorch(threads: int) -> Callable[[np.ndarray], object]:
    """Return the function that computes logits of uint8 (N, 32, 32, 3) images in PyTorch.

    It runs the network as `evaluate.py` does: eager, with batch norm, and it makes the mirrored
    kernels at each call.
    """
    import torch

    from dataset import normalise
    from model import NetDilated

    torch.set_num_threads(threads)
    model = NetDilated().to(memory_format=torch.channels_last).eval()
    return torch.inference_mode()(lambda images: model(normalise(images)))


def onnx_runtime(name: str, threads: int) -> Callable[[np.ndarray], object]:
    """Return the function that does it with an ONNX file of this folder."""
    from export.runtime import open_model

    session = open_model(HERE / name, threads)
    return lambda images: session.run(["logits"], {"images": images})


def median_time(classify: Callable, images: np.ndarray, seconds: float) -> float:
    """Return the median time of a call in seconds, over at least `seconds` and three calls."""
    classify(images)
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        classify(images)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


if __name__ == "__main__":
    main()
