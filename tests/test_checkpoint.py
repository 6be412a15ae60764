"""What is on disk: runs that are killed, files that are damaged, disks that are full; weights and
their metrics.
"""

import contextlib
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
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import checkpoint
import train
import utils
from checkpoint import (
    Checkpoint,
    add_metrics,
    labels_sha256,
    load,
    load_metrics,
    load_teacher,
    save,
    write_file,
)
from dataset import CORES, load_dataset, make_loader, train_transform
from model import NetDilated
from recipe import Recipe, make_optimizer, make_scheduler, seed_everything
from tiny import SHORT, STEPS, Code, Run, Tiny, equal, state

PROCESSES = multiprocessing.get_context(
    "forkserver"
)  # nothing is shared but what the arguments say
PROCESSES.set_forkserver_preload(
    ["albumentations", "matplotlib.pyplot", "torchmetrics.functional.classification"]
)
HISTORY = {"train_loss": [2.0, 1.0], "test_accuracy": [21.0, 65.0], "seconds": [3.0, 4.0]}
METRICS = {
    "network": "NetDilated",
    "hardware": "this machine",
    "test_accuracy": 65.0,
    "recipe": SHORT.to_json(),
    "history": HISTORY,
}
LABELS = [number % 10 for number in range(2000)]


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
        if next(writes) == 3:
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
    return torch.load(path, weights_only=True)["history"]


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
        refusal = f"another process is training with {run.path}: wait for it, stop it, or choose another folder"
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
        f"interrupted: {kept} epochs are kept in {run.path}, run again to go on\n"
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
    first, loaded, *table = capsys.readouterr().out.splitlines()
    assert loaded == f"{copied}: finished before, loaded (remove {copied.name}* to train it again)"
    assert [first, *table] == finished.output.splitlines()


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
    parts = {"model": run.model, "scheduler": make_scheduler(optimizer, run.recipe, STEPS)}
    optimizer.step()
    parts["scheduler"].step()
    with pytest.raises(
        ValueError, match="Tiny.ckpt has no epoch of this run, but the network has begun to train: "
    ):
        Checkpoint(run.path, run.recipe, run.loaders[0], None, parts).__enter__()
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
            r"layers: +\(0\): Conv2d.*stride=\(2, 2\).* there, +\(0\): Conv2d.*stride=\(1, 1\).* here",
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
        f"{tmp_path} has the weights of another run (max_lr: 0.1 there, 0.2 here), which this one would "
        "replace: choose another folder, or move Tiny.* away"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run.fit()
    assert not run.path.exists() and len(Run(root, tmp_path).fit()["seconds"]) == SHORT.epochs
    assert (
        f"{tmp_path} has the weights of an earlier run of this recipe, which will be replaced\n"
        in capsys.readouterr().out
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
        patch.setattr(os, "fsync", disk_full_after(3))
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
            match=(
                r"^epoch 3: the training loss is \d\S+ and the test loss nan: try a max_lr below 0.1$"
            ),
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
    for name in ("Tiny.ckpt", "NetDilated.pt"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match="^.*Tiny.ckpt is damaged or no checkpoint of this program [^\n]*$"
    ):
        Run(root, tmp_path).fit()
    with pytest.raises(
        ValueError, match="^.*NetDilated.pt is damaged or holds another network [^\n]*$"
    ) as error:
        load("NetDilated", tmp_path)
    reason = re.search(r"\((.*)\): train it again", str(error.value))[1]
    assert re.search("[A-Za-z]{4}", reason) and "\x1b" not in reason and len(reason) <= 200
    assert {(tmp_path / name).read_bytes() for name in ("Tiny.ckpt", "NetDilated.pt")} == {content}


def test_files_that_would_run_code_are_refused(root, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"run": {}, "history": {}, "random": Code(trap)}, tmp_path / "Tiny.ckpt")
    torch.save({"weight": Code(trap)}, tmp_path / "NetDilated.pt")
    for action in (Run(root, tmp_path).fit, lambda: load("NetDilated", tmp_path)):
        with pytest.raises(ValueError, match="is damaged or .*[Ww]eights.only"):
            action()
    assert not trap.exists()
    torch.load(tmp_path / "NetDilated.pt", weights_only=False)
    assert trap.exists()  # it was a trap


# ---------------------------------------------------------------- weights and metrics


def test_saved_weights_and_metrics_come_back(tmp_path):
    seed_everything(0)
    model = NetDilated()
    metrics = save(model, METRICS, tmp_path / "new")
    loaded, loaded_metrics = load("NetDilated", tmp_path / "new")
    assert equal(state(model), state(loaded)) and not loaded.training
    assert loaded_metrics == load_metrics("NetDilated", tmp_path / "new") == metrics
    assert METRICS.items() <= json.loads((tmp_path / "new" / "NetDilated.json").read_text()).items()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "NetDilated.json",
        "NetDilated.pt",
    ]


def test_weights_and_metrics_of_different_runs_are_told_apart(tmp_path):
    for folder in ("one", "other"):
        save(NetDilated(), METRICS, tmp_path / folder)
    (tmp_path / "other" / "NetDilated.pt").replace(
        tmp_path / "one" / "NetDilated.pt"
    )  # as if killed in between
    with pytest.raises(
        ValueError, match="^.*NetDilated.pt is not the file that NetDilated.json tells of: [^\n]*$"
    ):
        load("NetDilated", tmp_path / "one")


