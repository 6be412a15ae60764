"""The assignment's rules about augmentation, measured on albumentations' transforms."""

import copy
import functools
import numbers
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .rows import BROKEN, HOLDS, OPTIONAL, Row, listed, make_row, one_line

MEAN_COLOUR = (125, 123, 114)  # of CIFAR-10's training images, as bytes
OLD_NAMES = {f"{end}_{what}" for end in ("min", "max") for what in ("holes", "height", "width")}
OLD_NAMES |= {"fill_value", "mask_fill_value"}


def albumentations():
    """Return the package, which is imported only where a transform is checked.

    Raises:
        ValueError: it can't be imported.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network
    try:
        import albumentations
    except ImportError as error:
        raise ValueError(f"a transform needs albumentations ({one_line(error)})") from error
    return albumentations


def record_arguments() -> None:
    """Keep what CoarseDropout is called with, in `asked` of each one made from now on.

    albumentations 2 ignores the names of arguments that it had before, with a warning.
    """
    coarse_dropout = albumentations().CoarseDropout
    make = coarse_dropout.__init__

    @functools.wraps(make)
    def make_and_keep(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.asked = kwargs

    coarse_dropout.__init__ = make_and_keep


def check_transform(transform: object) -> list[Row]:
    """Return the rows of the rules about augmentation, from what it does to images of noise."""
    A = albumentations()
    if not isinstance(transform, (A.BasicTransform, A.BaseCompose)):
        kind = f"{type(transform).__module__}.{type(transform).__name__}"
        raise ValueError(
            f"transform is {kind}: choose a transform of albumentations, as A.Compose([...])"
        )
    try:
        return [
            _check_share(transform, "HorizontalFlip"),
            _check_share(transform, "ShiftScaleRotate"),
            *_check_hole(transform),
            _check_resize(transform),
        ]
    except Exception as error:
        raise ValueError(
            f"transform fails on a uint8 image ({one_line(error)}): it has to take (H, W, 3)"
        ) from error


def _all_steps(transform):
    """Return the single transforms of a composition in order, however nested."""
    inner = getattr(transform, "transforms", None)
    if inner is None:
        return [transform]
    return [step for part in inner for step in _all_steps(part)]


def _steps(transform, name):
    """Return the transforms of that name in a composition."""
    return [step for step in _all_steps(transform) if type(step).__name__ == name]


def _alone(transform, name):
    """Return a copy of a composition in which only transforms of that name do something.

    They do it as often as before.
    """
    A = albumentations()
    if isinstance(transform, A.BaseCompose):
        transform = copy.deepcopy(transform)
        transform.transforms = [_alone(part, name) for part in transform.transforms]
        return transform
    return transform if type(transform).__name__ == name else A.NoOp(p=transform.p)


def _check_share(transform, name):
    if not _steps(transform, name):
        return Row(name, "missing", BROKEN)
    share = _measure_share(_alone(transform, name))
    return make_row(name, f"changes {share:.0%} of the images", share > 0)


def _check_hole(transform):
    """Return the rows about the size and the colour of the hole."""
    steps = _steps(transform, "CoarseDropout")
    size, colour, note = "missing", None, ""
    if len(steps) > 1:
        size = f"{len(steps)} of them"
    elif steps and not _measure_share(_alone(transform, "CoarseDropout")):
        size = "never"
    elif steps:
        size, colour, note = _hole(steps[0])
        colour = _as_bytes(colour, _normalize_before(transform, steps[0]))
    text = "missing" if colour is None else " ".join(f"{channel:.0f}" for channel in colour)
    if colour is not None and 0 < max(colour) <= 1:
        text += ": the scale is 0 to 255"
    right = colour is not None and np.allclose(colour, MEAN_COLOUR, atol=1)
    return [
        make_row("CoarseDropout: one 16x16 hole", size + note, size == "16x16"),
        make_row("... filled with the mean colour", text, right),
    ]


def _hole(step):
    """Return the size of a hole, its colour (on the scale of the image), and a note.

    What is measured counts. Where a call with old argument names was recorded, what it says counts.
    """
    ignored = [name for name in getattr(step, "invalid_args", []) if name in OLD_NAMES]
    if not ignored:
        return *_measure_hole(step), ""
    if not hasattr(step, "asked"):
        names = listed(ignored)
        return *_measure_hole(step), f": this albumentations ignores the old arguments {names}"
    asked = _New.of(step.asked)
    note = ": old argument names, which albumentations 2 ignores: with it, no such hole is cut; "
    return asked.size(), asked.colour(), note + f"its own names: {asked.call()}"


class _New(NamedTuple):
    """The arguments of CoarseDropout by the names that albumentations 2 has for them."""

    holes: tuple
    heights: tuple
    widths: tuple
    fill: object

    @classmethod
    def of(cls, asked):
        """Translate the old names. A float is a share of the side, 32 pixels."""

        def between(what, otherwise):
            values = asked.get(f"min_{what}"), asked.get(f"max_{what}", otherwise)
            high = round(32 * values[1]) if isinstance(values[1], float) else values[1]
            low = round(32 * values[0]) if isinstance(values[0], float) else values[0]
            return (high if low is None else low, high)

        sides = between("height", 8), between("width", 8)
        return cls(between("holes", 8), *sides, asked.get("fill_value", 0))

    def size(self):
        """Return "16x16", or what else the holes are."""
        corners = list(zip(self.heights, self.widths, strict=True))
        if self.holes != (1, 1):
            return f"{self.holes[0]} to {self.holes[1]} holes"
        return _sizes(corners)

    def colour(self):
        """Return the three channels, if the fill is a colour."""
        values = self.fill if isinstance(self.fill, Sequence | np.ndarray) else [self.fill]
        if len(values) in (1, 3) and all(isinstance(value, numbers.Real) for value in values):
            return np.broadcast_to(np.asarray(values, float), 3)
        return None

    def call(self):
        """Return the call with the new names."""
        colour = self.colour()
        fill = self.fill
        if colour is not None:
            fill = "(" + ", ".join(f"{each:.4g}" for each in colour) + ")"
        return (
            f"CoarseDropout(num_holes_range={self.holes}, hole_height_range={self.heights}, "
            f"hole_width_range={self.widths}, fill={fill})"
        )


def _normalize_before(transform, step):
    """Return the Normalize that comes before a step, however nested; None if there is none."""
    before = None
    for each in _all_steps(transform):
        if each is step:
            return before
        if type(each).__name__ == "Normalize":
            before = each
    return None


def _as_bytes(colour, normalize):
    """Return a colour on the scale of bytes, if it was put into a normalised image."""
    if colour is None or normalize is None:
        return colour
    return (colour * np.asarray(normalize.std) + np.asarray(normalize.mean)) * 255


def _check_resize(transform):
    """Tell what the sides of an image become. One version of the assignment asks for it."""
    image = copy.deepcopy(transform)(image=np.zeros((40, 40, 3), np.uint8))["image"]
    shape = image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2]
    side = "x".join(map(str, shape))
    resizes = bool(_steps(transform, "Resize")) and side == "32x32"
    return Row("Resize", f"40x40 becomes {side}", HOLDS if resizes else OPTIONAL)


def _draws(step, count, kind=np.uint8):
    """Return a noise image, and versions that the transform makes of it, always the same ones."""
    step = copy.deepcopy(step)
    step.set_random_state(np.random.default_rng(0), random.Random(0))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).astype(kind)
    return image, [step(image=image)["image"] for _ in range(count)]


def _measure_share(step):
    """Return the share of images that the transform changes."""
    image, versions = _draws(step, 1000)
    return float(np.mean([(version != image).any() for version in versions]))


def _measure_hole(coarse_dropout):
    """Return the size of the hole, as "16x16", and its colour.

    The size is "none or of another shape" if it is not one rectangle.
    """
    coarse_dropout = copy.deepcopy(coarse_dropout)
    coarse_dropout.p = 1
    image, versions = _draws(coarse_dropout, 50, np.float32)
    sizes, colours = [], []
    for version in versions:
        hole = (version != image).any(2)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        if hole.sum() != rows * columns or not hole.any():
            return "none or of another shape", None
        sizes.append((rows, columns))
        colours.append(version[hole])
    return _sizes([min(sizes), max(sizes)]), np.concatenate(colours).mean(0)


def _sizes(pairs):
    """Return "16x16", or "8x8 to 16x16" where the smallest and the largest differ."""
    return " to ".join(f"{rows}x{columns}" for rows, columns in sorted(set(pairs)))
