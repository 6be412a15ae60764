"""The device that the networks run on: which one, in which precision, and what it is called."""

import ctypes
import functools
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name, as "cpu", "cuda:1" or "mps"; "auto" is the best one here.

    The best one is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    device = torch.device(name)
    counts = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }
    if (device.index or 0) >= counts.get(device.type, 0):
        raise ValueError(f"device is {name!r}, which is not here: choose auto or cpu")
    return device


def keep_freed_memory() -> None:
    """Set glibc's allocator of this process to keep freed memory; without glibc, do nothing.

    By default it hands every large activation back to the system, which clears its pages anew for
    the next batch. Call it where training or evaluation on a CPU begins.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format in which convolutions are fastest: channels_last, but not on MPS.

    There batch norm has wrong gradients in it: https://github.com/pytorch/pytorch/issues/175189.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device, in the memory format for it, and return it."""
    return model.to(device, memory_format=memory_format(device))


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type to train in on this device, or None where fp32 is the better choice.

    CUDA: bf16, or on older GPUs, which lack it, fp16 with scaled gradients. CPU: bf16 where it
    pays, with Intel's AMX or AMD's AVX512-BF16; with AVX512-BF16 alone, Intel's processors are
    slower in it than in fp32.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu":
        flags = _cpuinfo()
        if "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags):
            return torch.bfloat16
    return None


def autocast(device: torch.device) -> torch.autocast:
    """Return the context of automatic mixed precision in the type of `mixed_precision`."""
    dtype = mixed_precision(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of the gradients, which does nothing unless the device trains in fp16."""
    return torch.amp.GradScaler(device.type, 1024, enabled=mixed_precision(device) == torch.float16)


def hardware(device: torch.device) -> str:
    """Return the name of the device, of a CPU with its number of threads and its precision."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"GPU of {platform.machine()}"
    lines = [line for line in _cpuinfo().splitlines() if line.startswith("model name")]
    name = platform.processor() or platform.machine()
    if lines:
        name = lines[0].split(":")[1].strip()
    precision = "bf16" if mixed_precision(device) else "fp32"
    return f"{name}, {torch.get_num_threads()} threads, {precision}"


@functools.cache
def _cpuinfo():
    """Return what Linux says of its processors, or nothing elsewhere; read once."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "albumentations": version("albumentations"),
        "numpy": np.__version__,
    }
