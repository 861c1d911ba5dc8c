"""Checks of arguments: accepted values, and errors that name the argument and the value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from numballama.errors import Error
from numballama.validation import real_number, strings, whole_number


def test_whole_numbers() -> None:
    for value in (3, np.int64(3), np.uint8(3), True + 2):
        assert whole_number("n", value) == 3 and type(whole_number("n", value)) is int
    assert whole_number("n", -1) == -1 and whole_number("n", 0, 0) == 0
    for wrong in (1.0, "1", None, np.float32(1), [1]):
        with pytest.raises(Error, match="n must be a whole number, found "):
            whole_number("n", wrong)
    with pytest.raises(Error, match="n must be at least 2, found 1"):
        whole_number("n", 1, 2)


def test_real_numbers() -> None:
    for value in (0.5, np.float32(0.5), "0.5"):
        assert real_number("p", value, 0, 1, "between 0 and 1") == 0.5
    assert real_number("p", 1, 0, 1, "x") == 1.0 and type(real_number("p", 1, 0, 1, "x")) is float
    for wrong in (-0.1, 1.1, math.nan, math.inf, None, "a", 10**400):
        with pytest.raises(Error, match="p must be between 0 and 1, found"):
            real_number("p", wrong, 0, 1, "between 0 and 1")


def test_strings() -> None:
    assert list(strings("stop", "a")) == ["a"] and list(strings("stop", ("a", "b"))) == ["a", "b"]
    assert list(strings("stop", [])) == []
    wrongs: list[Any] = [None, 3, b"a", ["a", 3], {"a"}]
    for wrong in wrongs:
        with pytest.raises(Error, match="stop must be a string or a list of strings, found"):
            strings("stop", wrong)
