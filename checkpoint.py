"""What is written to disk and read back: the checkpoint of a run, and trained weights with their
metrics.

Each file is written aside and then renamed, so that the old one stays until its replacement is
complete.
"""

import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from checks import require
from model import build_network
from recipe import Recipe, seed_everything

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

HEAD = "epoch  train loss  train acc %  {0:>5} loss  {0:>5} acc %  seconds"
ROW = "{:5d}  {:10.4f}  {:11.2f}  {:10.4f}  {:11.2f}  {:7.1f}"


# ---------------------------------------------------------------- the checkpoint of a run


class Checkpoint:
    """The state of a training run, on disk after every epoch: a context manager around the loop
    over epochs.

    On entry it seeds the random generators; or it goes on where an earlier run with the same path
    and recipe stopped, on a CPU to the same weights as if nothing had happened. An interrupt or a
    kill loses the epoch that had begun, and nothing else. After the last epoch the finished run is
    loaded. To start afresh, remove the file and those of its name with another ending
    (`NetDilated.ckpt*`), and build the parts anew.

    Args:
        path: of the file.
        recipe: the `Recipe` of the run.
        loader: the training images; its order is part of the state.
        teacher: the trained network that the run learns from, if any.
        parts: everything else with a state, by name: model, optimizer, scheduler and so on.

    Attributes:
        history: a list for each column, an entry for each epoch: train_loss, train_accuracy, the
            same of the test images (or of the validation images, if the recipe holds out some),
            seconds.

    Raises:
        ValueError: the file is damaged, or of another run, or gone although the parts are trained;
            or the folder has the weights of another run; or the loader is not shuffled by
            `make_loader`.
        RuntimeError: another process trains with the file.
    """

    def __init__(
        self,
        path: str | Path,
        recipe: Recipe,
        loader: DataLoader,
        teacher: nn.Module | None,
        parts: dict[str, object],
    ):
        if getattr(loader.sampler, "generator", None) is None:
            raise ValueError(
                "the order of this loader can't be restored: choose one of make_loader(shuffle=True)"
            )
        require(
            "path of the checkpoint",
            path,
            "the path of a file",
            isinstance(path, (str, Path)) and Path(path).name and not Path(path).is_dir(),
        )
        self.path, self.recipe, self.loader = Path(path), recipe, loader
        self.parts = parts
        data = loader.dataset
        self.run = {
            **recipe.to_json(),
            "images": len(data),
            "layers": str(parts["model"]).splitlines(),
            "augmentations": str(getattr(data, "transform", None)).splitlines(),
            "teacher": teacher and _hash(teacher),
        }
        self.history = {
            name: []
            for name in (
                "train_loss",
                "train_accuracy",
                f"{recipe.split}_loss",
                f"{recipe.split}_accuracy",
                "seconds",
            )
        }

    def __enter__(self) -> "Checkpoint":
        self.lock = _lock(self.path)
        try:
            if _exists(self.path):
                self._restore()
            else:
                self._start()
        except BaseException:
            self.lock.close()
            raise
        if self.epochs_done() == self.recipe.epochs:
            print(
                f"{self.path}: finished before, loaded (remove {self.path.name}* to train it again)"
            )
        elif self.epochs_done():
            print(f"{self.path}: going on with epoch {self.epochs_done() + 1}")
        print(HEAD.format(self.recipe.split[:5]))
        for epoch, row in enumerate(zip(*self.history.values(), strict=True), 1):
            print(ROW.format(epoch, *row))
        work = [
            self.recipe.image_size(epoch) ** 2 * len(self.loader)
            for epoch in range(self.recipe.epochs)
        ]
        self.bar = tqdm(
            total=sum(work),
            initial=sum(work[: self.epochs_done()]),
            leave=False,
            smoothing=0,
            bar_format="{percentage:3.0f} % |{bar}| {elapsed}, {remaining} to go",
            disable=bool(os.environ.get("TQDM_DISABLE")),
        )  # which tqdm itself ignores in notebooks
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        with self.lock:
            if kind is KeyboardInterrupt and _exists(self.path):
                self._restore()
                print(
                    f"interrupted: {self.epochs_done()} epochs are kept in {self.path}, run again to go on",
                    flush=True,
                )

    def epochs_done(self) -> int:
        """Return the number of epochs that are finished."""
        return len(self.history["seconds"])

    def remaining_epochs(self) -> range:
        """Return the epochs to come, counted from 0."""
        return range(self.epochs_done(), self.recipe.epochs)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return the batches of the loader, while the progress bar moves on by the pixels of the
        images.
        """
        for batch in self.loader:
            yield batch
            self.bar.update(self.recipe.image_size(epoch) ** 2)

    def log(self, *row: float) -> None:
        """Add an epoch to the history, and print it. The row has the columns of `history`.

        Raises:
            FloatingPointError: a loss is no longer finite. The last checkpoint is of the epoch
                before.
        """
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(
                f"epoch {self.epochs_done() + 1}: the training loss is {row[0]} and the "
                f"{self.recipe.split} loss {row[2]}: try a max_lr below {self.recipe.max_lr}"
            )
        for column, value in zip(self.history.values(), row, strict=True):
            column.append(value)
        self.bar.clear()
        print(ROW.format(self.epochs_done(), *row), flush=True)
        self.bar.refresh()

    def save(self) -> None:
        """Write the state. If the disk is full, say so and go on; the checkpoint before stays."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"run": self.run, "history": self.history, "random": _random_state(self.loader)}
        try:
            write_file(self.path, _serialised(state), keep=_previous(self.path))
        except OSError as error:
            print(
                f"{self.path} could not be written ({error.strerror}): training goes on, and an older checkpoint is "
                "kept; make room to keep the next epochs",
                flush=True,
            )

    def _restore(self) -> None:
        state, found = _read(self.path)
        differences = _differences(state["run"], self.run)
        if differences and not state["history"]["seconds"]:  # nothing is lost
            return self._start()
        if differences:
            raise ValueError(
                f"{self.path} is of another run ({differences}): choose another folder, or remove "
                f"{self.path}* to start afresh"
            )
        if found != self.path:
            print(f"{self.path} is damaged or missing: going on from {found.name}")
        if found == _new(self.path):  # which the next save would overwrite
            os.replace(found, self.path)
        for name, part in self.parts.items():
            if state[name]:  # a scaler has none where gradients are not scaled
                part.load_state_dict(state[name])
        _set_random_state(self.loader, state["random"])
        self.history = state["history"]

    def _start(self) -> None:
        if getattr(self.parts.get("scheduler"), "last_epoch", 0):
            raise ValueError(
                f"{self.path} has no epoch of this run, but the network has begun to train: make the "
                "network, its optimizer and its schedule anew (in the notebook, run their cell)"
            )
        saved = _saved_recipe(self.path)
        differences = _differences(saved, self.recipe.to_json())
        if differences:
            raise ValueError(
                f"{self.path.parent} has the weights of another run ({differences}), which this one would "
                f"replace: choose another folder, or move {self.path.stem}.* away"
            )
        if saved:
            print(
                f"{self.path.parent} has the weights of an earlier run of this recipe, which will be replaced"
            )
        seed_everything(self.recipe.seed)
        self.loader.sampler.generator.manual_seed(self.recipe.seed)
        self.save()  # even the first epoch can be repeated


