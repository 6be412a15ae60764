"""The device: which one is taken, in which precision it trains, and what it is called."""

import json
import platform

import numpy as np
import pytest
import torch
from torch import nn

import dataset
import device
from dataset import normalise
from device import (
    autocast,
    hardware,
    make_scaler,
    memory_format,
    mixed_precision,
    pick_device,
    to_device,
    versions,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_taken(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if cuda else 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(best)


def test_a_device_that_is_named_is_taken_if_it_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == CPU and pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="^device is 'cuda:2', which is not here: choose auto or"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    "vendor, flags, dtype",
    [
        ("GenuineIntel", "avx512_bf16", None),
        ("GenuineIntel", "avx512_bf16 amx_bf16", torch.bfloat16),
        ("AuthenticAMD", "avx2", None),
        ("AuthenticAMD", "avx512_bf16", torch.bfloat16),
    ],
)
def test_a_cpu_trains_in_bf16_where_that_is_faster(vendor, flags, dtype, monkeypatch):
    monkeypatch.setattr(
        device, "_cpuinfo", lambda: f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n"
    )
    assert mixed_precision(CPU) is dtype
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (dtype or torch.float32)


@pytest.mark.parametrize("there, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_trains_in_bf16_where_the_gpu_has_it_and_else_in_fp16_with_scaled_gradients(
    there, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: there)
    assert mixed_precision(torch.device("cuda")) is dtype
    if torch.cuda.is_available():
        assert make_scaler(torch.device("cuda")).is_enabled() is not there


@pytest.mark.parametrize(
    "kind, expected",
    [("cpu", torch.channels_last), ("cuda", torch.channels_last), ("mps", torch.contiguous_format)],
)
def test_only_mps_has_channels_first(kind, expected):
    assert memory_format(torch.device(kind)) is expected


def test_a_model_and_its_images_have_the_memory_format_of_the_device(monkeypatch):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for kind, expected in ("cpu", torch.channels_last), ("mps", torch.contiguous_format):
        monkeypatch.setattr(
            device, "memory_format", lambda _, kind=kind: memory_format(torch.device(kind))
        )
        monkeypatch.setattr(dataset, "memory_format", device.memory_format)
        model = to_device(nn.Conv2d(3, 4, 3), CPU)
        for tensor in model.weight, normalise(images), model(normalise(images)):
            assert tensor.is_contiguous(memory_format=expected)


def test_mps_trains_in_fp32_and_only_fp16_has_scaled_gradients():
    assert mixed_precision(torch.device("mps")) is None
    assert not make_scaler(CPU).is_enabled()


def test_hardware_is_the_name_that_linux_has_for_the_processor_or_that_of_its_kind(monkeypatch):
    monkeypatch.setattr(
        device, "_cpuinfo", lambda: "processor\t: 0\nmodel name\t: Zen 9\nmodel name\t: Zen 9\n"
    )
    assert hardware(CPU) == f"Zen 9, {torch.get_num_threads()} threads, fp32"
    monkeypatch.setattr(device, "mixed_precision", lambda device: torch.bfloat16)
    assert hardware(CPU).endswith(" threads, bf16")
    monkeypatch.setattr(device, "_cpuinfo", lambda: "")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert hardware(CPU).startswith(f"{platform.machine()}, ")


def test_the_gpu_of_a_mac_is_not_called_by_the_name_of_its_processor():
    assert hardware(torch.device("mps")) == f"GPU of {platform.machine()}"


def test_versions_can_be_written_as_json():
    there = json.loads(json.dumps(versions()))
    assert sorted(there) == ["albumentations", "numpy", "python", "torch", "torchvision"]
    assert there["torch"] == torch.__version__ and there["python"] == platform.python_version()
