"""Keywords that are enforced by others: what these allow is what JSON Schema says."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.errors import Error
from numballama.structured.lark import schema_grammar
from numballama.structured.schema import check_schema
from tests.helpers.structured import accepts, random_text

pytest.importorskip("llguidance")

A, B, AB = {"a": 1}, {"b": 1}, {"a": 1, "b": 1}
NUMBERS: dict[str, Any] = {"type": "object", "properties": {name: {"type": "integer"} for name in "abc"}}
VALUES: list[Any] = [
    *({}, A, B, AB, {"a": None}, {"a": True}, {"a": False}, {"a": "x", "b": 1}, {"a": [], "c": 2}),
    *(None, True, False, 0, 1, 2.5, -3, "", "x", "abc", [], [1], [1, 2], {"d": {}}),
]


def agrees(value: dict[str, Any], checked: dict[str, Any]) -> bool:
    old, new = jsonschema.Draft7Validator(value), jsonschema.Draft202012Validator(checked)
    modern = jsonschema.Draft202012Validator(value)
    return all((old.is_valid(each) and modern.is_valid(each)) == new.is_valid(each) for each in VALUES)


@pytest.mark.parametrize(
    "value",
    [
        {"not": {"required": ["a"]}},
        {"not": {"required": ["a", "b"]}},
        {"not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
        {"not": {"type": ["object", "null"]}},
        {"not": {"type": "object", "required": ["a"]}},
        {"not": {"properties": {"a": {"type": "null"}, "b": {"type": "number"}}}},
        {"not": {"enum": [None, True]}},
        {"not": {"const": False}},
        {"not": {"not": {"type": "array"}}},
        {"not": {"minItems": 1}},
        {"not": {"maxLength": 1}},
        {"not": {"minimum": 1}},
        {"not": {"type": "number", "exclusiveMaximum": 2}},
        {"items": {"not": {}}},
        {"dependencies": {"a": ["b"]}},
        {"dependencies": {"a": {"properties": {"b": {"type": "string"}}}, "c": False}},
        {"dependentRequired": {"a": ["b"], "b": ["a"]}},
        {"dependentSchemas": {"a": {"required": ["b"]}}},
        {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}},
        {"if": {"properties": {"a": {"const": True}}, "required": ["a"]}, "then": {"required": ["b"]}},
        {"if": {"type": "object"}, "else": {"type": "string"}},
        {"if": {"pattern": "x"}},
        {"then": {"type": "string"}, "else": {"type": "null"}},
        {"propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": {"type": "integer"}},
        {"propertyNames": {"type": "string", "enum": ["a", "c"]}, "required": ["a"]},
        {"propertyNames": {"const": "a"}},
        {"propertyNames": False},
        {"propertyNames": {"type": "string"}, "required": ["a"]},
        {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"oneOf": [{"required": ["a"]}, {"not": {"required": ["a"]}}, {"required": ["b"]}]},
    ],
    ids=json.dumps,
)
def test_the_same_values_are_allowed(value: dict[str, Any]) -> None:
    checked = json.loads(check_schema(value))
    assert not {"not", "if", "dependencies", "propertyNames", "oneOf"} & set(checked) and agrees(value, checked)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("not", {"not": {"pattern": "a"}}),
        ("not", {"not": {"type": "integer"}}),
        ("not", {"not": {"enum": ["a"]}}),
        ("not", {"not": {"const": 1}}),
        ("not", {"not": {"oneOf": [{"type": "null"}, {"type": "string"}]}}),
        ("not", {"not": {"properties": {"a": {"const": "x"}}}}),
        ("not", {"not": {"items": {"type": "null"}}}),
        ("not", {"$defs": {"a": {}}, "not": {"$ref": "#/$defs/a"}}),
        ("if", {"if": {"pattern": "a"}, "then": {"minLength": 3}}),
        ("dependencies", {"dependencies": [1]}),
        ("dependencies", {"dependencies": {"a": [1]}}),
        ("dependentRequired", {"dependentRequired": {"a": {}}}),
        ("propertyNames", {"propertyNames": {"pattern": "a"}, "properties": {"b": {}}}),
        ("propertyNames", {"propertyNames": {"maxLength": 3}}),
        ("propertyNames", {"propertyNames": {"type": "null"}}),
        ("uniqueItems", {"not": {"uniqueItems": True}}),
    ],
)
def test_what_no_other_keyword_says_is_refused(keyword: str, value: dict[str, Any]) -> None:
    with pytest.raises(Error, match=f"json_schema: '{keyword}' at #".replace("$", r"\$")):
        check_schema(value)


@pytest.mark.parametrize(
    ("more", "allowed"),
    [
        ({"not": {"required": ["a"]}}, [{}, B]),
        ({"not": {"required": ["a", "b"]}}, [{}, A, B]),
        ({"dependencies": {"a": ["b"]}}, [{}, B, AB]),
        ({"dependentRequired": {"a": ["b"], "b": ["a"]}}, [{}, AB]),
        ({"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"not": {"required": ["b"]}}}, [{}, AB]),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, [A, B]),
        ({"allOf": [{"propertyNames": {"pattern": "b"}}]}, [{}, B]),
    ],
)
def test_llguidance_follows_what_is_written(more: dict[str, Any], allowed: list[Any]) -> None:
    grammar = schema_grammar(check_schema(NUMBERS | {"additionalProperties": False} | more))
    for value in ({}, A, B, AB):
        assert accepts(grammar, json.dumps(value)) is (value in allowed), value


@pytest.mark.parametrize("keyword", ["if", "oneOf"])
def test_what_grows_with_each_level_has_a_limit(keyword: str) -> None:
    """In a second: twice as large for each of 60 levels would be too much for any machine."""
    value: dict[str, Any] = {"required": ["a"]}
    for _ in range(60):
        if keyword == "if":
            value = {"if": value, "then": {"required": ["b"]}, "else": {"required": ["c"]}}
        else:
            value = {"required": ["b"], "oneOf": [{"required": ["c"]}, value]}
    start = time.perf_counter()
    with pytest.raises(Error, match=rf"'{keyword}' at #.* makes the schema too large: more than 20,000"):
        check_schema(value)
    assert time.perf_counter() - start < 5


NAMES = st.sampled_from("abc")
LEAVES = st.one_of(
    st.lists(NAMES, min_size=1, max_size=2, unique=True).map(lambda names: {"required": names}),
    st.sampled_from(["null", "boolean", "object", "array", "number", "string"]).map(lambda name: {"type": name}),
    st.lists(st.sampled_from([None, True, False]), min_size=1, max_size=2, unique=True).map(lambda all: {"enum": all}),
    st.sampled_from([{"minItems": 1}, {"maxItems": 1}, {"minLength": 1}, {"maximum": 1}, {"minProperties": 1}]),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    pair = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        inner.map(lambda schema: {"not": schema}),
        st.sampled_from([{"pattern": "[ab]"}, {"enum": ["a", "c"]}]).map(lambda names: {"propertyNames": names}),
        pair.map(lambda schemas: {"anyOf": schemas}),
        pair.map(lambda schemas: {"allOf": schemas}),
        pair.map(lambda schemas: {"oneOf": schemas}),
        st.dictionaries(NAMES, inner, max_size=2).map(lambda schemas: {"properties": schemas}),
        st.dictionaries(NAMES, inner | st.lists(NAMES, max_size=2, unique=True), max_size=2).map(
            lambda found: {"dependencies": found}
        ),
        st.tuples(inner, inner, inner).map(lambda all: dict(zip(("if", "then", "else"), all, strict=True))),
        st.tuples(inner, inner).map(lambda both: {**both[0], **both[1]}),
    )


@settings(max_examples=300, deadline=None)
@given(value=st.recursive(LEAVES, _nested, max_leaves=6))
def test_any_schema_keeps_its_meaning(value: dict[str, Any]) -> None:
    try:
        checked = json.loads(check_schema(value))
    except Error:
        return
    old, new = jsonschema.Draft7Validator(value), jsonschema.Draft7Validator(checked)
    assert [old.is_valid(each) for each in VALUES] == [new.is_valid(each) for each in VALUES]


@settings(max_examples=60, deadline=None)
@given(value=st.recursive(LEAVES, _nested, max_leaves=4), seed=st.integers(0, 10**6))
def test_every_text_is_valid(value: dict[str, Any], seed: int) -> None:
    try:
        text = random_text(schema_grammar(check_schema(value)), seed)
    except (Error, AssertionError):  # llguidance finds that it allows nothing, or cannot tell options apart
        return
    if text is not None:
        jsonschema.Draft7Validator(value).validate(json.loads(text))
