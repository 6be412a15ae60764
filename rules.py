"""The assignment's rules, measured on any network by running it: `check_rules`, and a command for a
folder of answers.

python rules.py answers/*.py
"""

import copy
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from checker.layout import (
    Layout,
    convolution_units,
    find_blocks,
    is_dilated,
    is_strided,
    name_of,
    place_of,
    stride_of,
)
from checker.operations import field_before, run_traced, whole_pixels
from checker.tables import markdown_table, text_table
from checker.tracer import Operation
from checkpoint import one_line
from dataset import CLASSES, FILL, A

PARAMETER_LIMIT, RECEPTIVE_FIELD_LIMIT = 200_000, 44  # the assignment's "fewer than" and "above"
HOLDS, BROKEN, UNDECIDED = "holds", "BROKEN", "undecided"


class Row(NamedTuple):
    """A rule, what was measured, and the verdict: holds, BROKEN, or undecided, where what was
    measured says why.
    """

    rule: str
    measured: str
    verdict: str


def _row(rule, measured, holds):
    return Row(rule, measured, HOLDS if holds else BROKEN)


def check_rules(
    model: nn.Module, transform: A.BasicTransform | A.BaseCompose | None = None
) -> list[Row]:
    """Measure the assignment's rules on any network by running it, and on its training transform if
    there is one.

    Args:
        model: from (N, 3, 32, 32) images to (N, 10) logits.
        transform: an albumentations transform, from uint8 (H, W, 3) to (32, 32, 3).

    Raises:
        ValueError: the network does not run on such an image, or returns something else; the
            transform is none of albumentations, or fails.
    """
    operations, _, unused = _run_any(model)
    layout = find_blocks(operations)
    return [
        check_four_blocks(layout),
        check_three_convolutions(layout),
        check_strides(layout),
        check_pooling(operations),
        check_receptive_field(operations),
        check_separable(operations),
        check_dilated(operations),
        check_global_pooling(operations),
        check_fully_connected(operations),
        check_parameters(model, unused),
        *(check_transform(transform) if transform is not None else []),
    ]


def _run_any(model):
    """Run a network that anybody wrote. A ValueError says that it is none for this task."""
    name = type(model).__name__
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    try:
        run = run_traced(model, torch.zeros(2, 3, 32, 32))
    except Exception as error:
        raise ValueError(
            f"{name} does not run on (2, 3, 32, 32) images ({one_line(error)}): it has to take "
            "(N, 3, 32, 32) on this machine, and return (N, 10)"
        ) from error
    shape = (
        tuple(run.result.shape)
        if isinstance(run.result, torch.Tensor)
        else type(run.result).__name__
    )
    if shape != (2, len(CLASSES)):
        raise ValueError(
            f"{name} turns (2, 3, 32, 32) images into {shape}: it has to return (N, 10)"
        )
    return run


# ---------------------------------------------------------------- blocks


def _listed(items, most=6):
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _block_row(layout, number, rule, measured, reason):
    """Return one of the rows about blocks: undecided if there is doubt, with the reason if it is
    broken.
    """
    if layout.doubt:
        return Row(rule, f"{measured}, but {layout.doubt}", UNDECIDED)
    broken = layout.faults()[number]
    return _row(rule, measured + (f": {reason()}" if broken else ""), not broken)


def check_four_blocks(layout: Layout) -> Row:
    """There are four blocks."""
    bonus = f", told by their {layout.bonus} (the bonus form)" if layout.bonus else ""
    sizes = [f"{block[0][0].size[0]}x{block[0][0].size[0]}" for block in layout.blocks]

    def reason():
        if layout.bonus:
            return "they end with " + _listed([name_of(block[-1]) for block in layout.blocks])
        return f"convolutions on maps of {_listed(sizes)}" if sizes else "no convolution"

    return _block_row(layout, 0, "four blocks", f"{len(layout.blocks)}{layout.note}{bonus}", reason)


