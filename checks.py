"""Checks of settings and arguments, and the one line that says what is allowed."""

import numbers
from collections.abc import Callable, Collection
from pathlib import Path


def require(name: str, value: object, allowed: str, holds: bool) -> None:
    """Raise a ValueError of one line that names the setting, its value and what is allowed.

    Do nothing if it holds.
    """
    if not holds:
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        raise ValueError(f"{name} is {shown}: choose {allowed}")


def is_number(value: object) -> bool:
    """Return whether the value is a finite number, NumPy's included, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return bool(abs(value) < 1e100)  # which NaN is not, either


def positive(value: object) -> bool:
    """Return whether the value is a finite number above 0."""
    return is_number(value) and value > 0


def is_folder(value: object) -> bool:
    """Return whether the value is the path of a folder, or of one that can be made."""
    try:
        return isinstance(value, (str, Path)) and bool(str(value)) and not Path(value).is_file()
    except (OSError, ValueError):  # it is too long, or no path
        return False


def one_of(names: Collection[str]) -> Callable[[object], bool]:
    """Return a check for one of these names."""
    return lambda value: isinstance(value, str) and value in names


def whole(low: int, high: float = float("inf")) -> Callable[[object], bool]:
    """Return a check for whole numbers from `low` to `high`."""
    return lambda value: type(value) is int and low <= value <= high


def between(low: float, high: float = float("inf")) -> Callable[[object], bool]:
    """Return a check for finite numbers from `low` to `high`."""
    return lambda value: is_number(value) and low <= value <= high
