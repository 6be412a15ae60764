"""`python checker answers/*.py`: the rules on a folder of answers, each in a process of its own."""

import argparse
import contextlib
import csv
import importlib.util
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import nn

from .rows import HOLDS, Row, one_line
from .rules import check_rules
from .tables import text_table

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CHECK_ONE = "--check-one"  # the argument that marks a process of `check_file`


def main(arguments: list[str] | None = None) -> None:
    """Print one table for files of networks: a row for each file, a column for each rule."""
    if sys.argv[1:2] == [CHECK_ONE]:
        return _check_one(*sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python checker",
        description="Check the assignment's rules on the networks in Python files: one table.",
        epilog="The files are executed, each in a process of its own: do not run it on files that "
        "you do not trust. Of each file, the network is Net, or else the nn.Module class that "
        "keeps the most rules, of those that can be built without arguments.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a Python file with a network; it is executed"
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="write the table with all measurements to this file, too"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="time for each file (default 60)",
    )
    options = parser.parse_args(arguments)
    with ThreadPoolExecutor(CORES) as pool:  # each thread waits for a process
        answers = dict(
            zip(
                options.files,
                pool.map(check_file, options.files, itertools.repeat(options.timeout)),
                strict=True,
            )
        )
    print(format_answers(answers))
    if options.csv:
        try:
            with open(options.csv, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    _answer_lines(answers, lambda row: f"{row.verdict}: {row.measured}")
                )
        except OSError as error:
            sys.exit(f"checker: {options.csv} could not be written ({error.strerror})")


def check_file(file: str, timeout: float = 60) -> tuple[str, list[Row]] | str:
    """Check the network in a Python file, which is executed in a process of its own.

    Returns:
        the name of the class and its rows, or an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        process = subprocess.Popen(
            [sys.executable, Path(__file__).parent, CHECK_ONE, Path(file).resolve(), path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"took longer than {timeout:g} seconds"
        finally:
            _end(process)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"ended its process with exit code {process.returncode}"
    return result if isinstance(result, str) else (result[0], [Row(*row) for row in result[1]])


def _end(process):
    """End a process and whatever it started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


def _check_one(file, path):
    """Write the name and the rows of the network in a file, or its error, as JSON."""
    try:
        result = _check_module(_import(Path(file)))
    except BaseException as error:  # a file that exits is an error, too
        result = _described(error)
    Path(path).write_text(json.dumps(result), encoding="utf-8")


def _described(error):
    return f"{type(error).__name__}: {one_line(error)}"


def _import(file):
    """Return the module of a file. It may import its neighbours, by their names or as those of a
    package.
    """
    if file.suffix != ".py":
        raise ValueError(
            "this is no Python file (of a notebook, `jupyter nbconvert --to script` makes one)"
        )
    name = file.parent.name
    if (
        name in sys.modules or (file.parent / f"{name}.py").exists()
    ):  # the package must not hide another module
        name = f"folder_{name}"
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(file.parent)]
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"{name}.{file.stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_module(module):
    """Return the name and the rows of `Net`, or else of the class that keeps the most rules of
    those that run.
    """
    if callable(getattr(module, "Net", None)):
        return "Net", check_rules(module.Net())
    checked, errors = {}, []
    for name, value in list(vars(module).items()):
        if (
            inspect.isclass(value)
            and issubclass(value, nn.Module)
            and value.__module__ == module.__name__
        ):
            try:
                checked[name] = check_rules(value())
            except Exception as error:  # a part of a network, or a network for other images
                errors.append(f"{name}: {_described(error)}")
    if not checked:
        raise ValueError("; ".join(errors) or "there is no class of a network")
    return max(checked.items(), key=lambda item: sum(row.verdict == HOLDS for row in item[1]))


def _answer_lines(answers, cell):
    """Return the table of answers: a line for each file, a column for each rule."""
    columns = list(
        dict.fromkeys(
            row.rule
            for answer in answers.values()
            if not isinstance(answer, str)
            for row in answer[1]
        )
    )
    lines = [["file", "network", *columns, "error"]]
    for file, answer in answers.items():
        if isinstance(answer, str):
            lines.append([file, "", *[""] * len(columns), answer])
        else:
            cells = {row.rule: cell(row) for row in answer[1]}
            lines.append([file, answer[0], *(cells.get(column, "") for column in columns), ""])
    return lines


def format_answers(answers: dict[str, tuple[str, list[Row]] | str]) -> str:
    """Return the verdicts of many files as a text table, and after it what was seen where one is
    not "holds".
    """
    lines = [line[:-1] for line in _answer_lines(answers, lambda row: row.verdict)]
    lines = [[file, *(cells if any(cells) else ["error"] * len(cells))] for file, *cells in lines]
    notes = []
    for file, answer in answers.items():
        notes += (
            [(file, "error", answer)]
            if isinstance(answer, str)
            else [
                (file, row.verdict, f"{row.rule}: {row.measured}")
                for row in answer[1]
                if row.verdict != HOLDS
            ]
        )
    return text_table(lines, most=16) + ("\n\n" + text_table(notes) if notes else "")
