"""A schema is enforced as a whole, or refused with the name and the place of what is not."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.errors import Error
from numballama.structured import schema
from numballama.structured.lark import schema_grammar
from numballama.structured.schema import check_schema
from tests.helpers.structured import accepts, random_text

pytest.importorskip("llguidance")

UNENFORCED = {
    "uniqueItems": True, "contains": {}, "minContains": 1, "maxContains": 1,
    "unevaluatedItems": False, "unevaluatedProperties": False, "$dynamicRef": "#a", "$dynamicAnchor": "a",
    "$recursiveRef": "#", "$recursiveAnchor": True, "$vocabulary": {}, "contentEncoding": "base64",
    "contentMediaType": "text/html", "contentSchema": {}, "nullable": True, "extends": {}, "disallow": "string",
    "divisibleBy": 2, "x-guidance": {"lenient": True},
}  # fmt: skip


@pytest.mark.parametrize("keyword", UNENFORCED)
def test_a_keyword_that_is_not_enforced_is_refused_by_name(keyword: str) -> None:
    """llama.cpp #19051, sglang #37707."""
    inner = {"type": "string", keyword: UNENFORCED[keyword]}
    for value, place in ((inner, "#"), ({"items": {"properties": {"a b": inner}}}, "#/items/properties/a b")):
        with pytest.raises(Error) as found:
            check_schema(value)
        assert repr(keyword) in str(found.value) and f"at {place} " in str(found.value)


