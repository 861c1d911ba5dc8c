"""Expressions of schemas. Where a class has all control characters, llguidance allows each character with an escape."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.structured.checker import _try_out
from numballama.structured.lark import schema_grammar
from numballama.structured.patterns import UNWRITTEN, without_control
from numballama.structured.schema import check_schema
from tests.helpers.structured import accepts, byte_vocabulary, random_text

pytest.importorskip("llguidance")

CHARACTERS = [*map(chr, range(32, 127)), *"\b\f\n\r\té🙂"]


def allows(schema: dict[str, Any], value: Any) -> bool:
    return accepts(schema_grammar(check_schema(schema)), json.dumps(value, ensure_ascii=False))


@pytest.mark.parametrize(
    "pattern",
    [
        '^[^"]$', r"^[^\\]$", r'^[^"\\]$', '^[^a"]$', r'^[^"\n]$', '^[^ -~]$', "^[^A-z]$", r"^[^\]\"]$", '^[^-"]$',
        '^[^"-]$', r"^[\x00-!#-~]$", r"^[\x00- ]$", r"^[a\x00-\x1f]$", "^[\x00-!]$", r"^[\x00-!-]$", r"^[\n-]$",
        r"^[\n\-]$", r"^[!-/]$", '^(?:[^"]|x)$', r'^(?:[^"]|\x01)$', '^(?:[^"]|\x01)$', r'^(?:[^"]|\u0001)$',
        r'^(?:[^"]|[\x01])$', r"^\D$", r"^[\s\S]$", r"^[^\S]$", "^[a-z]$", r"^\[[^\]]*$", "^.$",
    ],
)  # fmt: skip
def test_a_class_has_the_characters_that_it_names(pattern: str) -> None:
    grammar = schema_grammar(check_schema({"type": "string", "pattern": pattern}))
    for character in CHARACTERS:
        expected = re.search(pattern, character, re.ASCII) is not None
        assert accepts(grammar, json.dumps(character, ensure_ascii=False)) is expected, character


@pytest.mark.parametrize("pattern", [r"^\P{P}$", r"^\PP$", r"^[^\p{P}]$", r"^[\P{P}]$"])
def test_a_class_of_unicode(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert allows(schema, "a") and allows(schema, "\n")
    assert not allows(schema, '"') and not allows(schema, "\\")


def test_names_have_the_characters_of_their_pattern() -> None:
    schema = {"type": "object", "patternProperties": {'^[^"]+$': {"const": 1}}, "additionalProperties": False}
    assert allows(schema, {"a": 1}) and not allows(schema, {'a"': 1})
    schema = {"type": "object", "patternProperties": {'^a[^"]*$': {"const": 1}}, "additionalProperties": {"const": 2}}
    assert allows(schema, {'a"': 2}) and not allows(schema, {'a"': 1}) and not allows(schema, {"ab": 2})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^[a-z]+[.]$", "^[a-z]+[.]$"),
        (r"\[^a\]", r"\[^a\]"),
        ('[^"]', rf'[^{UNWRITTEN}"]'),
        ("[^-a]", rf"[^{UNWRITTEN}\-a]"),
        (r"[\n-]x", rf"[\n\-&&[^{UNWRITTEN}]]x"),
        (r"[\w\-]", r"[\w\-]"),
        (r"\pL\P{L}", rf"[\pL&&[^{UNWRITTEN}]][\P{{L}}&&[^{UNWRITTEN}]]"),
        (r"\x09\x61\u{7f}?", r"\x09\x61[^\s\S]?"),
        ("[a", "[a"),
        ("a\\", "a\\"),
    ],
)
def test_what_is_written(pattern: str, expected: str) -> None:
    assert without_control(pattern) == expected


PARTS = st.sampled_from(
    ['"', r"\\", "a", "n", "^", r"\n", r"\x00-!", "#-~", r"\]", ",", " -/", r"\s", r"\S", r"\d", r"\D", "é"]
)
CLASSES = st.builds(
    lambda negated, parts: f"[{'^' if negated else ''}z{''.join(parts)}]",
    st.booleans(),
    st.lists(PARTS, min_size=1, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(classes=st.lists(CLASSES, min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_every_text_fits_the_expression(classes: list[str], seed: int) -> None:
    schema = {"type": "string", "pattern": f"^(?:{'|'.join(classes)}){{1,4}}$"}
    try:
        text = random_text(schema_grammar(check_schema(schema)), seed)
    except AssertionError:  # a class without characters that JSON can hold
        return
    if text is not None and text.isascii():  # Python's \s and \d know more characters
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize(
    "control",
    ["\x02", "\x7f", r"\x02", r"\u0002", r"\U00000002", r"\x{2}", r"\x7F", r"\v", r"\a", "[\x7f]", r"[\x01\x02]"],
)
def test_a_character_that_is_never_written_is_not_left_out(control: str) -> None:
    """ "ab" would fit the grammar of `a\\x02b` otherwise, and the text of `\\x02` would have no end."""
    assert not allows({"type": "string", "pattern": f"^(?:a{control}b|c)$"}, "ab")
    assert allows({"type": "string", "pattern": f"^(?:a{control}b|c)$"}, "c")
    assert allows({"type": "string", "pattern": f"^a{control}?b$"}, "ab")
    grammar = schema_grammar(check_schema({"type": "string", "pattern": f"^{control}$"}))
    assert "Regex is empty" in _try_out(byte_vocabulary(), f'start: "x" {grammar[7:]}')
