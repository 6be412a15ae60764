"""Your own picture: open it, classify it, plot it: `python pictures.py cat.jpg dog.png`."""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from tqdm.auto import tqdm

from checks import positive, require, whole
from dataset import CLASSES, normalise, test_transform
from model import NetDilated
from plots import BLUE, finish_figure, show_image
from pretrained import load, one_line

Source = str | Path | Image.Image | np.ndarray


def open_picture(source: Source) -> np.ndarray:
    """Return a picture as the uint8 (side, side, 3) array of its largest centred square, as a
    person sees it.

    Args:
        source: the path of an image file, a PIL image, or an array: uint8 or uint16 of (H, W), (H,
            W, 1), (H, W, 3) or (H, W, 4), or floats of these shapes from 0 to 1. EXIF orientation
            is obeyed; what is transparent becomes white; greyscale, palette, 16-bit and CMYK
            pictures become RGB; of an animation the first picture is taken.

    Raises:
        ValueError: it is none of these, is damaged, empty or larger than 179 megapixels.
    """
    name = str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
    try:
        image = _from_array(source) if isinstance(source, np.ndarray) else source
        if isinstance(source, (str, Path)):
            image = Image.open(source)
        if not isinstance(image, Image.Image):
            raise ValueError("it is no path, PIL image or array")
        if not min(image.size):
            raise ValueError(f"it is empty, {image.width} x {image.height} pixels")
        rgb = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # PIL's decoders raise errors of many kinds on damaged files
        raise ValueError(
            f"{name} can't be used as a picture ({one_line(error)}): give a path of a PNG or JPEG "
            "file, a PIL image, or an array of shape (H, W) or (H, W, 3), uint8 or floats from 0 "
            "to 1"
        ) from error
    side = min(rgb.shape[:2])
    top, left = ((length - side) // 2 for length in rgb.shape[:2])
    return rgb[top : top + side, left : left + side]


def _from_array(array):
    """Return an array as a PIL image."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"its shape is {array.shape}")
    if array.dtype.kind == "f":
        if not (
            np.isfinite(array).all() and 0 <= array.min(initial=0) and array.max(initial=0) <= 1
        ):
            raise ValueError("its floats are not all from 0 to 1")
        array = np.round(255 * array).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"its type is {array.dtype}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image):
    """Return a PIL image of any mode as RGB, on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_bytes(values, mode):
    """Return the values of a PIL image of mode I or F as bytes: they are of 8 or 16 bits, or floats
    from 0 to 1.
    """
    if not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 65535):
        raise ValueError(f"its values, of mode {mode}, are not all from 0 to 65535")
    if mode.startswith("I;") or values.max() > 255:
        values = values / 256
    elif mode == "F" and values.max() <= 1:
        values = 255 * values
    return values.astype(np.uint8)


def classify(
    model: nn.Module,
    sources: Source | list[Source],
    count: int = 5,
    temperature: float = 1.0,
    classes: tuple[str, ...] = CLASSES,
) -> list:
    """Classify pictures of any size: return the `count` likeliest (class, probability) pairs of
    each, in order.

    The model is left in evaluation mode.

    Args:
        sources: a list of what `open_picture` takes, from which a progress bar is made if it is
            long, or one of them.
        temperature: what the logits are divided by, to calibrate the probabilities; see Guo et al.,
            On calibration of modern neural networks, https://arxiv.org/abs/1706.04599.
        classes: the names of the classes, if they are not CIFAR-10's.

    Returns:
        a list of lists, or, for one picture, its list.

    Raises:
        ValueError: a source is no picture, or an argument is not one of those allowed.
    """
    require(
        "model",
        type(model).__name__,
        "a network: the first of the pair that load returns",
        isinstance(model, nn.Module),
    )
    require(
        "count", count, f"1 to {len(classes)}, the number of classes", whole(1, len(classes))(count)
    )
    require("temperature", temperature, "a number above 0", positive(temperature))
    if not isinstance(sources, list):
        return classify(model, [sources], count, temperature, classes)[0]
    device, shrink = next(model.parameters()).device, test_transform()
    model.eval()
    results = []
    for source in tqdm(sources, unit="picture", leave=False, disable=len(sources) < 10):
        small = shrink(image=open_picture(source))["image"]
        with torch.no_grad():
            logits = model(normalise(small[None]).to(device))[0].float().cpu()
        require(
            "the number of classes",
            len(classes),
            f"{len(logits)} names, one for each logit of the network",
            len(classes) == len(logits),
        )
        probabilities, numbers = (logits / temperature).softmax(0).topk(count)
        results.append(
            [
                (classes[number], probability)
                for number, probability in zip(
                    numbers.tolist(), probabilities.tolist(), strict=True
                )
            ]
        )
    return results


def plot_picture(
    source: Source, likeliest: list[tuple[str, float]], path: str | Path
) -> plt.Figure:
    """Draw a picture, what the network sees of it, and the result of `classify`; save to `path`,
    return the figure.
    """
    picture = open_picture(source)
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 3.2), layout="constrained", width_ratios=(1, 1, 1.3)
    )
    for axis, image, title in zip(
        axes[:2],
        (picture, test_transform()(image=picture)["image"]),
        (f"{len(picture)} x {len(picture)} pixels", "what the network sees: 32 x 32"),
        strict=True,
    ):
        show_image(axis, image)
        axis.set_title(title, fontsize=10)
    names, probabilities = zip(*reversed(likeliest), strict=True)
    bars = axes[2].barh(names, probabilities, color=BLUE)
    axes[2].bar_label(bars, [f"{probability:.0%}" for probability in probabilities], padding=3)
    axes[2].set(xlim=(0, 1.15), xticks=[])
    axes[2].spines[["top", "right", "bottom"]].set_visible(False)
    return finish_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Classify the pictures that the arguments name, a line each."""
    parser = argparse.ArgumentParser(description="Classify pictures with the committed network.")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="the path of an image file")
    parser.add_argument("--count", type=int, default=3, help="how many classes are shown (3)")
    parser.add_argument("--save", metavar="FIGURE", help="draw one picture with its classes")
    options = parser.parse_args(arguments)
    if options.save and len(options.pictures) > 1:
        parser.error("--save draws one picture: give only one")
    try:
        model, metrics = load(NetDilated)
        temperature = metrics.get("temperature", 1.0)
    except (ValueError, OSError) as error:
        sys.exit(f"pictures.py: {error}")
    status = 0
    for picture in options.pictures:
        try:
            likeliest = classify(model, picture, options.count, temperature)
        except ValueError as error:  # the others go on
            print(f"pictures.py: {error}", file=sys.stderr)
            status = 1
            continue
        classes = ", ".join(f"{name} {probability:.1%}" for name, probability in likeliest)
        print(f"{picture}: {classes}")
        if options.save:
            plot_picture(picture, likeliest, options.save)
            print(f"drawn in {options.save}")
    sys.exit(status)


if __name__ == "__main__":
    main()
