"""CIFAR-10-C: the accuracy of saved weights under fifteen corruptions at five severities.

`python -m benchmarks.cifar10c weights/teacher` measures a network, prints a table and adds it to
benchmarks/cifar10c.json, after each kind of corruption: interrupted, it goes on there.

Where the environment variable `CIFAR10C_ROOT` names the folder of the official files, of
https://zenodo.org/records/2535967, those are read. Otherwise corruptions.py makes the images; no
seed is published, so figures then agree to about 0.3 points. It needs pictures for frost, and
without them 14 of the 15 kinds are measured.
"""

import argparse
import functools
import json
import os
import sys
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import PIL
import scipy
import torch
from torch import nn

import utils
from benchmarks.corruptions import CORRUPTIONS, corrupt, frost_pictures
from checks import require, whole
from dataset import DATASETS, load_dataset
from device import hardware, keep_freed_memory, pick_device, to_device, versions
from pretrained import WEIGHTS, load, one_line, write_json
from published import find_network

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "cifar10c.json"
REFERENCES = HERE / "cifar10c_references.json"
SEVERITIES = range(1, 6)


def official(name: str, severity: int, root: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of an official file at one severity, and their labels.

    `root` has NAME.npy, the test images at severity 1, then at 2 and so on, and labels.npy: uint8
    (50000, 32, 32, 3) and (50000,).

    Raises:
        ValueError, OSError: a file is not there, or holds something else; the message names it.
    """
    images, labels = (_read(Path(root, f"{each}.npy")) for each in (name, "labels"))
    count = len(labels) // 5
    require(
        f"shape of {name}.npy",
        f"{images.dtype} {images.shape}",
        f"the official file, uint8 {(5 * count, 32, 32, 3)} as its labels.npy",
        images.dtype == np.uint8 and images.shape == (5 * count, 32, 32, 3),
    )
    part = slice(count * (severity - 1), count * severity)
    return np.array(images[part]), np.array(labels[part])


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name the folder of CIFAR-10-C's files")
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: take CIFAR-10-C's file again") from error


def accuracy(model: nn.Module, images: np.ndarray, labels: list[int] | np.ndarray) -> float:
    """Return a network's accuracy in percent on uint8 (N, 32, 32, 3) images."""
    images, labels = torch.from_numpy(images), torch.as_tensor(labels, dtype=torch.int64)
    batches = zip(images.split(500), labels.split(500), strict=True)
    return utils.loss_and_accuracy(*utils.predict(model, batches))[1]


def accuracies_of(
    model: nn.Module,
    kind: str,
    images: np.ndarray,
    labels: list[int],
    root: str | Path | None = None,
) -> list[float]:
    """Return a network's five accuracies in percent under a kind of corruption, by severity.

    With `root`, the folder of the official files, these give as many images and their labels.
    """
    if root is None:
        return [accuracy(model, corrupt(images, kind, each), labels) for each in SEVERITIES]
    pairs = (official(kind, each, root) for each in SEVERITIES)
    return [accuracy(model, *(part[: len(images)] for part in pair)) for pair in pairs]


def kinds_to_measure(asked: list[str] | None, root: str | None) -> list[str]:
    """Return the kinds asked for, or all; without pictures, and unless asked for, not frost.

    Raises:
        OSError: frost is asked for, and there are no pictures of it.
    """
    kinds = asked or list(CORRUPTIONS)
    if root is None and "frost" in kinds:
        try:
            frost_pictures()
        except OSError as error:
            if asked:
                raise
            print(f"14 of 15 kinds: {error}")
            kinds.remove("frost")
    return kinds


def measure(options: argparse.Namespace) -> dict:
    """Measure what the output file does not have yet; return its entry of the network.

    Raises:
        ValueError, OSError: the entry is of other images; or something is missing or damaged.
    """
    root = os.environ.get("CIFAR10C_ROOT") or None
    if root and options.data != "CIFAR-10":
        raise ValueError("CIFAR10C_ROOT has images of CIFAR-10: unset it, or leave out --data")
    require("images", options.images, "a number above 0", whole(1)(options.images))
    kinds = kinds_to_measure(options.kinds, root)
    model, metrics = load(find_network(options.network), options.folder)
    to_device(model, pick_device(options.device))
    dataset = load_dataset("test", options.data)
    images, labels = dataset.data[: options.images], dataset.targets[: options.images]
    setup = {
        "network": metrics["network"],
        "sha256": metrics["sha256"],
        "data": dataset.title,
        "images": len(images),
        "source": "official files" if root else "made with seed 0",
    }
    results, entry = open_entry(options.output, options.folder, setup)
    if "clean" not in entry:
        entry.update(circumstances(model), clean=accuracy(model, images, labels), accuracies={})
    for kind in (kind for kind in kinds if kind not in entry["accuracies"]):
        entry["accuracies"][kind] = accuracies_of(model, kind, images, labels, root)
        entry["mean"] = np.mean(list(entry["accuracies"].values())).item()
        write_json(options.output, results)
        print(row(kind, entry["accuracies"][kind]), flush=True)
    return entry


def open_entry(path: Path, folder: str, setup: dict) -> tuple[dict, dict]:
    """Return the results in a file, and in them the entry of the weights in that folder.

    The entry is new if there was none, or one of other weights.

    Raises:
        ValueError: the entry is of the same weights on other images, or the file is damaged.
    """
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}): remove it") from error
    name = Path(os.path.relpath(folder, HERE.parent)).as_posix()
    if results.get(name, {}).get("sha256") != setup["sha256"]:
        results[name] = dict(setup)
    for key, value in setup.items():
        if results[name][key] != value:
            raise ValueError(
                f"{path} has {name} with {key} {results[name][key]} instead of {value}: choose "
                "another --output"
            )
    return results, results[name]


