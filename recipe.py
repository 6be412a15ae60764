"""Every setting of a run, with its meaning and limits; the optimizer and schedule they name."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from checks import between, is_folder, one_of, positive, require, whole
from dataset import DATASETS, TRAIN_CORRUPTIONS
from published import NETWORKS


def setting(
    default: object,
    meaning: str,
    allowed: str,
    check: Callable[[object], bool],
    affects_result: bool = True,
):
    """Return a field of `Recipe`, with what it means, what is allowed in words, and a check."""
    return field(
        default=default,
        compare=affects_result,
        metadata={"meaning": meaning, "allowed": allowed, "check": check},
    )


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run. `Recipe()` is the headline run; `medium` and `quick` are shorter.

    `robust` fine-tunes the network of the headline run.

    Recipes are equal if they give the same result: where it is written and how many workers there
    are don't matter.

    Raises:
        ValueError: a setting is impossible. The message names it, its value and what is allowed.
    """

    network: str = setting(
        "NetDilated", "the network, by name", f"one of {', '.join(NETWORKS)}", one_of(NETWORKS)
    )
    data: str = setting(
        "CIFAR-10", "the data set", f"one of {', '.join(DATASETS)}", one_of(DATASETS)
    )
    validation_size: int = setting(
        0,
        "training images that are held out, the last ones; they take the place of the test set",
        "a whole number, 0 or more",
        whole(0),
    )
    epochs: int = setting(
        120, "passes over the training images", "a whole number, 1 to 100000", whole(1, 100_000)
    )
    batch_size: int = setting(256, "images a step", "a whole number, 2 or more", whole(2))
    optimizer: str = setting(
        "Muon", "Muon, or SGD with Nesterov momentum", "SGD or Muon", one_of(("SGD", "Muon"))
    )
    max_lr: float = setting(
        0.3,
        "the peak of the learning rate",
        "a number above 0",
        positive,
    )
    muon_lr_ratio: float = setting(
        0.1,
        "the learning rate of the weights that Muon updates, as a share of that of the others",
        "a number above 0",
        positive,
    )
    warmup: float = setting(
        0.25,
        "the share of the steps in which the learning rate rises to its peak",
        "a number above 0 and below 1",
        lambda value: positive(value) and value < 1,
    )
    momentum: tuple[float, float] = setting(
        (0.85, 0.95),
        "the momentum at the peak of the learning rate, and at both ends of the run",
        "a pair of numbers above 0 and below 1",
        lambda value: (
            isinstance(value, tuple)
            and len(value) == 2
            and all(positive(each) and each < 1 for each in value)
        ),
    )
    weight_decay: float = setting(
        5e-4,
        "of the weights, not of norms and biases; with Muon, only of those that it leaves to SGD",
        "a number, 0 or more",
        between(0),
    )
    augmentation: float = setting(
        0.5,
        "the probability of shift-scale-rotate, and of coarse dropout",
        "a probability, 0 to 1",
        between(0, 1),
    )
    corruption: float = setting(
        0.2,
        "the probability that an image is corrupted; the teacher sees it clean",
        "a probability, 0 to 1",
        between(0, 1),
    )
    corruption_types: tuple[str, ...] = setting(
        ("gaussian_noise", "gaussian_blur", "low_contrast"),
        "the corruptions of which such an image gets one; one named twice is twice as likely",
        f"some of {', '.join(TRAIN_CORRUPTIONS)}",
        lambda value: (
            isinstance(value, tuple)
            and len(value) > 0
            and all(map(one_of(TRAIN_CORRUPTIONS), value))
        ),
    )
    sizes: tuple[int, ...] = setting(
        (20, 24, 28, 32),
        "progressive resizing: sizes of the training images, each for an equal share of the epochs",
        "sizes in pixels, each 8 to 1024, such as 32 or 16,32",
        lambda value: (
            isinstance(value, tuple) and len(value) > 0 and all(map(whole(8, 1024), value))
        ),
    )
    teacher: str | None = setting(
        "weights/teacher",
        "the folder of a trained NetDilated to learn from, or None",
        "None or the path of a folder",
        lambda value: value is None or is_folder(value),
    )
    wise_ft_alpha: float | None = setting(
        None,
        "None: train from scratch; a number: fine-tune the teacher's weights, in cycles of one "
        "epoch, and interpolate between those (0) and the mean of the fine-tuned ones (1)",
        "None, or a number, 0 to 1",
        lambda value: value is None or between(0, 1)(value),
    )
    distillation_weight: float = setting(
        0.9,
        "the share of the distillation loss; cross entropy has the rest",
        "a number, 0 to 1",
        between(0, 1),
    )
    distillation_temperature: float = setting(
        4.0, "what the logits are divided by in the distillation loss", "a number above 0", positive
    )
    seed: int = setting(
        0,
        "the seed of weights, order and augmentation",
        "a whole number, 0 to 4294967295",
        whole(0, 2**32 - 1),
    )
    num_workers: int | None = setting(
        None,
        "processes that augment; None: one for each core, at most 8",
        "None, or a whole number, 0 or more",
        lambda value: value is None or whole(0)(value),
        affects_result=False,
    )
    device: str = setting(
        "auto",
        "where the networks run; auto: the best device here",
        "auto, cpu, mps, cuda, or one GPU of several, such as cuda:1",
        lambda value: (
            isinstance(value, str) and bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value))
        ),
        affects_result=False,
    )
    folder: str = setting(
        "runs/headline",
        "where the weights, the metrics and the checkpoint of the run are written",
        "the path of a folder",
        is_folder,
        affects_result=False,
    )

    def __post_init__(self):
        for each in fields(self):
            value = _plain(getattr(self, each.name))
            require(each.name, value, each.metadata["allowed"], each.metadata["check"](value))
            object.__setattr__(self, each.name, value)  # the dataclass is frozen
        if self.wise_ft_alpha is not None:
            folder = "the folder of the weights to fine-tune"
            require("teacher", self.teacher, folder, self.teacher is not None)

    @classmethod
    def quick(cls, **changes: object) -> "Recipe":
        """Return the recipe that passes 85 % in two epochs, with some settings changed."""
        return cls(
            **{
                "epochs": 2,
                "batch_size": 128,
                "max_lr": 0.6,
                "warmup": 0.15,
                "augmentation": 0.1,
                "corruption": 0.0,
                "sizes": (16, 32),
                "teacher": None,
                "folder": "runs/quick",
                **changes,
            }
        )

    @classmethod
    def medium(cls, **changes: object) -> "Recipe":
        """Return the recipe that passes 94 % in 30 epochs without a teacher, with changes."""
        return cls(
            **{
                "epochs": 30,
                "corruption": 0.0,
                "teacher": None,
                "folder": "runs/medium",
                **changes,
            }
        )

    @classmethod
    def robust(cls, **changes: object) -> "Recipe":
        """Return the recipe that makes the headline network robust in a few epochs, with changes.

        It fine-tunes the committed weights on corrupted images. They themselves are the teacher,
        which sees the images clean. Some of the corruptions are those of CIFAR-10-C, whose authors
        ask that nobody trains on them: say so beside its accuracy there.
        """
        return cls(
            **{
                "epochs": 6,
                "batch_size": 128,
                "max_lr": 0.03,
                "warmup": 0.1,
                "augmentation": 0.25,
                "corruption": 0.85,
                "corruption_types": tuple(TRAIN_CORRUPTIONS),
                "sizes": (32,),
                "teacher": "weights",
                "wise_ft_alpha": 0.7,
                "folder": "runs/robust",
                **changes,
            }
        )

    @property
    def split(self) -> str:
        """The images that a run is evaluated on: "validation" if some are held out, else "test"."""
        return "validation" if self.validation_size else "test"

    def teacher_recipe(self, validation_size: int = 5000) -> "Recipe":
        """Return the recipe of the run's teacher.

        It has three quarters of the epochs, no teacher and no corruption. It holds out images, so
        that a student that holds out the same ones can be evaluated on them.
        """
        require("teacher", self.teacher, "the folder of the teacher", self.teacher is not None)
        return replace(
            self,
            epochs=math.ceil(0.75 * self.epochs),
            teacher=None,
            wise_ft_alpha=None,
            corruption=0.0,
            folder="runs/teacher",
            validation_size=validation_size,
        )

    def image_size(self, epoch: int) -> int:
        """Return the size in pixels of the training images in an epoch, counted from 0.

        With fewer epochs than sizes, only the last sizes are used. Evaluation is always at full
        size. Tan and Le, EfficientNetV2, https://arxiv.org/abs/2104.00298.
        """
        place = epoch * len(self.sizes) // self.epochs
        epochs_left = self.epochs - 1 - epoch
        return self.sizes[max(place, len(self.sizes) - 1 - epochs_left)]

    def to_json(self) -> dict[str, object]:
        """Return the settings that affect the result, in JSON's types."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }


def _plain(value):
    """Return a setting in the type that the recipe keeps it in."""
    if isinstance(value, (list, tuple)):  # JSON has lists
        return tuple(map(_plain, value))
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def seed_everything(seed: int, loader: DataLoader | None = None) -> None:
    """Seed the random generators of Python, NumPy and PyTorch, and the order of a loader."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if loader:
        loader.sampler.generator.manual_seed(seed)


