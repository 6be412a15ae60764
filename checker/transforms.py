"""The assignment's rules about augmentation, measured on albumentations' transforms."""

import copy
import os
import random

import numpy as np
import torch

from .rows import BROKEN, Row, make_row, one_line

MEAN_COLOUR = (125, 123, 114)  # of CIFAR-10's training images, as bytes


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


def check_transform(transform: object) -> list[Row]:
    """Return the rows of the rules about augmentation, from what the transforms do to images of
    noise.
    """
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


def _steps(transform, name):
    """Return the transforms of that name in a composition, however nested."""
    inner = getattr(transform, "transforms", None)
    if inner is not None:
        return [step for part in inner for step in _steps(part, name)]
    return [transform] if type(transform).__name__ == name else []


def _alone(transform, name):
    """Return a copy of a composition in which only the transforms of that name do something, as
    often as before.
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
    steps = _steps(transform, "CoarseDropout")
    hole, colour = "missing", None
    if len(steps) > 1:
        hole = f"{len(steps)} of them"
    elif steps:
        share = _measure_share(_alone(transform, "CoarseDropout"))
        hole, colour = _measure_hole(steps[0]) if share else ("never", None)
    text = "missing" if colour is None else " ".join(f"{channel:.0f}" for channel in colour)
    return [
        make_row("CoarseDropout: one 16x16 hole", hole, hole == "16x16"),
        make_row(
            "... filled with the mean colour",
            text,
            colour is not None and np.allclose(colour, MEAN_COLOUR, atol=1),
        ),
    ]


def _check_resize(transform):
    image = transform(image=np.zeros((40, 40, 3), np.uint8))["image"]
    side = "x".join(
        map(str, image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2])
    )
    return make_row(
        "Resize", f"40x40 becomes {side}", bool(_steps(transform, "Resize")) and side == "32x32"
    )


def _draws(step, count):
    """Return a noise image, and versions of it that the transform makes, the same ones every
    time.
    """
    step = copy.deepcopy(step)
    step.set_random_state(np.random.default_rng(0), random.Random(0))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
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
    image, versions = _draws(coarse_dropout, 50)
    sizes, colours = [], []
    for version in versions:
        hole = (version != image).any(2)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        if hole.sum() != rows * columns or not hole.any():
            return "none or of another shape", None
        sizes, colours = [*sizes, (rows, columns)], [*colours, version[hole]]
    smallest_and_largest = sorted({min(sizes), max(sizes)})
    return " to ".join(
        f"{rows}x{columns}" for rows, columns in smallest_and_largest
    ), np.concatenate(colours).mean(0)
