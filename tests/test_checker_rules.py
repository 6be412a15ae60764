"""The table of rules on networks in people's own styles, and on networks that break a rule each."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from answers import (
    ANSWERS,
    BLOCKS,
    GAP,
    VERDICTS,
    C,
    ConvBlocks,
    PlainSequential,
    narrow,
    pair,
    table,
    unit,
    with_endings,
)
from checker.operations import receptive_field
from checker.rules import check_rules
from dataset import train_transform
from model import NetDilated

# ---------------------------------------------------------------- networks in other styles


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
        "1 1 1 | 1 1 1 | 1 1 1 | 1 1 1: C1 ends with convs.2 3x3 16->16",
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
    def change(model):
        model.C1[0][0], model.C1[1][0] = pair(3, 8, kernel=4), pair(8, 8, kernel=1)
        model.C2[0][0], model.C3[1][0] = pair(8, 8, kernel=1), pair(8, 8)

    # 51 and 0.5 for the 4x4 convolution, less 1 and 2 for each of 1x1, less 4 for the dilation
    assert table(narrow(change))["receptive field"] == ("44", False)


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
        "0: no pointwise one works on the same channels as depthwise 3x3 depthwise 3->3",
        False,
    )
    assert rows["three convolutions in each"][0] == (
        "2: C1 has 2 convolutions: depthwise 3x3 depthwise 3->3, pointwise pointwise 3->3"
    )


@pytest.mark.parametrize(
    "network, text",
    [
        (
            nn.Conv2d(1, 10, 3),
            r"Conv2d does not run on \(2, 3, 32, 32\) images .*it has to take \(N, 3, 32, 32\)",
        ),
        (
            nn.Conv2d(3, 10, 3),
            r"Conv2d turns \(2, 3, 32, 32\) images into \(2, 10, 30, 30\): it has to return",
        ),
    ],
    ids=["other images", "other result"],
)
def test_a_network_for_another_task_is_refused_in_one_line(network, text):
    with pytest.raises(ValueError, match=text) as error:
        check_rules(network)
    assert "\n" not in str(error.value)


def test_a_network_may_have_no_convolution_or_lazy_layers():
    rows = table(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert rows["four blocks"] == ("0: no convolution", False)
    assert rows["receptive field"] == ("1", False)
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), *GAP, nn.LazyLinear(10))
    assert table(lazy)["three convolutions in each"][0].startswith("1: C1 has 1 convolution")


class Standardised(nn.Sequential):
    """The whole image, or batch, is brought to mean 0 and deviation 1 first."""

    def forward(self, x):
        return super().forward((x - x.mean()) / (x.std() + x.abs().sum() * 0))


def test_a_network_may_reduce_everything_to_one_number():
    rows = table(Standardised(C(3, 10, 3, 1, 1), *GAP))
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
    code = """
import sys, time, torch
sys.path.insert(0, "tests")
from torch import nn
from answers import C, DenseLayer, head
from checker.rules import check_rules
torch.set_num_threads(1)
layers = [C(3, 24, 3, 1, 1), *(DenseLayer(24 + 4 * each, 4) for each in range(40)), head(184)]
network = nn.Sequential(*layers)
start = time.perf_counter()
check_rules(network)
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(time.perf_counter() - start, *peak)
"""
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    seconds, memory = map(float, result.stdout.split())
    assert seconds < 10 and memory < 1.0 * 2**20  # kilobytes


class Counting(ConvBlocks):
    """It changes a buffer and draws numbers in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        self.steps += 1
        drop = F.dropout(torch.ones(1), 0.5) if random.random() < 2 else np.random.rand()
        return super().forward(x) + drop


def _random_states():
    numbers = np.random.get_state()[1].tolist()
    return torch.get_rng_state().tolist(), random.getstate(), numbers


def test_checking_leaves_the_network_and_the_random_states_as_they_were():
    network = Counting().half()
    network.convblock1[0].eval()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    states = _random_states()
    check_rules(network, train_transform())
    assert _random_states() == states
    assert network.training and not network.convblock1[0].training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(bool(parameter.grad.eq(1).all()) for parameter in network.parameters())


def _compiled_inside():
    network = ConvBlocks()
    network.convblock1.compile()
    network.convblock2 = torch.compile(network.convblock2)
    return network


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvBlocks().eval(),
        lambda: ConvBlocks().requires_grad_(False),
        lambda: torch.compile(ConvBlocks()),
        lambda: nn.DataParallel(ConvBlocks()),
        lambda: torch.compile(nn.DataParallel(torch.compile(ConvBlocks()))),
        _compiled_inside,
    ],
    ids=["eval", "frozen", "compiled", "parallel", "both", "inside"],
)
def test_a_mode_or_a_wrapper_changes_no_row(build):
    assert check_rules(build()) == check_rules(ConvBlocks())


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ],
    ids=["inference", "no_grad", "autocast", "device"],
)
def test_the_callers_modes_change_no_row(context):
    network, made, expected = ConvBlocks(), narrow(), check_rules(ConvBlocks())
    with context:
        assert check_rules(network) == expected and check_rules(made) == check_rules(narrow())


def test_the_default_type_changes_no_row_and_stays():
    expected = check_rules(ConvBlocks())
    torch.set_default_dtype(torch.float64)
    try:
        assert check_rules(ConvBlocks()) == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- what breaks a rule


def test_ours_keeps_every_rule():
    assert [
        rule for rule, (_, holds) in table(NetDilated(), train_transform()).items() if not holds
    ] == []


class PooledImage(nn.Module):
    """Pools the image before the network, and upsamples it again."""

    def __init__(self):
        super().__init__()
        self.network = narrow()

    def forward(self, x):
        return self.network(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2))


def replace_pairs(kernel):
    """Return a change that puts standard convolutions in the place of all separable ones."""

    def change(model):
        for block in (model.C1, model.C2, model.C3, model.C4):
            for layer in block:
                pointwise, depthwise = layer[0]
                dilation, stride = depthwise.dilation[0], depthwise.stride
                padding = dilation * (kernel // 2)
                layer[0] = C(pointwise.in_channels, 8, kernel, stride, padding, dilation)

    return change


def undilate(model):
    model.C3[1][0] = pair(8, 8)


def set_head(*layers):
    return lambda model: setattr(model, "O", nn.Sequential(*layers))


BROKEN_NETWORKS = {
    "four blocks": lambda: narrow(lambda model: setattr(model, "C4", nn.Identity())),
    "three convolutions in each": lambda: narrow(lambda model: model.C2.insert(1, unit(8, 8))),
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
        self.one, self.other = C(8, 8, 3, 2, 1), C(8, 8, 3, 2, 1)

    def forward(self, x):
        return self.one(x) + self.other(x)


def test_a_stride_too_early_breaks_only_its_row():
    rows = table(narrow(lambda model: setattr(model.C2[1][0][1], "stride", (2, 2))))
    text = "in C2, C2.1.0.0 pointwise + 3x3 depthwise, stride 2 8->8 is not the last"
    assert rows[BLOCKS[2]] == (f"1 1 2 | 1 2 2 | 1 1 2 | 1 1 2: {text}", False)
    assert rows[BLOCKS[0]][1] and rows[BLOCKS[1]][1]


def test_two_strides_side_by_side_are_both_the_last():
    rows = table(narrow(lambda model: setattr(model.C2[2], "0", TwoPaths())))
    assert rows[BLOCKS[2]] == ("1 1 2 | 1 1 2 2 | 1 1 2 | 1 1 2", True)
    assert rows[BLOCKS[1]][0].startswith("3 4 3 3: C2 has 4 convolutions")
