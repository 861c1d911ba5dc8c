"""Tools, formats and generated texts that the tests of tool calls share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from numballama.server.tools import CallArguments, CallStart, Content, Event, Parser, Reasoning, ToolFormat
from numballama.server.tools import choose_format as choose

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS: list[dict[str, Any]] = [WEATHER, TIME]

QWEN = '{%- if tools %}<tools></tools> <tool_call>\n{"name": <name>, "arguments": <args>}\n</tool_call>{% endif %}'
TEMPLATES = {
    "hermes": QWEN,
    "qwen3": QWEN + "<think>\n\n</think>",
    "llama": '{{ tools }}{"name": function name, "parameters": dictionary of argument name and its value}',
    "mistral": '{{ tools }}{{ "[TOOL_CALLS][" }}',
    "mistral named": '{{ tools }}{{ "[TOOL_CALLS]" + name + "[ARGS]" }}',
    "mistral id": '{{ tools }}{{ "[TOOL_CALLS]" + name + "[CALL_ID]" + id + "[ARGS]" }}',
    "magistral": '{{ tools }}[THINK][/THINK]{{ "[TOOL_CALLS]" + name + "[ARGS]" }}',
    "json": "{{ messages }}",
}
"""The parts of real templates that tell the format."""
FORMATS: dict[str, ToolFormat] = {name: choose(template, []) for name, template in TEMPLATES.items()}

SPELLED = {
    "hermes": '<tool_call>\n{{"name": "get_weather", "arguments": {0}}}\n</tool_call>',
    "llama": '{{"name": "get_weather", "parameters": {0}}}',
    "mistral": '[TOOL_CALLS][{{"name": "get_weather", "arguments": {0}}}]',
    "mistral named": "[TOOL_CALLS]get_weather[ARGS]{0}",
    "mistral id": "[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{0}",
    "json": '{{"name": "get_weather", "arguments": {0}}}',
}
"""Calls of `get_weather` with arguments {0}, by format."""


class Answer(NamedTuple):
    """What a client gets from all events of an answer."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    """(name, arguments) of each call."""


def answer(events: Iterable[Event]) -> Answer:
    """The sum of events. Checks that calls are numbered in order and arguments follow the start of their call."""
    content, reasoning, calls, ids = "", "", list[tuple[str, str]](), set[str]()
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(calls) and event.id not in ids
            ids.add(event.id)
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + event.text
        assert isinstance(event, CallStart) or event.text
    return Answer(content, reasoning, calls)


def events(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def read(name: str, text: str, in_reasoning: bool = False, tools: Sequence[dict[str, Any]] | None = TOOLS) -> Answer:
    """The answer that is `text`, fed as one piece."""
    return answer(events(FORMATS[name].parser(tools, in_reasoning), [text]))


FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "[THINK]", "[/THINK]", "```json", "```", '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
    '{"name": "time", "parameters": {}}', '{"arguments": {"a": [1, {}]}, "name": "time"}', '{"name": "time"}',
    '"get_weather"', '"name"', '"arguments"', '"parameters"', '"function"', '"type"', "get_weather", "time", "{", "}",
    "[", "]", ":", ",", ";", '"', "\\", "\\u00e9", "abc123XYZ", " ", "\n", " " * 17, "1", "true", "ü🙂", "x" * 70,
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)
"""Texts that are made of what formats are made of."""

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(FRAGMENTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=4) | st.sampled_from(FRAGMENTS), values, max_size=4).flatmap(
    lambda value: st.sampled_from([json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)])
)
"""JSON texts of objects, with markers in their strings."""
