"""The smoke setting: under pytest the notebook runs on a few images, in a temporary folder."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from model import NetDilated
from pretrained import save
from recipe import Recipe

SCRATCH = tempfile.TemporaryDirectory(prefix="s9-")
SMOKE = Recipe(
    data="tiny",
    epochs=2,
    batch_size=50,
    sizes=(8, 16),
    teacher=f"{SCRATCH.name}/teacher",
    folder=SCRATCH.name,
)
os.environ["S9_SETTINGS"] = json.dumps({**SMOKE.to_json(), "folder": SMOKE.folder})
os.environ["TQDM_DISABLE"] = "1"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # the tests write into temporary folders only
sys.dont_write_bytecode = True


def pytest_sessionstart():
    """Save an untrained teacher, and let SIGINT interrupt, which a shell's background ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    metrics = {"network": "NetDilated", "recipe": SMOKE.to_json(), "history": {}}
    save(NetDilated(), metrics, SMOKE.teacher)


@pytest.fixture(scope="session")
def root():
    """The folder of the sample of CIFAR-10."""
    return Path(__file__).parent / "sample"


@pytest.fixture(scope="session", autouse=True)
def remove_scratch():
    yield
    SCRATCH.cleanup()