def test_the_list_above_is_complete() -> None:
    assert set(UNENFORCED) == schema.UNENFORCED


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "string", "maxLenght": 3}, "'maxLenght' at # is no keyword .* 'maxLength'"),
        ({"type": "text"}, "'type' at # must be one of"),
        ({"type": []}, "'type' at #"),
        ({"type": "string", "format": "idn-email"}, "'format' at # 'idn-email' is not enforced"),
        ({"type": "string", "format": "unknown"}, "'format' at # 'unknown' is not enforced"),
        ({"$ref": "https://example.com/s.json"}, r"'\$ref' at # must point into the schema"),
        ({"$ref": "#/$defs/gone"}, r"'\$ref' at # points to '#/\$defs/gone', where there is no schema"),
        ({"enum": [{"not": {}}], "anyOf": [{"$ref": "#/enum/0"}]}, "where there is no schema"),
        ({"$defs": {"a~b": {}}, "$ref": "#/$defs/a~0b"}, "must not contain ~ or %"),
        ({"properties": {"a": {"$id": "b"}, "c": {"$ref": "#"}}}, r"'\$id' at #/properties/a is supported at the top"),
        ({"items": {"id": "b", "items": {"$ref": "#"}}}, "'id' at #/items is supported at the top only"),
        ({"type": "object", "minProperties": 2}, "'minProperties' at # can be enforced up to"),
        ({"minimum": 2**53 + 1}, "'minimum' at # is larger than 2"),
        ({"maximum": float("inf")}, "'maximum' at # must be finite"),
        ({"multipleOf": 0}, "'multipleOf' at # must be greater than 0"),
        ({"minLength": -1}, "'minLength' at # must be a whole number"),
        ({"minLength": True}, "'minLength' at # must be a whole number"),
        ({"required": "a"}, "'required' at # must be a list of names"),
        ({"required": True}, "'required' at # must be a list of names"),
        ({"enum": []}, "'enum' at # must be a list of values"),
        ({"const": {1, 2}}, "'const' at # must be a JSON value"),
        ({"const": "\x01"}, "'const' at # has the character U[+]0001"),
        ({"properties": {"\ud800": {}}}, "'properties' at # has the character U[+]D800"),
        ({"anyOf": []}, "'anyOf' at # must be a list of schemas"),
        ({"properties": []}, "'properties' at # must be an object of schemas"),
        ({"exclusiveMinimum": True}, "'exclusiveMinimum' at # is true without 'minimum'"),
        ({"items": [{}], "prefixItems": [{}]}, "'items' at # is a list beside prefixItems"),
        ({"pattern": "^[a&&b]$"}, "'pattern' at # has && in a character class"),
        ({"patternProperties": {"[[a]": {}}}, r"'patternProperties' at # has \[ in a character class"),
        (False, "json_schema is false"),
        ({"items": 3}, "a schema must be an object, found 3 at #/items"),
        ({3: 4}, "a keyword must be a string"),
        ("{'a': 1}", "json_schema is not JSON"),
        ('{"const": NaN}', "json_schema is not JSON: NaN"),
        ('{"a"' * 3, "json_schema is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"items":' * 70 + "{}" + "}" * 70, "nested too deeply"),
        ('{"const":' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        (" " * (1 << 18) + "{}", "the limit is 262,144"),
        ({"enum": ["x" * 1000] * 300}, "the limit is 262,144"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(value: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        check_schema(value)


def test_a_value_in_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["items"] = loop
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, {"const": deep}, {"type": deep}):
        with pytest.raises(Error, match="nested too deeply"):
            check_schema(value)
    while deep:
        deep = deep.pop()


def test_annotations_are_left_out() -> None:
    value = {
        "$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com", "title": "T", "x-order": 1,
        "markdownDescription": "d", "type": "object", "uniqueItems": False, "discriminator": {"propertyName": "a"},
        "properties": {"title": {"type": "string", "title": "Title", "default": "a", "examples": ["b"]}},
    }  # fmt: skip
    assert json.loads(check_schema(value)) == {"type": "object", "properties": {"title": {"type": "string"}}}


def test_names_of_schemas_matter_to_references_only() -> None:
    """Draft 4's `id` and `$id` say what a $ref below them is relative to; words with an underscore are taken out."""
    inner = {"type": "string", "id": "b", "_format": "date", "_uniqueItems": True}
    value = {"id": "https://example.com/a", "items": inner}
    assert json.loads(check_schema(value)) == {"items": {"type": "string"}}
    value = {"id": "a", "$ref": "#/$defs/b", "$defs": {"b": {"id": "#b", "type": "null"}}}
    assert json.loads(check_schema(value)) == {"$ref": "#/$defs/b", "$defs": {"b": {"type": "null"}}}


def test_a_reference_may_point_to_any_schema() -> None:
    """Many schemas keep some in places of their own; those in what is rewritten stand elsewhere."""
    value = {
        "parts": {"id": {"type": "integer"}, "list": {"type": "array", "items": {"$ref": "#/parts/id"}}},
        "$defs": {"moved-0": {"type": "null"}}, "dependencies": {"a": {"required": ["b"]}},
        "properties": {
            "a": {"$ref": "#/parts/list"}, "b": {"$ref": "#/parts/list/items"}, "c": {"$ref": "#/$defs/moved-0"},
            "d": {"$ref": "#/dependencies/a"}, "e": {"const": {"$ref": "#/parts/id"}},
        },
        "type": "object",
    }  # fmt: skip
    assert allows(value, '{"a":[1,2],"b":3,"c":null}') and allows(value, '{"e":{"$ref":"#/parts/id"}}')
    for text in ('{"a":["x"]', '{"a":1', '{"b":"x"', '{"c":1', '{"a":[]}', '{"d":{}}'):
        assert not allows(value, text), text
    for ref in ("#/parts/none", "#/examples/x", "#/properties/e/const", "#/$schema", "#/type"):
        with pytest.raises(Error, match="there is no schema"):
            check_schema(value | {"examples": {"x": {}}, "$schema": "x", "items": {"$ref": ref}})


def test_any_object_and_any_value() -> None:
    assert check_schema("json_object") == check_schema({"type": "object"}) == check_schema('{"type": "object"}')
    assert check_schema({}) == check_schema("true") == "{}"


def allows(value: Any, text: str) -> bool:
    return accepts(schema_grammar(check_schema(value)), text)


def test_old_forms_mean_the_same() -> None:
    pair = {"type": "array", "items": [{"type": "integer"}], "additionalItems": False}
    assert allows(pair, "[1]") and not allows(pair, "[1,2]") and not allows(pair, '["a"]')
    beside = {"type": "array", "prefixItems": [{"type": "integer"}], "additionalItems": False}
    assert allows(beside, '[1,"a"]') and not allows(beside, '["a"]')
    above = {"type": "integer", "minimum": 3, "exclusiveMinimum": True}
    assert allows(above, "4") and not allows(above, "3")


def test_properties_of_a_closed_object_are_counted() -> None:
    value = {"type": "object", "properties": {name: {"const": 1} for name in "abc"}, "additionalProperties": False}
    two = value | {"required": ["a"], "minProperties": 2}
    assert allows(two, '{"a":1,"b":1}') and allows(two, '{"a":1,"c":1}') and not allows(two, '{"a":1}')
    for more in ({"patternProperties": {"x": {}}}, {"additionalProperties": True}):
        with pytest.raises(Error, match="'minProperties' at # can be enforced up to 1 with 1 required"):
            check_schema(two | more)
    with pytest.raises(Error, match="'minProperties' at # can be enforced up to 2 with 1 required"):
        check_schema(two | {"minProperties": 3})


def test_formats_of_numbers_and_of_old_drafts() -> None:
    """OpenAPI's, which generated schemas have."""
    small = {"type": "integer", "format": "int32", "minimum": 0}
    assert allows(small, "2147483647") and not allows(small, "2147483648") and not allows(small, "-1")
    assert (
        allows({"format": "int32"}, '"x"')
        and allows({"format": "int32"}, "-3")
        and not allows({"format": "int32"}, "1.5")
    )
    large = {"type": "integer", "format": "int64"}
    assert allows(large, str(2**53)) and not allows(large, str(2**54))
    for name in ("float", "double"):
        assert allows({"type": "number", "format": name}, "1.5") and not allows(
            {"type": "number", "format": name}, '"1"'
        )
    assert allows({"type": "string", "format": "password"}, '"x"')
    assert allows({"type": "string", "format": "ip-address"}, '"1.2.3.4"')
    assert not allows({"type": "string", "format": "host-name"}, '"a b"')
    with pytest.raises(Error, match="'format' at #/items 'byte' is not enforced; supported are date-time"):
        check_schema({"items": {"type": "string", "format": "byte"}})


def test_a_name_has_one_spelling() -> None:
    """llguidance takes "\\u0061" for a name other than "a", unless it is told that there are no such escapes."""
    value = {"type": "object", "properties": {"a": {"type": "integer"}, "b\n": {"const": 1}}}
    assert allows(value, '{"a":1,"b\\n":1,"c":"x"}')
    for text in ('{"\\u0061":"x"}', '{"b\\u000a":2}', '{"b\\n":2}', '{"a":1,"a":2}'):
        assert not allows(value, text)


def test_white_space_is_limited() -> None:
    """llguidance #265."""
    for text in ('{"a": 1, "b": [1, 2]}', '{"a":1,"b":[1,2]}'):
        assert allows("json_object", text)
    for text in ('{ "a": 1}', '{"a":  1}', '{"a" :1}', ' {"a":1}', '{"a":1} ', '{"a":\n1}'):
        assert not allows("json_object", text)


NAMES = st.sampled_from(["a", "b", "c d", "é", 'q"'])
BOUNDS = st.tuples(st.integers(-30, 30), st.integers(0, 60)).map(lambda p: {"minimum": p[0], "maximum": p[0] + p[1]})
LENGTHS = st.tuples(st.integers(0, 3), st.integers(0, 5)).map(lambda p: {"minLength": p[0], "maxLength": p[0] + p[1]})
PATTERNS = st.sampled_from(["^a+b?$", "x", "^[^a-c]{2,4}$", r"\d{3}", "^(foo|bar)", "(a|b)c$", r"^\w+$", "^.{3}$"])
KEYS = st.sampled_from(["x", "^(foo|bar)", "[0-9]{3}"])
"""Where Python's classes and ends of lines are those of JSON Schema."""
LEAVES = st.one_of(
    BOUNDS.map(lambda bounds: {"type": "integer", **bounds}),
    BOUNDS.map(lambda bounds: {"type": "number", **bounds}),
    st.sampled_from([2, 3, 0.5]).map(lambda step: {"type": "number", "multipleOf": step}),
    LENGTHS.map(lambda lengths: {"type": "string", **lengths}),
    PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(schema.FORMATS).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.sampled_from([1, 2.5, "a", "b\n", None, True, "é", -3]), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"type": "boolean"}, {"type": ["null", "integer"]}, {"const": {"a": [1, "x"]}}]),
)


