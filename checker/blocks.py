"""The blocks C1 to C4 of a network, as a person would tell them."""

import itertools
from typing import NamedTuple

from .layout import Unit, convolution_units, is_dilated, is_strided, place_of, role_of, stride_of
from .names import named_blocks, readings
from .tracer import Operation

NUM_CLASSES = 10
Before = dict[int, frozenset[int]]  # id of an operation -> ids of all that led to its input


class Layout(NamedTuple):
    """The convolutions of a network in blocks. A depthwise-separable convolution counts as one."""

    blocks: list[list[Unit]]
    told: str = ""  # what tells the blocks, if it is not the size of the maps
    bonus: bool = False  # the bonus form: dilations may stand in the place of strides
    names: tuple[str, ...] = ()  # as their author calls them
    before: Before = {}
    note: str = ""
    doubt: str = ""  # what makes the blocks uncertain

    def units(self) -> list[Unit]:
        """Return all convolutions in order."""
        return [unit for block in self.blocks for unit in block]

    def name(self, number: int) -> str:
        """Return what to call a block, counted from 0."""
        return self.names[number] if self.names else f"C{number + 1}"

    def faults(self) -> tuple[bool, bool, bool]:
        """Say which of the three rules about blocks are broken."""
        return (
            len(self.blocks) != 4,
            any(len(block) != 3 for block in self.blocks) or not self.blocks,
            not self.blocks or not all(self.ends_well(block) for block in self.blocks),
        )

    def last(self, block: list[Unit]) -> list[Unit]:
        """Return the convolutions on whose results no other of the block works.

        There are several if branches end side by side, as a strided shortcut does.
        """
        used = set().union(*(self.before[id(each)] for unit in block for each in unit))
        return [unit for unit in block if id(unit[-1]) not in used]

    def early_strides(self, block: list[Unit]) -> list[Unit]:
        """Return the convolutions of a block with a stride that are not the last."""
        last = self.last(block)
        return [unit for unit in block if is_strided(unit) and unit not in last]

    def plain_ends(self, block: list[Unit]) -> list[Unit]:
        """Return the last convolutions that have neither stride 2 nor, in the bonus, a dilation."""
        last = self.last(block)
        if self.bonus and any(map(is_dilated, last)) and not any(map(is_strided, last)):
            return []  # a plain shortcut may stand beside a dilated convolution
        return [unit for unit in last if stride_of(unit) != 2]

    def ends_well(self, block: list[Unit]) -> bool:
        """Return whether the last convolution of a block, and no other, ends it as it should."""
        return not self.early_strides(block) and not self.plain_ends(block)


def find_blocks(operations: list[Operation]) -> Layout:
    """Return the convolutions of a network in blocks.

    A block is the convolutions that begin at the same resolution; in the bonus form, which has
    dilated convolutions in the place of some or all strides, it may end with a dilated one. The
    names that their author gave are one more way to tell the blocks, and no other way may cut a
    named block. The last convolution does not count if it gives the logits: it is the O of
    C1C2C3C4O. Where a layout can be read in several ways, the one that keeps the most rules counts.
    """
    first = next(iter(operations), None)
    upsampled = first and first.kind == "resize" and first.stride < 1 and not first.sources
    note = f" on images upsampled to {first.size[1]}x{first.size[1]}" if upsampled else ""
    layouts, before = [], _all_before(operations)
    both = [convolution_units(operations, early) for early in (False, True)]
    # a 1x1 convolution of a pair, whichever way they are paired, is no transition
    paired = {id(each) for units in both for unit in units if len(unit) > 1 for each in unit}
    for units in both:
        whole = [units[:-1], units] if _is_output(units) else [units]
        if len(whole) == 2 and units[-1][0].kernel > 1:
            whole.reverse()
        for some in whole:
            layouts += _layouts(some, before, paired)
    best = min(layouts, key=lambda layout: sum(layout.faults()))
    # only twelve convolutions can keep all rules, so that a doubt makes a difference
    twelve = any(len(layout.units()) == 12 for layout in layouts)
    doubt = _find_doubt(operations[1:] if upsampled else operations) if twelve else ""
    return best._replace(note=note, doubt=doubt)


def _all_before(operations):
    """Return `Before`: what led to the input of each operation, however far before it."""
    before = []
    for operation in operations:
        near = {id(operations[place]) for place in operation.sources}
        before.append(near.union(*(before[place] for place in operation.sources)))
    pairs = zip(operations, before, strict=True)
    return {id(operation): frozenset(each) for operation, each in pairs}


def _is_output(units):
    """Return whether the last convolution gives the logits."""
    return len(units) > 1 and units[-1][-1].channels[1] == NUM_CLASSES


