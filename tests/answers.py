"""Networks in the styles that students hand in, for the tests of the rules; beside each are its
rows, by hand.

`ANSWERS` maps a name to a function that builds a network, and to its rows that do not simply hold:
a part of what was measured, and the verdict. Figures that hold are given where they are worth
knowing. The receptive field of a plain network is 1 + 2 * the sum over its 3x3 convolutions of
dilation * jump, where the jump is 1, 2, 4, 8 in C1 to C4.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm
from torch.utils.checkpoint import checkpoint

from checker.rules import check_rules

C, S = nn.Conv2d, nn.Sequential
RULES = {
    "four": "four blocks",
    "three": "three convolutions in each",
    "stride": "stride 2 in the last of each, only there",
    "pool": "no pooling but the final one",
    "field": "receptive field",
    "pair": "a depthwise-separable convolution",
    "dilated": "a dilated convolution",
    "gap": "global average pooling at the end",
    "linear": "then at most one fully connected layer",
    "size": "fewer than",
}
ANSWERS = {}
BLOCKS = [RULES[key] for key in ("four", "three", "stride")]
VERDICTS = {"holds": True, "BROKEN": False, "undecided": None, "optional": "optional"}
GAP = nn.AdaptiveAvgPool2d(1), nn.Flatten()
TINY = S(C(3, 10, 3, 1, 1), *GAP)


def table(network, transform=None):
    """Return {rule, without its limit: (what was measured, whether it holds)}."""
    return {
        rule.split(" above")[0].split(" 200")[0]: (measured, VERDICTS[verdict])
        for rule, measured, verdict in check_rules(network, transform)
    }


def answer(**rows):
    """Add a network to `ANSWERS` with its rows: (text, verdict), or only the text of a broken
    one.
    """

    def add(build):
        ANSWERS[build.__name__] = (
            build,
            {
                RULES[key]: value if isinstance(value, tuple) else (value, "BROKEN")
                for key, value in rows.items()
            },
        )
        return build

    return add


def holds(text):
    return text, "holds"


def undecided(text):
    return text, "undecided"


def unit(a, b, stride=1, dilation=1, groups=1, kernel=3, mode="zeros"):
    """Convolution, batch norm, ReLU and dropout: the unit of most answers."""
    return S(
        C(a, b, kernel, stride, dilation * (kernel // 2), dilation, groups, False, mode),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.Dropout(0.05),
    )


def separable(a, b, stride=1, dilation=1):
    """Depthwise, then pointwise."""
    return S(
        C(a, a, 3, stride, dilation, dilation, a, bias=False),
        C(a, b, 1, bias=False),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.Dropout(0.05),
    )


def block(a, b, dilation=1, last=None):
    """Three convolutions, the last one with stride 2."""
    return S(unit(a, b), separable(b, b, 1, dilation), last or unit(b, b, 2))


def body():
    """Twelve convolutions, 1 1 2 in each block, one dilated in C2: receptive field 1 + 2 * 3 * 15 +
    2 * 2 = 95.
    """
    return S(block(3, 16), block(16, 24, 2), block(24, 32), block(32, 40))


def head(a):
    return S(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, 10))


# ---------------------------------------------------------------- compliant


@answer(
    four=holds("4"),
    three=holds("3 3 3 3"),
    stride=holds("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2"),
    pool=holds("none"),
    field=holds("97"),
    pair=holds("4"),
    dilated=holds("2"),
    gap=holds("of 2x2"),
    linear=holds("fully connected"),
)
class ConvBlocks(nn.Module):
    """The commonest style. Dilation 2 in C1 and in C2 adds 2 and 4 to 91."""

    def __init__(self):
        super().__init__()
        self.convblock1, self.convblock2 = block(3, 16, 2), block(16, 24, 2)
        self.convblock3, self.convblock4 = block(24, 32), block(32, 40)
        self.gap, self.fc = nn.AvgPool2d(kernel_size=2), nn.Linear(40, 10)

    def forward(self, x):
        x = self.convblock4(self.convblock3(self.convblock2(self.convblock1(x))))
        return F.log_softmax(self.fc(self.gap(x).view(-1, 40)), dim=-1)


@answer(three=holds("3 3 3 3"), field=holds("95"), gap=holds("of 2x2"), linear=holds("none"))
class OutputBeforePooling(nn.Module):
    """A 1x1 convolution to ten channels before the pooling is the O, and no fourth convolution of
    C4.
    """

    def __init__(self):
        super().__init__()
        self.body, self.out = body(), C(40, 10, 1)

    def forward(self, x):
        return F.log_softmax(F.avg_pool2d(self.out(self.body(x)), 2).reshape(-1, 10), dim=1)


@answer(three=holds("3 3 3 3"), linear=holds("fully connected"))
def output_after_pooling():
    """The same after the pooling."""
    return S(body(), nn.AdaptiveAvgPool2d(1), C(40, 10, 1), nn.Flatten(), nn.LogSoftmax(1))


@answer(three=holds("3 3 3 3"), stride=holds("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2"), pair=holds("8"))
def stride_in_the_pointwise():
    """Depthwise without, pointwise with a stride, in a pair that counts as one."""

    def last(b):
        return S(C(b, b, 3, 1, 1, groups=b), C(b, b, 1, 2), nn.ReLU())

    return S(
        block(3, 16, 2, last(16)),
        block(16, 24, 1, last(24)),
        block(24, 32, 1, last(32)),
        block(32, 40, 1, last(40)),
        head(40),
    )


@answer(three=holds("3 3 3 3"), stride=holds("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2"), pair=holds("4"))
def pointwise_before_a_pair():
    """3x3, 1x1, depthwise-separable with stride 2: the 1x1 must not take the depthwise layer."""

    def three(a, b, dilation=1):
        return S(
            unit(a, b, 1, dilation), C(b, b, 1), C(b, b, 3, 2, 1, groups=b), C(b, b, 1), nn.ReLU()
        )

    return S(three(3, 16), three(16, 24, 2), three(24, 32), three(32, 40), head(40))


@answer(three=holds("3 3 3 3"), pair=holds("8"))
def pointwise_first():
    """BSConv: a pair is pointwise, then depthwise, and the O comes right after one."""

    def pair(a, b, stride=1, dilation=1):
        return S(
            C(a, b, 1, bias=False),
            C(b, b, 3, stride, dilation, dilation, b),
            nn.BatchNorm2d(b),
            nn.SiLU(),
        )

    return S(
        *(
            S(unit(a, b), pair(b, b, 1, 2), pair(b, b, 2))
            for a, b in ((3, 16), (16, 24), (24, 32), (32, 40))
        ),
        C(40, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@answer(three=holds("3 3 3 3"), field=holds("95"))
def reflect_padding():
    layers = body()
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.padding_mode = "reflect" if layer.in_channels < 30 else "replicate"
            layer._reversed_padding_repeated_twice = [layer.dilation[0]] * 4
    return S(layers, head(40))


@answer(
    three=holds("3 3 3 3"),
    stride=holds("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2"),
    field=holds("91"),
    pair="0",
    dilated="0",
)
def circular_padding():
    layers = [
        unit(a, b, stride, mode="circular")
        for a, b in ((3, 12), (12, 24), (24, 32), (32, 40))
        for a, b, stride in ((a, b, 1), (b, b, 1), (b, b, 2))
    ]
    return S(*layers, head(40))


@answer(three=holds("3 3 3 3"), field=holds("95"), pool=holds("none"))
class SqueezeExcite(nn.Module):
    """What is pooled weighs the map and does not replace it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), head(40)
        self.gates = nn.ModuleList(
            S(
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(b, 4),
                nn.ReLU(),
                nn.Linear(4, b),
                nn.Sigmoid(),
            )
            for b in (16, 24, 32, 40)
        )

    def forward(self, x):
        for layers, gate in zip(self.body, self.gates, strict=True):
            x = layers(x)
            x = x * gate(x).view(*x.shape[:2], 1, 1).expand_as(x)
        return self.head(x)


