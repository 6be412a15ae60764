"""A row of the table of rules: what all rules return."""

import re
from collections.abc import Sequence
from typing import NamedTuple

HOLDS, BROKEN, UNDECIDED = "holds", "BROKEN", "undecided"
OPTIONAL = "optional"  # only one version of the assignment has this rule
CLAIMED, NONE_FOUND = "claimed", "none found"  # what only a training can tell
VERDICTS = {HOLDS, BROKEN, UNDECIDED, OPTIONAL, CLAIMED, NONE_FOUND}


class Row(NamedTuple):
    """A rule, what was measured, and the verdict.

    The verdict is `HOLDS`, `BROKEN`, or `UNDECIDED`, where what was measured says why. Rows that
    only inform have another one.
    """

    rule: str
    measured: str
    verdict: str


def make_row(rule: str, measured: str, holds: bool) -> Row:
    """Return a row that is decided."""
    return Row(rule, measured, HOLDS if holds else BROKEN)


def listed(items: Sequence[str], most: int = 6) -> str:
    """Return "a, b, c and 2 more", with at most so many items."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 200 characters.

    It begins with the kind of the error if the message says little.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without colours for a terminal
    text = " ".join(text.split())
    if isinstance(error, KeyError) or not re.search("[a-z]", text):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 200 else text[:197].rsplit(" ", 1)[0] + "..."
