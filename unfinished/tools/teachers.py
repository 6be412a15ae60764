"""The student of ten epochs of a wider teacher, into table "10 epochs, teachers, other code" of ablations.json.

From the root of the repository: `PYTHONPATH=. python unfinished/tools/teachers.py`. First a teacher of twice the width
for 30 epochs, in checkpoints/teachers/wide, then its student. The row of two teachers was made here, too (commit
4836db4 has that code).
"""
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

from torch import nn

from benchmarks.ablations import PLAIN, TEN, make_row
from checkpoint import write_json
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


def student(name: str, teacher: nn.Module) -> None:
    """Train a student of ten epochs, and write its row."""
    recipe = replace(TEN, validation_size=5000, teacher="weights/teacher", folder=f"checkpoints/teachers/{name[:18]}")
    with mock.patch("train.load_teacher", lambda *_: teacher.eval()):
        row = make_row(recipe)
    rows = json.loads(OUTPUT.read_text())
    rows.setdefault("10 epochs, teachers, other code", {})[name] = row
    write_json(OUTPUT, rows)


wide, metrics = run(replace(PLAIN, validation_size=5000, epochs=30, sizes=(16, 24, 32),
                            folder="checkpoints/teachers/wide"), Wide)
student(f"a teacher of twice the width and 30 epochs ({metrics['validation_accuracy']:.2f} %)", wide)