class LayerNorm(nn.LayerNorm):
    """Over channels."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@answer(three=holds("3 3 3 3"), field=holds("95"), linear=holds("fully connected"))
def layer_norms():
    layers = body()
    for each in layers:
        for part in each:
            part[-3] = LayerNorm(part[-3].num_features)
    return S(
        layers,
        nn.AdaptiveAvgPool2d(1),
        LayerNorm(40),
        nn.Flatten(),
        nn.LayerNorm(40),
        nn.Linear(40, 10),
    )


@answer(three=holds("3 3 3 3"), field=holds("95"), gap=holds("of 2x2"))
class FixedPositions(nn.Module):
    """Learned offsets for 32x32 positions: no other image size will do."""

    def __init__(self):
        super().__init__()
        self.offset, self.body, self.fc = (
            nn.Parameter(torch.zeros(1, 3, 32, 32)),
            body(),
            nn.Linear(40, 10),
        )

    def forward(self, x):
        return self.fc(self.body(x + self.offset).view(-1, 40, 4).mean(2))


@answer(three=holds("3 3 3 3"), field=holds("95"))
class Checkpointed(nn.Module):
    """Reentrant checkpointing, which saves memory in training."""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), head(40)

    def forward(self, x):
        for layers in self.body:
            x = checkpoint(layers, x, use_reentrant=True)
        return self.head(x)


@answer(three=holds("3 3 3 3"), field=holds("95"), pair=holds("4"))
def scripted():
    return torch.jit.script(S(body(), head(40)))


@answer(three=holds("3 3 3 3"), field=holds("95"), pair=holds("4"))
def traced():
    return torch.jit.trace(S(body(), head(40)).eval(), torch.zeros(2, 3, 32, 32))


@answer(field=holds("95"))
def double():
    return S(body(), head(40)).double()


@answer(field=holds("95"))
def half():
    return S(body(), head(40)).half()


@answer(field=holds("95"))
def bfloat16():
    return S(body(), head(40)).bfloat16()


@answer(field=holds("95"))
class AsksForDouble(nn.Module):
    """Its own code names its type, so that it runs in no other."""

    def __init__(self):
        super().__init__()
        self.layers = S(body(), head(40)).double()

    def forward(self, x):
        return self.layers(x.to(torch.float64))


@answer(field=holds("95"))
class Remembers(nn.Module):
    """Stored activations and the old weight norm: it can't be copied."""

    def __init__(self):
        super().__init__()
        self.body, self.gap = body(), nn.AdaptiveAvgPool2d(1)
        self.fc, self.seen = weight_norm(nn.Linear(40, 10)), []
        self(torch.zeros(1, 3, 32, 32))

    def forward(self, x):
        self.seen.append(self.body(x))
        return self.fc(self.gap(self.seen[-1]).flatten(1))


