"""Checks of arguments: accepted values, and errors that name the argument and the value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from numballama.errors import Error, UnsupportedError
from numballama.validation import flag, real_number, require_known, require_supported, strings, whole_number


def test_whole_numbers() -> None:
    for value in (3, np.int64(3), np.uint8(3), True + 2):
        assert whole_number("n", value) == 3 and type(whole_number("n", value)) is int
    assert whole_number("n", -1) == -1 and whole_number("n", 0, 0) == 0
    for wrong in (1.0, "1", None, np.float32(1), [1], True, False):
        with pytest.raises(Error, match="n must be a whole number, found "):
            whole_number("n", wrong)
    with pytest.raises(Error, match="n must be at least 2, found 1"):
        whole_number("n", 1, 2)


def test_real_numbers() -> None:
    for value in (0.5, np.float32(0.5), "0.5"):
        assert real_number("p", value, 0, 1, "between 0 and 1") == 0.5
    assert real_number("p", 1, 0, 1, "x") == 1.0 and type(real_number("p", 1, 0, 1, "x")) is float
    for wrong in (-0.1, 1.1, math.nan, math.inf, None, "a", 10**400, True, np.True_):
        with pytest.raises(Error, match="p must be between 0 and 1, found"):
            real_number("p", wrong, 0, 1, "between 0 and 1")


def test_strings() -> None:
    assert list(strings("stop", "a")) == ["a"] and list(strings("stop", ("a", "b"))) == ["a", "b"]
    assert list(strings("stop", [])) == []
    wrongs: list[Any] = [None, 3, b"a", ["a", 3], {"a"}]
    for wrong in wrongs:
        with pytest.raises(Error, match="stop must be a string or a list of strings, found"):
            strings("stop", wrong)


def test_flags() -> None:
    for value in (True, 1, np.bool_(1)):
        assert flag("on", value) is True
    for value in (False, 0, np.bool_(0)):
        assert flag("on", value) is False
    wrongs: list[Any] = ["true", "", None, 1.0, 2, -1, [], [True], np.ones(2, bool)]
    for wrong in wrongs:
        with pytest.raises(Error, match="on must be True or False, found"):
            flag("on", wrong)


def test_names_that_are_unknown() -> None:
    known, others = ["max_tokens", "top_k", "stop"], {"n_predict": "max_tokens"}
    require_known("option", ["stop", "top_k"], known, others)
    for names, expected in (
        (["n_predict"], "unknown option n_predict: use max_tokens. Choose from max_tokens, top_k, stop"),
        (["topk"], "unknown option topk: use top_k. Choose from"),
        (["heat"], "unknown option heat; choose from"),
        (["topk", "heat"], "unknown option topk, heat; choose from"),
        (["a\nb"], r"unknown option 'a\nb'; choose from"),
        ([str(n) for n in range(99)], "unknown option '0', '1', '2', '3', '4'; choose from"),
    ):
        with pytest.raises(Error) as caught:
            require_known("option", names, known, others)
        assert str(caught.value).startswith(expected)


def test_a_value_that_is_not_supported() -> None:
    require_supported("dtype", None, (None, "f32", "f16"))
    require_supported("dtype", "f16", (None, "f32", "f16"))
    with pytest.raises(UnsupportedError, match=r"^dtype 'f8' is not supported; choose from f32, f16$"):
        require_supported("dtype", "f8", (None, "f32", "f16"))
