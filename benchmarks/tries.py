"""Which ideas pay: each is trained on the same short schedule and judged on the last 10,000 training images, which it does
not see; writes a row for each into benchmarks/tries.json. What is called test accuracy in it is theirs.

`python benchmarks/tries.py` makes the rows that are missing, or those of the ideas named as arguments.
"""
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

SCHEDULE = {"epochs": 10, "augmentation": 0.25, "validation_size": 10_000}


class Try(Network):
    """NetDilated with other kernels or units; as it is by default."""

    def __init__(self, num_classes=10, kernels=9 * (3,), unit=Unit, inside=False):
        def pair(channels_in, kernel, stride, dilation):
            inner = [nn.BatchNorm2d(112), nn.SiLU()] if inside else []
            return nn.Sequential(conv(channels_in, 112, 1), *inner, Depthwise(112, kernel, stride, dilation))

        rows = zip((96, *8 * (112,)), kernels, 3 * (1, 1, 2), (1, 1, 1, 1, 2, 1, 1, 1, 1))
        units = [unit(pair(*row), 112) for row in rows]
        super().__init__([unit(conv(3, 48), 48), unit(conv(48, 48), 48), unit(conv(48, 96, stride=2), 96)],
                         units[:3], units[3:6], units[6:],
                         [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(112, num_classes)])


class QuietUnit(Unit):
    """A residual unit that begins as the identity: Goyal et al., https://arxiv.org/abs/1706.02677."""

    def __init__(self, convolution, channels):
        super().__init__(convolution, channels)
        layers = list(convolution) if isinstance(convolution, nn.Sequential) else [convolution]
        if layers[0].in_channels == channels and layers[-1].stride == (1, 1):
            nn.init.zeros_(self[1].weight)


MUON = {"optimizer": "Muon"}
IDEAS = {  # of the network, of the recipe, and of Muon's ratio
    "as it is": ({}, {}),
    "Muon, ratio 0.1": ({}, MUON),
    "Muon, ratio 0.25": ({}, MUON, 0.25),
    "Muon, ratio 0.05": ({}, MUON, 0.05),
    "Muon, 5x5 kernels in the first units of C3 and C4": ({"kernels": (3, 3, 3, 5, 3, 3, 5, 3, 3)}, MUON),
    "Muon, units begin as identity": ({"unit": QuietUnit}, MUON),
    "Muon, batch norm and SiLU within pairs": ({"inside": True}, MUON),
}


def main(names):
    path = HERE / "tries.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name in names or IDEAS:
        if name in rows:
            continue
        layout, settings, *ratio = IDEAS[name]
        folder = HERE.parent / "checkpoints" / "tries" / name.replace("/", " ")
        with (mock.patch.dict(model.NETWORKS, {"Try": partial(Try, **layout)}),
              mock.patch.object(utils.Muon, "ratio", *(ratio or [utils.Muon.ratio]))):
            facts = utils.run("Try", **SCHEDULE, **settings, checkpoint=folder / "checkpoint.pt", folder=folder)[1]
        rows[name] = {**{key: facts[key] for key in ("parameters", "macs", "train_accuracy", "test_accuracy", "test_loss",
                                                     "hardware", "date", "settings")},
                      "seconds_an_epoch": statistics.median(facts["history"]["seconds"])}
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print("{:50} {:8,} {:12,} {:6.1f} s {:6.2f} {:.4f}".format(
            name, *(rows[name][key] for key in ("parameters", "macs", "seconds_an_epoch", "test_accuracy", "test_loss"))))


if __name__ == "__main__":
    main(sys.argv[1:])
