"""The fork server: several guards at a time, their results in order."""

import contextlib
import gc
import importlib
import json
import os
import re
import select
import signal
import warnings
from collections.abc import Callable, Iterator

from torch import nn

from .rules import check_rules
from .sandbox import RESULT, Job, start

# what takes long to import: if a file asks for it, it is imported once, for all files
HEAVY = ("torchvision.transforms", "albumentations", "matplotlib.pyplot", "pandas", "cv2")


def preload(codes: list[str]) -> None:
    """Import once, for all forks, what takes long and what these codes mention.

    PyTorch sets much up at its first operations: a first network runs here, for all forks.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    layers = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    check_rules(nn.Sequential(*layers))
    for name in HEAVY:
        asks = re.compile(rf'^\s*"?(import|from)\s+{name.split(".")[0]}\b', re.MULTILINE)
        if any(map(asks.search, codes)):
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
    gc.freeze()  # the garbage collector of a fork copies no page that it only looks at


def check_files(
    jobs: list[Job], processes: int, waiting: Callable[[int], None] = lambda done: None
) -> Iterator[dict]:
    """Check files, several at a time; yield the result of each in order, as soon as it is there.

    Args:
        waiting: is called with the number of finished files, several times a second.
    """
    running, results, next_job = {}, {}, 0
    try:
        for number in range(len(jobs)):
            while number not in results:
                while len(running) < processes and next_job < len(jobs):
                    running[next_job] = [*start(jobs[next_job]), b""]
                    next_job += 1
                _collect(running, results)
                waiting(number + len(results))
            yield results.pop(number)
    finally:
        stop([guard for guard, *_ in running.values()])


def _collect(running, results):
    """Read from the pipes of the guards until one is done, or a moment has passed."""
    pipes = {pipe: number for number, (_, pipe, _) in running.items()}
    for pipe in select.select(list(pipes), [], [], 0.2)[0]:
        part = os.read(pipe, RESULT)
        number = pipes[pipe]
        running[number][2] += part
        if not part:
            guard, _, data = running.pop(number)
            os.close(pipe)
            os.waitpid(guard, 0)
            results[number] = json.loads(data) if data else {"error": "its guard was ended"}


def stop(guards: list[int]) -> None:
    """End guards, and with them whatever their files have started. No signal interrupts this."""
    if not guards:
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    for guard in guards:
        with contextlib.suppress(OSError):
            os.kill(guard, signal.SIGTERM)
    for guard in guards:
        with contextlib.suppress(OSError):
            os.waitpid(guard, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