def _previous(path):
    return path.with_name(path.name + ".previous")


def _new(path):
    return path.with_name(path.name + ".new")


def _exists(path):
    return path.exists() or _previous(path).exists()


def _read(path):
    """Return the first of the files of a checkpoint that is whole, and its path; never run code
    from the file.
    """
    trouble = None
    for candidate in filter(
        Path.exists, (path, _new(path), _previous(path))
    ):  # a kill may have left a new one aside
        try:
            with zipfile.ZipFile(candidate) as archive:
                if archive.testzip():
                    raise ValueError("a checksum differs")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            state["run"], state["history"], state["random"]
        except (PermissionError, MemoryError):
            raise
        except Exception as error:
            trouble = error
            continue
        return state, candidate
    raise ValueError(
        f"{path} is damaged or no checkpoint of this program ({one_line(trouble)}): "
        f"move {path}* away to start afresh"
    ) from trouble


def _hash(model):
    """Return the SHA-256 of the network's state."""
    return hashlib.sha256(
        b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    ).hexdigest()


def _saved_recipe(path):
    """Return the recipe of the weights that are saved beside a checkpoint, or nothing."""
    try:
        return load_metrics(path.stem, path.parent)["recipe"]
    except (OSError, ValueError):
        return {}


def _differences(there, here):
    """Say in which settings two runs differ, if the first one has any."""
    return "; ".join(
        _difference(name, there.get(name), value)
        for name, value in here.items()
        if there and there.get(name) != value
    )


def _difference(name, there, here):
    """Say how a setting differs; of lists of lines, as of layers, where they begin to."""
    if all(
        isinstance(lines, list) and all(isinstance(line, str) for line in lines)
        for lines in (there, here)
    ):
        pairs = itertools.zip_longest(there, here, fillvalue="nothing")
        there, here = next((old, new) for old, new in pairs if old != new)
    return f"{name}: {there} there, {here} here"


def _random_state(loader):
    """Return the states of all random generators. Augmentations have none: the batch's indices seed
    them.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "order": loader.sampler.generator.get_state(),
    }


def _set_random_state(loader, state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for number, there in enumerate(
        state["cuda"][: torch.cuda.device_count()]
    ):  # it may be another machine
        torch.cuda.set_rng_state(there, number)
    loader.sampler.generator.set_state(state["order"])


def _lock(path):
    """Return an open file that refuses a second process with the same checkpoint until it is
    closed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "a")
    except OSError as error:
        raise RuntimeError(
            f"{path.parent} can't be written ({error.strerror}): choose another folder"
        ) from error
    try:
        if fcntl:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not flock: forked workers would hold that one too
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise RuntimeError(
            f"another process is training with {path}: wait for it, stop it, or choose another "
            "folder"
        ) from error
    except OSError as error:  # some network drives have no locks
        print(
            f"{path.parent} can't lock files ({error.strerror}): take care that no other process trains there"
        )
    return file


