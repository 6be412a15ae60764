"""The blocks that a network's author named: block1, convblock1 with trans1, C1, layer1."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .layout import Unit

# block1, conv_block_1, conv1_2 (block 1), c1a: a word, its number, and perhaps more
NUMBERED = re.compile(r"(?P<word>[A-Za-z_]*?[A-Za-z])_?(?P<number>\d+)(?:[_A-Za-z].*)?$")


class NamedBlock(NamedTuple):
    """Convolutions that one numbered name holds: those from place `first` to before `end`."""

    name: str
    first: int
    end: int


def named_blocks(units: list[Unit]) -> list[NamedBlock]:
    """Return the blocks that the author named, in order; none if the names tell no blocks.

    Names tell blocks if one word with several numbers, as block1 to block4, holds at least half of
    the convolutions, more than one in the mean, and each number holds neighbours.
    """
    labels = [list(_labels(unit[0].where)) for unit in units]
    words = Counter(word for each in labels for word, _, _ in each)
    for word, _ in words.most_common():
        blocks = _blocks_of(word, labels)
        held = sum(block.end - block.first for block in blocks)
        if len(blocks) >= 2 and held >= 1.5 * len(blocks) and 2 * held >= len(units):
            return blocks
    return []


def _labels(where: str) -> Iterator[tuple[str, str, str]]:
    """Return (word, number, name) for each numbered part of the path of a module, outermost first.

    The word has the path before it, so that equal names in different modules differ.
    """
    path = ""
    for part in where.split("."):
        found = NUMBERED.match(part)
        if found:
            name = path + part[: found.end("number")]
            yield path + found["word"], found["number"], name
        path += part + "."


def _blocks_of(word, labels):
    """Return the blocks of one word; none if those of a number are not neighbours."""
    places = {}
    for place, each in enumerate(labels):
        for other, _, name in each:
            if other == word:
                places.setdefault(name, []).append(place)
    blocks = [NamedBlock(name, each[0], each[-1] + 1) for name, each in places.items()]
    if any(block.end > after.first for block, after in zip(blocks, blocks[1:], strict=False)):
        return []
    return blocks


def readings(
    units: list[Unit], blocks: list[NamedBlock]
) -> Iterator[tuple[list[list[Unit]], list[str]]]:
    """Return the ways to read named blocks: the convolutions of each, and its name.

    What stands between two of them, as a transition, belongs to the one before, to the one after,
    or to none.
    """
    names = [block.name for block in blocks]
    yield _cut(units, [block.first for block in blocks[1:]]), names
    yield _cut(units, [block.end for block in blocks[:-1]]), names
    borders = sorted({border for block in blocks for border in (block.first, block.end)})
    own = [part for part in _cut(units, borders) if part]
    name_of_first = {id(units[block.first]): block.name for block in blocks}
    yield own, [name_of_first.get(id(part[0]), _outer_name(part[0])) for part in own]


def _cut(units, borders):
    """Return the parts of a list between these places."""
    return [units[first:end] for first, end in itertools.pairwise([0, *borders, len(units)])]


def _outer_name(unit):
    return unit[0].where.split(".")[0]
