"""Which ideas pay: each is trained on the same short schedule, the best ones on a long one, and judged on the last training
images, which it does not see; writes a row for each into benchmarks/tries.json. What is called test accuracy in it is theirs.

`python benchmarks/tries.py` makes the rows that are missing, or those of the ideas named as arguments.
"""
import contextlib
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from unittest import mock

from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import model
import utils
from model import Depthwise, Network, Unit, conv

SHORT = {"epochs": 10, "optimizer": "SGD", "sizes": None, "augmentation": 0.25, "validation_size": 10_000}
LONG = {"epochs": 90, "optimizer": "SGD", "sizes": None, "augmentation": 0.5, "validation_size": 5_000}


class Try(Network):
    """NetDilated with other widths, kernels, units or sizes of the map; by default as it was before its images were enlarged."""

    def __init__(self, num_classes=10, enlarge=1, first=(48, 48, 96), widths=(112, 112, 112), kernels=9 * (3,), unit=Unit,
                 inside=False, depthwise_first=False, dilations=(1, 1, 1, 1, 2, 1, 1, 1, 1)):
        def pair(channels_in, channels, kernel, stride, dilation):
            if depthwise_first:
                return nn.Sequential(Depthwise(channels_in, kernel, stride, dilation), conv(channels_in, channels, 1))
            inner = [nn.BatchNorm2d(channels), nn.SiLU()] if inside else []
            return nn.Sequential(conv(channels_in, channels, 1), *inner, Depthwise(channels, kernel, stride, dilation))

        one, two, three = first
        outputs = [width for width in widths for _ in range(3)]
        rows = zip((three, *outputs), outputs, kernels, 3 * (1, 1, 2), dilations)
        units = [unit(pair(*row), row[1]) for row in rows]
        super().__init__([unit(conv(3, one), one), unit(conv(one, two), two), unit(conv(two, three, stride=2), three)],
                         units[:3], units[3:6], units[6:],
                         [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)], enlarge)


class ShortcutUnit(Unit):
    """A unit that adds every other pixel of its input also where its stride is 2: He et al., option A,
    https://arxiv.org/abs/1512.03385."""

    def forward(self, x):
        y = nn.Sequential.forward(self, x)
        stride = x.shape[-1] // y.shape[-1]
        return x[:, :, ::stride, ::stride] + y if x.shape[1] == y.shape[1] else y


class QuietUnit(Unit):
    """A residual unit that begins as the identity: Goyal et al., https://arxiv.org/abs/1706.02677."""

    def __init__(self, convolution, channels):
        super().__init__(convolution, channels)
        layers = list(convolution) if isinstance(convolution, nn.Sequential) else [convolution]
        if layers[0].in_channels == channels and layers[-1].stride == (1, 1):
            nn.init.zeros_(self[1].weight)


class PlainUnit(Unit):
    """A unit without the residual addition."""

    forward = nn.Sequential.forward


class LateUnit(Unit):
    """A unit whose activation comes behind the addition, as in the first residual networks."""

    def forward(self, x):
        y = self[1](self[0](x))
        return self[2](x + y if x.shape == y.shape else y)


class ReluUnit(Unit):
    """A unit with ReLU in the place of SiLU."""

    def __init__(self, convolution, channels):
        super().__init__(convolution, channels)
        self[2] = nn.ReLU()


def all_decay(model, max_lr, weight_decay, name, make_optimizer=utils.make_optimizer):
    """Return the optimizer with weight decay of norms and biases too."""
    optimizer = make_optimizer(model, max_lr, weight_decay, name)
    optimizer.param_groups[1]["weight_decay"] = weight_decay
    return optimizer