def _object(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def make(properties: dict[str, Any], required: set[str], additional: Any) -> dict[str, Any]:
        names = sorted(required & set(properties))
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": additional}

    additional = st.sampled_from([False, True]) | inner
    return st.builds(make, st.dictionaries(NAMES, inner, max_size=3), st.sets(NAMES), additional)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    limits = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return st.one_of(
        _object(inner),
        st.builds(
            lambda items, n: {"type": "array", "items": items, "minItems": n[0], "maxItems": sum(n)}, inner, limits
        ),
        st.builds(lambda first, rest: {"type": "array", "prefixItems": [first], "items": rest}, inner, inner),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
        st.builds(lambda one, two: {"allOf": [one, two]}, _object(inner), _object(inner)),
        st.builds(lambda name, value: {"type": "object", "patternProperties": {name: value}}, KEYS, inner),
        st.builds(lambda value: {"type": "object", "additionalProperties": value, "minProperties": 1}, inner),
        st.builds(lambda value: {"$defs": {"d": value}, "type": "array", "items": {"$ref": "#/$defs/d"}}, inner).map(
            lambda found: found if "$ref" not in json.dumps(found["$defs"]) else {}
        ),
    )


@settings(max_examples=60, deadline=None)
@given(value=st.recursive(LEAVES, _nested, max_leaves=5), seed=st.integers(0, 10**6))
def test_every_text_is_valid(value: dict[str, Any], seed: int) -> None:
    if "$ref" in json.dumps(value) and "$defs" not in value:
        return  # its $ref would point elsewhere
    if (text := random_text(schema_grammar(check_schema(value)), seed)) is not None:
        jsonschema.Draft202012Validator(value).validate(json.loads(text))


def test_a_schema_with_thousands_of_moved_refs_takes_no_time_that_is_a_square() -> None:
    names = [f"m{number}" for number in range(4500)]
    started = time.monotonic()
    found = json.loads(check_schema({"x": dict.fromkeys(names, True), "anyOf": [{"$ref": f"#/x/{n}"} for n in names]}))
    assert time.monotonic() - started < 1.5
    assert len(found["$defs"]) == 4500 and found["anyOf"][7] == {"$ref": "#/$defs/moved-7"}
