"""Trained weights with their metrics: save and load them. This file needs torch and no other file.

`NAME.pt` has the state dict of a network of class NAME, `NAME.json` its metrics, the weights'
SHA-256 among them. Each file is written aside and then renamed, so that the old one stays until its
replacement is complete.
"""

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the committed ones


def save(model: nn.Module, metrics: dict, folder: str | Path) -> dict:
    """Write the weights to `folder/NAME.pt` and the metrics to `folder/NAME.json`; return these.

    NAME is the metrics' "network", the name of the model's class. A run that is saved already, as
    one that was loaded from its checkpoint, keeps its metrics: the hardware and the day are its
    own.
    """
    path = Path(folder) / f"{metrics['network']}.pt"
    try:
        saved = load_metrics(metrics["network"], folder)
        if saved["history"] == metrics["history"] and saved["sha256"] == _sha256(path):
            return saved
    except (OSError, ValueError):
        pass  # nothing whole is saved there yet
    weights = inner_network(model).state_dict()
    write_file(path, serialised({key: value.cpu() for key, value in weights.items()}))
    return add_metrics({**metrics, "sha256": _sha256(path)}, folder)


def inner_network(model: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile` and nn.DataParallel, which is what is saved."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def add_metrics(metrics: dict, folder: str | Path, **more) -> dict:
    """Add what was measured since to a saved network's metrics and their file; return them all."""
    metrics = {**metrics, **more}
    write_json(Path(folder) / f"{metrics['network']}.json", metrics)
    return metrics


def load(build: Callable[[], nn.Module], folder: str | Path = WEIGHTS) -> tuple[nn.Module, dict]:
    """Return a network with its saved weights, on the CPU in evaluation mode, and its metrics.

    Args:
        build: the class of the network, as `NetDilated`, or a function that returns one.
        folder: where `NAME.pt` and `NAME.json` are, NAME the network's class; by default those of
            the repository.

    Raises:
        TypeError: `build` makes no network, as a name or a network does not.
        ValueError: a file is damaged, or the weights are of another network, or not those that the
            metrics tell of.
        OSError: there is no such file, or it may not be read.
    """
    model = build() if callable(build) and not isinstance(build, nn.Module) else None
    if not isinstance(model, nn.Module):
        raise TypeError(f"{build!r:.80} makes no network: give its class, as in load(NetDilated)")
    name = type(model).__name__
    path = Path(folder) / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: train {name} first, or take it from the repository"
        )
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or holds another network than {name} ({one_line(error)}): train it "
            "again, or take it from the repository"
        ) from error
    metrics = load_metrics(name, folder)
    if metrics["sha256"] != _sha256(path):
        raise ValueError(
            f"{path} is not the file that {name}.json tells of: save both again (a finished run's "
            "cells, run again, do), or take them from the repository"
        )
    return model.eval(), metrics


def load_metrics(name: str, folder: str | Path = WEIGHTS) -> dict:
    """Return the metrics of the saved network of that name.

    Raises:
        ValueError, OSError: the file holds no metrics, or is not there; the message names it.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: train {name} again, or take both of its files from the "
            "repository"
        )
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["sha256"], metrics["recipe"], metrics["history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no metrics ({one_line(error)}): train {name} again, or take both of its "
            "files from the repository"
        ) from error
    return metrics


# ---------------------------------------------------------------- files


def write_file(path: str | Path, content: bytes, keep: Path | None = None) -> None:
    """Write a new file aside, then put it in the place of `path` at once.

    The old one becomes `keep`, if that is given.

    Raises:
        OSError: it can't be written; or it can't take the place of the old one, as where a virus
            scanner holds that: then both are kept, and the message names both.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say of itself which file it is about
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    try:
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(new, path)
    except OSError as error:
        reason = f"{error.strerror}: the old file stays, the new one is {new}"
        raise OSError(error.errno, reason, str(path)) from error


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, as `write_file` does."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def serialised(state: object) -> bytes:
    """Return a state as the bytes of its file.

    torch.save itself does not tell a full disk from other trouble.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def advice(error: OSError) -> str:
    """Return what to do where a file could not be written: make room, if the disk is full."""
    return "; make room" if error.errno == errno.ENOSPC else ""


def one_line(error: Exception) -> str:
    """Return the message of an error in one line of at most 200 characters.

    The kind of the error is added where the message says little.
    """
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())  # without terminal colours
    if isinstance(error, KeyError) or not re.search("[a-z]", text):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 200 else text[:197].rsplit(" ", 1)[0] + "..."


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
