"""Your own picture: open it, classify it, plot it: `python pictures.py cat.jpg dog.png`."""

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import BinaryIO

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import nn
from tqdm import tqdm

from checks import positive, require, whole
from dataset import CLASSES, normalise, test_transform
from model import NetDilated
from plots import BLUE, finish_figure, show_image
from pretrained import load, one_line

Source = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor
HEIC = b"heic", b"heix", b"hevc", b"mif1", b"msf1"  # the brands of HEIF files


def open_picture(source: Source) -> np.ndarray:
    """Return the largest centred square of a picture, as a person sees it: uint8 (side, side, 3).

    EXIF orientation is obeyed; colours of another profile become sRGB; what is transparent becomes
    white; greyscale, palette, 16-bit and CMYK pictures become RGB; of an animation the first
    picture is taken.

    Args:
        source: the path of an image file, the bytes of one, an open file, a PIL image, an array, or
            a tensor. Arrays are uint8 or uint16 of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or
            floats of these shapes from 0 to 1; tensors are (3, H, W) or (1, H, W).

    Raises:
        ValueError: it is none of these, is damaged, empty or larger than 179 megapixels.
    """
    name = str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
    try:
        with contextlib.ExitStack() as opened:
            rgb = np.array(_to_rgb(_open(source, opened)))
    except Exception as error:  # PIL's decoders raise errors of many kinds on damaged files
        raise ValueError(
            f"{name} can't be used as a picture ({one_line(error)}): give a path of a PNG or JPEG "
            "file, its bytes, a PIL image, or an array of shape (H, W) or (H, W, 3), uint8 or "
            "floats from 0 to 1"
        ) from error
    side = min(rgb.shape[:2])
    top, left = ((length - side) // 2 for length in rgb.shape[:2])
    return rgb[top : top + side, left : left + side]


def _open(source, opened):
    """Return a source as a PIL image. What is opened here is closed with `opened`."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().movedim(0, -1).numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str) and re.match(r"(https?|ftp|file)://", source):
        raise ValueError("it is an address: download it first, and give the path of the file")
    if isinstance(source, (str, Path)):
        source = opened.enter_context(open(Path(source).expanduser(), "rb"))
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if hasattr(source, "read"):
        source = opened.enter_context(_open_file(source))
    if not isinstance(source, Image.Image):
        raise ValueError("it is no path, file, PIL image, array or tensor")
    if not min(source.size):
        raise ValueError(f"it is empty, {source.width} x {source.height} pixels")
    return ImageOps.exif_transpose(source)


def _open_file(file):
    """Return the image in a binary file. Of HEIC photographs, it needs the package pillow-heif."""
    head = file.read(12)
    file.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError(
                "it is an HEIC photograph: save it as JPEG, or pip install pillow-heif"
            ) from None
        register_heif_opener()
    return Image.open(file)


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
        shift = 8 if array.max(initial=0) > 255 else 0  # it may hold values of 8 bits
        array = (array >> shift).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"its type is {array.dtype}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image):
    """Return a PIL image of any mode as RGB in sRGB colours, on white where it is transparent."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile is no profile
            image = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
    return image.convert("RGB")


def _to_bytes(values, mode):
    """Return the values of a PIL image of mode I or F, of 8 or 16 bits or 0 to 1, as bytes."""
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
    """Return the `count` likeliest (class, probability) pairs of pictures of any size, in order.

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
    like, shrink = next(model.parameters(), torch.zeros(())), test_transform()
    model.eval()
    results = []
    for source in tqdm(sources, unit="picture", leave=False, disable=len(sources) < 10):
        small = shrink(image=open_picture(source))["image"]
        with torch.no_grad():
            logits = model(normalise(small[None]).to(like))[0].float().cpu()
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
    """Draw a picture, what the network sees of it, and the result of `classify`.

    Save the figure to `path` and return it.
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