def check_three_convolutions(layout: Layout) -> Row:
    """Each block has three convolutions."""
    measured = " ".join(str(len(block)) for block in layout.blocks) or "0"

    def reason():
        for number, block in enumerate(layout.blocks, 1):
            if len(block) != 3:
                plural = "s" if len(block) > 1 else ""
                return f"C{number} has {len(block)} convolution{plural}: {_listed([name_of(unit) for unit in block])}"
        return "no convolution"

    return _block_row(layout, 1, "three convolutions in each", measured, reason)


def check_strides(layout: Layout) -> Row:
    """The last convolution of each block has stride 2 (in the bonus form: is dilated), and no other
    has.
    """
    measured = (
        " | ".join(
            " ".join(
                f"d{max(each.dilation for each in unit)}"
                if layout.bonus and is_dilated(unit) and not is_strided(unit)
                else f"{stride_of(unit):g}"
                for unit in block
            )
            for block in layout.blocks
        )
        or "none"
    )
    measured += " (d: dilated instead of strided, the bonus)" if layout.bonus else ""

    def reason():
        for number, block in enumerate(layout.blocks, 1):
            early = [name_of(unit) for unit in block[:-1] if is_strided(unit)]
            if early:
                return f"in C{number}, {early[0]} is not the last"
            if not layout.ends_well(block):
                return f"C{number} ends with {name_of(block[-1])}"
        return "no convolution"

    return _block_row(layout, 2, "stride 2 in the last of each, only there", measured, reason)


# ---------------------------------------------------------------- the other rules of the network

POOLING = ("pooling", "global pooling", "global average pooling")


def _used(operations):
    """Return the places of the operations on whose results a convolution or pooling works, however
    far before it.
    """
    used = set()
    for place in reversed(range(len(operations))):
        if place in used or operations[place].kind in ("convolution", "attention", *POOLING):
            used |= operations[place].sources
    return used


def _pooling_name(operation):
    """Return a pooling as "pool1: 2x2 max pooling"."""
    kind = (
        "max"
        if "max" in operation.name
        else "average"
        if "avg" in operation.name
        else operation.name
    )
    return f"{place_of(operation)}: {operation.kernel}x{operation.kernel} {kind} pooling"


def check_pooling(operations: list[Operation]) -> Row:
    """There is no pooling on whose result a convolution works. Squeeze-and-excitation does not
    count.
    """
    used = _used(operations)
    early = [
        _pooling_name(each)
        for place, each in enumerate(operations)
        if each.kind in POOLING and place in used
    ]
    return _row("no pooling but the final one", _listed(early) or "none", not early)


def check_receptive_field(operations: list[Operation]) -> Row:
    """The receptive field of one position before the global pooling is large enough."""
    rule, field = f"receptive field above {RECEPTIVE_FIELD_LIMIT}", field_before(operations)
    if field == float("inf"):
        where = next((place_of(each) for each in operations if each.kind == "attention"), "forward")
        return Row(rule, f"the whole image, by {where}", HOLDS)
    pixels = whole_pixels(field)
    doubts = [each for each in operations if each.kind in ("other", "squeeze-excite")]
    if pixels <= RECEPTIVE_FIELD_LIMIT and doubts:
        what = (
            f"{doubts[0].name} can't be followed"
            if doubts[0].kind == "other"
            else "squeeze-excite sees more"
        )
        return Row(rule, f"{pixels}, but {what} ({place_of(doubts[0])})", UNDECIDED)
    return _row(rule, f"{pixels}", pixels > RECEPTIVE_FIELD_LIMIT)


def check_separable(operations: list[Operation]) -> Row:
    """There is a depthwise-separable convolution: a depthwise and a pointwise one that work on one
    another.
    """
    units = convolution_units(operations)
    pairs = sum(len(unit) > 1 for unit in units)
    alone = [name_of(unit) for unit in units if any(operation.groups > 1 for operation in unit)]
    reason = (
        f": no pointwise one works on the same channels as {alone[0]}"
        if alone
        else ": no grouped convolution"
    )
    return _row(
        "a depthwise-separable convolution", f"{pairs}" + (reason if not pairs else ""), pairs > 0
    )


