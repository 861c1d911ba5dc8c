"""Checks of user arguments. Each returns the value in the type that the code uses, or raises `Error`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import SupportsFloat, SupportsIndex, cast

import numpy as np

from .errors import Error


def whole_number(name: str, value: object, minimum: int | None = None) -> int:
    """`value` as an int. NumPy integers are accepted, 1.0 and True are not. Raises `Error` below `minimum`."""
    try:
        if isinstance(value, bool):  # `logprobs=True` is OpenAI's, and no number
            raise TypeError
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


def flag(name: str, value: object) -> bool:
    """`value` as a bool: True, False, 1, 0 or NumPy's. Raises `Error` for others: "false" would be true."""
    if isinstance(value, bool | int | np.bool_) and value in (0, 1):
        return bool(value)
    raise Error(f"{name} must be True or False, found {value!r}")


def strings(name: str, value: object) -> Sequence[str]:
    """One string or a sequence of strings, as a sequence. Raises `Error` for anything else."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise Error(f"{name} must be a string or a list of strings, found {value!r}")
    return items


def require_known(what: str, names: Iterable[str], known: Iterable[str], others: Mapping[str, str]) -> None:
    """Raise `Error` for a name that is not among the `known` ones. It says which is meant, where that can be guessed.

    `others`: names of other libraries → what to use instead.
    """
    known = list(known)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    meant = others.get(unknown[0])
    if meant is None and len(unknown) == 1:
        meant = next(iter(get_close_matches(unknown[0], known, 1, 0.75)), None)
    hint = "; choose from" if meant is None else f": use {meant}. Choose from"
    shown = ", ".join(name if name.isidentifier() and len(name) < 50 else f"{name!r:.50}" for name in unknown[:5])
    raise Error(f"unknown {what} {shown}{hint} {', '.join(known)}")
