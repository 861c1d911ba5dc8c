"""Calls that Numba has typed once are not typed again, by this package's compilations alone."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import numba
import pytest
from numba import types
from numba.core.types.functions import BaseFunction

from numballama.host import call_types


def polynomial(a: Any, b: Any) -> Any:
    return a * b + a * b * 2 + (a + b) * (a - b)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The multiplications that Numba types from now on. Nothing is known yet."""
    find: Any = BaseFunction.get_call_type
    asked: list[Any] = []

    def get_call_type(self: Any, context: Any, args: Any, kws: Any) -> Any:
        if self.typing_key is operator.mul:
            asked.append(tuple(args))
        return find(self, context, args, kws)

    monkeypatch.setattr(call_types, "_found", {})
    monkeypatch.setattr(BaseFunction, "get_call_type", get_call_type)
    return asked


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit((types.float64, types.float64))(function)  # type: ignore[no-any-return]


def test_an_operator_is_typed_once(typed: list[Any]) -> None:
    with call_types.remembered():
        function = compiled(polynomial)
    once = len(typed)
    assert function(3.0, 2.0) == polynomial(3.0, 2.0)
    with call_types.remembered():
        compiled(lambda a, b: a * b)
    assert 0 < once == len(typed), "float64 * float64 is known"
    compiled(polynomial)
    assert len(typed) > once, "the user's own functions are compiled as ever"


def test_another_thread_is_left_alone(typed: list[Any]) -> None:
    with call_types.remembered():
        compiled(polynomial)
        once = len(typed)
        thread = threading.Thread(target=compiled, args=(polynomial,))
        thread.start()
        thread.join()
    assert len(typed) > once
    assert not getattr(call_types._thread, "remembers", False)


def test_types_tell_calls_apart() -> None:
    """Also literal ones, signs and widths: each result has the type that Numba gives it without this."""
    numbers = [types.int8, types.uint64, types.float32, types.boolean]
    for first in numbers:
        for second in numbers:
            for function in (lambda a, b: a * 3 - b, lambda a, b: min(a, b)):
                plain = numba.njit((first, second))(function).nopython_signatures[0].return_type
                with call_types.remembered():
                    own = numba.njit((first, second))(function).nopython_signatures[0].return_type
                assert own == plain, (first, second)


def test_a_call_that_does_not_exist_is_refused_each_time() -> None:
    for _ in range(2):
        with call_types.remembered(), pytest.raises(numba.TypingError):
            numba.njit((types.float64, types.unicode_type))(polynomial)


def largest(a: Any, b: Any) -> Any:
    return max(a, b)


def test_an_exact_function_calls_nothing_that_was_compiled_for_a_fast_one() -> None:
    """`max` is compiled in place of the call, with the caller's options."""
    kinds = (types.float32, types.float32)
    with call_types.remembered():
        fast = numba.njit(kinds, fastmath={"reassoc", "contract", "nsz"})(largest)
        exact = numba.njit(kinds)(largest)
    assert "nsz" in next(iter(fast.inspect_llvm().values()))
    assert "nsz" not in next(iter(exact.inspect_llvm().values()))
