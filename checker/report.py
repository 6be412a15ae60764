"""The table of many answers: a letter for each rule, reasons below, a CSV for a spreadsheet."""

import csv
import os.path
import textwrap
from pathlib import Path

from .rows import BROKEN, CLAIMED, HOLDS, NONE_FOUND, OPTIONAL, UNDECIDED
from .rules import Limits

WIDTH, FILE_WIDTH, NETWORK_WIDTH = 110, 40, 24
LETTERS = {
    HOLDS: "h",
    BROKEN: "B",
    UNDECIDED: "u",
    OPTIONAL: "o",
    CLAIMED: "c",
    NONE_FOUND: "n",
}
WORDS = "h holds, B BROKEN, u undecided, o optional, c claimed, n none found, - no transform found"


def rule_names(limits: Limits) -> list[str]:
    """Return the names of all rows, in the order of the columns."""
    return [
        "four blocks",
        "three convolutions in each",
        "stride 2 in the last of each, only there",
        "no pooling but the final one",
        f"receptive field above {limits.receptive_field}",
        "a depthwise-separable convolution",
        "a dilated convolution",
        "global average pooling at the end",
        "then at most one fully connected layer",
        f"fewer than {limits.parameters:,} parameters",
        "test accuracy",
        "HorizontalFlip",
        "ShiftScaleRotate",
        "CoarseDropout: one 16x16 hole",
        "... filled with the mean colour",
        "Resize",
    ]


def short_names(files: list[str]) -> list[str]:
    """Return the paths of files without the folders and the ends that all have in common."""
    parts = [Path(os.path.abspath(file)).parts for file in files]
    most = min(map(len, parts)) - 1  # one part stays
    first = min(len(os.path.commonprefix(parts)), most)
    last = min(len(os.path.commonprefix([each[::-1] for each in parts])), most - first)
    return ["/".join(each[first : len(each) - last]) for each in parts]


class Report:
    """Prints the table, row by row."""

    def __init__(self, files: list[str], limits: Limits, long: bool = False):
        self.rules = rule_names(limits)
        self.columns = [chr(ord("A") + place) for place in range(len(self.rules))]
        self.names = [_shortened(name, FILE_WIDTH) for name in short_names(files)]
        self.width = max(map(len, ["file", *self.names]))
        self.long = long

    def head(self) -> str:
        """Return what the letters mean, and the head of the table."""
        pairs = zip(self.columns, self.rules, strict=True)
        legend = ", ".join(f"{column} {rule.replace(', ', ' and ')}" for column, rule in pairs)
        lines = [*textwrap.wrap(legend, WIDTH), WORDS, ""]
        return "\n".join([*lines, self._line("file", "network", "copy", self.columns)])

    def row(self, number: int, result: dict) -> str:
        """Return the row of a file, and below it what was seen where a rule does not hold."""
        if "error" in result:
            cells = ["-"] * len(self.columns)
            lines = [self._line(self.names[number], "no verdict", "", cells)]
            return "\n".join([*lines, *_wrapped(result["error"])])
        rows = {rule: (measured, verdict) for rule, measured, verdict in result["rows"]}
        cells = [LETTERS[rows[rule][1]] if rule in rows else "-" for rule in self.rules]
        lines = [self._line(self.names[number], result["network"], result["mark"], cells)]
        for column, rule in zip(self.columns, self.rules, strict=True):
            measured, verdict = rows.get(rule, ("", HOLDS))
            if verdict in (BROKEN, UNDECIDED, CLAIMED) or (self.long and measured):
                lines += _wrapped(f"{column} {verdict}: {rule}: {measured}")
        notes = list(result["notes"])
        if len(result["network"]) > NETWORK_WIDTH:
            notes.insert(0, f"network: {result['network']}")
        return "\n".join([*lines, *(line for note in notes for line in _wrapped(note))])

    def _line(self, file, network, mark, cells):
        network = _shortened(network, NETWORK_WIDTH)
        start = f"{file:{self.width}}  {network:{NETWORK_WIDTH}}  {mark:6}  "
        return (start + " ".join(cells)).rstrip()

    def copies(self, results: list[dict]) -> str:
        """Return which files share a network; "" if none do."""
        files = {}
        for name, result in zip(self.names, results, strict=True):
            if "mark" in result:
                files.setdefault(result["mark"], []).append(name)
        shared = {mark: names for mark, names in files.items() if len(names) > 1}
        lines = [f"the same network, {mark}: {', '.join(names)}" for mark, names in shared.items()]
        return "\n".join(part for line in lines for part in textwrap.wrap(line, WIDTH))

    def write_csv(self, path: str, files: list[str], results: list[dict]) -> None:
        """Write all measurements as a table that a spreadsheet opens."""
        head = ["file", "network", "copy", *self.rules, "notes", "error"]
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([head, *self._csv_lines(files, results)])

    def _csv_lines(self, files, results):
        for file, result in zip(files, results, strict=True):
            rows = {rule: f"{verdict}: {measured}" for rule, measured, verdict in _rows(result)}
            cells = [rows.get(rule, "") for rule in self.rules]
            notes = "; ".join(result.get("notes", []))
            line = [file, result.get("network", ""), result.get("mark", ""), *cells, notes]
            yield [_no_formula(cell) for cell in [*line, result.get("error", "")]]


def _rows(result):
    return result.get("rows", [])


def _no_formula(cell):
    """Keep a spreadsheet from calculating what a student has named."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def _shortened(text, most):
    half = (most - 2) // 2
    return text if len(text) <= most else f"{text[:half]}..{text[len(text) - half :]}"


def _wrapped(text):
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ")


def exit_status(results: list[dict]) -> int:
    """Return 3 if a file has no verdict, 1 if a rule is broken, or else 0."""
    if any("error" in result for result in results):
        return 3
    return int(any(row[2] == BROKEN for result in results for row in _rows(result)))
