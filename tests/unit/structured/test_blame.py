"""A schema that llguidance refuses: the error names keyword and place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from numballama.errors import Error
from numballama.structured.blame import place_of
from numballama.structured.checker import Checker, NotFollowedError
from numballama.structured.lark import schema_grammar
from numballama.structured.schema import check_schema

pytest.importorskip("llguidance")

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "'oneOf' at PLACE cannot be followed: more than one of"),
    ({"type": "string", "pattern": "a(?!b)"}, "'pattern' at PLACE cannot be followed: .*look-around"),
    ({"patternProperties": {"^a": {}, "a$": {}}}, "'patternProperties' at PLACE .*not disjoint"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "'maxProperties' at PLACE .*are required"),
    ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, "'minProperties' at PLACE .*are required"),
    ({"type": "number", "multipleOf": 1e-300}, "'multipleOf' at PLACE .*too many digits"),
    ({"allOf": [{"patternProperties": {"^a": {}}}, {"patternProperties": {"a$": {}}}]}, "'allOf' at PLACE "),
]


def refused(checker: Checker, value: object) -> Error:
    schema = check_schema(value)
    with pytest.raises(NotFollowedError) as found:
        checker.check(schema_grammar(schema), "json_schema")
    return place_of(found.value, schema, checker.check)


@pytest.fixture(scope="module")
def checker() -> Any:
    checker = Checker()
    yield checker
    checker.close()


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_the_error_names_keyword_and_place(checker: Checker, value: dict[str, Any], message: str) -> None:
    choice = {"anyOf": [{"type": "null"}, value]}
    deep = {"properties": {"fine": {"type": "string"}, "x": {"prefixItems": [{}, choice]}}}
    defined = {"items": {"$ref": "#/$defs/x"}, "type": "array", "$defs": {"fine": {}, "x": value}}
    for schema, place in ((value, "#"), (deep, "#/properties/x/prefixItems/1/anyOf/1"), (defined, "#/$defs/x")):
        error = str(refused(checker, schema))
        assert re.match(f"json_schema: {message.replace('PLACE', re.escape(place))}", error), error


def test_a_value_is_not_looked_into(checker: Checker) -> None:
    wrong = {"type": "integer", "const": {"oneOf": [{}]}}
    value = {"type": "object", "properties": {"a": {"const": wrong}, "b": wrong}, "required": ["b"]}
    message = "json_schema: 'properties' at # cannot be followed: Unsatisfiable schema: required property 'b'"
    assert str(refused(checker, value)).startswith(message)


def test_it_has_a_time_limit(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the error is the compiler's alone."""
    monkeypatch.setattr("numballama.structured.blame.FIND_S", -1.0)
    assert str(refused(checker, REFUSED[0][0])).startswith("json_schema cannot be followed: at 1(8): ")
