"""The table of rules, and what it is measured with, on our networks and on others in people's own
styles.
"""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import albumentations as A
import pytest
import torch
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from torch import nn
from torchvision import transforms

import dataset
from answers import ANSWERS, with_endings
from checker.answers import check_file, main
from checker.layout import layers_table
from checker.operations import count_macs, gradients_of_the_middle, receptive_field, trace
from checker.tables import markdown_table
from dataset import FILL, train_transform
from model import (
    NETWORKS,
    ConvBNAct,
    MirrorDepthwise,
    NetDilated,
    Network,
    build_network,
    conv,
    separable,
)
from rules import Row, check_rules, format_rules, rules_table

VERDICTS = {"holds": True, "BROKEN": False, "undecided": None}


def table(network, transform=None):
    return {
        rule.split(" above")[0].split(" 200")[0]: (measured, VERDICTS[verdict])
        for rule, measured, verdict in check_rules(network, transform)
    }


BLOCKS = ["four blocks", "three convolutions in each", "stride 2 in the last of each, only there"]


# ---------------------------------------------------------------- networks in other styles


class PlainSequential(nn.Module):
    """Everything in one list, average pooling of a fixed size, `view` before the linear layer.
    Keeps all rules.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 24, 32, 48):
            for stride, dilation in ((1, 1), (1, 2), (2, 1)):
                layers += [
                    nn.Conv2d(
                        channels,
                        channels,
                        3,
                        stride,
                        dilation,
                        dilation,
                        groups=channels,
                        bias=False,
                    ),
                    nn.Conv2d(channels, width, 1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    nn.Dropout(0.05),
                ]
                channels = width
        self.features, self.gap, self.fc = (
            nn.Sequential(*layers),
            nn.AvgPool2d(2),
            nn.Linear(48, 10),
        )

    def forward(self, x):
        x = self.gap(self.features(x))
        return F.log_softmax(self.fc(x.view(x.size(0), -1)), dim=-1)


class Functional(nn.Module):
    """No layer objects: parameters, `F.conv2d`, padding and pooling by hand, in two steps. Keeps
    all rules.
    """

    def __init__(self):
        super().__init__()
        widths = [3, 8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 10]
        self.full = nn.ParameterList(
            nn.Parameter(torch.randn(b, a, 3, 3) / (3 * a**0.5))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.depth, self.point = (
            nn.Parameter(torch.randn(8, 1, 3, 3) / 3),
            nn.Parameter(torch.randn(8, 8, 1, 1) / 3),
        )

    def forward(self, x):
        for number, weight in enumerate(self.full, 1):
            x = F.pad(x, [2 if number == 4 else 1] * 4)
            if number == 2:
                x = F.conv2d(F.conv2d(x, self.depth, groups=8), self.point)
            else:
                x = F.conv2d(
                    x, weight, stride=2 if number % 3 == 0 else 1, dilation=2 if number == 4 else 1
                )
            x = F.relu_(x)
        return x.mean(-1).mean(-1)


class PooledBlocks(nn.Module):
    """Max pooling between the blocks, the global one as a mean over two axes."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 16, 16, 24, 24, 24, 32, 32, 32, 40, 40, 10)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])

    def forward(self, x):
        for number, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = norm(torch.relu(convolution(x)))
            x = F.max_pool2d(x, 2) if number % 3 == 0 else x
        return x.mean(dim=[2, 3])


class FixedSize(nn.Module):
    """A learned offset for each pixel, so that no other image size will do; too narrow a view;
    dense head.
    """

    def __init__(self, dilation=1):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 3, 32, 32))
        self.a, self.b = (
            nn.Conv2d(3, 8, 3, 1, dilation, dilation),
            nn.Conv2d(8, 8, 3, 1, dilation, dilation),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8192, 10))

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x + self.offset))))