# ---------------------------------------------------------------- optimizer and schedule


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer that the recipe names: SGD with Nesterov momentum, or `Muon`.

    Weight decay reaches the weights, but not norms and biases. With Muon it reaches only the
    weights that Muon leaves to SGD, those of depthwise convolutions and of the last layer: 6 % of
    NetDilated's parameters.
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    mixing = []  # the convolutions that mix channels, but for one that is the last layer
    if recipe.optimizer == "Muon":
        mixing = [weight for weight in weights[:-1] if weight.ndim == 4 and weight.shape[1] > 1]
    decayed = [weight for weight in weights if id(weight) not in map(id, mixing)]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if mixing:
        lr = recipe.muon_lr_ratio * recipe.max_lr
        groups.append({"params": mixing, "lr": lr, "weight_decay": 0.0, "orthogonal": True})
    optimizer = {"SGD": torch.optim.SGD, "Muon": Muon}[recipe.optimizer]
    return optimizer(groups, lr=recipe.max_lr, momentum=recipe.momentum[1], nesterov=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> LRScheduler:
    """Return the schedule, which is stepped after each batch: one cycle, or many in fine-tuning.

    In a cycle, the learning rate of each group of parameters rises to the one it has now in the
    share `warmup` of the steps, and falls to nearly zero; the momentum does the opposite. One cycle
    is of cosines: Smith and Topin, Super-convergence, https://arxiv.org/abs/1708.07120. In
    fine-tuning each epoch is a cycle, of straight lines, as in stochastic weight averaging:
    Izmailov et al., https://arxiv.org/abs/1803.05407.

    Raises:
        ValueError: the run, or an epoch of fine-tuning, has fewer than three steps.
    """
    fine_tuning = recipe.wise_ft_alpha is not None
    steps = steps_per_epoch if fine_tuning else recipe.epochs * steps_per_epoch
    remedy = "a smaller batch_size" if fine_tuning else "more epochs or a smaller batch_size"
    require("the number of steps", steps, f"{remedy}, for 3 steps at least", steps > 2)
    warmup = max(recipe.warmup, 2 / steps)  # a rise of one step would divide by zero
    peaks, (low, high) = [group["lr"] for group in optimizer.param_groups], recipe.momentum
    momentum = {"base_momentum": low, "max_momentum": high}
    if fine_tuning:
        rise = warmup * steps
        return CyclicLR(optimizer, 0.0, peaks, rise, steps - rise, **momentum)
    return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=warmup, **momentum)


