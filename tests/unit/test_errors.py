"""Errors: one base, and messages that say where, what was expected and what was found."""

from __future__ import annotations

import copy
import pickle

import pytest

import numballama
from numballama.errors import ContextError, DeviceError, Error, FormatError, Interrupted, UnsupportedError


def test_all_have_one_base_and_are_public() -> None:
    for kind in (FormatError, UnsupportedError, DeviceError, ContextError):
        assert issubclass(kind, Error) and getattr(numballama, kind.__name__) is kind
    assert numballama.Error is Error and issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception), "`except Exception` does not swallow Ctrl-C"


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({}, "bad"),
        ({"path": "a.bin"}, "a.bin: bad"),
        ({"path": "a.bin", "where": 1234567}, "a.bin: bad; at byte 1,234,567"),
        ({"where": "wq", "expected": (2, 3), "found": (3, 2)}, "bad; at wq; expected (2, 3); found (3, 2)"),
        ({"where": 0, "found": 0}, "bad; at byte 0; found 0"),
    ],
)
def test_message_of_a_format_error(details: dict[str, object], message: str) -> None:
    error = FormatError("bad", **details)  # type: ignore[arg-type]
    assert str(error) == message
    assert all(getattr(error, name) == details.get(name) for name in ("path", "where", "expected", "found"))


def test_an_interrupt_keeps_the_text() -> None:
    error = Interrupted("half a", ["the first"])
    for each in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (each.text, each.finished, str(each)) == ("half a", ["the first"], "interrupted after 6 characters")