class Resized(PlainSequential):
    """Works on images of another size, and may change it once more between two blocks."""

    def __init__(self, scale, between=1, antialias=False):
        super().__init__()
        self.scale, self.between, self.antialias, self.gap = (
            scale,
            between,
            antialias,
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x):
        x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", antialias=self.antialias)
        x = self.features[:30](x)
        x = F.interpolate(x, scale_factor=self.between) if self.between > 1 else x
        return self.fc(self.gap(self.features[30:](x)).flatten(1))


class SideBySide(nn.Module):
    """A depthwise and a pointwise convolution one after the other, but neither works on the other's
    result.
    """

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        return self.head(torch.cat([self.depthwise(x), self.pointwise(x)], 1).mean((2, 3)))


@pytest.mark.parametrize("style", [PlainSequential, Functional])
def test_answers_in_other_styles_that_keep_the_rules_pass(style):
    rows = table(style())
    assert [rule for rule, (_, holds) in rows.items() if not holds] == []
    assert rows["three convolutions in each"][0] == "3 3 3 3"


@pytest.mark.parametrize("endings", ["".join(ends) for ends in itertools.product("2d", repeat=4)])
def test_a_block_ends_with_a_stride_or_in_the_bonus_form_with_a_dilation(endings):
    rows = table(with_endings(endings))
    assert [rows[name][1] for name in BLOCKS] == [True] * 3 and rows["three convolutions in each"][
        0
    ] == "3 3 3 3"
    assert ("bonus" in rows["four blocks"][0]) == ("d" in endings)


@pytest.mark.filterwarnings("ignore")  # of old ways that students still use
@pytest.mark.parametrize("name", ANSWERS)
def test_each_row_of_an_answer_is_as_worked_out_by_hand(name):
    build, expected = ANSWERS[name]
    for rule, (measured, verdict) in table(build()).items():
        text, right = expected.get(rule, ("", "holds"))
        assert (text in measured, verdict) == (True, VERDICTS[right]), f"{rule}: {measured}"


def test_pooling_between_blocks_is_named_and_ends_a_block():
    rows = table(PooledBlocks())
    assert rows["four blocks"] == ("4", True) and rows["three convolutions in each"] == (
        "3 3 3 3",
        True,
    )
    assert rows["stride 2 in the last of each, only there"] == (
        "1 1 1 | 1 1 1 | 1 1 1 | 1 1 1: C1 ends with convs.2 3x3 16→16",
        False,
    )
    assert rows["no pooling but the final one"] == (
        ", ".join(["forward: 2x2 max pooling"] * 4),
        False,
    )
    assert rows["a depthwise-separable convolution"] == ("0: no grouped convolution", False)
    assert rows["a dilated convolution"] == ("0", False)
    assert rows["global average pooling at the end"] == ("global average pooling of 2x2", True)
    assert rows["then at most one fully connected layer"] == ("none", True)


@pytest.mark.parametrize("antialias", [False, True])
def test_images_may_be_upsampled_before_the_first_block(antialias):
    rows = table(Resized(1.5, antialias=antialias))
    assert [rows[rule] for rule in BLOCKS] == [
        ("4 on images upsampled to 48x48", True),
        ("3 3 3 3", True),
        ("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2", True),
    ]
    pixels = float(rows["receptive field"][0])
    assert pixels == pytest.approx(1 + (receptive_field(PlainSequential()) + 0.5) / 1.5, abs=1)


def test_interpolation_to_the_same_size_is_nothing():
    assert [table(Resized(1))[rule] for rule in BLOCKS] == [
        table(PlainSequential())[rule] for rule in BLOCKS
    ]


@pytest.mark.parametrize(
    "network", [Resized(0.75), Resized(1.5, between=2)], ids=["shrunk", "between blocks"]
)
def test_shrinking_images_and_resizing_between_blocks_leaves_the_blocks_undecided(network):
    rows = table(network)
    assert all(
        holds is None and "upsample" in measured for measured, holds in map(rows.get, BLOCKS)
    )


def test_half_a_pixel_of_an_upsampled_image_is_not_reached():
    network = NetDilated()
    network.C2[0], network.C3[0], network.C4[1] = (
        separable(*channels, kernel_size=1) for channels in ((64, 96), (96, 192), (288, 288))
    )
    assert table(network)["receptive field"] == ("44", False)  # 58.5 - 2 - 4 - 8


