"""What the table of rules is measured with: operations, receptive fields, the table of layers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from answers import ANSWERS, ConvBlocks, PlainSequential, narrow
from checker.layout import layers_table, receptive_fields
from checker.neutral import evaluated
from checker.operations import receptive_field, trace
from checker.rules import Row, format_rules, rules_table
from checker.tables import markdown_table
from checker.tracer import Tracer
from model import NetDilated

ROWS = [
    Row("four blocks", "4", "holds"),
    Row("no pooling", "pool1: 2x2 | " + "a long text " * 12, "BROKEN"),
    Row("stride 2", "1 1 2", "undecided"),
]


def test_columns_stay_aligned_where_a_row_is_long():
    lines = format_rules(ROWS).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 120  # the long one takes two
    assert {
        line.index(word) for line, word in zip(lines, ("verdict", "holds", "BROKEN"), strict=False)
    } == {lines[-1].index("undecided")}
    assert " ".join(
        line[lines[0].index("measured") : lines[0].index("verdict")].strip() for line in lines[2:4]
    ) == (ROWS[1].measured.strip())


def test_markdown_tables_align_columns_whose_heads_end_in_a_colon_and_keep_bars_within_cells():
    lines = markdown_table(("name", "number:"), [("one | two", "1")]).splitlines()
    assert lines == ["| name | number |", "| --- | ---: |", "| one \\| two | 1 |"]
    assert rules_table(ROWS).splitlines()[2:] == [
        "| four blocks | 4 | holds |",
        f"| no pooling | pool1: 2x2 \\| {'a long text ' * 12} | BROKEN |",
        "| stride 2 | 1 1 2 | undecided |",
    ]


def test_receptive_fields_are_those_after_each_convolution():
    fields = receptive_fields(narrow())
    assert fields == [3, 4, 5, 7, 9, 11, 15, 23, 27, 35, 43, 51]
    assert (
        receptive_fields(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 8, 4)))[0] == 2.5
    )


def test_the_table_of_layers_tells_kernels_strides_shapes_and_receptive_fields():
    lines = layers_table(NetDilated()).splitlines()
    assert len(lines) == 14 and lines[0] == "|  | convolution | output | receptive field | jump |"
    assert [lines[2], lines[9], lines[13]] == [
        "| 1 | 3x3 standard | 16 x 64 x 64 | 3 | 0.5 |",
        "| 8 | pointwise + 3x3 depthwise, dilation 2 | 192 x 16 x 16 | 24 | 2 |",
        "| 12 | pointwise + 4x4 depthwise, stride 2 | 288 x 4 x 4 | 58 | 8 |",
    ]


# ---------------------------------------------------------------- what it is measured with


@pytest.mark.parametrize("build", [ConvBlocks, NetDilated])
def test_trace_sees_what_the_modules_say(build):
    def first(value):
        return value if isinstance(value, int) else value[0]

    layers = [each for each in build().modules() if getattr(each, "weight", None) is not None]
    layers = [each for each in layers if each.weight.ndim == 4]
    operations = [each for each in trace(build()) if each.name == "convolution"]
    assert [(each.kernel, each.stride, each.dilation) for each in operations] == [
        (each.weight.shape[3], first(each.stride), first(getattr(each, "dilation", 1)))
        for each in layers
    ]


def test_trace_sees_functional_calls_and_takes_the_longest_path():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.long, self.short = nn.Conv2d(3, 8, 7, padding=3), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            x = F.max_pool2d(self.long(x) + self.short(x), 2)
            return F.avg_pool2d(x, x.shape[-1]).flatten(1)

    kinds = [operation.kind for operation in trace(Branches())]
    assert kinds == ["convolution", "convolution", "pooling", "global average pooling"]
    assert receptive_field(Branches()) == 8  # 7, and 1 more through the pooling window of 2


class End(Exception):
    """The map is found. What comes after it may not run on images of this size."""


class MapBefore(Tracer):
    """Keeps the (N, C, H, W) map before the operation at place `end`, and ends there."""

    def __init__(self, model, end):
        super().__init__(model)
        self.map, self.end = None, end

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in reversed(tree_leaves((args, kwargs or {}))):
            if isinstance(leaf, torch.Tensor) and leaf.ndim == 4 and leaf in self.paths:
                self.map = leaf
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.operations) > self.end:
            raise End
        return result


def measured_field(network):
    """Measure the receptive field of the middle position before the global pooling, from gradients.

    Luo et al., Understanding the effective receptive field, https://arxiv.org/abs/1701.04128.
    """
    end = [operation.kind for operation in trace(network)].index("global average pooling")
    side = 16 * round(receptive_field(network) / 16 + 3)  # the field in the middle, and a border
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    with evaluated(network), MapBefore(network, end) as tracer, contextlib.suppress(End):
        tracer.follow(images)
        network(images)
    height, width = tracer.map.shape[2:]
    middle = tracer.map[..., height // 2, width // 2].sum()
    reached = torch.autograd.grad(middle, images)[0].ne(0).flatten(0, 1).any(0)
    sides = [reached.any(axis).nonzero().flatten() for axis in (0, 1)]
    assert all(each.min() > 0 and each.max() < side - 1 for each in sides)
    return max(int(each.max() - each.min()) + 1 for each in sides)


WITNESSED = [
    "ConvBlocks",
    "bonus",
    "circular_padding",
    "reflect_padding",
    "layer_norms",
    "max_pooled_blocks",
    "resnet_a",
    "resnet_b",
    "mobilenet_v2",
    "densenet",
    "convnext",
    "squeezenet",
    "shufflenet",
    "factorised",
    "pointwise_first",
    "stride_in_the_pointwise",
]


@pytest.mark.parametrize(
    "build",
    [
        narrow,
        PlainSequential,
        *(ANSWERS[name][0] for name in WITNESSED),
    ],
    ids=["narrow", "plain", *WITNESSED],
)
def test_gradients_see_the_same_receptive_field(build):
    torch.manual_seed(0)
    network = build()
    assert measured_field(network) == receptive_field(network)


@pytest.mark.parametrize("mode, pixels", [("nearest", 2), ("bilinear", 3), ("bicubic", 5)])
def test_interpolation_has_a_receptive_field_too(mode, pixels):
    class Upsampled(nn.Module):
        """A 3x3 convolution on images twice as large: it looks one original pixel further than the
        interpolation.
        """

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 3, padding=1)

        def forward(self, x):
            return self.conv(F.interpolate(x, scale_factor=2, mode=mode)).mean((2, 3))

    assert receptive_field(Upsampled()) == pixels
    assert pixels <= measured_field(Upsampled()) <= pixels + 1
