"""The table of rules on networks in other people's styles, written without our building blocks."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils
from model import NETWORKS, build_network, measure_receptive_field, receptive_field


class PlainSequential(nn.Module):
    """Everything in one list, average pooling of a fixed size, `view` before the linear layer. Keeps all rules."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 24, 32, 48):
            for stride, dilation in ((1, 1), (1, 2), (2, 1)):
                layers += [nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False),
                           nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(0.05)]
                channels = width
        self.features, self.gap, self.fc = nn.Sequential(*layers), nn.AvgPool2d(2), nn.Linear(48, 10)

    def forward(self, x):
        x = self.gap(self.features(x))
        return F.log_softmax(self.fc(x.view(x.size(0), -1)), dim=-1)


class Functional(nn.Module):
    """No layer objects: parameters, `F.conv2d`, padding and pooling by hand, in two steps. Keeps all rules."""

    def __init__(self):
        super().__init__()
        widths = [3, 8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 10]
        self.full = nn.ParameterList(nn.Parameter(torch.randn(b, a, 3, 3) / (3 * a**0.5))
                                     for a, b in zip(widths, widths[1:]))
        self.depth, self.point = nn.Parameter(torch.randn(8, 1, 3, 3) / 3), nn.Parameter(torch.randn(8, 8, 1, 1) / 3)

    def forward(self, x):
        for number, weight in enumerate(self.full, 1):
            x = F.pad(x, [2 if number == 4 else 1] * 4)
            if number == 2:
                x = F.conv2d(F.conv2d(x, self.depth, groups=8), self.point)
            else:
                x = F.conv2d(x, weight, stride=2 if number % 3 == 0 else 1, dilation=2 if number == 4 else 1)
            x = F.relu_(x)
        return x.mean(-1).mean(-1)


class PooledBlocks(nn.Module):
    """Max pooling between the blocks, the global one as a mean over two axes."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 16, 16, 24, 24, 24, 32, 32, 32, 40, 40, 10)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])

    def forward(self, x):
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms), 1):
            x = norm(torch.relu(conv(x)))
            x = F.max_pool2d(x, 2) if number % 3 == 0 else x
        return x.mean(dim=[2, 3])


class BasicBlock(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, stride, 1), nn.Conv2d(b, b, 3, 1, 1)
        self.shortcut = nn.Conv2d(a, b, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def resnet():
    """Blocks that begin with the stride, and have a third convolution in the shortcut."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), BasicBlock(16, 16, 1), BasicBlock(16, 24, 2), BasicBlock(24, 32, 2),
                         nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(32, 10))


class SqueezeExcite(nn.Module):
    """An inverted residual block in the style of MobileNetV3: a global pooling inside."""

    def __init__(self, width, stride):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.Hardswish())
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 5, stride, 2, groups=2 * width)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 8, 1), nn.ReLU(),
                                     nn.Conv2d(8, 2 * width, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if x.shape == y.shape else y


def mobilenet():
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), SqueezeExcite(16, 1), SqueezeExcite(16, 2), SqueezeExcite(16, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10))