def _layouts(units, before, paired):
    """Return the ways to read these convolutions as blocks, the ones to be preferred first."""
    jumps = [round(unit[0].jump, 3) for unit in units]
    ordered = [unit for _, unit in sorted(zip(jumps, units, strict=True), key=lambda pair: pair[0])]
    jumps.sort()
    sizes = {place for place in range(1, len(units)) if jumps[place - 1] < jumps[place]}
    plain = Layout(_cut(ordered, sizes), before=before)
    joints = _joints(ordered, before)
    found = [
        Layout(_cut(ordered, sizes | (ends & joints)), told, True, before=before)
        for told, ends in (*_transitions(ordered, paired), *_dilations(ordered))
    ]
    found.sort(key=lambda layout: (sum(layout.faults()), abs(len(layout.blocks) - 4)))
    found.insert(0 if sizes else len(found), plain)
    threes = sizes | (_threes(plain.blocks) & joints)
    found.append(Layout(_cut(ordered, threes), "dilations", True, before=before))
    named = named_blocks(units)
    if not named:
        return found
    mine = []
    for blocks, names in readings(units, named):
        bonus = _is_bonus(blocks)
        told = "names" if bonus or blocks != plain.blocks else ""
        mine.append(Layout(blocks, told, bonus, tuple(names), before))
    held = [{id(unit) for unit in units[block.first : block.end]} for block in named]
    found = [_with_names(layout, mine) for layout in found if not _cuts_through(layout, held)]
    good = [layout for layout in found if not any(layout.faults())]
    return good + mine + found


def _is_bonus(blocks):
    return any(is_dilated(block[-1]) and not is_strided(block[-1]) for block in blocks)


def _cuts_through(layout, held):
    """Return whether the convolutions that one name holds are in several blocks of a layout."""
    homes = {id(unit): place for place, block in enumerate(layout.blocks) for unit in block}
    return any(len({homes[each] for each in ids}) > 1 for ids in held)


def _with_names(layout, mine):
    """Return a layout with the author's names for its blocks, if these are the same blocks."""
    same = (other.names for other in mine if other.blocks == layout.blocks)
    return layout._replace(names=next(same, ()))


def _joints(units, before):
    """Return where a convolution has come to an end beside which no other branch lies.

    All earlier convolutions lead to it, and all later ones work on what comes of it.
    """
    behind = [set().union(*(before[id(each)] for each in unit)) for unit in units]
    last = [id(unit[-1]) for unit in units]
    return {
        place
        for place in range(1, len(units))
        if behind[place - 1].issuperset(last[: place - 1])
        and all(last[place - 1] in each for each in behind[place:])
    }


def _threes(blocks):
    """Return where blocks of six, nine or twelve convolutions end a three with a dilated one."""
    places, start = set(), 0
    for block in blocks:
        ends = range(3, len(block), 3)
        if len(block) % 3 == 0 and all(is_dilated(block[end - 1]) for end in ends):
            places |= {start + end for end in ends}
        start += len(block)
    return places


def _transitions(units, paired):
    """Return where blocks may end with a 1x1 convolution to fewer channels, if some are dilated."""
    ends = {
        place
        for place, unit in enumerate(units[:-1], 1)
        if role_of(unit[0]) == "pointwise"
        and id(unit[0]) not in paired
        and unit[0].channels[1] < unit[0].channels[0]
    }
    return [("1x1 convolutions", ends)] if ends and any(map(is_dilated, units)) else []


def _dilations(units):
    """Return where blocks may end: where a dilation is applied, where it falls, where it changes.

    There are no such ways unless more convolutions are dilated than strided.
    """
    dilations = [max(operation.dilation for operation in unit) for unit in units]
    if sum(dilation > 1 for dilation in dilations) <= sum(map(is_strided, units)):
        return []
    pairs = list(enumerate(itertools.pairwise(dilations), 1))
    applied = {place for place, (here, _) in pairs if here > 1}
    falls = {place for place, (here, after) in pairs if here > after}
    changes = {place for place, (here, after) in pairs if here != after}
    return [("dilations", ends) for ends in (applied, falls, changes)]


def _cut(units, ends):
    """Return the convolutions in blocks that end at these places."""
    borders = [0, *sorted(ends), len(units)] if units else []
    return [units[first:last] for first, last in itertools.pairwise(borders)]


def _find_doubt(operations):
    """Say what else than strides and pooling changes the size of a map, or can't be followed."""
    looking = [each for each in operations if each.kind in ("convolution", "pooling")]
    shrunk = {each.jump for each in looking if each.stride > 1}
    for each in operations:
        if each.kind == "other":
            return f"{each.name} in {place_of(each)} can't be followed"
        if each.kind == "resize" and (each.stride < 1 or each.jump not in shrunk):
            before, after = each.size
            return f"{each.name} in {place_of(each)} makes {after}x{after} of {before}x{before}"
    return ""
