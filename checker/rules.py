"""The assignment's rules, measured on any network by running it."""

from typing import NamedTuple

import torch
from torch import nn

from .blocks import NUM_CLASSES, Layout, find_blocks
from .layout import convolution_units, is_dilated, is_strided, name_of, place_of, role_of, stride_of
from .neutral import inner_network
from .operations import Run, field_before, run_traced, whole_pixels
from .rows import BROKEN, HOLDS, UNDECIDED, Row, listed, make_row, one_line
from .tables import markdown_table, text_table
from .tracer import Operation
from .transforms import check_transform

PARAMETER_LIMIT, RECEPTIVE_FIELD_LIMIT = 200_000, 44  # the assignment's "fewer than" and "above"


class Limits(NamedTuple):
    """The assignment's "fewer than" and "above"."""

    parameters: int = PARAMETER_LIMIT
    receptive_field: int = RECEPTIVE_FIELD_LIMIT


THIS_YEAR = Limits()


def check_rules(
    model: nn.Module, transform: object | None = None, limits: Limits = THIS_YEAR
) -> list[Row]:
    """Measure the assignment's rules on a network by running it, and on its training transform.

    Args:
        model: from (N, 3, 32, 32) images to (N, 10) logits.
        transform: an albumentations transform, from uint8 (H, W, 3) to (32, 32, 3).
        limits: other ones than this year's.

    Raises:
        ValueError: the network does not run on such an image, or returns something else; the
            transform is none of albumentations, or fails.
    """
    rows = check_run(run_any(model), model, limits)
    return rows if transform is None else rows + check_transform(transform)


def check_run(run: Run, model: nn.Module, limits: Limits) -> list[Row]:
    """Return the rows of a network that `run_any` has run."""
    operations, layout = run.operations, find_blocks(run.operations)
    return [
        check_four_blocks(layout),
        check_three_convolutions(layout),
        check_strides(layout),
        check_pooling(operations),
        check_receptive_field(operations, limits.receptive_field),
        check_separable(operations),
        check_dilated(operations),
        check_global_pooling(operations),
        check_fully_connected(operations),
        check_parameters(model, run.unused, limits.parameters),
    ]


def run_any(model: nn.Module) -> Run:
    """Run a network that anybody wrote. A ValueError says that it is none for this task."""
    name = type(inner_network(model)).__name__
    try:
        run = run_traced(model)
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
    if shape != (2, NUM_CLASSES):
        raise ValueError(
            f"{name} turns (2, 3, 32, 32) images into {shape}: it has to return (N, 10)"
        )
    return run


# ---------------------------------------------------------------- blocks


def _block_row(layout, number, rule, measured, reason):
    """Return one of the rows about blocks: undecided if there is doubt, or with the reason."""
    if layout.doubt:
        return Row(rule, f"{measured}, but {layout.doubt}", UNDECIDED)
    broken = layout.faults()[number]
    return make_row(rule, measured + (f": {reason()}" if broken else ""), not broken)


def check_four_blocks(layout: Layout) -> Row:
    """There are four blocks."""
    measured = f"{len(layout.blocks)}{layout.note}"
    if layout.told:
        measured += f", told by their {layout.told}" + (" (the bonus form)" * layout.bonus)

    def reason():
        if layout.told == "names":
            return listed(layout.names)
        if layout.told:
            return "they end with " + listed([name_of(block[-1]) for block in layout.blocks])
        sizes = [f"{block[0][0].size[0]}x{block[0][0].size[0]}" for block in layout.blocks]
        return f"convolutions on maps of {listed(sizes)}" if sizes else "no convolution"

    return _block_row(layout, 0, "four blocks", measured, reason)


def check_three_convolutions(layout: Layout) -> Row:
    """Each block has three convolutions."""
    measured = " ".join(str(len(block)) for block in layout.blocks) or "0"

    def reason():
        for number, block in enumerate(layout.blocks):
            if len(block) != 3:
                plural = "s" if len(block) > 1 else ""
                names = listed([name_of(unit) for unit in block])
                return f"{layout.name(number)} has {len(block)} convolution{plural}: {names}"
        return "no convolution"

    return _block_row(layout, 1, "three convolutions in each", measured, reason)


