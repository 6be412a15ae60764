"""Blocks as a person reads them: the author's names, branches, transitions, pairs, heads."""

import pytest
import torch
from torch import nn

from answers import BLOCKS, C, S, body, head, table, unit

# ---------------------------------------------------------------- small cases: text to network


def layer(text, a, b):
    """Return cb, sep or 1x1, perhaps with /d2, /s2 or /s2d2: convolution, norm, ReLU."""
    kind, _, change = text.partition("/")
    stride = 2 if "s2" in change else 1
    dilation = int(change.partition("d")[2] or 1)
    if kind == "sep":
        pair = C(a, a, 3, stride, dilation, dilation, a), C(a, b, 1)
        return S(*pair, nn.BatchNorm2d(b), nn.ReLU())
    kernel = 1 if kind == "1x1" else 3
    padding = dilation * (kernel // 2)
    return S(C(a, b, kernel, stride, padding, dilation), nn.BatchNorm2d(b), nn.ReLU())


def network(text, name="block"):
    """Return a network as a person would sketch it: square brackets name a block."""
    blocks, channels = nn.Sequential(), 3
    parts = [part.strip(" ,") for part in text.replace("[", "|[").replace("]", "]|").split("|")]
    number, between = 0, 0
    for part in filter(None, parts):
        layers = S()
        for each in part.strip("[]").split(","):
            layers.append(layer(each.strip(), channels, 16))
            channels = 16
        number, between = (number + 1, between) if "[" in part else (number, between + 1)
        blocks.add_module(f"{name}{number}" if "[" in part else f"t{between}", layers)
    blocks.add_module("gap", nn.AdaptiveAvgPool2d(1))
    blocks.add_module("flatten", nn.Flatten())
    blocks.add_module("fc", nn.Linear(16, 10))
    return blocks


CASES = {  # a network: blocks, convolutions in each, strides: text and verdict
    "[cb, sep, cb] [sep, sep, cb/d2] [sep, sep, cb/d4] [sep, sep, cb/d8]": (
        ("4, told by their names (the bonus form)", True),
        ("3 3 3 3", True),
        ("1 1 1 | 1 1 d2 | 1 1 d4 | 1 1 d8", False),
    ),
    "[cb, cb, sep] [cb, cb, cb/d2] [cb, cb, cb/d2] [cb, cb, cb]": (
        ("4, told by their names (the bonus form)", True),
        ("3 3 3 3", True),
        ("1 1 1 | 1 1 d2 | 1 1 d2 | 1 1 1", False),
    ),
    "[sep, cb/d2] [cb, cb, cb/s2] [cb, cb, cb/s2] [cb, cb, cb/d2]": (
        ("4, told by their names (the bonus form)", True),
        ("2 3 3 3: block1 has 2 convolutions", False),
        ("1 d2 | 1 1 2 | 1 1 2 | 1 1 d2", True),
    ),
    "[cb, cb, cb/s2], 1x1, [cb, cb, cb/d2], 1x1, [sep, sep, sep/s2], 1x1, [sep, sep, sep/s2]": (
        ("4, told by their names (the bonus form)", True),
        ("3 4 4 4: block2 has 4 convolutions: t1.0.0 pointwise 16->16, block2.0.0", False),
        ("1 1 2 | 1 1 1 d2 | 1 1 1 2 | 1 1 1 2", True),
    ),
    "[sep, cb, cb, cb/s2d2] [sep/d2, 1x1, cb/d2] [sep, cb, 1x1/s2]": (
        ("3, told by their names (the bonus form): block1, block2, block3", False),
        ("4 3 3: block1 has 4 convolutions", False),
        ("1 1 1 2 | d2 1 d2 | 1 1 2", True),
    ),
    "[cb, cb/d2] [sep, cb/d4] [cb/d8, cb/d16] [cb/d32]": (
        ("4, told by their names (the bonus form)", True),
        ("2 2 2 1: block1 has 2 convolutions", False),
        ("1 d2 | 1 d4 | d8 d16 | d32", True),
    ),
    # the sizes of the maps tell the blocks, and the names are those of the row
    "[cb, cb, cb/s2] [cb, cb/s2] [cb, cb, cb/s2] [cb, sep, cb/s2]": (
        ("4", True),
        ("3 2 3 3: block2 has 2 convolutions", False),
        ("1 1 2 | 1 2 | 1 1 2 | 1 1 2", True),
    ),
    # the stride is in the first of the next block
    "[cb, cb, cb] [cb/s2, cb, cb] [cb/s2, cb, cb] [cb/s2, cb, cb]": (
        ("4, told by their names", True),
        ("3 3 3 3", True),
        ("1 1 1 | 2 1 1 | 2 1 1 | 2 1 1: block1 ends with block1.2.0 3x3 16->16", False),
    ),
    # convblock1 with trans1
    "[cb, cb], 1x1/s2, [cb, cb], 1x1/s2, [cb, cb], 1x1/s2, [cb, cb], 1x1/s2": (
        ("4", True),
        ("3 3 3 3", True),
        ("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2", True),
    ),
    "[cb, cb], 1x1/s2, [cb, cb], 1x1/s2, [cb, sep/d2], 1x1, [cb, cb], 1x1/s2": (
        ("4, told by their names", True),
        ("3 3 3 3", True),
        ("1 1 2 | 1 1 2 | 1 1 1 | 1 1 2: block3 ends with t3.0.0 pointwise 16->16", False),
    ),
}


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("name", ["block", "C", "layer", "convblock", "conv_block_"])
def test_blocks_are_read_by_their_names_too(text, name):
    rows = table(network(text, name))
    assert rows[BLOCKS[0]][0].split(":")[0] == CASES[text][0][0].split(":")[0]
    for rule, (measured, holds) in zip(BLOCKS, CASES[text], strict=True):
        assert measured.replace("block", name) in rows[rule][0].replace("blocks", "")
        assert rows[rule][1] is holds


def test_names_of_single_convolutions_or_of_everything_tell_no_blocks():
    """convblock1 to convblock12, conv1 before layer1, features: the sizes of the maps count."""
    single = "[cb] [cb] [cb/s2] " * 4
    assert [table(network(single))[rule][1] for rule in BLOCKS] == [True] * 3
    everything = nn.Sequential()
    everything.add_module("features2", S(*body(), *head(40)))
    assert [table(everything)[rule][0] for rule in BLOCKS[:2]] == ["4", "3 3 3 3"]


def test_names_with_two_numbers_tell_the_block_by_the_first():
    layers, channels = nn.Sequential(), 3
    for number in (1, 2, 3, 4):
        for part in (1, 2, 3):
            stride = 2 if part == 3 and number != 2 else 1
            layers.add_module(f"conv{number}_{part}", unit(channels, 16, stride))
            channels = 16
    rows = table(S(layers, head(16)))
    assert rows[BLOCKS[0]] == ("4, told by their names", True)
    assert "0.conv2 ends with 0.conv2_3.0 3x3" in rows[BLOCKS[2]][0]


# ---------------------------------------------------------------- branches, pairs, heads


class Residual(nn.Module):
    """Two convolutions, the second with a stride, and a strided shortcut, which runs first or
    last.
    """

    def __init__(self, a, b, shortcut_first):
        super().__init__()
        self.one, self.two, self.shortcut = C(a, b, 3, 1, 1), C(b, b, 3, 2, 1), C(a, b, 1, 2)
        self.shortcut_first = shortcut_first

    def forward(self, x):
        if self.shortcut_first:
            y = self.shortcut(x)
            return y + self.two(self.one(x).relu())
        return self.two(self.one(x).relu()) + self.shortcut(x)


@pytest.mark.parametrize("first", [False, True])
def test_a_strided_shortcut_is_beside_the_last_whichever_is_written_first(first):
    widths = (3, 8, 16, 16, 16)
    blocks = [Residual(a, b, first) for a, b in zip(widths, widths[1:], strict=False)]
    rows = table(S(*blocks, head(16)))
    assert [rows[rule][1] for rule in BLOCKS] == [True] * 3
    assert rows[BLOCKS[2]][0] == " | ".join(["2 1 2" if first else "1 2 2"] * 4)


class Pyramid(nn.Module):
    """Dilations side by side, as in ASPP: no cut runs between them."""

    def __init__(self, a, b):
        super().__init__()
        self.branches = nn.ModuleList(C(a, b, 3, 1, d, d) for d in (1, 2, 4))

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def test_branches_are_cut_by_resolution_only():
    rows = table(S(Pyramid(3, 4), C(12, 12, 3, 1, 2, 2), Pyramid(12, 4), head(12)))
    assert rows[BLOCKS[1]][0].startswith("4 3: ")
    strided = S(unit(3, 12, 2), Pyramid(12, 4), unit(12, 12, 2), Pyramid(12, 4), head(12))
    assert table(strided)[BLOCKS[1]][0].startswith("1 4 3: ")


def test_the_1x1_convolutions_of_pairs_are_no_transitions():
    """Inverted residuals: read with the pairs the other way round, each projection is alone."""

    def inverted(a, b, dilation):
        return S(C(a, 32, 1), C(32, 32, 3, 1, dilation, dilation, 32), C(32, b, 1), nn.ReLU())

    rows = table(S(unit(3, 16), *(inverted(16, 16, 2) for _ in range(5)), head(16)))
    assert "1x1" not in rows[BLOCKS[0]][0]


@pytest.mark.parametrize(
    "layers, text",
    [
        (
            [C(16, 16, 3, 1, 1, groups=4), C(16, 16, 1)],
            "0: 1 3x3 16->16 is grouped, not depthwise: 4 groups of 16 channels",
        ),
        (
            [C(16, 16, 3, 1, 1, groups=16), C(16, 16, 3, 1, 1)],
            "0: no pointwise one works on the same channels as 1 3x3 depthwise 16->16",
        ),
        ([C(16, 16, 3, 1, 1), C(16, 16, 1)], "0: no grouped convolution"),
    ],
    ids=["grouped", "alone", "none"],
)
def test_the_reason_why_there_is_no_pair_is_the_true_one(layers, text):
    rows = table(S(C(3, 16, 3, 1, 1), *layers, head(16)))
    assert rows["a depthwise-separable convolution"] == (text, False)


class Auxiliary(nn.Module):
    """Computes a second classifier, whose result is returned in training only."""

    def __init__(self):
        super().__init__()
        self.front, self.back, self.fc = body()[:2], body()[2:], head(40)
        self.aux_conv, self.aux = C(24, 24, 3), head(24)

    def forward(self, x):
        x = self.front(x)
        other = self.aux(self.aux_conv(x))
        x = self.fc(self.back(x))
        return (x, other) if self.training else x


def test_a_head_whose_result_is_not_returned_does_not_count():
    rows = table(Auxiliary())
    assert [rule for rule, (_, holds) in rows.items() if not holds] == []
    assert rows[BLOCKS[1]][0] == "3 3 3 3"
