"""Where a JSON value ends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.server.tools.scanner import ValueScanner
from tests.helpers.tool_texts import values


def scan(text: str, pieces: int, forbidden: str = "<") -> tuple[int, bool, bool]:
    """(end, done, broken) of a text that is fed in pieces."""
    scanner = ValueScanner(forbidden)
    for start in range(0, len(text), pieces):
        stop = min(start + pieces, len(text))
        end = scanner.feed(text, start, stop)
        if end < stop or scanner.done or scanner.broken:
            return end, scanner.done, scanner.broken
    return len(text), scanner.done, scanner.broken


@given(values, st.integers(1, 5), st.sampled_from(["}", ",", " ", "]"]))
def test_values_end_where_json_ends(value: object, pieces: int, behind: str) -> None:
    for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        assert scan(text + behind + "x", pieces) == (len(text), True, False)


@pytest.mark.parametrize(
    ("text", "end", "done", "broken"),
    [
        ('{"a": NaN,}]', 11, True, False),
        ('{"a": [1}', 8, False, True),
        ('{"a": 1<', 7, False, True),
        ('{"a": "<', 8, False, False),
        ("<", 0, False, True),
        ("}", 0, False, True),
        ("12.5e-3", 7, False, False),
        ("true}", 4, True, False),
        ("[" * 65, 64, False, True),
    ],
)
def test_what_breaks_a_value(text: str, end: int, done: bool, broken: bool) -> None:
    assert all(scan(text, pieces) == (end, done, broken) for pieces in (1, 2, 100))
