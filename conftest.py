"""The smoke setting: under pytest the notebook runs on built-in data, in a folder that is removed afterwards."""
import json
import os
import tempfile

import pytest

SCRATCH = tempfile.TemporaryDirectory(prefix="s9-")
os.environ["S9_SETTINGS"] = json.dumps({"data": "built-in", "epochs": 2, "batch_size": 100, "folder": SCRATCH.name,
                                         "teacher": f"{SCRATCH.name}/teacher"})
os.environ["TQDM_DISABLE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def remove_scratch():
    yield
    SCRATCH.cleanup()
