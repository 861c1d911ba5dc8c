"""Checks of a request's tools."""

from __future__ import annotations

from typing import Any

import pytest

from numballama.errors import Error
from numballama.server.tools import CheckedTool, check_tools
from numballama.server.tools.definitions import MAX_DEPTH
from tests.helpers.tool_texts import TOOLS, WEATHER


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def test_tools() -> None:
    weather, time = check_tools(TOOLS)
    assert weather == CheckedTool("get_weather", "The weather of a city", WEATHER["function"]["parameters"])  # type: ignore[index]
    assert time.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert check_tools(None) == check_tools([]) == ()
    (only,) = check_tools([tool(parameters={"properties": {"a": {}}}, strict=True, description=None)])
    assert only.parameters == {"type": "object", "properties": {"a": {}}}
    assert len(check_tools([tool(name=f"f{number}") for number in range(128)])) == 128
    assert check_tools([tool(parameters=nested(MAX_DEPTH))])


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("tools", "tools must be a list"),
        ({"type": "function"}, "tools must be a list"),
        ([*TOOLS, None], r"tools\[2\] must be"),
        ([{"type": "retrieval"}], r'tools\[0\]\.type must be "function", found \'retrieval\''),
        ([{"type": "function"}], r"tools\[0\]\.function must be"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function\.name must be .* found None"),
        ([tool(name="")], r"tools\[0\]\.function\.name"),
        ([tool(name="a b")], "found 'a b'"),
        ([tool(name="é")], r"tools\[0\]\.function\.name"),
        ([tool(name="f\n")], r"tools\[0\]\.function\.name"),
        ([tool(name="x" * 65)], r"tools\[0\]\.function\.name"),
        ([tool(), *TOOLS, tool()], r"tools\[3\]\.function\.name: 'f' is the name of an earlier tool"),
        ([tool(name=f"f{number}") for number in range(129)], "found 129; at most 128"),
        ([tool(description=1)], r"tools\[0\]\.function\.description must be a text"),
        ([tool(parameters=[])], r"tools\[0\]\.function\.parameters must be a JSON schema"),
        ([tool(parameters={"type": "string"})], r'parameters\.type must be "object", found \'string\''),
        ([tool(parameters=nested(MAX_DEPTH + 1))], "nested deeper than 64"),
        ([tool(parameters=nested(100_000))], "nested deeper than 64"),
        ([tool(parameters={"const": "x" * (256 << 10)})], "at most 262,144"),
        ([tool(parameters={"const": {1}})], "is not JSON"),
        ([tool(parameters={"const": float("nan")})], "is not JSON"),
    ],
)
def test_invalid_tools_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        check_tools(tools)
