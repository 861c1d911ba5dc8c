"""Tools and choices of them, as clients send them."""

from __future__ import annotations

from typing import Any

import pytest

from numballama.server.fields import Request, parse
from numballama.server.http import dumps
from numballama.server.tool_fields import AllowedTools, CustomTool, NamedCustom, NamedTool, Tool, ToolChoice, Tools


class Wanted(Request):
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None


def choice(value: Any) -> Any:
    return parse(Wanted, dumps({"tool_choice": value})).tool_choice


def test_forms_of_a_choice() -> None:
    assert choice("required") == "required"
    named = choice({"type": "function", "function": {"name": "f"}})
    assert isinstance(named, NamedTool) and named.name == "f"
    named = choice({"type": "custom", "custom": {"name": "c"}})
    assert isinstance(named, NamedCustom) and named.name == "c"
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "c"}}]
    allowed = choice({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}})
    assert isinstance(allowed, AllowedTools) and allowed.names == {"f", "c"}


@pytest.mark.parametrize(("form", "grammar"), [(None, False), ({"type": "text"}, False), ("regex", True)])
def test_kinds_of_tools(form: Any, grammar: bool) -> None:
    if form == "regex":
        form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a"}}
    custom = {"type": "custom", "custom": {"name": "c", "format": form}}
    found = parse(Wanted, dumps({"tools": [{"function": {"name": "f"}}, custom]})).tools
    assert found is not None and isinstance(found[0], Tool) and isinstance(found[1], CustomTool)
    assert (found[1].custom.grammar is not None) is grammar