MUON = {**SHORT, "optimizer": "Muon"}
GROWING = {**MUON, "sizes": [16, 24, 32]}
LONG_GROWING = {**LONG, "optimizer": "Muon", "sizes": [20, 24, 28, 32]}
MIDDLE = {**LONG_GROWING, "epochs": 30, "validation_size": 10_000}
LARGE = {"enlarge": 2, "first": (16, 16, 64), "widths": (96, 128, 176)}
IDEAS = {  # of the network, of the recipe, and what else is replaced: object, attribute, by what
    "as it was, SGD": ({}, SHORT),
    "Muon": ({}, MUON),
    "Muon, 5x5 kernels in the first units of C3 and C4": ({"kernels": (3, 3, 3, 5, 3, 3, 5, 3, 3)}, MUON),
    "Muon, units begin as identity": ({"unit": QuietUnit}, MUON),
    "Muon, batch norm and SiLU within pairs": ({"inside": True}, MUON),
    "Muon, shortcuts around strides": ({"unit": ShortcutUnit}, MUON),
    "Muon, no residual additions": ({"unit": PlainUnit}, MUON),
    "Muon, activation behind the addition": ({"unit": LateUnit}, MUON),
    "Muon, channels 96 in C2, 112 in C3, 128 in C4": ({"widths": (96, 112, 128)}, MUON),
    "Muon, images enlarged to 48x48, channels 32, 32, 96 in C1, then 96, 128, 136": (
        {"enlarge": 1.5, "first": (32, 32, 96), "widths": (96, 128, 136)}, MUON),
    "Muon, images enlarged to 64x64, channels 16, 16, 64 in C1, then 96, 128, 176": (LARGE, MUON),
    "Muon, the same, training images growing through 16, 24 and 32 pixels before": (LARGE, GROWING),
    "Muon, images enlarged to 64x64, channels 16, 16, 64 in C1, then 64, 128, 192": (
        {"enlarge": 2, "first": (16, 16, 64), "widths": (64, 128, 192)}, MUON),
    "as it is now, SGD": (LARGE, {**GROWING, "optimizer": "SGD"}),
    "as it is now, no residual additions": ({**LARGE, "unit": PlainUnit}, GROWING),
    "as it is now, ReLU": ({**LARGE, "unit": ReluUnit}, GROWING),
    "as it is now, depthwise before pointwise": ({**LARGE, "depthwise_first": True}, GROWING),
    "as it is now, no average of the weights": (LARGE, GROWING, (utils._Run, "average_weights", lambda run: None)),
    "as it is now, weight decay of norms and biases": (LARGE, GROWING, (utils, "make_optimizer", all_decay)),
    "as it is now, batches of 128": (LARGE, {**GROWING, "batch_size": 128}),
    "as it is now, 144 channels in C3": ({**LARGE, "widths": (96, 144, 176)}, GROWING),
    "as it is now, enlarged to 80x80, channels 16, 16, 48 in C1, then 64, 144, 192, dilation 2 in C4 too": (
        {"enlarge": 2.5, "first": (16, 16, 48), "widths": (64, 144, 192), "dilations": (1, 1, 1, 1, 2, 1, 1, 2, 1)}, GROWING),
    "30 epochs": (LARGE, MIDDLE),
    "30 epochs, max_lr 0.15": (LARGE, {**MIDDLE, "max_lr": 0.15}),
    "30 epochs, max_lr 0.6": (LARGE, {**MIDDLE, "max_lr": 0.6}),
    "90 epochs, SGD": ({}, LONG),
    "90 epochs, Muon": ({}, {**LONG, "optimizer": "Muon"}),
    "90 epochs, Muon, images enlarged to 64x64, growing through 20, 24, 28 and 32 pixels before": (
        LARGE, LONG_GROWING),
    "90 epochs, the same, distilled from that one": (
        LARGE, {**LONG_GROWING, "teacher": "weights/teacher"}),
    "90 epochs, batches of 128, distilled from the distilled one": (
        LARGE, {**LONG_GROWING, "teacher": "weights/held-out", "batch_size": 128}),
}


def main(names):
    path = HERE / "tries.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name in names or IDEAS:
        if name in rows:
            continue
        layout, settings, *replaced = IDEAS[name]
        folder = HERE.parent / "checkpoints" / "tries" / name.replace("/", " ")
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(model.NETWORKS, {"Try": partial(Try, **layout)}))
            for target in replaced:
                stack.enter_context(mock.patch.object(*target))
            facts = utils.run("Try", **settings, checkpoint=folder / "checkpoint.pt", folder=folder)[1]
        rows[name] = {**{key: facts[key] for key in ("parameters", "macs", "train_accuracy", "test_accuracy", "test_loss",
                                                     "hardware", "date", "settings")},
                      "seconds_an_epoch": statistics.median(facts["history"]["seconds"])}
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print("{:50} {:8,} {:12,} {:6.1f} s {:6.2f} {:.4f}".format(
            name, *(rows[name][key] for key in ("parameters", "macs", "seconds_an_epoch", "test_accuracy", "test_loss"))))


if __name__ == "__main__":
    main(sys.argv[1:])
