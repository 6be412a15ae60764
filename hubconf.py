"""torch.hub.load(REPOSITORY, "net_dilated", pretrained=True): the network and its weights in one
line.
"""

from pathlib import Path

from checkpoint import load
from model import NetDilated

dependencies = ["torch", "torchvision", "albumentations", "numpy", "PIL", "tqdm"]


def net_dilated(pretrained: bool = False) -> NetDilated:
    """Return NetDilated, from (N, 3, 32, 32) images to (N, 10) logits of `dataset.CLASSES`.

    The images are RGB from 0 to 1, less the mean (0.4914, 0.4822, 0.4465), divided by the standard
    deviation (0.2470, 0.2435, 0.2616), as of `dataset.normalise`. With `pretrained` it has the
    weights of the committed run, in evaluation mode; weights/NetDilated.json has their accuracy.

    Modules called model, dataset, recipe, checkpoint and checks are imported, so a program can't
    use others of the same name beside them.

    Raises:
        ValueError: the file of the weights is not the one that was committed. FileNotFoundError:
            there is none.
    """
    return load("NetDilated", Path(__file__).parent / "weights")[0] if pretrained else NetDilated()