def test_a_receptive_field_is_the_same_at_any_size_of_the_image():
    assert table(FixedSize(dilation=16))["receptive field"] == ("65", True)  # 1 + 2 * 16 twice
    rows = table(FixedSize())
    assert rows["receptive field"] == ("5", False)
    assert rows["global average pooling at the end"] == ("none", False)
    assert rows["fewer than"] == ("85,810", True)


class Heavier(nn.Module):
    """A network with 200,000 parameters more, which it uses."""

    def __init__(self, network):
        super().__init__()
        self.network, self.more = network, nn.Parameter(torch.zeros(200_000), False)

    def forward(self, x):
        return self.network(x) + self.more.sum()


def test_frozen_parameters_count():
    assert table(Heavier(PlainSequential().requires_grad_(False)))["fewer than"][1] is False


def test_a_pair_must_work_on_one_another():
    rows = table(SideBySide())
    assert rows["a depthwise-separable convolution"] == (
        "0: no pointwise one works on the same channels as depthwise 3x3 depthwise 3→3",
        False,
    )
    assert rows["three convolutions in each"][0] == (
        "2: C1 has 2 convolutions: depthwise 3x3 depthwise 3→3, pointwise pointwise 3→3"
    )


@pytest.mark.parametrize(
    "network, text",
    [
        (
            nn.Conv2d(1, 10, 3),
            r"Conv2d does not run on \(2, 3, 32, 32\) images .*take \(N, 3, 32, 32\) .*and return \(N, 10\)",
        ),
        (
            nn.Conv2d(3, 10, 3),
            r"Conv2d turns \(2, 3, 32, 32\) images into \(2, 10, 30, 30\): it has to return \(N, 10\)",
        ),
    ],
    ids=["other images", "other result"],
)
def test_a_network_for_another_task_is_refused_in_one_line(network, text):
    with pytest.raises(ValueError, match=text) as error:
        check_rules(network)
    assert "\n" not in str(error.value)


class Standardised(nn.Sequential):
    """The whole image, or batch, is brought to mean 0 and deviation 1 first."""

    def forward(self, x):
        return super().forward((x - x.mean()) / (x.std() + x.abs().sum() * 0))


def test_a_network_may_reduce_everything_to_one_number():
    rows = table(Standardised(conv(3, 10), *GAP))
    assert rows["receptive field"][0].startswith("3") and rows["no pooling but the final one"] == (
        "none",
        True,
    )


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="only Linux tells the peak of a process by itself",
)
def test_a_check_takes_little_time_and_memory():
    """The whole process, PyTorch included: on a deep DenseNet, which once took two minutes and 5
    GB.
    """
    code = (
        "import sys, time, torch; sys.path.insert(0, 'tests'); from torch import nn; "
        "from answers import C, DenseLayer, head; from rules import check_rules; torch.set_num_threads(1); "
        "layers = [C(3, 24, 3, 1, 1), *(DenseLayer(24 + 4 * each, 4) for each in range(40)), head(184)]; "
        "network = nn.Sequential(*layers); start = time.perf_counter(); check_rules(network); "
        "peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]; "
        "print(time.perf_counter() - start, *peak)"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    seconds, memory = map(float, result.stdout.split())
    assert seconds < 10 and memory < 1.2 * 2**20  # kilobytes


def test_checking_leaves_the_network_as_it_was():
    network = PlainSequential()
    network.features[2].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_rules(network)
    assert network.training and not network.features[2].training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


# ---------------------------------------------------------------- our network, and what breaks a rule


def test_ours_keeps_every_rule():
    assert [
        rule for rule, (_, holds) in table(NetDilated(), train_transform()).items() if not holds
    ] == []


def bsconv(a, b, stride=1, dilation=1):
    """Pointwise, then depthwise, in plain layers."""
    return nn.Sequential(
        conv(a, b, 1), nn.Conv2d(b, b, 3, stride, dilation, dilation, groups=b, bias=False)
    )


def narrow(change=None):
    """Return a network of the layout of ours with few channels, after a change."""

    def block(width, dilation):
        return [
            ConvBNAct(bsconv(width, 8), 8),
            ConvBNAct(bsconv(8, 8, dilation=dilation), 8),
            ConvBNAct(bsconv(8, 8, stride=2), 8),
        ]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = Network(block(3, 1), block(8, 1), block(8, 2), block(8, 1), head, upsample=2)
    if change:
        change(model)
    return model


class PooledImage(nn.Module):
    """Pools the image before the network, and upsamples it again."""

    def __init__(self):
        super().__init__()
        self.network = narrow()

    def forward(self, x):
        return self.network(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2))


