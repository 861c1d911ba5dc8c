"""Arguments from outside, turned into what the code works with, or into an `Error` that names them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from .errors import Error


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; NumPy integers are welcome, 1.0 is not. Raises `Error` below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise Error(f"{name} must be a whole number, found {value!r}") from None
    if least is not None and number < least:
        raise Error(f"{name} must be at least {least}, found {number}")
    return number


def real_number(name: str, value: Any, least: float, most: float, meaning: str) -> float:
    """`value` as a float within [least, most]; `meaning` says in the error what is wanted."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not least <= number <= most:
        raise Error(f"{name} must be {meaning}, found {value!r}")
    return number


def strings(name: str, value: Any) -> Sequence[str]:
    """One string or several, as several."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not all(isinstance(item, str) for item in given):
        raise Error(f"{name} must be a string or several, found {value!r}")
    return given