def test_weights_that_are_missing_or_of_another_network_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="^.*NetDilated.pt is not there: train NetDilated first[^\n]*$"
    ):
        load("NetDilated", tmp_path)
    torch.save(Tiny().state_dict(), tmp_path / "NetDilated.pt")
    with pytest.raises(
        ValueError, match="^.*NetDilated.pt is damaged or holds another network than NetD[^\n]*$"
    ):
        load("NetDilated", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"\xff"],
    ids=["empty", "cut off", "an empty dictionary", "a list", "not UTF-8"],
)
def test_metrics_that_are_none_are_named(content, tmp_path):
    save(NetDilated(), METRICS, tmp_path)
    (tmp_path / "NetDilated.json").write_bytes(content)
    with pytest.raises(
        ValueError,
        match="^.*NetDilated.json holds no metrics [^\n]*: train NetDilated again[^\n]*$",
    ):
        load("NetDilated", tmp_path)


def test_metrics_that_are_missing_are_named(tmp_path):
    save(NetDilated(), METRICS, tmp_path)
    (tmp_path / "NetDilated.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="^.*NetDilated.json is not there: train NetDilated again[^\n]*$"
    ):
        load("NetDilated", tmp_path)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("NetDilated", None), "^folder is None: choose the path of a folder$"),
        (([], "weights"), r"^network \[\] is unknown: choose one of NetDilated"),
    ],
)
def test_arguments_of_load_that_are_none_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        load(*arguments)


@pytest.mark.parametrize("path", ["", ".", None])
def test_the_path_of_a_checkpoint_that_is_no_file_is_named(path):
    loader = make_loader(load_dataset("test", "sample"), 10, shuffle=True, num_workers=0)
    with pytest.raises(
        ValueError, match=f"^path of the checkpoint is {path!r}: choose the path of a file$"
    ):
        Checkpoint(path, Recipe(), loader, None, {"model": Tiny()})


def test_a_run_saved_again_keeps_its_metrics_unless_a_file_is_harmed(tmp_path):
    model, again = NetDilated(), {**METRICS, "hardware": "another machine"}
    metrics = save(model, METRICS, tmp_path)
    metrics = add_metrics(metrics, tmp_path, temperature=1.5)
    assert metrics["temperature"] == 1.5 and METRICS.items() <= metrics.items()
    assert save(model, again, tmp_path) == load("NetDilated", tmp_path)[1] == metrics
    for name, content in (
        ("NetDilated.pt", b"damaged"),
        ("NetDilated.json", b"{"),
        ("NetDilated.json", b"{}"),
    ):
        save(model, METRICS, tmp_path)
        (tmp_path / name).write_bytes(content)
        assert save(model, again, tmp_path)["hardware"] == "another machine"
        assert equal(state(model), state(load("NetDilated", tmp_path)[0]))
    other = {**METRICS, "history": {**HISTORY, "seconds": [3.0, 5.0]}}
    assert save(model, other, tmp_path)["history"] == other["history"]


def test_weights_that_cannot_be_read_are_not_taken_for_damaged_ones(tmp_path, monkeypatch):
    save(NetDilated(), METRICS, tmp_path)
    monkeypatch.setattr(checkpoint.torch, "load", lambda path, **options: open_nothing(path))
    with pytest.raises(PermissionError, match="NetDilated.pt"):
        load("NetDilated", tmp_path)


def test_a_teacher_is_one_of_the_same_data(tmp_path):
    model = NetDilated()
    save(model, METRICS, tmp_path)
    recipe = replace(SHORT, teacher=str(tmp_path))
    teacher = load_teacher(recipe, LABELS)
    assert equal(state(teacher), state(model)) and not teacher.training
    with pytest.raises(
        ValueError,
        match=f"^teacher is {str(tmp_path)!r}: choose None, or the folder of one trained on "
        "CIFAR-10, not on sample$",
    ):
        load_teacher(replace(recipe, data="CIFAR-10"), LABELS)


def test_a_teacher_has_not_seen_what_its_student_holds_out(tmp_path):
    metrics = {**METRICS, "recipe": {**METRICS["recipe"], "validation_size": 500}}
    save(NetDilated(), {**metrics, "labels_sha256": labels_sha256(LABELS[:1500])}, tmp_path)
    recipe = replace(SHORT, teacher=str(tmp_path), validation_size=500)
    load_teacher(recipe, LABELS[:1500])
    load_teacher(replace(recipe, validation_size=400), LABELS[:1600])
    load_teacher(replace(recipe, validation_size=0), LABELS[::-1])
    with pytest.raises(
        ValueError,
        match="choose None, or the folder of one that held out 501 training images, as the "
        "student does, not 500$",
    ):
        load_teacher(replace(recipe, validation_size=501), LABELS[:1499])
    with pytest.raises(ValueError, match="this one may have seen those that are held out"):
        load_teacher(recipe, LABELS[500:][::-1])


def test_nothing_is_overwritten_before_its_replacement_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(descriptor):
        assert (tmp_path / "figure.png.new").read_bytes() == b"new" and path.read_bytes() == b"old"
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full: '.*figure.png'"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_file(path, b"new", keep=tmp_path / "kept.png")
    assert path.read_bytes() == b"new" and (tmp_path / "kept.png").read_bytes() == b"old"
