"""The state of a training run on disk: written after every epoch, read back when the run goes on.

Each file is written aside and then renamed, so that the old one stays until its replacement is
complete.
"""

import hashlib
import itertools
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from checks import require
from pretrained import advice, load_metrics, one_line, serialised, write_file
from recipe import Recipe

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


class Checkpoint:
    """The state of a training run on disk: a context manager around the loop over epochs.

    On entry it goes on where an earlier run with the same path and recipe stopped, on a CPU to the
    same weights as if nothing had happened. If there was none, it writes the state as it is, which
    the caller has seeded. An interrupt or a kill loses the epoch that had begun, and nothing else.
    A finished run is loaded. To start afresh, remove the file and those of its name with another
    ending (`NetDilated.ckpt*`), and build the parts anew.

    Args:
        path: of the file.
        recipe: the `Recipe` of the run.
        loader: the training images; its order is part of the state.
        parts: everything else with a state, by name: model, optimizer, scheduler, log and so on.
            The log is a `utils.Log`, which knows how many epochs are done.
        teacher: the trained network that the run learns from, if any.
        restart: whether to begin anew, with one line, where the file is of a run with other
            settings: for runs of minutes.

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
        parts: dict[str, object],
        teacher: nn.Module | None = None,
        restart: bool = False,
    ):
        if getattr(loader.sampler, "generator", None) is None:
            raise ValueError(
                "the order of this loader can't be restored: choose one of "
                "make_loader(shuffle=True)"
            )
        is_file = isinstance(path, (str, Path)) and Path(path).name and not Path(path).is_dir()
        require("path of the checkpoint", path, "the path of a file", is_file)
        self.path, self.recipe, self.loader = Path(path), recipe, loader
        self.parts, self.restart = parts, restart
        self.run = {
            **recipe.to_json(),
            "images": len(loader.dataset),
            "layers": str(parts["model"]).splitlines(),
            "augmentations": str(getattr(loader.dataset, "transform", None)).splitlines(),
            "teacher": teacher and _hash(teacher),
        }

    def __enter__(self) -> "Checkpoint":
        self.lock = _lock(self.path)
        try:
            if self._files():
                self._restore()
            else:
                self._start()
        except BaseException:
            self.lock.close()
            raise
        epochs = self.parts["log"].epochs_done()
        if epochs == self.recipe.epochs:
            name = self.path.name
            print(f"{self.path}: finished before, loaded (remove {name}* to train it again)")
        elif epochs:
            print(f"{self.path}: going on with epoch {epochs + 1}")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self.lock:
            if kind is KeyboardInterrupt and self._files():
                self._restore()
                print(
                    f"interrupted: {self.path} keeps {self.parts['log'].epochs_done()} of "
                    f"{self.recipe.epochs} epochs, run again to go on",
                    flush=True,
                )

    def save(self) -> None:
        """Write the state. If the disk is full, say so and go on; the checkpoint before stays."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["run"] = self.run
        state["epoch"] = self.parts["log"].epochs_done()
        state["random"] = _random_state(self.loader)
        try:
            write_file(self.path, serialised(state), keep=self._with_ending(".previous"))
        except OSError as error:
            print(
                f"{self.path} could not be written ({error.strerror}): training goes on, and an "
                f"older checkpoint is kept{advice(error)}",
                flush=True,
            )

    def _restore(self):
        state, found = _read(self.path, self._files())
        differences = _differences({**Recipe().to_json(), **state["run"]}, self.run)
        if differences and not state["epoch"]:  # nothing is lost
            return self._start()
        if differences and self.restart:
            print(f"{self.path} is of another run ({differences}): begun anew")
            return self._start()
        if differences:
            raise ValueError(
                f"{self.path} is of another run ({differences}): choose another folder, or remove "
                f"{self.path}* to start afresh"
            )
        if found != self.path:
            print(f"{self.path} is damaged or missing: going on from {found.name}")
        if found == self._with_ending(".new"):  # which the next save would overwrite
            os.replace(found, self.path)
        for name, part in self.parts.items():
            if state[name]:  # a scaler has none where gradients are not scaled
                part.load_state_dict(state[name])
        _set_random_state(self.loader, state["random"])

    def _start(self):
        if getattr(self.parts.get("scheduler"), "last_epoch", 0):
            raise ValueError(
                f"{self.path} has no epoch of this run, but the network has begun to train: make "
                "the network, its optimizer and its schedule anew (in the notebook, run their cell)"
            )
        if not self.restart:
            self._refuse_other_weights()
        self.save()  # even the first epoch can be repeated

    def _refuse_other_weights(self):
        """Raise a ValueError if the folder has the weights of a run with other settings."""
        folder, saved = self.path.parent, _saved_recipe(self.path)
        differences = _differences(saved, self.recipe.to_json())
        if differences:
            raise ValueError(
                f"{folder} has the weights of another run ({differences}), which this one would "
                f"replace: choose another folder, or move {self.path.stem}.* away"
            )
        if saved:
            print(
                f"{folder} has the weights of an earlier run of this recipe, which will be replaced"
            )

    def _with_ending(self, ending):
        return self.path.with_name(self.path.name + ending)

    def _files(self):
        """Return the files that may hold the state, the newest first.

        A kill between two renames may have left a new one aside; alone it may be incomplete.
        """
        new, previous = self._with_ending(".new"), self._with_ending(".previous")
        if not (self.path.exists() or previous.exists()):
            return []
        return [path for path in (self.path, new, previous) if path.exists()]


