"""What a network does to an image, operation by operation, whatever its modules are called.

`trace` lists the operations; `receptive_field` is a single figure.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import nn

from .neutral import neutral, runnable
from .tracer import Operation, Tracer


class Run(NamedTuple):
    """One run of a network."""

    operations: list[Operation]  # in order
    result: object  # what the network returned
    unused: dict[str, int]  # the number of parameters of each module that has unused ones


def trace(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> list[Operation]:
    """Run the network on (C, H, W) images of that shape and return its `Operation`s in order.

    With every tensor goes the square of pixels that each of its elements can see. Slices and
    permutations move these squares as they move the elements. A window adds (kernel - 1) * dilation
    * jump to their sides; where paths meet, the square around both counts. The jump is the distance
    of neighbouring positions in pixels of the image. A stride multiplies it; upsampling has a
    stride below 1. Araujo et al., Computing receptive fields of convolutional neural networks,
    https://distill.pub/2019/computing-receptive-fields/.
    """
    return run_traced(model, shape).operations


def run_traced(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> Run:
    """Run the network on two (C, H, W) images of zeros.

    It runs in float32 on the CPU, or, if its own code asks for another type or device, as it is.
    What runs is the network inside `torch.compile` or nn.DataParallel.
    """
    model = runnable(model)
    images = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
    try:
        return _run(model, images)
    except Exception:
        weights = [each for each in model.parameters() if not nn.parameter.is_lazy(each)]
        first = next((each for each in weights if each.is_floating_point()), images)
        if (first.dtype, first.device) == (images.dtype, images.device):
            raise
    return _run(model, images.to(first.device, first.dtype), as_it_is=True)


def _run(model, images, as_it_is=False):
    with neutral(model, as_it_is), Tracer(model) as tracer:
        images = images.clone()  # one that no inference mode has made
        tracer.follow(images)
        result, unused = model(images), {}
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                continue
            if parameter.untyped_storage().data_ptr() not in tracer.memory:
                module = name.rpartition(".")[0] or name
                unused[module] = unused.get(module, 0) + parameter.numel()
        path = tracer.paths.get(result) if isinstance(result, torch.Tensor) else None
        ends = path.sources if path else set()
        return Run(_leading_to(ends, tracer.operations), result, unused)


def _leading_to(ends, operations):
    """Return the operations without those of heads whose results are not returned.

    Operations that only weigh a map lead to no result by themselves, and stay.
    """
    needed, places = set(), list(ends)
    while places:
        place = places.pop()
        if place not in needed:
            needed.add(place)
            places += operations[place].sources
    if not needed:  # the result can't be followed
        return operations
    weighing = ("squeeze-excite", "attention", "other")
    kept = [
        place
        for place, operation in enumerate(operations)
        if place in needed or operation.kind in weighing
    ]
    new = {old: place for place, old in enumerate(kept)}
    return [
        operations[old]._replace(
            sources=frozenset(new[place] for place in operations[old].sources if place in new)
        )
        for old in kept
    ]


def fingerprint(run: Run, parameters: int) -> str:
    """Return six letters and digits that two networks of the same operations share.

    Names don't count, nor what works element by element, as an activation or dropout.
    """
    kept = [
        (each.kind, each.channels, each.size, *each[5:9], sorted(each.sources))
        for each in run.operations
    ]
    return hashlib.sha256(repr((kept, parameters)).encode()).hexdigest()[:6]


def receptive_field(model: nn.Module) -> int | float:
    """Return the receptive field, in whole pixels, of one position before the global pooling.

    It is infinite if a position sees the whole image at any size, as after self-attention. What is
    pooled from a map only to weigh it, as in squeeze-and-excitation, does not count.
    """
    return whole_pixels(field_before(trace(model)))


def whole_pixels(field: float) -> int | float:
    """Return a receptive field in the pixels that it really reaches.

    Half a pixel of an upsampled image is none.
    """
    return field if math.isinf(field) else int(field + 1e-3)


def field_before(operations: list[Operation]) -> float:
    """Return the receptive field at the end of the map, in pixels.

    The end is before the global pooling, or before what stands for it.
    """
    looking = ("convolution", "pooling", "attention")
    last = max((place for place, each in enumerate(operations) if each.kind in looking), default=-1)
    if last >= 0 and operations[last].kind == "pooling" and operations[last].size[1] == 1:
        return operations[last].receptive_field  # it pools only a part, but leaves one position
    for operation in operations[last + 1 :]:
        if operation.kind == "fully connected" or "global" in operation.kind:
            return operation.receptive_field
    return operations[last].receptive_field if last >= 0 else 1