def replace_pairs(kernel_size):
    """Return a change that puts standard convolutions in the place of all separable ones."""

    def change(model):
        for block in (model.C1, model.C2, model.C3, model.C4):
            for layer in block:
                pointwise, depthwise = layer[0]
                layer[0] = conv(
                    pointwise.in_channels,
                    depthwise.out_channels,
                    kernel_size,
                    depthwise.stride,
                    depthwise.dilation[0],
                )

    return change


def undilate(model):
    model.C3[1][0][1].dilation = model.C3[1][0][1].padding = (1, 1)


def set_head(*layers):
    return lambda model: setattr(model, "O", nn.Sequential(*layers))


GAP = nn.AdaptiveAvgPool2d(1), nn.Flatten()
BROKEN_NETWORKS = {
    "four blocks": lambda: narrow(lambda model: setattr(model.C3[2][0][1], "stride", (1, 1))),
    "three convolutions in each": lambda: narrow(
        lambda model: model.C2.insert(1, ConvBNAct(conv(8, 8), 8))
    ),
    "stride 2 in the last of each, only there": lambda: narrow(
        lambda model: setattr(model.C4[2][0][1], "stride", (1, 1))
    ),
    "no pooling but the final one": PooledImage,
    "receptive field": lambda: narrow(replace_pairs(1)),
    "a depthwise-separable convolution": lambda: narrow(replace_pairs(3)),
    "a dilated convolution": lambda: narrow(undilate),
    "global average pooling at the end": lambda: narrow(
        set_head(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    ),
    "then at most one fully connected layer": lambda: narrow(
        set_head(*GAP, nn.Linear(8, 9), nn.Linear(9, 10))
    ),
    "fewer than": lambda: Heavier(narrow()),
}


def test_a_narrow_network_of_our_layout_keeps_every_rule():
    rows = table(narrow())
    assert all(holds for _, holds in rows.values()) and set(rows) == set(BROKEN_NETWORKS)


@pytest.mark.parametrize("rule", BROKEN_NETWORKS)
def test_a_network_that_breaks_a_rule_fails_its_row(rule):
    assert table(BROKEN_NETWORKS[rule]())[rule][1] is False


class GlobalMax(nn.Module):
    def forward(self, x):
        return x.amax((2, 3))


@pytest.mark.parametrize(
    "head, measured",
    [
        ([nn.Flatten(), nn.Linear(8 * 4 * 4, 10)], "none"),
        ([GlobalMax(), nn.Linear(8, 10)], "O.0: 4x4 max pooling of a 4x4 map"),
    ],
)
def test_a_network_without_global_average_pooling_fails_its_row(head, measured):
    assert table(narrow(set_head(*head)))["global average pooling at the end"] == (measured, False)


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = conv(8, 8, stride=2), conv(8, 8, stride=2)

    def forward(self, x):
        return self.one(x) + self.other(x)


def test_two_convolutions_with_a_stride_in_one_block_fail_their_row():
    rows = table(narrow(lambda model: setattr(model.C2[2], "0", TwoPaths())))
    assert rows["stride 2 in the last of each, only there"] == (
        "1 1 2 | 1 1 2 2 | 1 1 2 | 1 1 2: in C2, C2.2.0.one 3x3, stride 2 8→8 is not the last",
        False,
    )


# ---------------------------------------------------------------- transforms

TINY = nn.Sequential(conv(3, 10), *GAP)
HOLE = {
    "num_holes_range": (1, 1),
    "hole_height_range": (16, 16),
    "hole_width_range": (16, 16),
    "fill": FILL,
}


def replaced(name, *steps):
    """Return our training transform with other steps in the place of one of its own."""
    kept = [step for step in train_transform().transforms if type(step).__name__ != name]
    return A.Compose([*kept[:2], *steps, *kept[2:]])


def hole(**changes):
    return replaced("CoarseDropout", A.CoarseDropout(**{**HOLE, **changes}))


@pytest.mark.parametrize(
    "rule, measured, transform",
    [
        ("HorizontalFlip", "missing", replaced("HorizontalFlip")),
        (
            "HorizontalFlip",
            "changes 0% of the images",
            replaced("HorizontalFlip", A.HorizontalFlip(p=0)),
        ),
        ("ShiftScaleRotate", "missing", replaced("ShiftScaleRotate", A.Affine(p=0.5))),
        ("CoarseDropout: one 16x16 hole", "missing", replaced("CoarseDropout")),
        ("CoarseDropout: one 16x16 hole", "none or of another shape", hole(num_holes_range=(2, 2))),
        ("CoarseDropout: one 16x16 hole", "never", hole(p=0)),
        (
            "CoarseDropout: one 16x16 hole",
            "2 of them",
            replaced("CoarseDropout", A.CoarseDropout(), A.CoarseDropout(**HOLE)),
        ),
        (
            "CoarseDropout: one 16x16 hole",
            "never",
            replaced("CoarseDropout", A.Sequential([A.CoarseDropout(**HOLE)], p=0)),
        ),
        ("CoarseDropout: one 16x16 hole", "8x16", hole(hole_height_range=(8, 8))),
        ("CoarseDropout: one 16x16 hole", "16x20", hole(hole_width_range=(20, 20))),
        ("CoarseDropout: one 16x16 hole", "2x16 to 16x16", hole(hole_height_range=(2, 16))),
        (
            "... filled with the mean colour",
            "0 0 0",
            hole(fill=(0.4914, 0.4822, 0.4465)),
        ),  # for other images than bytes
        ("... filled with the mean colour", "128 128 128", hole(fill=128)),
        ("Resize", "40x40 becomes 32x32", replaced("Resize", A.CenterCrop(32, 32))),
        ("Resize", "40x40 becomes 28x28", replaced("Resize", A.Resize(28, 28))),
    ],
)
def test_a_transform_that_breaks_a_rule_fails_its_row(rule, measured, transform):
    text, holds = table(TINY, transform)[rule]
    assert measured in text and holds is not None and not holds


def test_a_black_hole_of_the_right_size_breaks_only_the_rule_of_its_colour():
    rows = table(TINY, hole(fill=0))
    assert rows["CoarseDropout: one 16x16 hole"] == ("16x16", True)
    assert rows["... filled with the mean colour"] == ("0 0 0", False)


def test_a_plain_transform_fails_all_rows_but_resize():
    rows = check_rules(TINY, dataset.test_transform())[-5:]
    assert [row.verdict for row in rows] == ["BROKEN"] * 4 + ["holds"]


@pytest.mark.parametrize(
    "transform, flips",
    [
        (A.HorizontalFlip(p=0.5), "changes 51% of the images"),
        (A.Compose([]), "missing"),
        (
            A.Compose([A.OneOf([A.HorizontalFlip(p=0.5), A.Blur(p=0.5)])]),
            "changes 23% of the images",
        ),
        (
            A.Compose([A.OneOf([A.HorizontalFlip(p=0.5), A.Blur(p=0.5)], p=0)]),
            "changes 0% of the images",
        ),
        (
            A.Compose([A.HorizontalFlip(p=0.5), A.Resize(32, 32), A.Normalize(), ToTensorV2()]),
            "changes 51% of the images",
        ),
    ],
    ids=["no Compose", "empty", "nested", "nested, never", "to tensor"],
)
def test_any_transform_of_albumentations_is_measured(transform, flips):
    rows = table(TINY, transform)
    assert rows["HorizontalFlip"][0] == flips
    assert rows["Resize"] == (
        ("40x40 becomes 32x32", True)
        if "ToTensorV2" in str(transform)
        else ("40x40 becomes 40x40", False)
    )


@pytest.mark.parametrize(
    "transform, text",
    [
        (
            transforms.Compose([transforms.ToTensor()]),
            "transform is torchvision.transforms.transforms.Compose: choose a",
        ),
        ([], "transform is builtins.list: choose a transform of albumentations"),
        (A.Compose([A.RandomCrop(64, 64)]), "transform fails on a uint8 image .*: it has to take"),
    ],
    ids=["torchvision", "a list", "fails"],
)
def test_another_transform_is_refused_in_one_line(transform, text):
    with pytest.raises(ValueError, match=text) as error:
        check_rules(TINY, transform)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- tables

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


def test_the_table_of_layers_tells_kernels_strides_shapes_and_receptive_fields():
    lines = layers_table(NetDilated()).splitlines()
    assert len(lines) == 14 and lines[0] == "|  | convolution | output | receptive field | jump |"
    assert [lines[2], lines[9], lines[13]] == [
        "| 1 | 3x3 standard | 16 x 64 x 64 | 3 | 0.5 |",
        "| 8 | pointwise + 3x3 depthwise, dilation 2 | 192 x 16 x 16 | 24 | 2 |",
        "| 12 | pointwise + 4x4 depthwise, stride 2 | 288 x 4 x 4 | 58 | 8 |",
    ]


# ---------------------------------------------------------------- what it is measured with


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_sees_what_the_modules_say(name):
    """A mirrored layer applies each of its weights twice."""

    def first(value):
        return value if isinstance(value, int) else value[0]

    network = build_network(name)
    layers = [
        module
        for module in network.modules()
        if getattr(module, "weight", torch.zeros(1)).ndim == 4
    ]
    operations = [operation for operation in trace(network) if operation.name == "convolution"]
    assert [(each.kernel, each.stride, each.dilation, each.groups > 1) for each in operations] == [
        (
            layer.weight.shape[3],
            first(layer.stride),
            first(getattr(layer, "dilation", 1)),
            isinstance(layer, MirrorDepthwise) or getattr(layer, "groups", 1) > 1,
        )
        for layer in layers
    ]
    macs = sum(
        layer.weight.numel() * operation.size[1] ** 2 * (1 if isinstance(layer, nn.Conv2d) else 2)
        for layer, operation in zip(layers, operations, strict=True)
    )
    macs += sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear))
    assert macs == count_macs(network)


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


