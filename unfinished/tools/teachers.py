"""Students of ten epochs with other teachers, into benchmarks/ablations.json, table "10 epochs, teachers".

From the root of the repository: `PYTHONPATH=. python unfinished/tools/teachers.py`. First the student of two teachers:
weights/teacher and the held-out run, both trained on the same 45,000 images. Then a teacher of twice the width for 30
epochs, in checkpoints/teachers/wide, and its student. The rows "no teacher" and "our teacher" are of
benchmarks/ablations.py.
"""
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from benchmarks.ablations import PLAIN, TEN, make_row
from checkpoint import load, write_json
from model import MirrorMean, Network, separable, standard
from train import run

OUTPUT = Path("benchmarks/ablations.json")


class Wide(Network):
    """NetDilated with twice the channels."""

    def __init__(self):
        super().__init__(
            upsample=2,
            C1=[standard(3, 32, lifting=True), standard(32, 32), standard(32, 128, kernel_size=4, stride=2)],
            C2=[separable(128, 192), separable(192, 192), separable(192, 192, kernel_size=4, stride=2)],
            C3=[separable(192, 384), separable(384, 384, dilation=2), separable(384, 384, kernel_size=4, stride=2)],
            C4=[separable(384, 576), separable(576, 576), separable(576, 576, kernel_size=4, stride=2)],
            O=[nn.AdaptiveAvgPool2d(1), nn.Flatten(), MirrorMean(), nn.Linear(288, 10)])


class Mean(nn.Module):
    """The logarithm of the mean of the probabilities of several networks."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return torch.stack([network(x).float().softmax(1) for network in self.networks]).mean(0).log()


def student(name: str, teacher: nn.Module) -> None:
    """Train a student of ten epochs, and write its row."""
    recipe = replace(TEN, validation_size=5000, teacher="weights/teacher", folder=f"checkpoints/teachers/{name[:18]}")
    with mock.patch("train.load_teacher", lambda *_: teacher.eval()):
        row = make_row(recipe)
    rows = json.loads(OUTPUT.read_text())
    rows.setdefault("10 epochs, teachers", {})[name] = row
    write_json(OUTPUT, rows)


student("the mean of our teacher and of its student of 120 epochs",
        Mean(load("NetDilated", "weights/teacher")[0], load("NetDilated", "weights/held-out")[0]))
wide, metrics = run(replace(PLAIN, validation_size=5000, epochs=30, sizes=(16, 24, 32),
                            folder="checkpoints/teachers/wide"), Wide)
student(f"a teacher of twice the width and 30 epochs ({metrics['validation_accuracy']:.2f} %)", wide)
