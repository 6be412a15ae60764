"""Nothing is lost: runs that are killed, files that are damaged, disks that are full.

As a script, `python tests/test_recovery.py` kills twenty runs and says how many survived.
"""
import contextlib
import io
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from dataset import load_dataset, make_loader

PROCESSES = multiprocessing.get_context("spawn")  # nothing is shared but what the arguments say
MOMENTS = random.Random()  # which the trainings here, that seed the generators of all libraries, leave alone


def small_training(folder, root, workers=0, again=False):
    """Train for five epochs of half a second, on one thread, and return the weights; with `again`, `fit` is called anew
    after an interrupt."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    utils.seed_everything(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 4), nn.BatchNorm2d(16), nn.SiLU(), nn.Dropout(0.1), nn.Flatten(),
                          nn.Linear(1024, 10))
    train_set = load_dataset("train", "built-in", validation_size=1300, root=root)  # 700 images
    test_set = load_dataset("test", "built-in", root=root)
    arguments = model, make_loader(train_set, 100, True, workers), make_loader(test_set, 500), 5, 0.05
    try:
        utils.fit(*arguments, device="cpu", checkpoint=folder / "checkpoint.pt")
    except KeyboardInterrupt:
        if not again:
            raise
        utils.fit(*arguments, device="cpu", checkpoint=folder / "checkpoint.pt")
    finally:
        torch.set_num_threads(threads)
    return model.state_dict()


def work(folder, *arguments):
    """The small training in a process of its own; what it prints goes to a file."""
    os.setsid()
    os.environ["TQDM_DISABLE"] = "1"
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in any other process on Linux
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    torch.save(small_training(folder, *arguments), folder / "result.pt")


class Run:
    """A small training in a folder of its own."""

    def __init__(self, folder, root, workers=0):
        self.folder, self.arguments, self.checkpoint = folder, (folder, root, workers), folder / "checkpoint.pt"

    def start(self, again=False):
        """Start it in a process of its own."""
        (self.folder / "output.txt").unlink(missing_ok=True)
        process = PROCESSES.Process(target=work, args=(*self.arguments, again))
        process.start()
        return process

    def output(self, process):
        """Wait for the end of the process and return what was printed."""
        process.join()
        return (self.folder / "output.txt").read_text()

    def wait_for(self, process, line):
        while process.is_alive():
            with contextlib.suppress(FileNotFoundError):
                if line in (self.folder / "output.txt").read_text():
                    return
            time.sleep(0.001)
        raise AssertionError(f"ended without {line!r}: {self.output(process)}")

    def finish(self):
        """Run it to the end in this process; return what was printed, and the weights."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            weights = small_training(*self.arguments)
        return output.getvalue(), weights


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("whole"), root).finish()[1]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_same_seed_gives_the_same_weights_at_any_number_of_workers(workers, root, tmp_path, uninterrupted):
    if workers > len(os.sched_getaffinity(0)):
        pytest.skip("there are not as many cores")
    assert equal(uninterrupted, Run(tmp_path, root, workers).finish()[1])


def kill(run, moment):
    """Start the run and SIGKILL it: `moment` seconds into the training, or, if None, while it writes a checkpoint. Return
    whether that came before its end."""
    process, new = run.start(), run.checkpoint.with_name("checkpoint.pt.new")
    run.wait_for(process, "seconds")
    if moment is None:
        while not new.exists() and process.is_alive():
            pass
    else:
        time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):  # it may have finished
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_a_killed_run_goes_on_to_the_same_weights(root, tmp_path, uninterrupted):
    run = Run(tmp_path, root, workers=1)
    fates = [kill(run, moment) for moment in (None, MOMENTS.uniform(0, 0.3), MOMENTS.uniform(0, 0.6))]
    assert fates[0]  # the others may come after the end
    assert equal(uninterrupted, run.finish()[1])


def test_a_finished_run_is_loaded(root, tmp_path, uninterrupted):
    run = Run(tmp_path, root)
    run.finish()
    output, weights = run.finish()
    assert "finished before, loaded" in output and equal(uninterrupted, weights)


def test_an_interrupt_keeps_the_epoch_that_has_begun(root, tmp_path, uninterrupted):
    run = Run(tmp_path, root)
    process = run.start()
    run.wait_for(process, "    1  ")
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    output = run.output(process)
    assert process.exitcode != 0
    epoch, batches = map(int, re.search(r"interrupted in epoch (.*): (.*) of 7 batches; everything is kept", output).groups())
    assert len(utils.load_history(run.checkpoint)["test_accuracy"]) == epoch - 1 >= 1
    output, weights = run.finish()
    assert f"going on with epoch {epoch}, batch {batches + 1}\n" in output and equal(uninterrupted, weights)