# ---------------------------------------------------------------- weights and metrics


def save(model: nn.Module, metrics: dict, folder: str | Path = "weights") -> dict:
    """Write the state dict to `folder/NAME.pt` and the metrics to `folder/NAME.json`; return the
    metrics.

    A run that is saved already, as one that was loaded from its checkpoint, keeps its metrics: the
    hardware and the day are its own.
    """
    path = Path(folder) / f"{metrics['network']}.pt"
    try:
        saved = load_metrics(metrics["network"], folder)
        if saved["history"] == metrics["history"] and saved["sha256"] == _sha256(path):
            return saved
    except (OSError, ValueError):
        pass  # nothing whole is saved there yet
    write_file(path, _serialised({key: value.cpu() for key, value in model.state_dict().items()}))
    return add_metrics({**metrics, "sha256": _sha256(path)}, folder)


def add_metrics(metrics: dict, folder: str | Path = "weights", **more) -> dict:
    """Add what was measured since to the metrics of a saved network, in their file as well; return
    them all.
    """
    metrics = {**metrics, **more}
    write_json(Path(folder) / f"{metrics['network']}.json", metrics)
    return metrics


def load(name: str, folder: str | Path = "weights") -> tuple[nn.Module, dict]:
    """Return the named network with its saved weights, in evaluation mode, and its metrics.

    Raises:
        ValueError: the network is unknown, the folder is no path, or a file is damaged, or the
            weights are not those that the metrics tell of.
        OSError: there is no such file, or it may not be read.
    """
    require("folder", folder, "the path of a folder", isinstance(folder, (str, Path)))
    model, path = build_network(name), Path(folder) / f"{name}.pt"
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
            f"{path} is damaged or holds another network than {name} ({one_line(error)}): train it again, "
            "or take it from the repository"
        ) from error
    metrics = load_metrics(name, folder)
    if metrics["sha256"] != _sha256(path):
        raise ValueError(
            f"{path} is not the file that {name}.json tells of: save both again (a finished run's cells, "
            "run again, do), or take them from the repository"
        )
    return model.eval(), metrics


def load_metrics(name: str, folder: str | Path = "weights") -> dict:
    """Return the metrics of a saved network; a ValueError or an OSError names a file that is
    none.
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
            f"{path} holds no metrics ({one_line(error)}): train {name} again, or take both of its files "
            "from the repository"
        ) from error
    return metrics


def load_teacher(recipe: Recipe, labels: list[int]) -> nn.Module:
    """Return the NetDilated saved in the folder `recipe.teacher`. `labels` are those of the
    student's training images.

    Raises:
        ValueError: it was trained on other data, or perhaps on images that the student holds out;
            or see `load`.
        FileNotFoundError: there is no teacher.
    """
    try:
        teacher, metrics = load("NetDilated", recipe.teacher)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"teacher is {recipe.teacher!r}, which lacks NetDilated.pt or NetDilated.json: choose "
            "None, or train one (benchmarks/reproduce.md has the command)"
        ) from error
    data, held_out = metrics["recipe"]["data"], metrics["recipe"]["validation_size"]
    choose = f"teacher is {recipe.teacher!r}: choose None, or the folder of one"
    if data != recipe.data:
        raise ValueError(f"{choose} trained on {recipe.data}, not on {data}")
    if held_out < recipe.validation_size:
        raise ValueError(
            f"{choose} that held out {recipe.validation_size} training images, as the student does, not "
            f"{held_out}"
        )
    seen = labels[: len(labels) + recipe.validation_size - held_out]
    if recipe.validation_size and metrics.get("labels_sha256") != labels_sha256(seen):
        raise ValueError(
            f"{choose} whose training images had the order that they have here: this one may have seen "
            "those that are held out (benchmarks/reproduce.md has the command that trains a teacher)"
        )
    return teacher


def labels_sha256(labels: list[int]) -> str:
    """Return the SHA-256 of the labels, 0 to 255, which tells in which order the images were."""
    return hashlib.sha256(bytes(labels)).hexdigest()


def write_file(path: str | Path, content: bytes, keep: Path | None = None) -> None:
    """Write a new file aside, then put it in the place of `path` at once; the old one becomes
    `keep`, if given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _new(path)
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
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(new, path)


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, as `write_file` does."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def one_line(error: Exception) -> str:
    """Return the message of an error in one line of at most 200 characters, with its kind if it
    says little.
    """
    text = " ".join(
        re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()
    )  # without colours for a terminal
    if isinstance(error, KeyError) or not re.search("[a-z]", text):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 200 else text[:197].rsplit(" ", 1)[0] + "..."


def _serialised(state):
    """Return a state as the bytes of its file: torch.save does not tell a full disk from other
    trouble.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