def measured_field(network, side=192):
    """Measure the receptive field of the middle position before the global pooling, from gradients.

    Luo et al., Understanding the effective receptive field, https://arxiv.org/abs/1701.04128.
    """
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    end = [operation.kind for operation in trace(network)].index("global average pooling")
    reached = gradients_of_the_middle(network, images, [end])[0].ne(0)
    sides = [reached.any(axis).nonzero().flatten() for axis in (0, 1)]
    assert all(0 < side.min() and side.max() < 191 for side in sides)
    return max(int(side.max() - side.min()) + 1 for side in sides)


def test_gradients_are_those_of_float32_and_the_model_keeps_its_type():
    network, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), torch.rand(1, 3, 9, 9)
    expected = gradients_of_the_middle(network, images, [1, 2])
    assert torch.equal(gradients_of_the_middle(network.double(), images, [1, 2]), expected)
    assert network[0].weight.dtype == torch.float64


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
        lambda: build_network("PublishedDilated"),
        NetDilated,
        *(ANSWERS[name][0] for name in WITNESSED),
    ],
    ids=["ours, narrow", "plain", "published", "ours", *WITNESSED],
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


# ---------------------------------------------------------------- a folder of answers

NET = """
import torch.nn as nn
import model  # the student's own, beside this file
print("not part of the table")
class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
class {}(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model.layers()
    def forward(self, x):
        return self.layers(x)
class Other(nn.Module):
    {}
if __name__ == "__main__":
    raise SystemExit("this would train")
"""
LAYERS = """
from torch import nn
def layers():
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""

DIGITS = """
import torch.nn as nn
class ForDigits(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_a_folder_of_answers_is_one_table(tmp_path, capsys):
    """The class Net, another one, a function Net, and files that fail in their own ways."""
    files = {
        "net.py": NET.format("Net", "pass"),
        "mine.py": NET.format("Mine", "def __init__(self, a): pass"),
        "function.py": LAYERS.replace("layers", "Net"),
        "fails.py": "import nothing_such",
        "leaves.py": "import os; os._exit(3)",
        "empty.py": "",
        "digits.py": DIGITS,
        "notebook.ipynb": "{}",
    }
    folder = tmp_path / "torch"  # whose name must not hide the package
    folder.mkdir()
    for name, text in {**files, "model.py": LAYERS}.items():
        (folder / name).write_text(text)
    main([*(str(folder / name) for name in files), "--csv", str(tmp_path / "table.csv")])
    lines, notes = capsys.readouterr().out.split("\n\n")
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines.splitlines()
        if line.startswith(str(tmp_path))
    }
    assert len(set(map(len, rows.values()))) == 1 and len(rows) == 8
    net, mine, function, *errors = rows.values()
    assert (net[0], mine[0], function[0]) == ("Net", "Mine", "Net") and net[1:] == mine[
        1:
    ] == function[1:]
    assert {cell for cells in errors for cell in cells} == {"error"}
    assert net[1:5] == ["BROKEN", "BROKEN", "BROKEN", "holds"]
    for text in (
        "ModuleNotFoundError: No module named 'nothing_such'",
        "with exit code 3",
        "no class of a network",
        "ForDigits does not run on (2, 3, 32, 32) images",
        "ValueError: this is no Python file",
    ):
        assert text in " ".join(notes.split())
    assert "three convolutions in each: 1: C1 has 1 convolution: layers.0 3x3 3→10" in notes
    head, *cells = csv.reader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines())
    assert head[:3] == ["file", "network", "four blocks"] and head[-1] == "error"
    assert (
        [len(row) for row in cells] == [13] * 8
        and cells[0][5] == "holds: none"
        and "nothing_such" in cells[3][-1]
    )


