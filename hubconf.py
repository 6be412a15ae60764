"""torch.hub.load(REPOSITORY, "net_dilated", pretrained=True): the network and its weights in one line."""
import hashlib
import json
from pathlib import Path

import torch

from model import NetDilated

dependencies = ["torch"]


def net_dilated(pretrained=False):
    """Return NetDilated: (N, 3, 32, 32) images, prepared as `dataset.normalise(dataset.test_transform()(...))` does, to
    (N, 10) logits of `dataset.CLASSES`.

    With `pretrained`, it has the weights of the committed run, in evaluation mode; weights/NetDilated.json tells their
    accuracy and SHA-256.

    Raises:
        RuntimeError: the file of the weights is not the one that was committed.
    """
    model = NetDilated()
    if not pretrained:
        return model
    path = Path(__file__).parent / "weights" / "NetDilated.pt"
    expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise RuntimeError(f"{path} is damaged, its SHA-256 is not {expected}: fetch it again (with torch.hub, "
                           "force_reload=True)")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