# ---------------------------------------------------------------- reading and comparing


def _read(path, candidates):
    """Return the state in the first file that is whole, and its path; never run code from it."""
    trouble = None
    for candidate in candidates:
        try:
            with zipfile.ZipFile(candidate) as archive:
                if archive.testzip():
                    raise ValueError("a checksum differs")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            state["run"], state["epoch"], state["random"]
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
    values = model.state_dict().values()
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in values)).hexdigest()


def _saved_recipe(path):
    """Return the recipe of the weights that are saved beside a checkpoint, or nothing."""
    try:
        saved = load_metrics(path.stem, path.parent)["recipe"]
    except (OSError, ValueError):
        return {}
    return {**Recipe().to_json(), **saved}  # an older version had fewer settings


def _differences(there, here):
    """Say in which settings two runs differ, if the first one has any."""
    return "; ".join(
        _difference(name, there.get(name), value)
        for name, value in here.items()
        if there and there.get(name) != value
    )


def _difference(name, there, here):
    """Say how a setting differs; of lists of lines, where they begin to."""
    if name in ("layers", "augmentations"):
        pairs = itertools.zip_longest(there, here, fillvalue="nothing")
        there, here = next((old, new) for old, new in pairs if old != new)
    return f"{name}: {there} there, {here} here"


# ---------------------------------------------------------------- random states


def _random_state(loader):
    """Return the states of all random generators.

    Augmentations have none: the batch's indices seed them. Python's and NumPy's are for networks
    that draw from them, such as stochastic depth by `random.random()`.
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
    here = torch.cuda.device_count()  # it may be another machine, with fewer GPUs
    for number, there in enumerate(state["cuda"][:here]):
        torch.cuda.set_rng_state(there, number)
    loader.sampler.generator.set_state(state["order"])


# ---------------------------------------------------------------- lock


def _lock(path):
    """Return an open file that refuses a second process with the same checkpoint while open."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "a")
    except OSError as error:
        raise RuntimeError(
            f"{path.parent} can't be written ({error.strerror}): choose another folder"
        ) from error
    try:
        if fcntl:  # lockf, not flock, which forked workers would hold, too
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            f"{path.parent} can't lock files ({error.strerror}): take care that no other process "
            "trains there"
        )
    return file
