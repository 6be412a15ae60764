"""The same conditions for every check, whatever the caller has set, who finds all as it was."""

import contextlib
import copy
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def runnable(model: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile` and nn.DataParallel.

    It is a copy if the model was made in inference mode, outside of which it doesn't run.
    """
    model = inner_network(model)
    if any(tensor.is_inference() for tensor in _tensors(model)):
        with torch.inference_mode(False):
            return copy.deepcopy(model)
    return model


def inner_network(model: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile` and nn.DataParallel, which compute the same."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


@contextlib.contextmanager
def neutral(model: nn.Module, as_it_is: bool = False) -> Iterator[None]:
    """Keep the model in evaluation mode and in float32 on the CPU, and PyTorch in its usual modes.

    With `as_it_is`, the model keeps its type and device, and so do new tensors. Modes, weights,
    buffers, gradients and random states are afterwards as they were before.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        # what is compiled inside runs uncompiled; nothing is if the compiler was never imported
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not as_it_is:
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(_default_dtype(torch.float32))
        stack.enter_context(_fixed_random_states())
        stack.enter_context(evaluated(model, as_it_is))
        yield


@contextlib.contextmanager
def evaluated(model: nn.Module, as_it_is: bool = False) -> Iterator[None]:
    """Keep the model in evaluation mode, with copies of its weights and buffers.

    The copies are in float32 on the CPU unless `as_it_is`.
    """
    modes = [(module, module.training) for module in model.modules()]
    tensors = _tensors(model)
    values, fast = [tensor.data for tensor in tensors], torch.backends.mha.get_fastpath_enabled()
    try:
        for tensor, value in zip(tensors, values, strict=True):
            if as_it_is or not value.is_floating_point():
                tensor.data = value.clone()
            else:
                tensor.data = value.to("cpu", torch.float32, copy=True)
        # the fast path is one call that hides all operations of an encoder layer
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data = value
        for module, training in modes:
            module.training = training


def _tensors(model):
    """Return weights and buffers, without those that get a shape only when the model first runs."""
    tensors = *model.parameters(), *model.buffers()
    return [tensor for tensor in tensors if not nn.parameter.is_lazy(tensor)]


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _fixed_random_states():
    """A network may draw numbers even in evaluation: the same ones in every check."""
    generator = torch.default_generator  # of the CPU; that of a GPU stays as it is
    states = generator.get_state(), random.getstate(), np.random.get_state()
    generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