OLD_SESSIONS = """
import torch.nn as nn
from .block import Convolution  # of the package that the file's folder is
from models.block import Convolution
class Answer(nn.Sequential):
    def __init__(self):
        super().__init__(Convolution(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
class Older(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 3), nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1), nn.Flatten())
class Broken(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
"""


def test_a_table_that_cannot_be_written_is_one_line_and_still_shown(tmp_path, capsys):
    (tmp_path / "net.py").write_text(LAYERS.replace("layers", "Net"))
    with pytest.raises(
        SystemExit, match="^rules.py: .*table.csv could not be written \\(No such file or directory"
    ):
        main([str(tmp_path / "net.py"), "--csv", str(tmp_path / "nowhere" / "table.csv")])
    assert "holds" in capsys.readouterr().out


def test_of_several_networks_in_a_file_the_one_that_keeps_the_most_rules_counts(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "block.py").write_text("from torch.nn import Conv2d as Convolution")
    (tmp_path / "models" / "model.py").write_text(OLD_SESSIONS)
    name, rows = check_file(str(tmp_path / "models" / "model.py"))
    assert name == "Answer" and rows[3].verdict == "holds"


def test_a_file_that_does_not_end_is_stopped(tmp_path):
    (tmp_path / "endless.py").write_text("while True: pass")
    assert check_file(str(tmp_path / "endless.py"), timeout=1) == "took longer than 1 seconds"


def test_the_help_says_that_files_are_executed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "The files are executed" in text
        and "the network is Net, or else the nn.Module class that keeps" in text
    )
