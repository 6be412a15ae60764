"""The blocks C1 to C4 of a network, as a person would tell them."""

import itertools
from typing import NamedTuple

from .layout import Unit, convolution_units, is_dilated, is_strided, place_of, role_of, stride_of
from .tracer import Operation

NUM_CLASSES = 10


class Layout(NamedTuple):
    """The convolutions of a network in blocks. A depthwise-separable convolution counts as one."""

    blocks: list[list[Unit]]
    bonus: str = (
        ""  # what tells the blocks of the bonus form, which has dilations in the place of strides
    )
    note: str = ""
    doubt: str = ""  # what makes the blocks uncertain

    def units(self) -> list[Unit]:
        """Return all convolutions in order."""
        return [unit for block in self.blocks for unit in block]

    def faults(self) -> tuple[bool, bool, bool]:
        """Say which of the three rules about blocks are broken."""
        return (
            len(self.blocks) != 4,
            any(len(block) != 3 for block in self.blocks) or not self.blocks,
            not self.blocks or not all(self.ends_well(block) for block in self.blocks),
        )

    def ends_well(self, block: list[Unit]) -> bool:
        """Return whether the last convolution of a block, and no other, has stride 2, or is dilated
        in the bonus.
        """
        return (
            stride_of(block[-1]) == 2
            or (self.bonus and is_dilated(block[-1]) and not is_strided(block[-1]))
        ) and (not any(map(is_strided, block[:-1])))


def find_blocks(operations: list[Operation]) -> Layout:
    """Return the convolutions of a network in blocks.

    A block is the convolutions that begin at the same resolution; in the bonus form, which has
    dilated convolutions in the place of some or all strides, it may end with a dilated one. The
    last convolution does not count if it gives the logits: it is the O of C1C2C3C4O. Where a layout
    can be read in several ways, the one that keeps the most rules counts.
    """
    first = next(iter(operations), None)
    upsampled = first and first.kind == "resize" and first.stride < 1 and not first.sources
    note = f" on images upsampled to {first.size[1]}x{first.size[1]}" if upsampled else ""
    readings = []
    for early in (False, True):
        units = convolution_units(operations, early)
        whole = [units[:-1], units] if _is_output(units) else [units]
        if len(whole) == 2 and units[-1][0].kernel > 1:
            whole.reverse()
        for some in whole:
            jumps = sorted({round(unit[0].jump, 3) for unit in some})
            plain = Layout(
                [[unit for unit in some if round(unit[0].jump, 3) == jump] for jump in jumps],
                note=note,
            )
            bonus = [
                *(
                    Layout(blocks, "1x1 convolutions", note)
                    for blocks in _cut_after_transitions(some)
                ),
                *(Layout(blocks, "dilations", note) for blocks in _cut_at_dilations(some)),
            ]
            bonus.sort(key=lambda layout: (sum(layout.faults()), abs(len(layout.blocks) - 4)))
            readings += [*bonus, plain] if len(jumps) == 1 else [plain, *bonus]
            readings.append(Layout(_cut_in_threes(plain.blocks), "dilations", note))
    best = min(readings, key=lambda layout: sum(layout.faults()))
    twelve = any(
        len(layout.units()) == 12 for layout in readings
    )  # otherwise no doubt could save it
    return best._replace(doubt=_find_doubt(operations[bool(upsampled) :]) if twelve else "")


def _is_output(units):
    """Return whether the last convolution gives the logits."""
    return len(units) > 1 and units[-1][-1].channels[1] == NUM_CLASSES


def _cut_in_threes(blocks):
    """Return the blocks, with those of six, nine or twelve convolutions cut where each third one is
    dilated.
    """
    parts = []
    for block in blocks:
        threes = [block[first : first + 3] for first in range(0, len(block), 3)]
        whole = len(block) % 3 == 0 and all(is_dilated(three[-1]) for three in threes[:-1])
        parts += threes if whole else [block]
    return parts


def _cut_after_transitions(units):
    """Return the way to tell blocks by 1x1 convolutions to fewer channels, if there are dilated
    convolutions at all.
    """
    if not any(map(is_dilated, units)):
        return []
    return [
        _cut(
            units,
            [
                is_strided(unit)
                or (
                    len(unit) == 1
                    and role_of(unit[0]) == "pointwise"
                    and unit[0].channels[1] < unit[0].channels[0]
                )
                for unit in units[:-1]
            ],
        )
    ]


def _cut_at_dilations(units):
    """Return the ways to tell blocks by dilations: where one is applied, where it falls, where it
    changes.

    There are none unless more convolutions are dilated than strided.
    """
    dilations = [max(operation.dilation for operation in unit) for unit in units]
    if sum(dilation > 1 for dilation in dilations) <= sum(map(is_strided, units)):
        return []
    pairs = list(zip(dilations, dilations[1:], units, strict=False))
    cuts = [
        [before > 1 or is_strided(unit) for before, _, unit in pairs],
        [before > after or is_strided(unit) for before, after, unit in pairs],
        [before != after or is_strided(unit) for before, after, unit in pairs],
    ]
    return [_cut(units, cut) for cut in cuts]


def _cut(units, ends):
    """Return the convolutions in blocks, each up to one that is an end."""
    borders = [0, *(place for place, end in enumerate(ends, 1) if end), len(units)]
    return [units[first:last] for first, last in itertools.pairwise(borders)]


def _find_doubt(operations):
    """Say what else than strides and pooling changes the size of a map, or can't be followed."""
    shrunk = {
        each.jump
        for each in operations
        if each.kind in ("convolution", "pooling") and each.stride > 1
    }
    for each in operations:
        if each.kind == "other":
            return f"{each.name} in {place_of(each)} can't be followed"
        if each.kind == "resize" and (each.stride < 1 or each.jump not in shrunk):
            before, after = each.size
            return f"{each.name} in {place_of(each)} makes {after}x{after} of {before}x{before}"
    return ""