def check_strides(layout: Layout) -> Row:
    """The last convolution of each block has stride 2, and no other has.

    In the bonus form it may be dilated instead.
    """

    def figure(unit):
        if layout.bonus and is_dilated(unit) and not is_strided(unit):
            return f"d{max(each.dilation for each in unit)}"
        return f"{stride_of(unit):g}"

    blocks = [" ".join(map(figure, block)) for block in layout.blocks]
    measured = " | ".join(blocks) or "none"
    if layout.bonus:
        measured += " (d: dilated instead of strided, the bonus)"

    def reason():
        for number, block in enumerate(layout.blocks):
            for unit in layout.early_strides(block):
                return f"in {layout.name(number)}, {name_of(unit)} is not the last"
            for unit in layout.plain_ends(block):
                return f"{layout.name(number)} ends with {name_of(unit)}"
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
    return make_row("no pooling but the final one", listed(early) or "none", not early)


def check_receptive_field(operations: list[Operation], limit: int) -> Row:
    """The receptive field of one position before the global pooling is large enough."""
    rule, field = f"receptive field above {limit}", field_before(operations)
    if field == float("inf"):
        where = next((place_of(each) for each in operations if each.kind == "attention"), "forward")
        return Row(rule, f"the whole image, by {where}", HOLDS)
    pixels = whole_pixels(field)
    doubts = [each for each in operations if each.kind in ("other", "squeeze-excite")]
    if pixels <= limit and doubts:
        what = (
            f"{doubts[0].name} can't be followed"
            if doubts[0].kind == "other"
            else "squeeze-excite sees more"
        )
        return Row(rule, f"{pixels}, but {what} ({place_of(doubts[0])})", UNDECIDED)
    return make_row(rule, f"{pixels}", pixels > limit)


def check_separable(operations: list[Operation]) -> Row:
    """There is a depthwise and a pointwise convolution that work on one another."""
    rule, units = "a depthwise-separable convolution", convolution_units(operations)
    pairs = sum(len(unit) > 1 for unit in units)
    if pairs:
        return Row(rule, f"{pairs}", HOLDS)
    grouped = [unit for unit in units if unit[0].groups > 1]
    for unit in grouped:
        if role_of(unit[0]) == "depthwise":
            reason = f"no pointwise one works on the same channels as {name_of(unit)}"
            return Row(rule, f"0: {reason}", BROKEN)
    for unit in grouped:
        groups, channels = unit[0].groups, unit[0].channels[0]
        reason = f"grouped, not depthwise: {groups} groups of {channels} channels"
        return Row(rule, f"0: {name_of(unit)} is {reason}", BROKEN)
    return Row(rule, "0: no grouped convolution", BROKEN)


def check_dilated(operations: list[Operation]) -> Row:
    """There is a dilated convolution."""
    count = sum(map(is_dilated, convolution_units(operations)))
    return make_row("a dilated convolution", f"{count}", count > 0)


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
        measured = f"{len(head)}: " + listed([place_of(each) for each in head])
    return make_row("then at most one fully connected layer", measured, len(head) <= 1)


def check_parameters(model: nn.Module, unused: dict[str, int], limit: int) -> Row:
    """There are few enough parameters, frozen ones included. It is undecided if only those that are
    used are.
    """
    rule, parameters = (
        f"fewer than {limit:,} parameters",
        sum(each.numel() for each in model.parameters()),
    )
    measured, idle = f"{parameters:,}", sum(unused.values())
    measured += (
        f", {idle:,} of them in layers that are not used ({listed(list(unused))})" if idle else ""
    )
    if parameters - idle < limit <= parameters:
        return Row(rule, measured, UNDECIDED)
    return make_row(rule, measured, parameters < limit)


# ---------------------------------------------------------------- tables


def format_rules(rows: list[Row]) -> str:
    """Return the rows of `check_rules` as a text table."""
    return text_table([("rule", "measured", "verdict"), *rows])


def rules_table(rows: list[Row]) -> str:
    """Return the rows of `check_rules` as a Markdown table."""
    return markdown_table(("rule", "measured", "verdict"), rows)
