"""CIFAR-10-C: the accuracy of a network under fifteen corruptions at five severities.

`python evaluate.py --corruptions` measures it; ours are in the metrics beside the weights.

The images are read from the official files, of https://zenodo.org/records/2535967, where those
are there. Otherwise corruptions.py makes them; no seed is published, so figures then agree to about
0.3 points. It needs pictures for frost, and without them 14 of the 15 kinds are measured.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import PIL
import scipy
import torch
from torch import nn

import utils
from benchmarks.corruptions import CORRUPTIONS, corrupt, kinds_to_make
from checks import require
from dataset import CIFAR10
from device import hardware, versions

REFERENCES = Path(__file__).resolve().parent / "cifar10c_references.json"
SEVERITIES = range(1, 6)
Accuracies = dict[str, list[float]]  # kind -> the accuracy in percent at each severity


# ---------------------------------------------------------------- measuring


def measure(
    model: nn.Module, dataset: CIFAR10, known: dict | None = None, root: str | Path | None = None
) -> Iterator[tuple[str, dict]]:
    """Measure a network under each kind of corruption of a data set's images.

    Yield the kind with all that is known after it: clean accuracy in percent, number and source of
    the images, circumstances, and `Accuracies`. What is `known` from an earlier call is not
    measured again.

    With `root`, the folder of the official files, these take the place of images that are made.

    Raises:
        ValueError, OSError: what is known is of other images, or a file is missing or damaged.
    """
    images, labels = dataset.data, dataset.targets
    setup = {"images": len(images), "source": "official files" if root else "made with seed 0"}
    for key, value in setup.items():
        if known and known[key] != value:
            raise ValueError(
                f"the metrics have CIFAR-10-C with {key} {known[key]} instead of {value}: remove "
                'their "cifar10c" to measure it anew'
            )
    results = known or {
        "clean": accuracy(model, images, labels),
        **setup,
        **circumstances(model),
        "accuracies": {},
    }
    to_make = CORRUPTIONS if root else kinds_to_make()
    for kind in CORRUPTIONS:
        if kind not in results["accuracies"]:
            if kind not in to_make:
                continue
            results["accuracies"][kind] = accuracies_of(model, kind, images, labels, root)
        yield kind, results


def circumstances(model: nn.Module) -> dict:
    """Return what else a result depends on."""
    libraries = {"scipy": scipy.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__}
    return {
        "hardware": hardware(next(model.parameters()).device),
        "date": date.today().isoformat(),
        "versions": {**versions(), **libraries},
    }


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


# ---------------------------------------------------------------- the official files


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


# ---------------------------------------------------------------- means


def mean(accuracies: Accuracies | dict[str, float], kinds: Iterable[str] | None = None) -> float:
    """Return the mean accuracy in percent over the severities and some kinds, or all."""
    return np.mean([accuracies[kind] for kind in (accuracies if kinds is None else kinds)]).item()


def by_kind(accuracies: Accuracies) -> dict[str, float]:
    """Return the mean accuracy in percent over the severities by kind."""
    return {kind: mean(accuracies, [kind]) for kind in accuracies}


@functools.cache
def published(network: str = "WRN-40-2, AugMix") -> dict[str, float]:
    """Return the published mean accuracies of a network, in percent, by kind."""
    rows = json.loads(REFERENCES.read_text())
    return next(each["accuracies"] for each in rows if each["network"] == network)


# ---------------------------------------------------------------- for a person

HEAD = "CIFAR-10-C, severity      1      2      3      4      5   mean   AugMix"


def row(kind: str, accuracies: list[float]) -> str:
    """Return a line of a table: the accuracy at each severity, the mean, and AugMix's."""
    values = "".join(f"{value:7.1f}" for value in (*accuracies, np.mean(accuracies)))
    return f"{kind:20}{values}{published()[kind]:9.1f}"


def summary(results: dict) -> str:
    """Return the last lines of the table: the mean, of which images it is, and what is missing."""
    accuracies = results["accuracies"]
    count = f"mean of {len(accuracies)} of {len(CORRUPTIONS)} kinds"
    lines = [
        f"{count:55}{mean(accuracies):7.1f}{mean(published(), accuracies):9.1f}",
        f"{results['images']:,} images, {results['source']}; clean {results['clean']:.1f}",
    ]
    if "frost" not in accuracies:
        lines.append("frost needs pictures: benchmarks/README.md says which")
    return "\n".join(lines)
