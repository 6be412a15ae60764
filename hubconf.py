"""torch.hub.load(REPOSITORY, "net_dilated", pretrained=True): the network and its weights.

The two files that this needs are loaded under names of their own, so that a program may have a
`model` or `pretrained` module itself.
"""

import importlib.util
import sys
from pathlib import Path

dependencies = ["torch"]


def _load_module(name):
    """Return the module in the file of that name beside this one, under a private name."""
    private = f"_s9_hub_{name}"
    spec = importlib.util.spec_from_file_location(private, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[private] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_model, _pretrained = _load_module("model"), _load_module("pretrained")


def net_dilated(pretrained: bool = False) -> _model.NetDilated:
    """Return NetDilated, from (N, 3, 32, 32) images to (N, 10) logits.

    The images are RGB from 0 to 1, less the mean (0.4914, 0.4822, 0.4465), divided by the standard
    deviation (0.2470, 0.2435, 0.2616), by channel. The classes are airplane, automobile, bird, cat,
    deer, dog, frog, horse, ship and truck. With `pretrained` it has the weights of the committed
    run, in evaluation mode; weights/NetDilated.json has their accuracy.

    Raises:
        ValueError: the file of the weights is not the one that was committed.
        FileNotFoundError: there is none.
    """
    if not pretrained:
        return _model.NetDilated()
    return _pretrained.load(_model.NetDilated)[0]