class Muon(torch.optim.SGD):
    """SGD whose updates of the parameters in "orthogonal" groups are nearly orthogonal matrices.

    Such a parameter is the weight of a convolution that mixes channels. Its update is the Nesterov
    momentum, made nearly orthogonal, times the learning rate. So directions of small gradients
    change as fast as the others. For mirrored pairs of channels, that is the update of
    the shared weight, not of the whole kernel. Jordan et al.,
    https://kellerjordan.github.io/posts/muon/ (`torch.optim.Muon` takes no convolutions).

    Before each update, the Frobenius norm of the weight is set to the square root of its number of
    rows, as in https://github.com/KellerJordan/cifar10-airbench. Its scale does not matter where
    batch norm follows, as everywhere but in three layers of PublishedDilated.
    """

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient. There is no `closure`."""
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if group.get("orthogonal") and parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["momentum"], group["lr"])
        super().step()

    def _update(self, parameters, momentum, lr):
        """Update parameters of one shape, whose matrices are made orthogonal in one batch."""
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0) + parameter.grad
            directions.append((parameter.grad + momentum * state["momentum_buffer"]).flatten(1))
            parameter.grad = None  # SGD passes over it
        updates = zeropower_via_newtonschulz5(torch.stack(directions))
        for parameter, update in zip(parameters, updates, strict=True):
            norm = parameter.norm().clamp(min=1e-7)  # weights may begin as zeros
            parameter.mul_(len(parameter) ** 0.5 / norm)
            parameter.sub_(update.view_as(parameter), alpha=lr)


def zeropower_via_newtonschulz5(matrices: torch.Tensor) -> torch.Tensor:
    """Return (..., M, N) matrices with their singular values brought near 1.

    Those that are not tiny become 0.6 to 1.3. Five steps of Jordan's Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon/.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return zeropower_via_newtonschulz5(matrices.mT).mT
    # the iteration converges where no singular value is above 1, as with a Frobenius norm of 1
    matrices = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        # Jordan's coefficients: the steepest rise of small values, at the price of 0.6 to 1.3
        squares = matrices @ matrices.mT
        matrices = 3.4445 * matrices + (2.0315 * squares @ squares - 4.775 * squares) @ matrices
    return matrices
