"""Each file in a process of its own, in a folder of its own, safe from accidents (not from malice).

The command is a fork server: it has imported PyTorch, and forks a guard for each file. The guard
copies the file, forks the worker that executes it, watches it, and ends whatever it started. The
worker tells its result over a pipe that it opens only when it has executed all of the file's code.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .answer import examine
from .linux import adopt_orphans, descendants, end_descendants, end_with_parent, leave_network
from .rows import VERDICTS, one_line
from .rules import Limits

TEXT = set(".py .ipynb .txt .md .json .yaml .yml .toml .cfg .ini .csv".split())
LARGEST, ALL_FILES = 2**20, 20 * 2**20  # bytes of a neighbour, of all neighbours
DATA, FILE_SIZE = 4 * 2**30, 64 * 2**20  # bytes
PROCESSES, RESULT = 64, 2**20
WHOLE_SHARE = 1 / 3  # of the time: if a file has not ended then, only its definitions are executed


class Job(NamedTuple):
    """One file to check."""

    file: Path
    wanted: str  # the network in the student's words; "" if any
    limits: Limits
    timeout: float  # seconds


# ---------------------------------------------------------------- the guard


def start(job: Job) -> tuple[int, int]:
    """Fork a guard; return its process id, and the pipe on which its result will come, as JSON."""
    parent = os.getpid()
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    guard = os.fork()
    if guard:
        os.close(write)
        return guard, read
    try:
        os.close(read)
        _guard(job, write, parent)
    finally:
        os._exit(0)  # never return into the command


class _Stopped(BaseException):
    """The command was stopped."""


def _guard(job, pipe, parent):
    def stop(*_):
        raise _Stopped

    os.setpgid(0, 0)  # a Ctrl-C reaches the command alone, which then stops the guards
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    end_with_parent(signal.SIGTERM, parent)
    adopt_orphans()
    folder = tempfile.mkdtemp(prefix="checker-")
    try:
        result = _attempts(job, Path(folder))
    except _Stopped:
        result = _error("stopped")
    except Exception as error:
        result = _error(f"could not be copied or executed ({one_line(error)})")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        _write(pipe, json.dumps(result).encode())


def _write(pipe, data):
    while data:
        data = data[os.write(pipe, data) :]


def _attempts(job, folder):
    """Execute the whole file, or, where that fails, only its definitions, in another process."""
    end = time.monotonic() + job.timeout
    if job.file.suffix == ".ipynb":
        return _attempt(job, folder / "1", False, job.timeout)
    first = _attempt(job, folder / "1", True, WHOLE_SHARE * job.timeout)
    if "error" not in first or first["executed"]:
        return first
    second = _attempt(job, folder / "2", False, max(1, end - time.monotonic()))
    if "error" in second:
        return _error(f"{first['error']}; its definitions alone: {second['error']}")
    note = "only imports, classes, functions and constants were executed"
    second["notes"].append(f"{note} (as a whole: {first['error']})")
    return second


def _attempt(job, folder, whole, seconds):
    """Execute a copy of the file in a worker, and return its result, or an error."""
    file = copy_with_neighbours(job.file, folder)
    fifo = folder.with_suffix(".result")
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    guard = os.getpid()
    worker = os.fork()
    if not worker:
        try:
            os.close(pipe)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _work(job, file, fifo, whole, guard)
        finally:
            os._exit(1)
    try:
        data, status = _watch(worker, pipe, seconds)
    finally:
        end_descendants(worker)
        os.close(pipe)
    if isinstance(status, str):
        return _error(status)
    try:
        return _checked(json.loads(data))
    except (ValueError, KeyError, TypeError):
        return _error(f"ended its process {_described(status)}")


def _error(text, executed=False):
    """Return the result of a file without a verdict; `executed`, if all of its code has run."""
    return {"error": text, "executed": executed}


def _watch(worker, pipe, seconds):
    """Read what a worker writes until it ends. Return this and its status, or why it was ended."""
    end, data, looked = time.monotonic() + seconds, b"", 0
    while True:
        with contextlib.suppress(BlockingIOError):
            data += os.read(pipe, RESULT)
        gone, status = os.waitpid(worker, os.WNOHANG)
        now = time.monotonic()
        if gone:
            with contextlib.suppress(BlockingIOError):
                while part := os.read(pipe, RESULT):
                    data += part
            return data, status
        if now > looked + 0.2:
            looked = now
            if len(descendants(os.getpid())) > PROCESSES:
                return data, f"started more than {PROCESSES} processes"
        if now > end:
            return data, f"took longer than {round(seconds, 1):g} seconds"
        time.sleep(0.02)


def _described(status):
    if os.WIFSIGNALED(status):
        return f"by a signal ({signal.Signals(os.WTERMSIG(status)).name})"
    return f"with exit code {os.WEXITSTATUS(status)}, without a result"


def _checked(result):
    """Return a result of the form that `examine` returns; anything else raises an error."""
    if "error" in result:
        return _error(_text(result["error"]), bool(result["executed"]))
    rows = [[_text(cell) for cell in row] for row in result["rows"]]
    if len(rows) < 10 or any(len(row) != 3 or row[2] not in VERDICTS for row in rows):
        raise ValueError("these are no rows")
    return {
        "network": _text(result["network"]),
        "rows": rows,
        "notes": [_text(note) for note in result["notes"]],
        "mark": _text(result["mark"])[:6],
        "offline": bool(result["offline"]),
    }


def _text(value):
    """Return a text in one line, without what a terminal would obey."""
    if not isinstance(value, str):
        raise TypeError("this is no text")
    line = " ".join(value.split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:1000]


# ---------------------------------------------------------------- the worker


def _work(job, file, fifo, whole, guard):
    """Execute a file in this process, and write the result. It doesn't return."""
    os.setsid()
    end_with_parent(signal.SIGKILL, guard)
    offline = leave_network()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.closerange(3, 65536)  # among them the pipes of the guard
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    home = file.parent.parent.parent
    _set_environment(home)
    for kind, most in (
        (resource.RLIMIT_DATA, DATA),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))
    torch.set_num_threads(1)
    worker = os.getpid()
    result = {**examine(file, job.wanted, job.limits, whole), "offline": offline}
    if os.getpid() != worker:  # the file has forked, and this is the other one
        os._exit(0)
    pipe = os.open(fifo, os.O_WRONLY)
    _write(pipe, json.dumps(result).encode())
    os._exit(0)