def check_dilated(operations: list[Operation]) -> Row:
    """There is a dilated convolution."""
    count = sum(map(is_dilated, convolution_units(operations)))
    return _row("a dilated convolution", f"{count}", count > 0)


def check_global_pooling(operations: list[Operation]) -> Row:
    """The last map is averaged over all of its positions."""
    used, rule = _used(operations), "global average pooling at the end"
    last = [
        each for place, each in enumerate(operations) if each.kind in POOLING and place not in used
    ]
    for each in last:
        if each.kind == "global average pooling":
            return Row(rule, f"{each.kind} of {each.size[0]}x{each.size[0]}", HOLDS)
    if not last:
        return Row(rule, "none", BROKEN)
    before, after = last[-1].size
    measured = f"{_pooling_name(last[-1])} of a {before}x{before} map"
    if after > 1:
        measured += f" leaves {after}x{after}"
    elif last[-1].kind == "pooling":
        measured += " leaves positions out"
    return Row(rule, measured, BROKEN)


def check_fully_connected(operations: list[Operation]) -> Row:
    """After the last convolution there is at most one fully connected layer; a 1x1 convolution of a
    1x1 map is one.
    """
    used = _used(operations)
    head = [
        each
        for place, each in enumerate(operations)
        if each.kind == "fully connected" and place not in used
    ]
    measured = "fully connected" if len(head) == 1 else "none"
    if len(head) > 1:
        measured = f"{len(head)}: " + _listed([place_of(each) for each in head])
    return _row("then at most one fully connected layer", measured, len(head) <= 1)


def check_parameters(model: nn.Module, unused: dict[str, int]) -> Row:
    """There are few enough parameters, frozen ones included. It is undecided if only those that are
    used are.
    """
    rule, parameters = (
        f"fewer than {PARAMETER_LIMIT:,} parameters",
        sum(each.numel() for each in model.parameters()),
    )
    measured, idle = f"{parameters:,}", sum(unused.values())
    measured += (
        f", {idle:,} of them in layers that are not used ({_listed(list(unused))})" if idle else ""
    )
    if parameters - idle < PARAMETER_LIMIT <= parameters:
        return Row(rule, measured, UNDECIDED)
    return _row(rule, measured, parameters < PARAMETER_LIMIT)


# ---------------------------------------------------------------- augmentation


def check_transform(transform: A.BasicTransform | A.BaseCompose) -> list[Row]:
    """Return the rows of the rules about augmentation, from what the transforms do to images of
    noise.
    """
    if not isinstance(transform, (A.BasicTransform, A.BaseCompose)):
        raise ValueError(
            f"transform is {type(transform).__module__}.{type(transform).__name__}: choose a transform of "
            "albumentations, as A.Compose([...])"
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
    if isinstance(transform, A.BaseCompose):
        transform = copy.deepcopy(transform)
        transform.transforms = [_alone(part, name) for part in transform.transforms]
        return transform
    return transform if type(transform).__name__ == name else A.NoOp(p=transform.p)


def _check_share(transform, name):
    if not _steps(transform, name):
        return Row(name, "missing", BROKEN)
    share = _measure_share(_alone(transform, name))
    return _row(name, f"changes {share:.0%} of the images", share > 0)


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
        _row("CoarseDropout: one 16x16 hole", hole, hole == "16x16"),
        _row(
            "... filled with the mean colour",
            text,
            colour is not None and np.allclose(colour, FILL, atol=1),
        ),
    ]


def _check_resize(transform):
    image = transform(image=np.zeros((40, 40, 3), np.uint8))["image"]
    side = "x".join(
        map(str, image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2])
    )
    return _row(
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


# ---------------------------------------------------------------- tables


def format_rules(rows: list[Row]) -> str:
    """Return the rows of `check_rules` as a text table."""
    return text_table([("rule", "measured", "verdict"), *rows])


def rules_table(rows: list[Row]) -> str:
    """Return the rows of `check_rules` as a Markdown table."""
    return markdown_table(("rule", "measured", "verdict"), rows)


if __name__ == "__main__":
    from checker.answers import main  # which imports this module

    main()
