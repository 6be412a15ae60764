"""The state of a run on disk: runs that are killed, files that are damaged, disks that are full."""

import contextlib
import csv
import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import train
import utils
from checkpoint import Checkpoint
from dataset import load_dataset, train_transform
from loader import CORES, make_loader
from recipe import Recipe, make_optimizer, make_scheduler
from tiny import SHORT, STEPS, Code, Run, Tiny, equal, state
from utils import Log

# nothing is shared but what the arguments say
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["albumentations", "matplotlib.pyplot", "torchmetrics.functional.classification"]
)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run that nothing disturbed: its folder, weights, history and what it printed."""
    run = Run(root, tmp_path_factory.mktemp("finished"))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        history = run.fit()
    return SimpleNamespace(
        folder=run.path.parent, weights=state(run.model), history=history, output=output.getvalue()
    )


@pytest.fixture
def copied(finished, tmp_path):
    """The path of the finished run's checkpoint, in a folder that a test may spoil."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "Tiny.ckpt"


def work(root, folder, workers, pause, die_while_writing):
    """Train in a process of its own, with a pause before each step; or die while the third
    checkpoint is written.
    """
    os.setsid()
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of the workers, as in any other process on Linux
    run, writes = Run(root, folder, workers), itertools.count(1)

    def die(descriptor):
        if next(writes) == 4:  # the second was of the log
            os.ftruncate(descriptor, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    if die_while_writing:
        os.fsync = die
    run.model.register_forward_pre_hook(lambda *_: time.sleep(pause))
    run.fit()


@contextlib.contextmanager
def another_process(root, folder, workers=0, pause=0.01, die_while_writing=False):
    """Start the run in a process of its own, which is killed in the end, if not before, and its
    workers with it.
    """
    process = PROCESSES.Process(target=work, args=(root, folder, workers, pause, die_while_writing))
    process.start()
    try:
        yield process
    finally:
        kill(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def kill(process):
    process.kill()
    process.join()


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive(), f"it ended without {path}"
        time.sleep(0.001)


def press_ctrl_c():
    """Interrupt this process and its workers, as a terminal and Jupyter do."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def before_step(number, training):
    """Return what presses Ctrl-C before the step of that number, in training or in the tests."""

    def arrange(run, patch):
        steps = itertools.count(1)
        run.model.register_forward_pre_hook(
            lambda model, _: (
                press_ctrl_c() if model.training is training and next(steps) == number else None
            )
        )

    return arrange


def within_batch(number):
    """Return what presses Ctrl-C when half of the batch of that number has come from the worker."""

    def arrange(run, patch):
        batches, receive = itertools.count(1), Connection._recv

        def receive_half(connection, size, *read):
            if size > 50_000 and next(batches) == number:
                receive(connection, size // 2)
                press_ctrl_c()
            return receive(connection, size, *read)

        patch.setattr(Connection, "_recv", receive_half)

    return arrange


def history_in(path):
    return torch.load(path, weights_only=True)["log"]


def disk_full_after(writes):
    """Return what takes the place of os.fsync when there is room for so many files only."""
    numbers = itertools.count(1)

    def fsync(descriptor):
        if next(numbers) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


# ---------------------------------------------------------------- the checkpoint of a run


def test_a_killed_run_goes_on_to_the_same_weights(root, tmp_path, finished, capsys):
    """It is killed while it writes a checkpoint, and later at a random moment."""
    path = tmp_path / "Tiny.ckpt"
    with another_process(root, tmp_path, die_while_writing=True) as process:
        process.join()
        assert (
            process.exitcode == -signal.SIGKILL
            and path.with_name("Tiny.ckpt.new").stat().st_size == 1000
        )
    assert len(history_in(path)["seconds"]) == 1
    before = path.with_name("Tiny.ckpt.previous")
    before.unlink()
    with another_process(root, tmp_path, workers=1, pause=0.03) as process:
        wait_for(before, process)  # the second epoch is finished
        time.sleep(random.Random().uniform(0, 0.03 * STEPS))
        kill(process)  # and its worker lives on
        assert process.exitcode == -signal.SIGKILL
        run = Run(root, tmp_path)
        run.fit()
    assert re.search("going on with epoch [234]\n", capsys.readouterr().out)
    assert equal(state(run.model), finished.weights)


def test_a_second_process_is_refused_until_the_first_one_ends(root, tmp_path, finished):
    run = Run(root, tmp_path)
    with another_process(
        root, tmp_path, workers=1, pause=60
    ) as process:  # in its first step for long enough
        wait_for(run.path, process)
        refusal = (
            f"another process is training with {run.path}: wait for it, stop it, or choose another "
            "folder"
        )
        with pytest.raises(RuntimeError, match=f"^{re.escape(refusal)}$"):
            run.fit()
    run.fit()
    assert equal(state(run.model), finished.weights)


def test_where_there_is_no_fcntl_the_lock_is_that_of_windows(tmp_path, monkeypatch):
    """With a stand-in for Windows' msvcrt, which refuses a region that is locked through another
    handle.
    """
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(checkpoint, "fcntl", None)
    monkeypatch.setattr(
        checkpoint,
        "msvcrt",
        SimpleNamespace(
            LK_NBLCK=2,
            locking=lambda descriptor, mode, length: fcntl.flock(
                descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
            ),
        ),
        raising=False,
    )
    for _ in range(2):  # it is free again afterwards
        with (
            checkpoint._lock(tmp_path / "Tiny.ckpt"),
            pytest.raises(RuntimeError, match="another process is training"),
        ):
            checkpoint._lock(tmp_path / "Tiny.ckpt")


def test_a_folder_without_locks_is_named_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def lockf(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(checkpoint, "fcntl", SimpleNamespace(lockf=lockf, LOCK_EX=0, LOCK_NB=0))
    checkpoint._lock(tmp_path / "Tiny.ckpt").close()
    assert (
        f"{tmp_path} can't lock files (Operation not supported): take care"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "arrange, kept",
    [
        (before_step(2, training=True), 0),
        (before_step(2, training=False), 1),
        (within_batch(2 * STEPS + 2), 2),
    ],
    ids=["first epoch", "test of the second", "batch of the third"],
)
def test_after_ctrl_c_the_same_cell_goes_on_to_the_same_weights(
    arrange, kept, root, tmp_path, finished, monkeypatch, capsys
):
    """As in Jupyter: `fit` is called again with the same objects, and the worker has felt the
    Ctrl-C as well.
    """
    run = Run(root, tmp_path, workers=1)
    arrange(run, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    output = capsys.readouterr().out
    assert output.endswith(
        f"interrupted: {run.path} keeps {kept} of 4 epochs, run again to go on\n"
    )
    assert "going on" not in output
    assert history_in(run.path)["test_loss"] == finished.history["test_loss"][:kept]
    assert equal(
        state(run.model), torch.load(run.path, weights_only=True)["model"]
    )  # the last whole epoch
    history = run.fit()
    assert (
        equal(state(run.model), finished.weights)
        and history["train_loss"] == finished.history["train_loss"]
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_weights_are_the_same_at_any_number_of_workers(workers, root, tmp_path, finished):
    if workers > CORES:
        pytest.skip("there are not as many cores")
    run = Run(root, tmp_path, workers)
    run.fit()
    assert equal(state(run.model), finished.weights)


def test_a_finished_run_is_loaded_and_shows_its_epochs_again(root, copied, finished, capsys):
    run = Run(root, copied.parent)
    run.teacher.forward = None  # nothing is trained
    assert run.fit() == finished.history == history_in(copied)
    assert equal(state(run.model), finished.weights)
    _, loaded, *table = capsys.readouterr().out.splitlines()
    assert loaded == f"{copied}: finished before, loaded (remove {copied.name}* to train it again)"
    assert table == finished.output.splitlines()[1:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(
            bytes(byte ^ (place == 30_000) for place, byte in enumerate(path.read_bytes()))
        ),
        lambda path: path.unlink(),
    ],
    ids=["half", "empty", "one bit", "killed between the two renames"],
)
def test_a_damaged_or_missing_checkpoint_gives_way_to_the_one_before(
    damage, root, copied, finished, capsys
):
    damage(copied)
    run = Run(root, copied.parent)
    run.fit()
    output = capsys.readouterr().out
    assert f"{copied} is damaged or missing: going on from Tiny.ckpt.previous\n" in output
    assert "going on with epoch 4\n" in output
    assert equal(state(run.model), finished.weights)


def test_a_new_checkpoint_that_a_kill_left_aside_is_the_newest(root, copied, finished, capsys):
    copied.rename(copied.with_name("Tiny.ckpt.new"))  # killed between the two renames
    run = Run(root, copied.parent)
    assert run.fit() == finished.history
    assert "is damaged or missing: going on from Tiny.ckpt.new\n" in capsys.readouterr().out
    assert copied.exists()  # the next save writes aside again


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    root, copied, finished, monkeypatch
):
    written = copied.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(checkpoint.zipfile, "ZipFile", open_nothing)
        Run(root, copied.parent).fit()
    assert copied.read_bytes() == written and Run(root, copied.parent).fit() == finished.history


def open_nothing(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_trained_network_without_its_checkpoint_is_not_trained_again(root, tmp_path):
    """As when the files are removed and only the cell of the loop is run again."""
    run = Run(root, tmp_path)
    optimizer = make_optimizer(run.model, run.recipe)
    scheduler = make_scheduler(optimizer, run.recipe, STEPS)
    parts = {"model": run.model, "scheduler": scheduler, "log": Log(tmp_path / "log", run.recipe)}
    optimizer.step()
    parts["scheduler"].step()
    with pytest.raises(
        ValueError, match="Tiny.ckpt has no epoch of this run, but the network has begun to train: "
    ):
        Checkpoint(run.path, run.recipe, run.loaders[0], parts).__enter__()
    assert not run.path.exists()


def another_teacher(run):
    run.teacher = Tiny().eval()


def another_layer(run):
    run.model.layers[0].stride = (1, 1)  # with the same parameters


@pytest.mark.parametrize(
    "changes, change, difference",
    [
        ({"max_lr": 0.2}, None, "max_lr: 0.1 there, 0.2 here"),
        ({"sizes": (8, 32)}, None, r"sizes: \[16, 32\] there, \[8, 32\] here"),
        (
            {"optimizer": "SGD", "corruption": 0.1},
            None,
            "optimizer: Muon there, SGD here; corruption: 0.2 there, 0.1 here",
        ),
        ({"teacher": False}, None, "teacher: [0-9a-f]{64} there, None here"),
        ({}, another_teacher, "teacher: [0-9a-f]{64} there, [0-9a-f]{64} here"),
        (
            {},
            another_layer,
            r"layers: +\(0\): Conv2d.*stride=\(2, 2\).* there, "
            r"+\(0\): Conv2d.*stride=\(1, 1\).* here",
        ),
        (
            {"transform": train_transform(0.25)},
            None,
            r"augmentations: +Shift\w+\(p=0.5.* there, +Shift\w+\(p=0.25.* here",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    changes, change, difference, root, copied, finished
):
    written, run = copied.read_bytes(), Run(root, copied.parent, **changes)
    if change:
        change(run)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(copied))} is of another run \({difference}\): [^\n]*$"
    ):
        run.fit()
    assert copied.read_bytes() == written
    assert Run(root, copied.parent).fit() == finished.history


def test_a_checkpoint_without_an_epoch_gives_way_to_another_recipe(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "train", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
        Run(root, tmp_path).fit()
    assert len(Run(root, tmp_path, epochs=2).fit()["seconds"]) == 2


def test_the_weights_of_another_run_are_not_replaced(root, tmp_path, capsys):
    run = Run(root, tmp_path, max_lr=0.2)
    (tmp_path / "Tiny.json").write_text(
        json.dumps({"sha256": "", "history": {}, "recipe": SHORT.to_json()})
    )
    message = (
        f"{tmp_path} has the weights of another run (max_lr: 0.1 there, 0.2 here), which this one "
        "would replace: choose another folder, or move Tiny.* away"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run.fit()
    assert not run.path.exists() and len(Run(root, tmp_path).fit()["seconds"]) == SHORT.epochs
    assert (
        f"{tmp_path} has the weights of an earlier run of this recipe, which will be replaced\n"
        in capsys.readouterr().out
    )


def test_a_short_run_may_begin_anew_in_the_place_of_another(root, copied, finished, capsys):
    history = Run(root, copied.parent, epochs=2, restart=True).fit()
    assert len(history["seconds"]) == 2
    assert f"{copied} is of another run (epochs: 4 there, 2 here): begun anew\n" in (
        capsys.readouterr().out
    )
    again = Run(root, copied.parent, epochs=2, restart=True)  # the same run is loaded
    again.model.forward = None
    again.teacher.forward = None
    assert again.fit() == history


class Drawing(Tiny):
    """Draws from Python's and NumPy's random generators, as stochastic depth may."""

    def forward(self, x):
        scale = random.random() + np.random.rand() if self.training else 1
        return scale * super().forward(x)


def test_the_random_generators_of_python_and_numpy_go_on_where_they_were(
    root, tmp_path, monkeypatch
):
    whole, parted, again = (
        Run(root, tmp_path / folder, teacher=False, build=Drawing)
        for folder in ("whole", "parted", "parted")
    )
    history = whole.fit()
    before_step(STEPS + 9, training=True)(parted, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        parted.fit()
    assert again.fit()["train_loss"] == history["train_loss"]


def rows_in(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_log_is_a_csv_file_that_grows_with_each_epoch_and_is_cut_back(
    root, tmp_path, finished, monkeypatch
):
    """Interrupted between the row and the checkpoint of the third epoch."""
    seen = []

    def save(checkpoint, save=Checkpoint.save):
        seen.append(len(rows_in(path)) if path.exists() else 0)
        if seen[-1] == 3:
            raise KeyboardInterrupt
        save(checkpoint)

    path = tmp_path / "Tiny.csv"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save)
        Run(root, tmp_path).fit()
    assert seen == [0, 1, 2, 3]
    assert Run(root, tmp_path).fit()["train_loss"] == finished.history["train_loss"]
    rows = rows_in(path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["test_loss"]) for row in rows] == finished.history["test_loss"]


def test_a_log_that_cannot_be_written_does_not_end_the_run(root, tmp_path, finished, capsys):
    (tmp_path / "Tiny.csv").mkdir()
    assert Run(root, tmp_path).fit()["train_loss"] == finished.history["train_loss"]
    assert f"{tmp_path / 'Tiny.csv'} could not be written (Is a directory)" in (
        capsys.readouterr().out
    )


def test_a_new_run_does_not_depend_on_what_was_drawn_before(root, tmp_path, finished):
    run = Run(root, tmp_path)
    next(iter(run.loaders[0]))
    torch.rand(1)
    assert run.fit()["train_loss"] == finished.history["train_loss"]


def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(
    root, tmp_path, finished, monkeypatch, capsys
):
    run = Run(root, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full_after(4))
        run.fit()
    assert (
        capsys.readouterr().out.count(
            f"{run.path} could not be written (No space left on device): training goes on"
        )
        == 2
    )
    assert equal(state(run.model), finished.weights) and len(history_in(run.path)["seconds"]) == 2
    run = Run(root, tmp_path)
    run.fit()
    assert "going on with epoch 3\n" in capsys.readouterr().out and equal(
        state(run.model), finished.weights
    )


def test_an_interrupt_on_a_full_disk_stays_an_interrupt(root, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", disk_full_after(0))
    monkeypatch.setattr(utils, "train", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Run(root, tmp_path).fit()
    assert not (tmp_path / "Tiny.ckpt").exists()


def test_a_loader_whose_order_cannot_be_restored_is_refused(root, tmp_path):
    run = Run(root, tmp_path)
    with pytest.raises(
        ValueError, match=r"can't be restored: choose one of make_loader\(shuffle=True\)$"
    ):
        train.fit(run.model, run.recipe, run.loaders[1], run.loaders[1])


def test_a_folder_that_cannot_be_written_is_named_before_work_begins(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(utils, "train", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(
        RuntimeError, match=r"folder can't be written \(Not a directory\): choose another folder$"
    ):
        Run(root, tmp_path / "file" / "folder").fit()


def test_a_loss_that_turns_nan_is_one_line_and_the_checkpoint_before_stays(
    root, tmp_path, finished, monkeypatch
):
    """The last step of the third epoch spoils the weights, so that the test is the first to
    tell.
    """

    def spoil(model, loader, recipe, epoch, *others, train=utils.train):
        result = train(model, loader, recipe, epoch, *others)
        if epoch == 2:
            nn.init.constant_(model.layers[0].weight, float("nan"))
        return result

    run = Run(root, tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            FloatingPointError,
            match=r"^epoch 3: the training loss is \d\S+ and the test loss nan: try a max_lr below",
        ),
    ):
        patch.setattr(utils, "train", spoil)
        run.fit()
    assert len(history_in(run.path)["seconds"]) == 2
    run = Run(root, tmp_path)
    run.fit()
    assert equal(state(run.model), finished.weights)


def whole_model():
    buffer = io.BytesIO()
    torch.save(Tiny(), buffer)
    return buffer.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"not one of ours",
    "code": pickle.dumps(print, protocol=2),
    "model": whole_model(),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_by_name(content, root, tmp_path):
    (tmp_path / "Tiny.ckpt").write_bytes(content)
    message = "^.*Tiny.ckpt is damaged or no checkpoint of this program [^\n]*$"
    with pytest.raises(ValueError, match=message):
        Run(root, tmp_path).fit()
    assert (tmp_path / "Tiny.ckpt").read_bytes() == content


def test_a_file_that_would_run_code_is_refused(root, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"run": {}, "epoch": 0, "random": Code(trap)}, tmp_path / "Tiny.ckpt")
    with pytest.raises(ValueError, match="is damaged or .*[Ww]eights.only"):
        Run(root, tmp_path).fit()
    assert not trap.exists()
    torch.load(tmp_path / "Tiny.ckpt", weights_only=False)
    assert trap.exists()  # it was a trap


@pytest.mark.parametrize("path", ["", ".", None])
def test_the_path_of_a_checkpoint_that_is_no_file_is_named(path):
    loader = make_loader(load_dataset("test", "sample"), 10, shuffle=True, num_workers=0)
    with pytest.raises(
        ValueError, match=f"^path of the checkpoint is {path!r}: choose the path of a file$"
    ):
        Checkpoint(path, Recipe(), loader, {"model": Tiny()})