def test_a_second_interrupt_does_not_wait_for_the_end_of_the_step(tmp_path):
    class Slow(nn.Linear):
        def forward(self, x):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it waited")

    loaders = make_loader(load_dataset("train", "built-in", root=tmp_path), 100, True, 0), []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        utils.fit(nn.Sequential(nn.Flatten(), Slow(3072, 10)), *loaders, 1, device="cpu")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_reaches_every_process_and_the_same_cell_goes_on(root, tmp_path, uninterrupted):
    """As in Jupyter: the interrupt goes to the kernel and its workers, and `fit` is called again with the same objects."""
    run = Run(tmp_path, root, workers=1)
    process = run.start(again=True)
    run.wait_for(process, "    1  ")
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = run.output(process)
    assert process.exitcode == 0 and "interrupted in epoch" in output and "going on with epoch" in output, output
    assert equal(uninterrupted, torch.load(tmp_path / "result.pt", weights_only=True))


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: b"",
    lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
], ids=["half", "empty", "one bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, root, tmp_path, uninterrupted):
    run = Run(tmp_path, root)
    run.finish()
    run.checkpoint.write_bytes(damage(run.checkpoint.read_bytes()))
    output, weights = run.finish()
    assert "is damaged or missing: going back" in output and "going on with epoch 5" in output
    assert equal(uninterrupted, weights)


def test_a_kill_between_the_two_renames_loses_nothing(root, tmp_path, uninterrupted):
    run = Run(tmp_path, root)
    run.finish()
    run.checkpoint.unlink()
    output, weights = run.finish()
    assert "going on with epoch 5" in output and equal(uninterrupted, weights)


def test_a_second_process_is_refused(root, tmp_path):
    run = Run(tmp_path, root, workers=1)
    first = run.start()
    run.wait_for(first, "seconds")
    os.kill(first.pid, signal.SIGSTOP)  # at work for as long as the second one needs to notice
    refusal = f"another process is training with {run.checkpoint}: wait for it, stop it, or choose another folder"
    with pytest.raises(RuntimeError, match=f"^{re.escape(refusal)}$"):
        run.finish()
    os.killpg(first.pid, signal.SIGKILL)
    first.join()
    assert run.finish()  # the lock ended with the process


def test_where_there_is_no_fcntl_the_lock_is_that_of_windows(tmp_path, monkeypatch):
    """With a stand-in for Windows' msvcrt, which refuses a region that is locked through another handle."""
    fcntl = pytest.importorskip("fcntl")
    locking = lambda descriptor, mode, length: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setattr(utils, "fcntl", None)
    monkeypatch.setattr(utils, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    for _ in range(2):  # it is free again afterwards
        with utils._alone(tmp_path / "checkpoint.pt"):
            with pytest.raises(RuntimeError, match="another process is training"):
                with utils._alone(tmp_path / "checkpoint.pt"):
                    pytest.fail("both are at work")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(root, tmp_path, uninterrupted):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = Run(disk, root)
        run.finish()
        size = run.checkpoint.stat().st_size
        for path in disk.iterdir():
            path.unlink()
        (disk / "ballast").write_bytes(bytes(2**20 - int(1.5 * size)))  # room for one checkpoint, not for two
        output, _ = run.finish()
        assert "could not be written (No space left on device): training goes on" in output
        assert len(utils.load_history(run.checkpoint)["seconds"]) == 1 and "    5  " in output
        (disk / "ballast").unlink()
        output, weights = run.finish()
        assert "going on with epoch 2" in output and equal(uninterrupted, weights)
    finally:
        subprocess.run(["umount", "--lazy", disk])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_keeps_the_figure_before_and_the_notebook_goes_on(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        history = {f"{split}_loss": [2.0, 1.0] for split in ("train", "test")}
        utils.plot_loss(history, disk / "loss.png")
        before = (disk / "loss.png").read_bytes()
        with contextlib.suppress(OSError):
            (disk / "ballast").write_bytes(bytes(2**20))  # as much as there is room for
        assert utils.plot_loss(history, disk / "loss.png", "other data").axes
        assert f"{disk / 'loss.png'} could not be written (No space left on device)" in capsys.readouterr().out
        assert (disk / "loss.png").read_bytes() == before
    finally:
        subprocess.run(["umount", "--lazy", disk])


def test_a_checkpoint_folder_that_cannot_be_written_is_named_before_work_begins(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match=r"file can't be written \(File exists\): choose another folder"):
        with utils._alone(tmp_path / "file" / "checkpoint.pt"):
            pytest.fail("work began")


def main(kills=20):
    """Kill `kills` runs, each once, resume them, and count those that end with the weights of an uninterrupted one."""
    survived, os.environ["TQDM_DISABLE"] = 0, "1"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "whole").mkdir()
        load_dataset("test", "built-in", root=folder)  # drawn beforehand
        start = time.perf_counter()
        whole = Run(folder / "whole", folder).finish()[1]
        duration = time.perf_counter() - start
        for number in range(kills):
            (folder / str(number)).mkdir()
            run = Run(folder / str(number), folder, workers=number % 2)
            moment = None if number % 4 == 0 else MOMENTS.uniform(0, duration)
            fate = "killed" if kill(run, moment) else "finished before"
            same = equal(whole, run.finish()[1])
            survived += same
            print(f"{number + 1:3d}  {fate} {'while writing' if moment is None else f'after {moment:.2f} s':14}  "
                  f"{'survived' if same else 'LOST'}", flush=True)
    print(f"{survived} of {kills} survived")
    return survived == kills


if __name__ == "__main__":
    sys.exit(not main())
