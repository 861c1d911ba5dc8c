"""Custom tools: the input is read from the arguments' JSON, whatever pieces it comes in."""

from __future__ import annotations

import json
from itertools import pairwise

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.server.tools.custom import CustomCalls, InputText, closes_too_much, custom_parameters
from numballama.server.tools.events import CallArguments, CallStart, Content, Event


def read(pieces: list[str]) -> str:
    reader = InputText()
    return "".join([*map(reader.feed, pieces), reader.finish()])


@given(st.text() | st.text('\\"\n\u00e9\U0001f600u0dD83'), st.booleans(), st.lists(st.integers(0, 400), max_size=8))
def test_any_pieces_give_the_input(text: str, ascii_only: bool, cuts: list[int]) -> None:
    text = text.encode(errors="replace").decode()
    whole = json.dumps({"input": text}, ensure_ascii=ascii_only)
    ends = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    assert read([whole[at:end] for at, end in pairwise(ends)]) == text


def test_the_input_comes_as_early_as_possible() -> None:
    reader = InputText()
    pieces = ['{"in', 'put": "a', "b\\", "n\\ud83d", "\\ude00\\ud83d", 'x"', "} more"]
    assert [reader.feed(piece) for piece in pieces] == ["", "a", "b", "\n", "\U0001f600", "\ufffdx", ""]
    assert reader.finish() == ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{"input": "cut', "cut"),
        ('{"input": "cut\\u00', "cut"),
        ('{"input" :', ""),
        ('{ "inp', ""),
        ('{"city": "Oslo"}', '{"city": "Oslo"}'),
        ('{"note": 1, "input": "late"}', "late"),
        ('{"input": 7}', '{"input": 7}'),
        ("[1]", "[1]"),
        ("no JSON", "no JSON"),
        ('{"input": "\\q\\uZZ"}', "q"),
        ("", ""),
    ],
)
def test_what_a_model_may_write_instead(arguments: str, found: str) -> None:
    assert read([arguments]) == read(list(arguments)) == found


def test_a_pattern_is_of_the_whole_input() -> None:
    validate = jsonschema.Draft202012Validator(custom_parameters("a|bc")).is_valid
    assert validate({"input": "a"}) and validate({"input": "bc"})
    assert not validate({"input": "ac"}) and not validate({"input": "a", "b": 1}) and not validate({})
    assert jsonschema.Draft202012Validator(custom_parameters(None)).is_valid({"input": "anything"})


def test_calls_of_custom_tools_among_others() -> None:
    calls = CustomCalls({"run"})
    events: list[Event] = [
        Content("a"), CallStart(0, "c0", "run"), CallArguments(0, '{"input": "l'), CallArguments(0, 's"}'),
        CallStart(1, "c1", "look"), CallArguments(1, '{"x": 1}'), CallStart(2, "c2", "run"), CallArguments(2, '{"y"'),
    ]  # fmt: skip
    found = [*calls.convert(events, False), *calls.convert([], True)]
    assert found == [
        Content("a"), CallStart(0, "c0", "run", custom=True), CallArguments(0, "l", True), CallArguments(0, "s", True),
        CallStart(1, "c1", "look"), CallArguments(1, '{"x": 1}'), CallStart(2, "c2", "run", custom=True),
        CallArguments(2, '{"y"', True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (")", True),
        ("a)|(?:b", True),
        (r"(\))", False),
        ("([)])", False),
        ("[])]", False),
        (r"[^]\])]", False),
        ("((a)b)", False),
        ("(", False),
        (r"\\)", True),
        ("[a])", True),
        ("[)", True),
    ],
)
def test_groups_that_are_not_open(pattern: str, found: bool) -> None:
    assert closes_too_much(pattern) is found
