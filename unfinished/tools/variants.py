"""Ablations of other code on the ten-epoch schedule, into benchmarks/ablations.json, table "10 epochs, other code".

From the root of the repository: `PYTHONPATH=. python unfinished/tools/variants.py [NAME...]`.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from benchmarks.ablations import TEN, make_row
from checkpoint import write_file
from model import NetDilated, separable, standard


def large_kernels():
    network = NetDilated()
    network.C3[0] = separable(96, 192, kernel_size=5)
    network.C4[0] = separable(192, 288, kernel_size=5)
    return network


def cheap_c1():
    network = NetDilated()
    network.C1 = nn.Sequential(standard(3, 8, lifting=True), standard(8, 8), standard(8, 64, kernel_size=4, stride=2))
    return network


def small_strides():
    network = NetDilated()
    network.C1[2] = standard(16, 64, stride=2)
    for block, channels in ((network.C2, 96), (network.C3, 192), (network.C4, 288)):
        block[2] = separable(channels, channels, stride=2)
    return network


BUILDS = {"5x5 kernels at the start of C3 and C4": large_kernels,
          "8 channels in the first two convolutions": cheap_c1,
          "3x3 kernels with stride 2": small_strides}
OUTPUT = Path("benchmarks/ablations.json")
for name in sys.argv[1:] or BUILDS:
    rows = json.loads(OUTPUT.read_text())
    table = rows["10 epochs, other code"]
    if name not in table:
        table[name] = make_row(replace(TEN, folder=f"checkpoints/variants/{name}"), BUILDS[name])
        write_file(OUTPUT, (json.dumps(rows, indent=1) + "\n").encode())