def circumstances(model: nn.Module) -> dict:
    """Return what else a result depends on."""
    libraries = {"scipy": scipy.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__}
    return {
        "hardware": hardware(next(model.parameters()).device),
        "date": date.today().isoformat(),
        "versions": {**versions(), **libraries},
    }


def row(kind: str, accuracies: list[float]) -> str:
    """Return a line of the table: the accuracy at each severity, the mean, and AugMix's."""
    values = "".join(f"{value:7.1f}" for value in (*accuracies, np.mean(accuracies)))
    return f"{kind:18}{values}{augmix()[kind]:9.1f}"


def table(entry: dict) -> str:
    """Return an entry as lines for a person."""
    kinds, images = entry["accuracies"], f"{entry['images']:,} images of {entry['data']}"
    reference = np.mean([augmix()[kind] for kind in kinds])
    return "\n".join(
        [
            f"{entry['network']} on {images}, {entry['source']}",
            f"{'severity':18}{'1':>7}{'2':>7}{'3':>7}{'4':>7}{'5':>7}{'mean':>7}{'AugMix':>9}",
            *(row(kind, kinds[kind]) for kind in CORRUPTIONS if kind in kinds),
            f"{f'mean of {len(kinds)} of 15':53}{entry['mean']:7.1f}{reference:9.1f}",
            f"{'clean':53}{entry['clean']:7.1f}",
        ]
    )


@functools.cache
def augmix() -> dict[str, float]:
    """Return the published mean accuracies of WRN-40-2 with AugMix, in percent, by kind."""
    rows = json.loads(REFERENCES.read_text())
    return next(each["accuracies"] for each in rows if each["network"] == "WRN-40-2, AugMix")


def main(arguments: list[str] | None = None) -> None:
    """Measure the weights that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", default=WEIGHTS, help="of the weights and metrics (default weights)"
    )
    parser.add_argument(
        "--network", default="NetDilated", help="a name of published.py, or FILE.py:CLASS"
    )
    parser.add_argument("--images", type=int, default=10000, help="the first of them (all)")
    parser.add_argument("--kinds", nargs="+", choices=CORRUPTIONS, help="of corruption (all)")
    parser.add_argument("--data", default="CIFAR-10", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default cifar10c.json")
    try:
        keep_freed_memory()
        print(table(measure(parser.parse_args(arguments))))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"cifar10c.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