@answer(field=holds("95"))
class ZeroBranches(nn.Module):
    """ReZero: each block begins as a plain shortcut by slices, through which little is seen."""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), head(40)
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        for layers, weight in zip(self.body, self.weight, strict=True):
            y = layers(x)
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])) + weight * y
        return self.head(x)


@answer(field=holds("95"))
def zero_initialised_norms():
    network = S(body(), head(40))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.weight)
    return network


@answer(three=holds("3 3 3 3"), field=holds("95"))
class MeanOfMeans(nn.Module):
    """Batch by `squeeze`, pooling by two means; works on two images as on one hundred."""

    def __init__(self):
        super().__init__()
        self.body, self.out = body(), C(40, 10, 1)

    def forward(self, x):
        return self.out(self.body(x)).mean(3, keepdim=True).mean(2, keepdim=True).squeeze()


@answer(three=holds("3 3 3 3"), field=holds("95"))
class ByHand(nn.Module):
    """Padding with zeros in a new tensor, and batch norm by hand."""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), head(40)
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding = (0, 0)

    def forward(self, x):
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                pad = layer.dilation[0] * (layer.kernel_size[0] // 2)
                height, width = x.shape[2:]
                padded = torch.zeros(len(x), x.shape[1], height + 2 * pad, width + 2 * pad)
                padded[:, :, pad : pad + height, pad : pad + width] = x
                x = layer(padded)
            elif isinstance(layer, nn.BatchNorm2d):
                x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).add(1)
                x = x.relu_()
        return self.head(x)


# ------------------------------------------------------------ the bonus: dilated, not strided


def dilated_block(a, b, dilation, last=None):
    return S(unit(a, b), separable(b, b), last or unit(b, b, 1, dilation))


@answer(
    four=holds("4, told by their dilations (the bonus form)"),
    three=holds("3 3 3 3"),
    pool=holds("none"),
    stride=holds("1 1 d2 | 1 1 d4 | 1 1 d8 | 1 1 d8"),
    field=holds("61"),
    dilated=holds("4"),
)
def bonus():
    """All jumps are 1: 1 + 2 * (8 + 2 + 4 + 8 + 8) = 61."""
    return S(
        dilated_block(3, 16, 2),
        dilated_block(16, 24, 4),
        dilated_block(24, 24, 8),
        dilated_block(24, 32, 8),
        head(32),
    )


