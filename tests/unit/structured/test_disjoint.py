"""`oneOf` of options that cannot hold at once is `anyOf`; of others it stays what it is."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.structured.disjoint import Options
from numballama.structured.lark import schema_grammar
from numballama.structured.schema import check_schema
from tests.helpers.structured import accepts, random_text

pytest.importorskip("llguidance")

X, Y = {"properties": {"x": {}}, "required": ["x"]}, {"properties": {"y": {}}, "required": ["y"]}
OBJECT, CLOSED = {"type": "object"}, {"type": "object", "additionalProperties": False}
DEFS = {
    "text": {"type": "string"}, "number": {"allOf": [{"type": "integer"}]}, "loop": {"$ref": "#/$defs/loop"},
    "a": {**OBJECT, "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
    "b": {**OBJECT, "properties": {"kind": {"$ref": "#/$defs/word"}}}, "word": {"enum": ["b", "c"]},
    "any": {**OBJECT, "properties": {"kind": {"type": "string"}}, "required": ["kind"]},
}  # fmt: skip


def refs(*names: str) -> list[dict[str, str]]:
    return [{"$ref": f"#/$defs/{name}"} for name in names]


def is_any_of(*options: Any, **beside: Any) -> bool:
    checked = json.loads(check_schema({"$defs": DEFS, "oneOf": list(options), **beside}))
    assert ("oneOf" in checked) is not ("allOf" in checked)
    return "oneOf" not in checked


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "null"}, *refs("text")],
        refs("text", "number"),
        refs("a", "b"),
        refs("a", "b", "text"),
        [CLOSED | X, CLOSED | Y],
        [CLOSED | X, Y],
        [CLOSED, OBJECT | X],
        [{"enum": [1, "a"]}, {"const": 2}],
        [False, {}],
        [OBJECT | X, OBJECT | Y | {"properties": {"y": {}, "x": False}}],
        [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 4}],
        [{"type": "integer", "maximum": 4}, {"type": "number", "minimum": 4.5}],
        [{"type": "number", "exclusiveMaximum": 4}, {"type": "number", "minimum": 4}],
        [{"type": "number", "maximum": 4}, {"type": "number", "minimum": 4, "exclusiveMinimum": True}],
        [{"type": "string", "format": name} for name in ("ipv4", "ipv6", "uuid", "date", "time", "date-time", "email")],
        [{"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2}],
        [{"type": "array", "items": {"type": "integer"}, "minItems": 1}, {"type": "array", "items": refs("text")[0]}],
        [{"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "minItems": 1},
         {"type": "array", "items": {"type": "string"}, "minItems": 1}],
        [OBJECT | {"properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]},
         OBJECT | {"properties": {"n": {"type": "integer", "maximum": 0}}, "required": ["n"]}],
        [OBJECT | {"properties": {"x": OBJECT | {"properties": {"y": {"$ref": "#/$defs/text"}}, "required": ["y"]}}},
         OBJECT | {"properties": {"x": OBJECT | {"properties": {"y": {"$ref": "#/$defs/number"}}}}, "required": ["x"]}],
    ],
    ids=json.dumps,
)  # fmt: skip
def test_options_that_cannot_hold_at_once(options: list[Any]) -> None:
    assert is_any_of(*options)


@pytest.mark.parametrize(
    "options",
    [
        [X, Y],
        [OBJECT | X, OBJECT | Y],
        refs("a", "any"),
        refs("b", "any"),
        refs("text", "text"),
        refs("loop", "text"),
        [{"type": "integer"}, {"type": "number"}],
        [{"enum": [1, 2]}, {"enum": [2.0, 3]}],
        [CLOSED, CLOSED],
        [{"additionalProperties": False} | X, {"additionalProperties": False} | Y],  # any text fits both
        [CLOSED | X | {"patternProperties": {"y": {}}}, OBJECT | Y],
        [{"type": "string", "pattern": "a"}, {"type": "string", "pattern": "b"}],
        [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 3}],
        [{"maxLength": 3}, {"minLength": 4}],  # any number fits both
        [{"type": "number", "maximum": 4}, {"type": "number", "minimum": 4}],
        [{"type": "string", "format": "hostname"}, {"type": "string", "format": "ipv4"}],
        [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv4"}],
        [{"type": "array", "items": {"type": "integer"}}, {"type": "array", "items": {"type": "string"}}],  # []
        [{"$ref": "#/$defs/word", "type": "string"}, {"$ref": "#/$defs/word", "type": "null"}],  # draft 7 sees no type
        [{"type": "null"}] * 65,
    ],
    ids=lambda options: json.dumps(options)[:60],
)
def test_options_that_may_hold_at_once(options: list[Any]) -> None:
    assert not is_any_of(*options)


def test_what_stands_beside_counts() -> None:
    options = [{"additionalProperties": False} | X, {"additionalProperties": False} | Y]
    assert is_any_of(*options, **OBJECT) and not is_any_of(*options)
    checked = check_schema({"$defs": DEFS, "oneOf": refs("a", "b"), "anyOf": [{"required": ["kind"]}]})
    assert accepts(schema_grammar(checked), '{"kind":"c"}') and not accepts(schema_grammar(checked), "{}")


def test_the_comparisons_of_a_schema_have_a_limit() -> None:
    """A few seconds at most: each level has each property of the next one, by $ref."""
    names = [f"p{number}" for number in range(400)]
    levels = {
        f"l{level}": {
            **OBJECT,
            "properties": {name: {"$ref": f"#/$defs/l{level + 1}"} for name in names},
            "required": names,
        }
        for level in range(3)
    }
    schema = {"$defs": {**levels, "l3": {}}, "oneOf": [{"$ref": "#/$defs/l0"}] * 64}
    start = time.perf_counter()
    assert "oneOf" in json.loads(check_schema(schema))
    assert time.perf_counter() - start < 5


LEAVES = st.sampled_from(
    [
        {"type": "null"},
        {"type": "string"},
        {"type": "integer"},
        {"const": "a"},
        {"enum": ["a", 1]},
        {"type": "string", "maxLength": 1},
        {"type": "string", "minLength": 2},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "ipv4"},
        {"type": "integer", "maximum": 1},
        {"type": "number", "exclusiveMinimum": 1},
        {"type": "array", "items": {"type": "null"}, "minItems": 1},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        {"type": "array", "maxItems": 0},
        *refs("text", "word", "a", "b"),
    ]
)
PROPERTIES = st.dictionaries(st.sampled_from("xyz"), LEAVES, max_size=2)
OBJECTS = st.builds(
    lambda properties, required, closed, typed: {
        "properties": properties,
        "required": sorted(required & set(properties)),
        **({"additionalProperties": False} if closed else {}),
        **(OBJECT if typed else {}),
    },
    PROPERTIES, st.sets(st.sampled_from("xyz")), st.booleans(), st.booleans(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(options=st.lists(LEAVES | OBJECTS, min_size=2, max_size=3), typed=st.booleans(), seed=st.integers(0, 10**6))
def test_every_text_fits_one_option(options: list[Any], typed: bool, seed: int) -> None:
    schema = {"$defs": DEFS, "oneOf": options, **(OBJECT if typed else {})}
    try:
        text = random_text(schema_grammar(check_schema(schema)), seed, 60)
    except AssertionError:  # llguidance knows no better, or nothing fits
        return
    if text is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_values_inside_constants_count_for_the_limit() -> None:
    """64 options that share a constant with many values: it was written 4,000 times, which took a minute."""
    shared = {"enum": [list(range(20_000))]}
    options = [
        {"type": "object", "properties": {"a": shared, "z": {"const": number}}, "required": ["a", "z"]}
        for number in range(64)
    ]
    started = time.monotonic()
    assert not Options({}).never_two(options, {})
    assert time.monotonic() - started < 5
    assert Options({}).never_two(options[:2], {})
