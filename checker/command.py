"""`python checker answers/*.py`: the rules on a folder of answers."""

import argparse
import contextlib
import glob
import os
import re
import signal
import sys
import time
from pathlib import Path

from .report import Report, exit_status
from .rules import PARAMETER_LIMIT, RECEPTIVE_FIELD_LIMIT, Limits

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CHOICE = re.compile(r"(?P<file>.+\.(?:py|ipynb)):(?P<network>[A-Za-z_]\w*(?:\(.*\))?)$", re.DOTALL)
EPILOG = """
The code is executed. Each file runs in a process and a temporary folder of its own, with a copy of
its neighbours, without network, CUDA and standard input, and with limits of time, memory, processes
and file size. Accidents are caught; malice is not: use a container for files that you do not trust.
Of the networks in a file, the one shown is the last that takes (N, 3, 32, 32) and that the file
builds itself, or else the last that it defines. Exit status: 0, 1 if a rule is broken, 2 if the
command can't run, 3 if a file has no verdict.
"""


def main(arguments: list[str] | None = None) -> int:
    """Print one table for files of networks; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        parser.error("this system can't fork a process for each file: use Linux, macOS or WSL")
    from .sandbox import Job
    from .server import preload

    files = _expanded(options.files, parser)
    limits = Limits(options.max_parameters, options.min_receptive_field)
    report = Report([_shown(*each) for each in files], limits, options.long)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no name may end the command where it can't be encoded
            stream.reconfigure(errors="backslashreplace")
    preload([file.read_text(encoding="utf-8", errors="ignore") for file, _ in files])
    jobs = [Job(file, wanted, limits, options.timeout) for file, wanted in files]
    results = _check_all(jobs, report)
    if results is None:
        return 130
    _print_end(report, results)
    if options.csv:
        try:
            report.write_csv(options.csv, [_shown(*each) for each in files], results)
        except OSError as error:
            text = f"checker: {options.csv} could not be written ({error.strerror})"
            print(text, file=sys.stderr)
            return 2
    return exit_status(results)


def _check_all(jobs, report):
    """Print a row for each file as soon as it is there; return the results, None if stopped."""
    from .server import check_files

    results, progress = [], Progress(len(jobs))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        print(report.head(), flush=True)
        with contextlib.closing(check_files(jobs, CORES, progress.show)) as arriving:
            for number, result in enumerate(arriving):
                results.append(result)
                progress.clear()
                print(report.row(number, result), flush=True)
    except KeyboardInterrupt:
        return None
    finally:
        progress.clear()
        signal.signal(signal.SIGTERM, before)
    return results


def _print_end(report, results):
    copies = report.copies(results)
    if copies:
        print(f"\n{copies}")
    if any(result.get("offline") is False for result in results):
        print("\nThis system did not let the files' network be denied.")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python checker",
        description="Check the assignment's rules on the networks in Python files and notebooks.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a Python file, a notebook, a folder of them or a pattern; FILE.py:Net or "
        "FILE.py:Net(norm='BN') chooses the network",
    )
    parser.add_argument("--long", action="store_true", help="tell what holds, too, and why")
    parser.add_argument("--csv", metavar="FILE", help="write all measurements to a file, too")
    parser.add_argument(
        "--timeout",
        type=_above_zero(float),
        default=60,
        metavar="SECONDS",
        help="time for each file (default 60)",
    )
    parser.add_argument(
        "--max-parameters",
        type=_above_zero(int),
        default=PARAMETER_LIMIT,
        metavar="N",
        help=f"fewer than so many (default {PARAMETER_LIMIT:,})",
    )
    parser.add_argument(
        "--min-receptive-field",
        type=_above_zero(int),
        default=RECEPTIVE_FIELD_LIMIT,
        metavar="PIXELS",
        help=f"above so many (default {RECEPTIVE_FIELD_LIMIT})",
    )
    return parser


def _above_zero(kind):
    def convert(text):
        try:
            value = kind(text.replace("_", "").replace(",", ""))
        except ValueError:
            value = 0
        if not 0 < value < 10**9:
            raise argparse.ArgumentTypeError(f"{text!r}: choose a number above 0")
        return value

    return convert


def _shown(file, wanted):
    return f"{file}:{wanted}" if wanted else str(file)


def _expanded(arguments, parser) -> list[tuple[Path, str]]:
    """Return the files of paths, folders and patterns, each with the network that is chosen."""
    files = []
    for argument in arguments:
        choice = None if os.path.exists(argument) else CHOICE.match(argument)
        name, wanted = (choice["file"], choice["network"]) if choice else (argument, "")
        if os.path.isdir(name):
            found = [path for path in sorted(Path(name).rglob("*")) if _is_answer(path, name)]
            found = [path for path in found if path.parent == Path(name) or _has_network(path)]
        elif os.path.exists(name):
            found = [Path(name)]
        else:
            found = [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        if not found:
            parser.error(f"{name}: there is no such file, or no Python file and notebook in it")
        files += [(path, wanted) for path in found]
    return list(dict.fromkeys(files))


def _is_answer(path, folder):
    inner = path.relative_to(folder).parts
    hidden = any(part.startswith((".", "__")) for part in inner)
    return path.suffix in (".py", ".ipynb") and not hidden and path.is_file()


def _has_network(path):
    """Return whether a file may have a network: others in the folders below are helpers."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    return bool(re.search(r"\bnn\b|Module\b|Sequential\b|\.ipynb$", text + path.suffix))


class Progress:
    """A bar on the terminal, below the rows that are there."""

    def __init__(self, files: int):
        self.files, self.start = files, time.monotonic()
        self.shown = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Draw the bar."""
        if self.shown:
            full = 30 * done // self.files
            seconds = time.monotonic() - self.start
            bar = "#" * full + "." * (30 - full)
            print(f"\r[{bar}] {done} of {self.files}, {seconds:.0f} s", end="", file=sys.stderr)

    def clear(self) -> None:
        """Remove the bar, so that a row can be printed."""
        if self.shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