class Mixer(nn.Module):
    """Patches as tokens, mixed by matrix products: no convolution anywhere."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens, self.channels = nn.Linear(48, 32), nn.Linear(64, 64), nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = x.view(-1, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 64, 48)
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head(F.gelu(self.channels(x)).mean(1))


class Sliced(PlainSequential):
    """Halves the resolution by leaving out every other pixel, and the last time by a pixel shuffle, not by strides."""

    def forward(self, x):
        for layer in self.features:
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                x = F.conv2d(x, layer.weight, None, 1, 1, 1, layer.groups)[:, :, ::2, ::2]
            else:
                x = layer(x)
        x = F.pixel_unshuffle(x, 2)[:, :48]
        return self.fc(x.mean((2, 3)))


class FixedSize(nn.Module):
    """A learned offset for each pixel, so that no other image size will do; too narrow a view; dense head."""

    def __init__(self, dilation=1):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 3, 32, 32))
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, dilation, dilation), nn.Conv2d(8, 8, 3, 1, dilation, dilation)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8192, 10))

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x + self.offset))))


def table(network):
    return {rule.split(" above")[0].split(" 200")[0]: (measured, holds)
            for rule, measured, holds in utils.check_rules(network)}


def verdicts(network):
    return [holds for _, holds in table(network).values()]


BLOCKS = ["four blocks", "three convolutions in each", "stride 2 in the last of each, only there"]


@pytest.mark.parametrize("style", [PlainSequential, Functional])
def test_answers_in_other_styles_that_keep_the_rules_pass(style):
    rows = table(style())
    assert [rule for rule, (_, holds) in rows.items() if not holds] == []
    assert rows["three convolutions in each"][0] == "3 3 3 3"


def test_pooling_between_blocks_is_named_and_ends_a_block():
    rows = table(PooledBlocks())
    assert rows["four blocks"] == ("4", True) and rows["three convolutions in each"] == ("3 3 3 3", True)
    assert rows["stride 2 in the last of each, only there"] == ("1 1 1 | 1 1 1 | 1 1 1 | 1 1 1", False)
    assert rows["no pooling but the final one"] == (", ".join(["max_pool2d_with_indices"] * 4), False)
    assert rows["a depthwise-separable convolution"] == ("0", False) and rows["a dilated convolution"] == ("0", False)
    assert rows["global average pooling at the end"] == ("global average pooling of 2x2", True)
    assert rows["then at most one fully connected layer"] == ("nothing", True)


def test_the_convolution_of_a_shortcut_counts():
    rows = table(resnet())
    assert rows["four blocks"] == ("3", False) and rows["three convolutions in each"] == ("5 3 1", False)
    assert rows["receptive field"] == ("25", False)
    assert rows["global average pooling at the end"][1] and rows["no pooling but the final one"][1]


def test_squeeze_and_excitation_is_pooling_before_the_end():
    rows = table(mobilenet())
    assert rows["no pooling but the final one"] == ("mean, mean, mean", False)
    assert rows["a depthwise-separable convolution"] == ("3", True)
    assert rows["global average pooling at the end"][1] and rows["then at most one fully connected layer"][1]
    assert rows["receptive field"] == ("512 or more", True)  # each pooling sees the whole image


class Resized(PlainSequential):
    """Works on images of another size, and may change it once more between two blocks."""

    def __init__(self, scale, between=1, antialias=False):
        super().__init__()
        self.scale, self.between, self.antialias, self.gap = scale, between, antialias, nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", antialias=self.antialias)
        x = self.features[:30](x)
        x = F.interpolate(x, scale_factor=self.between) if self.between > 1 else x
        return self.fc(self.gap(self.features[30:](x)).flatten(1))


@pytest.mark.parametrize("antialias", [False, True])
def test_images_may_be_enlarged_before_the_first_block(antialias):
    rows = table(Resized(1.5, antialias=antialias))
    assert [rows[rule] for rule in BLOCKS] == [("4 on images enlarged to 48x48", True), ("3 3 3 3", True),
                                               ("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2", True)]
    pixels = float(rows["receptive field"][0])
    assert pixels == pytest.approx(1 + (receptive_field(PlainSequential()) + 0.5) / 1.5, abs=1)


def test_interpolation_to_the_same_size_is_nothing():
    assert [table(Resized(1))[rule] for rule in BLOCKS] == [table(PlainSequential())[rule] for rule in BLOCKS]


@pytest.mark.parametrize("network", [Resized(0.75), Resized(1.5, between=2)])
def test_shrinking_images_and_resizing_between_blocks_leaves_the_blocks_undecided(network):
    rows = table(network)
    assert all(holds is None and "upsample" in measured for measured, holds in map(rows.get, BLOCKS))


@pytest.mark.parametrize("style, operation", [(Mixer, "addmm"), (Sliced, "slice")])
def test_what_a_layout_does_not_let_decide_is_said(style, operation):
    rows = table(style())
    assert [rows[rule] for rule in BLOCKS] == [(f"can't tell: {operation} before the end", None)] * 3
    text = utils.format_rules(utils.check_rules(style()))
    assert text.count("undecided") >= 3


def test_a_fixed_size_leaves_a_receptive_field_open_only_where_it_fills_the_image():
    assert measure_receptive_field(FixedSize()) == (5, True)
    assert table(FixedSize())["receptive field"] == ("5", False)
    assert table(FixedSize(dilation=16))["receptive field"] == ("17 or more", None)
    rows = table(FixedSize())
    assert rows["global average pooling at the end"] == ("none", False)
    assert rows["fewer than"] == ("85,810", True)


def test_frozen_parameters_count():
    network = PlainSequential()
    network.more = nn.Linear(500, 500).requires_grad_(False)
    assert table(network)["fewer than"][1] is False


def test_a_pair_must_work_on_one_another():
    class Side(nn.Module):
        """A depthwise and a pointwise convolution one after the other, but side by side."""

        def __init__(self):
            super().__init__()
            self.depthwise, self.pointwise = nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(6, 10)

        def forward(self, x):
            return self.head(torch.cat([self.depthwise(x), self.pointwise(x)], 1).mean((2, 3)))

    rows = table(Side())
    assert rows["a depthwise-separable convolution"] == ("0", False) and rows["three convolutions in each"][0] == "2"


@pytest.mark.parametrize("name", NETWORKS)
def test_measured_and_theoretical_receptive_field_agree(name):
    network = build_network(name)
    assert measure_receptive_field(network) == (receptive_field(network), True)


@pytest.mark.parametrize("mode, pixels", [("nearest", 2), ("bilinear", 3), ("bicubic", 5)])
def test_interpolation_has_a_receptive_field_too(mode, pixels):
    class Enlarged(nn.Module):
        """A 3x3 convolution on images twice as large, which looks one original pixel further than the interpolation."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 3, padding=1)

        def forward(self, x):
            return self.conv(F.interpolate(x, scale_factor=2, mode=mode)).mean((2, 3))

    assert receptive_field(Enlarged()) == pixels
    measured, whole = measure_receptive_field(Enlarged())
    assert pixels <= measured <= pixels + 1 and whole


@pytest.mark.parametrize("network, text", [
    (nn.Conv2d(1, 10, 3), r"Conv2d does not run on \(2, 3, 32, 32\) images .*take \(N, 3, 32, 32\) and return \(N, 10\)"),
    (nn.Conv2d(3, 10, 3), r"Conv2d turns \(2, 3, 32, 32\) images into \(2, 10, 30, 30\): it has to return \(N, 10\)"),
])
def test_a_network_for_another_task_is_refused_in_one_line(network, text):
    with pytest.raises(ValueError, match=text) as error:
        utils.check_rules(network)
    assert "\n" not in str(error.value)


def test_checking_leaves_the_network_as_it_was():
    network = PlainSequential()
    network.features[2].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    utils.check_rules(network)
    assert network.training and not network.features[2].training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
