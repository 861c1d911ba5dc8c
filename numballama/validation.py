"""Checks of user arguments. Each returns the value in the type that the code uses, or raises `Error`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsFloat, SupportsIndex, cast

from .errors import Error


def whole_number(name: str, value: object, minimum: int | None = None) -> int:
    """`value` as an int. NumPy integers are accepted, 1.0 is not. Raises `Error` below `minimum`."""
    try:
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        raise Error(f"{name} must be a whole number, found {value!r}") from None
    if minimum is not None and number < minimum:
        raise Error(f"{name} must be at least {minimum}, found {number}")
    return number


def real_number(name: str, value: object, minimum: float, maximum: float, expected: str) -> float:
    """`value` as a float in [minimum, maximum]. Raises `Error` that says `expected`, also for NaN."""
    try:
        number = float(cast("SupportsFloat | str", value))
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not minimum <= number <= maximum:
        raise Error(f"{name} must be {expected}, found {value!r}")
    return number


def strings(name: str, value: object) -> Sequence[str]:
    """One string or a sequence of strings, as a sequence. Raises `Error` for anything else."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise Error(f"{name} must be a string or a list of strings, found {value!r}")
    return items