@answer(
    four=holds("bonus"), three=holds("3 3 3 3"), stride=holds("1 1 2 | 1 1 d2 | 1 1 d4 | 1 1 d8")
)
def bonus_with_one_stride():
    return S(
        dilated_block(3, 16, 2, unit(16, 16, 2)),
        dilated_block(16, 24, 2),
        dilated_block(24, 24, 4),
        dilated_block(24, 32, 8),
        C(32, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@answer(
    four="3",
    three="3 4 3: C2 has 4 convolutions: 1.0.0 3x3 16->24, 1.1.0 ",
    stride=holds("1 1 d2 | 1 1 1 d4"),
    field="35",
)
def bonus_with_a_block_too_few():
    """1 + 2 * (4 + 7 + 6): the second block has four convolutions."""
    return S(
        dilated_block(3, 16, 2),
        dilated_block(16, 24, 1),
        unit(24, 24, 1, 4),
        dilated_block(24, 32, 4)[0],
        dilated_block(32, 32, 4)[1:],
        head(32),
    )


# ---------------------------------------------------------------- what breaks a rule


@answer(
    gap="1: 2x2 average pooling of a 3x3 map leaves positions out", linear=holds("fully connected")
)
def pooling_that_leaves_rows_out():
    """A window of 2x2 of a map of 3x3."""
    return S(
        S(body(), nn.ZeroPad2d((0, 1, 0, 1))), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(40, 10)
    )


@answer(
    four="1",
    three="1: C1 has 1 convolution: 0 3x3, stride 2 3->8",
    stride=holds("2"),
    field="3",
    pair="0",
    dilated="0",
    gap="1: 9x9 average pooling of a 16x16 map leaves positions out",
)
def nine_of_sixteen():
    """The issue's own case."""
    return S(C(3, 8, 3, 2, 1), nn.AvgPool2d(9), nn.Flatten(), nn.Linear(8, 10))


@answer(gap="1: 2x2 max pooling of a 2x2 map", pool=holds("none"))
def final_max_pooling():
    return S(body(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(40, 10))


@answer(gap="none", linear=holds("fully connected"))
def flattened():
    return S(body(), nn.Flatten(), nn.Linear(160, 10))


@answer(linear="2: 3, 5")
def two_linear_layers():
    return S(
        body(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


@answer(
    four="5: convolutions on maps of 32x32, 16x16, 8x8, 4x4, 2x2",
    three="3 3 3 3 1: C5 has 1 convolution: 1.0 3x3",
    gap=holds("of 1x1"),
    stride=holds("1 1 2 | 1 1 2 | 1 1 2 | 1 1 2 | 2"),
)
def one_position_is_left():
    """A thirteenth convolution, with a stride, leaves a map of 1x1, which is pooled all the
    same.
    """
    return S(body(), unit(40, 48, 2), head(48))


class MaxPooledBlock(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = C(a, b, 3, 1, 1), C(b, b, 3, 1, 1), C(b, b, 3, 1, 1)
        self.pool = nn.MaxPool2d(2, 2)

    def forward(self, x):
        return self.pool(F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))))


@answer(
    pool="0.pool: 2x2 max pooling, 1.pool: 2x2 max pooling",
    three=holds("3 3 3 3"),
    pair="0",
    dilated="0",
    stride="1 1 1 | 1 1 1 | 1 1 1 | 1 1 1: C1 ends with 0.conv3 3x3 12->12",
    field=holds("106"),
)
def max_pooled_blocks():
    """A window of 2 adds a jump: 91 + 1 + 2 + 4 + 8 = 106."""
    return S(
        MaxPooledBlock(3, 12),
        MaxPooledBlock(12, 16),
        MaxPooledBlock(16, 24),
        MaxPooledBlock(24, 32),
        head(32),
    )


@answer(
    four="6",
    three="1 1 1 1 1 1: C1",
    stride="1 | 1 | 1 | 1 | 1 | 1: C1",
    field=holds("158"),
    pair="0",
    dilated="0",
    pool="14: 2x2 max pooling",
    gap=holds("of 1x1"),
)
def pooled_to_one_position():
    """Five poolings leave one position, over which a window moves yet: 1 + 2 * 63 + 31 = 158."""
    layers = [
        (C(a, b, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in ((3, 8), (8, 8), (8, 8), (8, 8), (8, 8))
    ]
    return S(*(layer for three in layers for layer in three), C(8, 8, 3, 1, 1), head(8))


class BasicBlock(nn.Module):
    def __init__(self, a, b, stride, option="B"):
        super().__init__()
        self.conv1, self.bn1 = C(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = C(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.shortcut = S()
        if stride > 1 and option == "B":
            self.shortcut = S(C(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        self.more = b - a if option == "A" else 0

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + self.shortcut(x))


@answer(
    four="3: convolutions on maps of 32x32, 16x16, 8x8",
    three="4 2 1: C1 has 4 convolutions",
    field="25",
    pair="0",
    stride="1 1 1 2 | 1 2 | 1: C3 ends with",
    dilated="0",
    linear=holds("fully connected"),
)
def resnet_a():
    """Shortcuts by slices. A stem, then pairs of which the second sees at the new jump: 1 + 2 + 4 +
    6 + 12 = 25.
    """
    return S(
        C(3, 16, 3, 1, 1),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 24, 2, "A"),
        BasicBlock(24, 32, 2, "A"),
        head(32),
    )


@answer(
    four="3",
    three="5 3 1",
    stride="C3 ends with 3.conv2 3x3 32->32",
    field="25",
    pair="0",
    dilated="0",
    linear=holds("fully connected"),
)
def resnet_b():
    return S(
        C(3, 16, 3, 1, 1),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 24, 2),
        BasicBlock(24, 32, 2),
        head(32),
    )


class InvertedResidual(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv = S(
            C(a, 2 * a, 1),
            nn.BatchNorm2d(2 * a),
            nn.ReLU6(),
            C(2 * a, 2 * a, 3, stride, 1, groups=2 * a),
            nn.BatchNorm2d(2 * a),
            nn.ReLU6(),
            C(2 * a, b, 1),
            nn.BatchNorm2d(b),
        )
        self.residual = stride == 1 and a == b

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


@answer(
    four="3",
    three="5 2 2: C1 has 5",
    stride="C3 ends with",
    pair=holds("4"),
    dilated="0",
    field="19",
    linear=holds("fully connected"),
)
def mobilenet_v2():
    """A stem, then expansions, each with a pair of depthwise and projection: 1 + 2 * (1 + 1 + 1 + 2
    + 4) = 19.
    """
    return S(
        unit(3, 16),
        InvertedResidual(16, 16, 1),
        InvertedResidual(16, 24, 2),
        InvertedResidual(24, 24, 2),
        InvertedResidual(24, 32, 1),
        head(32),
    )


class DenseLayer(nn.Module):
    def __init__(self, a, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(a), C(a, growth, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


@answer(
    four="2",
    three="6 4",
    stride="C1 ends with",
    pool="6: 2x2 average pooling",
    field="28",
    pair="0",
    dilated="0",
)
def densenet():
    """A stem, four layers, a 1x1 transition with average pooling, four layers: 1 + 2 * 5 + 1 + 4 *
    4 = 28.
    """
    return S(
        C(3, 16, 3, 1, 1),
        DenseLayer(16, 8),
        DenseLayer(24, 8),
        DenseLayer(32, 8),
        DenseLayer(40, 8),
        C(48, 24, 1),
        nn.AvgPool2d(2),
        DenseLayer(24, 8),
        DenseLayer(32, 8),
        DenseLayer(40, 8),
        DenseLayer(48, 8),
        head(56),
    )


class ConvNeXtBlock(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.dwconv, self.norm = C(a, a, 7, padding=3, groups=a), nn.LayerNorm(a)
        self.pwconv1, self.pwconv2 = nn.Linear(a, 2 * a), nn.Linear(2 * a, a)
        self.gamma = nn.Parameter(1e-6 * torch.ones(a))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


@answer(
    four="3: convolutions on maps of 32x32, 16x16, 8x8",
    three="1 5 4: C1 has 1 convolution",
    pair=holds("4"),
    stride="C3 ends with 6.pwconv2 pointwise 64->32",
    dilated="0",
    field=holds("76"),
    linear=holds("fully connected"),
)
def convnext():
    """2x2 stem, twice 7x7, 2x2 downsampling, twice 7x7: 1 + 1 + 2 * 6 * 2 + 2 + 2 * 6 * 4 = 76."""
    return S(
        C(3, 24, 2, 2),
        ConvNeXtBlock(24),
        ConvNeXtBlock(24),
        LayerNorm(24),
        C(24, 32, 2, 2),
        ConvNeXtBlock(32),
        ConvNeXtBlock(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(32),
        nn.Linear(32, 10),
    )


class ViT(nn.Module):
    """Patches of 4x4, a class token, encoder layers of PyTorch's own."""

    def __init__(self, pool=False):
        super().__init__()
        self.pool, self.patches = pool, C(3, 32, 4, 4)
        self.token, self.positions = (
            nn.Parameter(torch.zeros(1, 1, 32)),
            nn.Parameter(torch.zeros(1, 65, 32)),
        )
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.encoder(x)
        return self.head(x.mean(1) if self.pool else x[:, 0])


@answer(
    field=holds("the whole image, by encoder.layers.0.self_attn"),
    four="2: ",
    three="1 8: ",
    dilated="0",
    stride="C1 ends with patches 4x4, stride 4 3->32",
    pair="0",
    gap="none",
    linear=holds("fully connected"),
)
def vit():
    return ViT()


@answer(
    field=holds("the whole image"),
    four="2: ",
    three="1 8: ",
    stride="C1 ends with",
    pair="0",
    dilated="0",
    gap=holds("global average pooling of 8x8"),
)
def vit_pooled():
    return ViT(pool=True)


@answer(
    field=holds("the whole image, by encoder.self_attn"),
    four="2: ",
    three="1 5: C1 has 1 convolution: stem 3x3",
    stride="1 | 1 1 1 1 1: C1 ends with stem 3x3 3->32",
    pool="pool: 3x3 max pooling",
    pair="0",
    dilated="0",
    gap="none",
    linear=holds("fully connected"),
)
class CCT(nn.Module):
    """A compact transformer: tokens from a convolution, and a weighted sum of them at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = C(3, 32, 3, 1, 1), nn.MaxPool2d(3, 4, 1)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.weights, self.head = nn.Linear(32, 1), nn.Linear(32, 10)

    def forward(self, x):
        x = self.encoder(F.dropout(self.pool(F.relu(self.stem(x))).flatten(2).transpose(1, 2), 0.1))
        return self.head((self.weights(x).softmax(1).transpose(1, 2) @ x).squeeze(1))


class HandMadeAttention(nn.Module):
    """Self-attention on the map, as in a non-local block."""

    def __init__(self, a):
        super().__init__()
        self.qkv, self.out = C(a, 3 * a, 1), C(a, a, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.out((v @ weights.transpose(1, 2)).view_as(x))


@answer(
    field=holds("the whole image"),
    three="3 3 3 5: C4 has 5",
    four=holds("4"),
    stride=holds("1 1 1 1 2"),
)
def with_attention():
    """Two 1x1 convolutions too many in C4."""
    layers = list(body())
    return S(*layers[:3], HandMadeAttention(32), layers[3], head(40))


@answer(
    four="2: convolutions on maps of 32x32, 8x8",
    three="1 1: C1 has 1 convolution: embed 4x4, stride 4 48->32",
    stride="C1 ends with embed",
    pair="0",
    dilated="0",
    field=holds("the whole image, by tokens.0"),
    gap=holds("global average pooling of 8x8"),
)
class Mixer(nn.Module):
    """Patches of 4x4 as tokens. A linear layer on each patch is a convolution with stride 4."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(48, 32), nn.Linear(32, 10)
        self.tokens, self.channels = (
            S(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64)),
            nn.Linear(32, 32),
        )

    def forward(self, x):
        x = x.view(-1, 3, 8, 4, 8, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 64, 48)
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head(F.gelu(self.channels(x)).mean(1))


# ---------------------------------------------------------------- further styles


class FireModule(nn.Module):
    """SqueezeNet's: a squeeze, then two expansions side by side."""

    def __init__(self, a, squeeze, b):
        super().__init__()
        self.squeeze, self.one, self.three = (
            C(a, squeeze, 1),
            C(squeeze, b, 1),
            C(squeeze, b, 3, padding=1),
        )

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


@answer(
    four="2",
    three="4 4: C1 has 4 convolutions: 0 3x3 3->16",
    stride="C1 ends with",
    pair="0",
    dilated="0",
    pool="2: 3x3 max pooling",
    field="15",
    linear=holds("none"),
)
def squeezenet():
    """Stem, fire, pooling, fire, and a 3x3 O, which is C2's fourth: 1 + 2 + 2 + 2 + 2 * 2 + 2 * 2 =
    15.
    """
    return S(
        C(3, 16, 3, 1, 1),
        FireModule(16, 8, 16),
        nn.MaxPool2d(3, 2, 1),
        FireModule(32, 8, 16),
        C(32, 10, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's: half of the channels pass, then the channels are shuffled."""

    def __init__(self, a):
        super().__init__()
        self.branch = S(
            C(a // 2, a // 2, 1),
            nn.ReLU(),
            C(a // 2, a // 2, 3, 1, 1, groups=a // 2),
            C(a // 2, a // 2, 1),
            nn.ReLU(),
        )

    def forward(self, x):
        left, right = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([left, self.branch(right)], 1), 2)


@answer(
    four=holds("4"),
    three="4 3 3 3: C1 has 4 convolutions: 0.0 pointwise",
    field=holds("61"),
    pair=holds("4"),
    dilated="0",
)
def shufflenet():
    """A stem too many. A unit is a 1x1 and a separable convolution; then a strided 3x3: 1 + 2 * (1
    + 1) * 15 = 61.
    """
    return S(
        unit(3, 16, kernel=1),
        *(S(ShuffleUnit(a), unit(a, b, 2)) for a, b in ((16, 16), (16, 24), (24, 32), (32, 40))),
        head(40),
    )


@answer(three=holds("3 3 3 3"), field=holds("95"), pool=holds("none"))
class EfficientAttention(nn.Module):
    """ECA: the gate is a 1-D convolution over pooled channels; and CBAM's sum of average and
    maximum.
    """

    def __init__(self):
        super().__init__()
        self.body, self.head, self.conv = body(), head(40), nn.Conv1d(1, 1, 3, padding=1)
        self.mlp = S(C(24, 4, 1), nn.ReLU(), C(4, 24, 1))

    def forward(self, x):
        x = self.body[0](x)
        gate = (
            self.conv(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2))
            .transpose(-1, -2)
            .unsqueeze(-1)
        )
        x = self.body[1](x * gate.sigmoid())
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        return self.head(self.body[3](self.body[2](x * gate.sigmoid())))


@answer(three=holds("3 3 3 3"), field=holds("95"), pool=holds("none"))
class CoordinateAttention(nn.Module):
    """The gates are means of rows and of columns, each with a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.gate = body(), head(40), C(16, 16, 1)

    def forward(self, x):
        x = self.body[0](x)
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
        x = x * self.gate(rows).sigmoid() * self.gate(columns).sigmoid()
        return self.head(self.body[3](self.body[2](self.body[1](x))))


@answer(
    four=undecided("4, but slice in forward makes 16x16 of 32x32"),
    three=undecided("3 3 3 3, but slice"),
    stride=undecided("slice in forward"),
    field=holds("95"),
)
class Sliced(nn.Module):
    """Leaves out every other position after a convolution with stride 1: a stride, or none?"""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), head(40)
        for layers in self.body:
            layers[2][0].stride = (1, 1)

    def forward(self, x):
        for layers in self.body:
            x = layers(x)[:, :, ::2, ::2]
        return self.head(x)


@answer(
    four="3: convolutions on maps of 32x32, 16x16, 8x8",
    three="2 2 1",
    field="15",
    pair="0",
    dilated="0",
    stride="in C1, 0.0",
    pool=holds("none"),
    linear=holds("fully connected"),
)
def factorised():
    """Inception's 1x3 and 3x1, each with a stride along its own axis: 1 + 2 + 2 * 2 + 2 * 4 = 15
    along both.
    """

    def pair(a, b, stride):
        return S(C(a, b, (1, 3), (1, stride), (0, 1)), C(b, b, (3, 1), (stride, 1), (1, 0)))

    return S(pair(3, 16, 2), pair(16, 24, 2), C(24, 24, 3, padding=1), head(24))


@answer(
    four="2: convolutions on maps of 32x32, 14x14",
    three="1 1: C1",
    stride="C1 ends with conv.conv1 5x5 3->6",
    pool="conv.pool: 2x2 max pooling",
    field="16",
    pair="0",
    dilated="0",
    linear="3: fc.0, fc.2, fc.4",
    gap="conv.pool2: 2x2 max pooling of a 10x10 map leaves 5x5",
    size=holds("62,006"),
)
def lenet():
    """The textbook's: 5x5, pooling, 5x5, pooling: 1 + 4 + 1 + 8 + 2 = 16."""
    network = S()
    network.add_module("conv", S())
    network.conv.add_module("conv1", C(3, 6, 5))
    network.conv.add_module("pool", nn.MaxPool2d(2))
    network.conv.add_module("conv2", C(6, 16, 5))
    network.conv.add_module("pool2", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    network.add_module(
        "fc", S(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    )
    return network


@answer(
    four=undecided("upsample_nearest2d in 2 makes 16x16 of 8x8"),
    three=undecided("makes 16x16 of 8x8"),
    stride=undecided("makes 16x16 of 8x8"),
    field=holds("59"),
)
def resized_between_blocks():
    """Twelve convolutions, but the map grows again after C2. Jumps 1, 2, 2, 4: 1 + 2 * 3 * 9 + 2 *
    2 = 59.
    """
    return S(
        block(3, 16),
        block(16, 24, 2),
        nn.Upsample(scale_factor=2),
        block(24, 32),
        block(32, 40),
        head(40),
    )


@answer(
    field=undecided("28, but squeeze-excite sees more (5.0.0)"),
    four="2",
    three="6 ",
    stride="C1 ends with",
    pool="6: 2x2",
    pair="0",
    dilated="0",
)
def narrow_squeeze_excite():
    class Gate(nn.Sequential):
        def forward(self, x):
            return x * super().forward(x)

    layers = list(densenet())
    layers[5] = S(
        Gate(nn.AdaptiveAvgPool2d(1), C(48, 4, 1), nn.ReLU(), C(4, 48, 1), nn.Sigmoid()), layers[5]
    )
    return S(*layers)


def with_endings(endings):
    """Four blocks that end with stride 2 ("2"), with dilation 2 in its place ("d") or with neither
    ("1").
    """
    kinds = {"2": (2, 1), "d": (1, 2), "1": (1, 1)}
    widths = (3, 16, 24, 32, 40)
    return S(
        *(
            block(a, b, 1, unit(b, b, *kinds[end]))
            for a, b, end in zip(widths, widths[1:], endings, strict=False)
        ),
        head(40),
    )


@answer(
    four=holds("4, told by their dilations"),
    field=holds("59"),
    stride="1 1 2 | 1 1 d2 | 1 1 2 | 1 1 1 (d: dilated instead of strided, the bonus): C4 ends",
)
def bonus_that_fails_at_the_end():
    """Stride 2, dilation 2, stride 2, neither. Jumps 1, 2, 2, 4: 1 + 2 * 3 * 9 + 2 * 2 = 59."""
    return with_endings("2d21")


@answer(
    four=holds("4, told by their dilations"),
    three=holds("3 3 3 3"),
    stride=holds("d2 d2 d2 | d2 d2 d2"),
    pair="0: no grouped convolution",
    field=holds("49"),
)
def dilated_throughout():
    """No stride at all: 1 + 2 * 2 * 12 = 49."""
    return S(*(unit(a, 8, 1, 2) for a in (3, *[8] * 11)), head(8))


@answer(
    four=holds("4, told by their 1x1 convolutions"),
    three="4 4 4 3: C1 has 4 convolutions: ",
    field="27",
    pair="0",
    stride="1 1 d2 1 | 1 1 1 1 | 1 1 1 1 | 1 1 1 (d: dilated instead of strided, the bonus): C1",
)
def transitions():
    """Blocks of three with a 1x1 convolution between them: 1 + 2 * 12 + 2 for the dilation = 27."""
    return S(
        unit(3, 8),
        unit(8, 8),
        unit(8, 16, 1, 2),
        C(16, 8, 1),
        unit(8, 8),
        unit(8, 8),
        unit(8, 16),
        C(16, 8, 1),
        unit(8, 8),
        unit(8, 8),
        unit(8, 16),
        C(16, 8, 1),
        unit(8, 8),
        unit(8, 8),
        unit(8, 16),
        head(16),
    )


class Shrinking(nn.Module):
    """Two convolutions without padding that halve the map, and a strided shortcut around them."""

    def __init__(self, a, b, dilation):
        super().__init__()
        self.one, self.two = C(a, b, 3, dilation=dilation // 2), C(b, b, 3, dilation=dilation // 2)
        self.shortcut = C(a, b, 1, 2)

    def forward(self, x):
        return self.two(self.one(x)) + self.shortcut(x)


@answer(
    four="2: convolutions on maps of 32x32, 16x16",
    stride="C1 ends with 0.two 3x3, dilation 4 16->16",
    field="23",
    pair="0: no grouped convolution",
)
def shrinks_beside_a_stride():
    """The map of 16x16 sees 1 + 2 * 8 = 17 pixels by way of two convolutions, which have jump 1: 17
    + 2 * 3 = 23.
    """
    return S(Shrinking(3, 16, 8), *(unit(16, 16) for _ in range(3)), head(16))


@answer(
    four="3", three="1 1 1", stride="C3 ends with 2", field="7", pair="0: no grouped", dilated="0"
)
def longer_than_wide():
    """Two strides, then 1x9. Along the height 1 + 2 + 4 = 7 pixels, along the width 7 + 4 * 8 =
    39.
    """
    return S(unit(3, 8, 2), unit(8, 8, 2), C(8, 8, (1, 9), padding=(0, 4)), head(8))


@answer(field=holds("95"), pool=holds("none"))
def local_response_norm():
    """It averages over neighbouring channels with PyTorch's pooling in three dimensions."""
    return S(*body(), nn.LocalResponseNorm(5), head(40))


class MixedKernels(nn.Module):
    """MixConv: depthwise 3x3 on one half of the channels, 5x5 on the other, then pointwise."""

    def __init__(self, a, b):
        super().__init__()
        self.small = C(a // 2, a // 2, 3, padding=1, groups=a // 2)
        self.large = C(a // 2, a // 2, 5, padding=2, groups=a // 2)
        self.pointwise = C(a, b, 1)

    def forward(self, x):
        one, other = x.chunk(2, 1)
        return self.pointwise(torch.cat([self.small(one), self.large(other)], 1))


class AddedBranches(nn.Module):
    """RepVGG's branches and ConvMixer's shortcut: depthwise 3x3 + depthwise 1x1 + identity, then
    pointwise.
    """

    def __init__(self, a, b):
        super().__init__()
        self.three, self.one = C(a, a, 3, padding=1, groups=a), C(a, a, 1, groups=a)
        self.pointwise = C(a, b, 1)

    def forward(self, x):
        return self.pointwise(self.three(x) + self.one(x) + x)


def with_separable(kind):
    """Twelve convolutions, the second one of each block of that kind; the very first one is
    dilated.
    """
    widths = (3, 16, 24, 32, 40)
    return S(
        *(
            S(unit(a, b, 1, 1 + (a == 3)), kind(b, b), unit(b, b, 2))
            for a, b in zip(widths, widths[1:], strict=False)
        ),
        head(40),
    )


@answer(three=holds("3 3 3 3"), field=holds("123"), pair=holds("4"))
def mixed_kernels():
    """1 + 2 * 3 * 15 + 2 for the dilation + 2 * 15 for 5x5 in the place of 3x3 = 123."""
    return with_separable(MixedKernels)


@answer(three=holds("3 3 3 3"), field=holds("93"), pair=holds("4"))
def added_branches():
    """1 + 2 * 3 * 15 + 2 for the dilation = 93."""
    return with_separable(AddedBranches)


@answer(
    size=undecided("259,386, 200,416 of them in layers that are not used (unused, more)"),
    field=holds("97"),
)
def unused_layers():
    network = ConvBlocks()
    network.unused, network.more = nn.Linear(500, 400), C(3, 4, 1)
    return network


@answer(
    four="2: convolutions on maps of 32x32, 16x16",
    three="1 2",
    stride="C2 ends with 2.0 3x3 8->8",
    field="11",
    pair="0",
    dilated="0",
)
def padded_by_other_means():
    """Maps have the size before the padding, which is an operation of its own: 1 + 2 + 2 * 2 * 2 =
    11.
    """
    return S(unit(3, 8, 2), unit(8, 8, mode="replicate"), unit(8, 8, mode="reflect"), head(8))


# ---------------------------------------------------------------- for several test files


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


def pair(a, b, kernel=3, stride=1, dilation=1):
    """Pointwise, then depthwise."""
    layers = S(C(a, b, 1, bias=False))
    layers.append(C(b, b, kernel, stride, dilation * ((kernel - 1) // 2), dilation, b, bias=False))
    return layers


class Narrow(nn.Module):
    """Images upsampled twofold, blocks C1 to C4 of three separable convolutions, a linear layer.

    It has the layout of our network with few channels, and keeps every rule.
    """

    def __init__(self):
        super().__init__()

        def block(a, dilation=1):
            pairs = pair(a, 8), pair(8, 8, 3, 1, dilation), pair(8, 8, 3, 2)
            return S(*(S(each, nn.BatchNorm2d(8), nn.SiLU()) for each in pairs))

        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.C1, self.C2, self.C3, self.C4 = block(3), block(8), block(8, 2), block(8)
        self.O = S(*GAP, nn.Linear(8, 10))

    def forward(self, x):
        return self.O(self.C4(self.C3(self.C2(self.C1(self.upsample(x))))))


def narrow(change=None):
    """Return a `Narrow` network after a change."""
    model = Narrow()
    if change:
        change(model)
    return model
