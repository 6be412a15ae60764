"""What a student's file says, read without executing it: Python files and notebooks."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

CODE_MAGICS = {"time", "timeit", "capture", "prun", "writefile", "file", "python", "python3"}
# %matplotlib inline, !pip install, x = !ls, x?
MAGIC = re.compile(r"\s*([%!?]|[\w., ]+=\s*[%!])|.*\w\?+\s*$")


class Source(NamedTuple):
    """The code of a file, and what a notebook has printed."""

    cells: list[str]  # one for a Python file
    outputs: list[tuple[int, str]]  # (number of the cell, counted from 1; text)
    written: dict[str, str]  # files that the notebook writes by %%writefile

    def text(self) -> str:
        """Return all of the code."""
        return "\n".join(self.cells)

    def statements(self) -> list[ast.stmt]:
        """Return the statements of all cells that parse, in order."""
        statements = []
        for cell in self.cells:
            try:
                statements += ast.parse(cell).body
            except SyntaxError:
                continue
        return statements


def read_source(path: Path) -> Source:
    """Read a Python file or a notebook.

    Raises:
        ValueError: it is neither, or can't be read.
    """
    if path.suffix not in (".py", ".ipynb"):
        raise ValueError("this is neither a Python file nor a notebook")
    data = path.read_bytes()
    if path.suffix == ".py":
        return Source([_parsing(_decoded(data))], [], {})
    try:
        return _read_notebook(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("this notebook can't be read: it is no JSON with cells") from error


def _parsing(code):
    """Return the code of a Python file, without magics if it is an exported notebook."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return without_magics(code)
    return code


def _decoded(data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _read_notebook(notebook):
    cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
    code, outputs, written = [], [], {}
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] != "code":
            continue
        text = _joined(cell.get("source", cell.get("input", "")))
        code.append(without_magics(text))
        name = re.match(r"%%(?:writefile|file)\s+(?:-a\s+)?([\w.-]+\.py)\s*\n", text)
        if name:
            written[name[1]] = text[name.end() :]
        for output in cell.get("outputs", []):
            shown = output.get("text", output.get("data", {}).get("text/plain", ""))
            outputs.append((number, _joined(shown)))
    return Source(code, outputs, written)


def _joined(text):
    return text if isinstance(text, str) else "".join(text)


def without_magics(cell: str) -> str:
    """Return the code of a cell with `pass` in the place of each magic and each shell command."""
    lines, goes_on = [], False
    first = re.match(r"\s*%%(\w+)", cell)
    if first and first[1] not in CODE_MAGICS:  # it is bash, HTML or the like
        return ""
    for line in cell.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if goes_on:
            lines.append("")
        elif MAGIC.match(line):
            lines.append(indent + "pass")
            goes_on = True
        else:
            lines.append(line)
        goes_on = goes_on and line.endswith("\\")
    return "\n".join(lines)


def module_calls(statements: list[ast.stmt]) -> list[ast.Call]:
    """Return the calls in the code of a file outside of its classes, in order."""
    calls = []
    for statement in statements:
        if not isinstance(statement, ast.ClassDef):
            found = [node for node in _outside_classes(statement) if isinstance(node, ast.Call)]
            calls += sorted(found, key=lambda node: (node.lineno, node.col_offset))
    return calls


def part_names(statements: list[ast.stmt]) -> set[str]:
    """Return the names that are called within classes: what is a part of something else."""
    classes = [node for statement in statements for node in ast.walk(statement)]
    classes = [node for node in classes if isinstance(node, ast.ClassDef)]
    calls = [each for node in classes for each in ast.walk(node) if isinstance(each, ast.Call)]
    return {called_name(call) for call in calls}


def _outside_classes(node):
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef):
            yield from _outside_classes(child)


def called_name(call: ast.Call) -> str:
    """Return "Net" for a call as `Net(...)` or `models.Net(...)`; "" for another one."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


# ---------------------------------------------------------------- what a training printed

NUMBER = r"(?:\d+\s*/\s*\d+\s*\(\s*)?(?P<value>\d+(?:\.\d+)?)\s*(?P<percent>%?)"
ACCURACY = re.compile(rf"(?:test|val)[^\n]*?acc(?:uracy)?\b[^\d\n]{{0,20}}?{NUMBER}", re.IGNORECASE)
ON_TEST = re.compile(rf"accuracy[^\n\d]*(?:\d+ )?test[^\d\n]{{0,20}}?{NUMBER}", re.IGNORECASE)
EPOCH = re.compile(r"epoch\W{0,3}(\d+)", re.IGNORECASE)


class Claim(NamedTuple):
    """A test accuracy, in percent, that a notebook has printed."""

    accuracy: float
    epoch: str  # "" if there is none before it
    cell: int


def claims(source: Source) -> list[Claim]:
    """Return the test accuracies in the outputs of a notebook, in order."""
    found = []
    for cell, text in source.outputs:
        epoch = ""
        for line in re.split(r"[\r\n]+", text):
            epoch = (EPOCH.findall(line) or [epoch])[-1]
            match = ACCURACY.search(line) or ON_TEST.search(line)
            if match:
                value = float(match["value"])
                value = 100 * value if value <= 1 and not match["percent"] else value
                if value <= 100:
                    found.append(Claim(value, epoch, cell))
    return found
