"""The smoke setting: under pytest the notebook runs on the sample, in a folder that is removed
afterwards.
"""

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from model import NetDilated
from pretrained import save
from recipe import Recipe

SCRATCH = tempfile.TemporaryDirectory(prefix="s9-")
SMOKE = Recipe(
    data="sample",
    epochs=2,
    batch_size=200,
    sizes=(8, 16),
    teacher=f"{SCRATCH.name}/teacher",
    folder=SCRATCH.name,
)
os.environ["S9_SETTINGS"] = json.dumps({**SMOKE.to_json(), "folder": SMOKE.folder})
os.environ["TQDM_DISABLE"] = "1"


def pytest_sessionstart():
    """Save an untrained teacher, and let SIGINT interrupt even where the shell ignores it, as in
    the background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    save(
        NetDilated(),
        {"network": "NetDilated", "recipe": SMOKE.to_json(), "history": {}},
        Path(SMOKE.teacher),
    )


@pytest.fixture(scope="session")
def root():
    """The folder of the sample of CIFAR-10."""
    return Path(__file__).parent / "sample"


@pytest.fixture(scope="session", autouse=True)
def remove_scratch():
    yield
    SCRATCH.cleanup()
