"""Tools of a request: checks of OpenAI's `tools` list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import Error

MOST_TOOLS = 128
"""As OpenAI's limit."""
MAX_SCHEMA = 256 << 10
"""Maximum size of a tool's `parameters` as JSON, in characters."""
MAX_DEPTH = 64
"""Maximum nesting of a tool's `parameters`, and of a call's arguments."""
NAME = r"[a-zA-Z0-9_-]{1,64}"
"""Regular expression of a tool's name. As OpenAI's."""


@dataclass(frozen=True)
class CheckedTool:
    """One function that a model may call, of a request that `check_tools` has accepted."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments. Its "type" is "object"."""


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[CheckedTool, ...]:
    """The tools of a request: `[{"type": "function", "function": {"name": …, "parameters": {…}}}]`.

    Raises `Error` that names the place, for a tool without a name, a name that is not 1 to 64 of a-z A-Z 0-9 _ -, a
    name given twice, parameters that describe no object or are too large, and more than 128 tools.
    """
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise Error(f"tools must be a list of functions, found {tools!r:.100}")
    if len(tools) > MOST_TOOLS:
        raise Error(f"tools: found {len(tools)}; at most {MOST_TOOLS} are possible")
    found: dict[str, CheckedTool] = {}
    for index, given in enumerate(tools):
        tool = _check_tool(f"tools[{index}]", given)
        if tool.name in found:
            raise Error(
                f"tools[{index}].function.name: {tool.name!r} is the name of an earlier tool; names must differ"
            )
        found[tool.name] = tool
    return tuple(found.values())


def _check_tool(place: str, given: object) -> CheckedTool:
    if not isinstance(given, Mapping):
        raise Error(f'{place} must be {{"type": "function", "function": {{…}}}}, found {given!r:.100}')
    if given.get("type", "function") != "function":
        raise Error(f'{place}.type must be "function", found {given["type"]!r:.100}')
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise Error(f'{place}.function must be {{"name": …, "parameters": {{…}}}}, found {function!r:.100}')
    place = f"{place}.function"
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise Error(f"{place}.name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, found {name!r:.100}")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise Error(f"{place}.description must be a text, found {description!r:.100}")
    return CheckedTool(name, description or "", _check_parameters(f"{place}.parameters", function.get("parameters")))


def _check_parameters(place: str, schema: object) -> Mapping[str, Any]:
    """The schema with "type": "object". None is a function without parameters."""
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping):
        raise Error(f"{place} must be a JSON schema, found {schema!r:.100}")
    if schema.get("type", "object") != "object":
        raise Error(f'{place}.type must be "object", found {schema["type"]!r:.100}')
    if next((True for depth in _depths(schema) if depth > MAX_DEPTH), False):
        raise Error(f"{place} is nested deeper than {MAX_DEPTH}")
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Error(f"{place} is not JSON: {error}") from None
    if size > MAX_SCHEMA:
        raise Error(f"{place} has {size:,} characters as JSON; at most {MAX_SCHEMA:,} are possible")
    return {**schema, "type": "object"}


def _depths(schema: Mapping[str, Any]) -> Iterator[int]:
    """The depth of each object and list of a schema; without recursion, which a hostile one would exhaust."""
    waiting: list[tuple[object, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Mapping):
            yield depth
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple):
            yield depth
            waiting.extend((item, depth + 1) for item in value)
