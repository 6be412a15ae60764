"""The page that classifies your picture in the browser: one file with the network in it."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import CLASSES, MEAN, STD, CIFAR10Sample, load_dataset
from export.layers import Convolution, fold
from model import NetDilated
from pretrained import write_file

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(model: NetDilated, metrics: dict, path: str | Path) -> None:
    """Write the page to `path`: the same bytes for the same weights and metrics.

    Metrics without a test accuracy, as of weights that nobody tested, make a page that claims none.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, value in _texts(model, metrics).items():
        page = page.replace(f"{{{{{name}}}}}", value)
    write_file(path, page.encode())


def _texts(model, metrics):
    """Return what stands in the place of each {{name}} of the template."""
    mistakes, claim = metrics.get("sample_mistakes", []), ""
    if "test_accuracy" in metrics:
        accuracy = f"{metrics['test_accuracy']:.1f}\N{NO-BREAK SPACE}%"
        claim = f" It classifies {accuracy} of {metrics['data']}'s test images correctly."
    return {
        "network": type(model).__name__,
        "parameters": f"{sum(each.numel() for each in model.parameters()):,}",
        "claim": claim,
        "count": str(len(CLASSES)),
        "classes": ", ".join(CLASSES),
        "mistakes": " The network is wrong about some of them." if mistakes else "",
        "samples": "".join(_samples(load_dataset("test", "sample"), mistakes)),
        "data": json.dumps(_network(model, metrics.get("temperature", 1.0))),
    }


def _network(model, temperature):
    """Return what the page's script needs to know of the network."""
    linear, side = model.O[-1], round(32 * model.upsample.scale_factor)
    weight = linear.weight.detach().numpy()[:, :, None, None]
    last = Convolution("O.3", "linear", weight, linear.bias.detach().numpy())
    layers, integers, floats = [], [], []
    for each in (*fold(model), last):
        layers.append(_layer(each, side))
        side = layers[-1]["newSide"]
        whole, scale = quantise(each.weight)
        integers.append(whole.transpose(0, 2, 3, 1))  # channels last
        floats += [scale] if each.bias is None else [scale, each.bias]
    return {
        "classes": CLASSES,
        "mean": MEAN,
        "std": STD,
        "temperature": temperature,
        "layers": layers,
        "integers": _base64(integers, "<i2"),
        "floats": _base64(floats, "<f4"),
    }


def _layer(convolution, side):
    """Return all but the numbers of a convolution of side x side maps, for the page's script."""
    rows, inputs, size, _ = convolution.weight.shape
    names = "kind", "stride", "padding", "dilation", "residual"
    reach = convolution.dilation * (size - 1)
    new_side = (side + 2 * convolution.padding - reach - 1) // convolution.stride + 1
    return {
        **{name: getattr(convolution, name) for name in names},
        "bias": convolution.bias is not None,
        "rows": rows,  # of the kernel that is kept: half of the output channels
        "inputs": inputs,
        "size": size,
        "side": side,
        "newSide": new_side,
        "area": new_side**2,
    }


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a kernel, (out, ...), as 16-bit integers, and what to multiply each output's by."""
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    scale = np.where(largest > 0, largest / 32767, 1).astype(np.float32)
    return np.rint(weight / scale[:, None, None, None]).astype(np.int16), scale


def _base64(arrays, dtype):
    """Return arrays one after another, as base64 of that type."""
    content = b"".join(array.astype(dtype).tobytes() for array in arrays)
    return base64.b64encode(content).decode()


def _samples(dataset: CIFAR10Sample, mistakes):
    """Return a button for an image of each class; every third is a mistake, if there is one."""
    for label, name in enumerate(CLASSES):
        numbers = [n for n, target in enumerate(dataset.targets) if target == label]
        wrong = [n for n in numbers if n in mistakes]
        right = [n for n in numbers if n not in mistakes]
        number = (wrong + right if label % 3 == 0 else right + wrong)[0]
        image = f'<img src="{_png(dataset.data[number])}" style="width: 4rem" alt="">'
        yield f'<button type="button">{image}{name}</button>'


def _png(image):
    """Return the data URI of an image as PNG, uncompressed: versions of zlib would differ."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=0)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