def _set_environment(home):
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    os.environ.clear()
    os.environ.update(
        kept,
        HOME=str(home),
        TMPDIR=str(home),
        CUDA_VISIBLE_DEVICES="",
        MPLBACKEND="Agg",
        NO_ALBUMENTATIONS_UPDATE="1",
        OMP_NUM_THREADS="1",
        PYTHONDONTWRITEBYTECODE="1",
    )
    tempfile.tempdir = None  # the one that was found before


def copy_with_neighbours(file: Path, folder: Path) -> Path:
    """Copy a file into a folder, with the code and text files beside it and in the folder above.

    The copy has two folders above it, as deep as a student's `..` may reach. Neighbours are copied
    up to 1 MB each and 20 MB in all, the nearest first.
    """
    source = file.resolve()
    home = folder / "home" / (source.parent.parent.name or "above") / (source.parent.name or "here")
    home.mkdir(parents=True)
    shutil.copyfile(source, home / source.name)
    left = ALL_FILES
    for base, target, depth in (
        (source.parent, home, 3),
        (source.parent.parent, home.parent, 1),
    ):
        for path in _neighbours(base, depth):
            copy = target / path.relative_to(base)
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                if size <= min(LARGEST, left) and not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
                    left -= size
    return home / source.name


def _neighbours(base: Path, depth: int) -> Iterator[Path]:
    """Return the code and text files of a folder, and of those in it, down to a depth."""
    try:
        entries = sorted(base.iterdir())[:1000]
    except OSError:
        return
    yield from (each for each in entries if each.suffix in TEXT and each.is_file())
    for each in entries if depth else []:
        hidden = each.name.startswith((".", "__pycache__")) or (each / "pyvenv.cfg").exists()
        if each.is_dir() and not each.is_symlink() and not hidden:
            yield from _neighbours(each, depth - 1)
