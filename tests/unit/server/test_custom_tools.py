"""Custom tools of OpenAI's interfaces: calls with a text, which may have to match a regular expression."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from numballama.server.answers import ChatCompletion
from numballama.server.chat_core import forced_call, offered_tools
from numballama.server.custom_tools import as_functions, custom_names
from numballama.server.errors import ApiError
from numballama.server.fields import parse
from numballama.server.http import dumps
from numballama.server.protocol import ChatRequest
from numballama.server.tool_fields import Custom, CustomFormat, CustomGrammar, CustomTool, Function, Tool
from numballama.server.tools.formats import choose_format
from tests.helpers.http_server import Running

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
REGEX = r"[a-c]{2}\d{3}"
GRAMMAR = {"syntax": "regex", "definition": REGEX}
CODE = {"type": "custom", "custom": {"name": "code", "format": {"type": "grammar", "grammar": GRAMMAR}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
PLAIN = {"type": "custom", "custom": {"name": "say", "format": {"type": "text"}}}
GREEDY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me of a dog."}], "temperature": 0, "max_tokens": 60,
}  # fmt: skip
FLAT = {"type": "custom", "name": "code", "format": {"type": "grammar", **GRAMMAR}}


def custom(name: str, syntax: str | None = None) -> CustomTool:
    form = None
    if syntax is not None:
        form = CustomFormat(type="grammar", grammar=CustomGrammar(syntax=syntax, definition="a+"))  # type: ignore[arg-type]
    return CustomTool(type="custom", custom=Custom(name=name, description="What it does", format=form))


def test_custom_tools_are_functions_of_a_text() -> None:
    look = Tool(function=Function(name="look"))
    tools = [look, custom("say"), custom("code", "regex")]
    found = as_functions(tools)
    assert found is not None and found[0] is look and as_functions(None) is None
    assert [tool.function.name for tool in found] == ["look", "say", "code"]
    assert found[1].function.description == "What it does"
    inputs = [(tool.function.parameters or {})["properties"]["input"] for tool in found[1:]]
    assert inputs == [{"type": "string"}, {"type": "string", "pattern": "^(?:a+)$"}]
    assert custom_names(tools) == {"say", "code"} and custom_names(tools, with_grammar=True) == {"code"}
    assert custom_names(None) == frozenset()


def test_a_lark_grammar_is_refused() -> None:
    """It cannot be enforced inside a JSON string, and is not ignored."""
    with pytest.raises(ApiError, match=r"tools\.1\.custom\.format\.grammar\.syntax: .* use syntax 'regex'"):
        as_functions([custom("say"), custom("code", "lark")])


@pytest.mark.parametrize("choice", ["required", {"type": "custom", "custom": {"name": "code"}}])
def test_a_call_matches_the_grammar(server: Running, choice: Any) -> None:
    body = GREEDY | {"tools": [CODE], "tool_choice": choice, "parallel_tool_calls": False}
    answer = server.post(CHAT, body).json
    ChatCompletion.model_validate(answer, strict=True)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "custom" and call["custom"]["name"] == "code" and call["id"].startswith("call_")
    assert re.fullmatch(REGEX, call["custom"]["input"]) and answer["choices"][0]["finish_reason"] == "tool_calls"


def test_streams_have_the_same_calls(server: Running) -> None:
    body = GREEDY | {"tools": [LOOK, CODE], "tool_choice": {"type": "custom", "custom": {"name": "code"}}}
    (whole,) = server.post(CHAT, body).json["choices"][0]["message"]["tool_calls"]
    deltas = [event["choices"][0]["delta"] for event in server.post(CHAT, body | {"stream": True}).events[:-1]]
    first, *rest = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (first["index"], first["type"], first["custom"]) == (0, "custom", {"name": "code", "input": ""})
    assert "".join(call["custom"]["input"] for call in rest) == whole["custom"]["input"]


@pytest.mark.parametrize(("tools", "restricts"), [([LOOK, CODE], True), ([LOOK, PLAIN], False)])
def test_a_call_that_the_model_chose_to_make_matches_too(tools: list[dict[str, Any]], restricts: bool) -> None:
    """Text and calls are free, but what calls a tool with a grammar."""
    request = parse(ChatRequest, dumps(GREEDY | {"tools": tools}))
    found = forced_call(choose_format(None, {}), request, offered_tools(request), False)
    assert bool(found) is restricts
    if restricts:
        assert REGEX.replace("\\", "\\\\") in found["grammar"] and '"look"' in found["grammar"]


def test_text_beside_tools_with_a_grammar(server: Running) -> None:
    whole = server.post(CHAT, GREEDY | {"tools": [CODE]}).json["choices"][0]
    deltas = [
        event["choices"][0]["delta"]
        for event in server.post(CHAT, GREEDY | {"tools": [CODE], "stream": True}).events[:-1]
    ]
    assert whole["message"]["content"] == "".join(delta.get("content") or "" for delta in deltas) != ""


def test_a_conversation_goes_on(server: Running) -> None:
    call = {"id": "c1", "type": "custom", "custom": {"name": "code", "input": 'a"b\n'}}
    messages = [*GREEDY["messages"], {"role": "assistant", "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "done"})
    prompt = server.post("/apply-template", {"messages": messages, "tools": [CODE]}).json["prompt"]
    assert '{"name": "code", "arguments": {"input": "a\\"b\\n"}}' in prompt and '"content": "done"' in prompt
    assert server.post(CHAT, GREEDY | {"messages": messages, "tools": [CODE]}).status == 200
    items = [
        {"role": "user", "content": "Tell me of a dog."},
        {"type": "custom_tool_call", "call_id": "c1", "name": "code", "input": 'a"b\n'},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
    ]
    answer = server.post(RESPONSES, {"input": items, "tools": [FLAT], "max_output_tokens": 1}).json
    assert answer["tools"] == [FLAT]
    counted = server.post("/tokenize", {"messages": messages, "tools": [CODE]}).json["count"]
    assert answer["usage"]["input_tokens"] == counted


def test_responses(server: Running) -> None:
    choice = {"type": "custom", "name": "code"}
    body = {"input": "Tell me of a dog.", "temperature": 0, "tools": [FLAT], "tool_choice": choice}
    answer = server.post(RESPONSES, body).json
    (item,) = answer["output"]
    assert item["type"] == "custom_tool_call" and item["name"] == "code" and re.fullmatch(REGEX, item["input"])
    assert answer["tool_choice"] == choice and item["id"].startswith("ctc_") and item["call_id"].startswith("call_")
    events = server.post(RESPONSES, body | {"stream": True}).events
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:3] + kinds[-3:] == [
        "output_item.added", "custom_tool_call_input.done", "output_item.done", "completed",
    ]  # fmt: skip
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == events[-3]["input"] == events[-1]["response"]["output"][0]["input"] == item["input"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools.0.custom.name"),
        (CHAT, {"tools": [{"type": "custom"}]}, "tools.0.custom"),
        (CHAT, {"tools": [{"type": "web_search"}]}, "tools.0.type"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "grammar"}}}]},
         "tools.0.custom.format"),
        (CHAT, {"tools": [LOOK], "tool_choice": {"type": "custom", "custom": {"name": "code"}}}, "tool_choice"),
        (CHAT, {"tools": [json.loads(json.dumps(CODE).replace("[a-c]", "("))], "tool_choice": "required"}, "tools.0"),
        (CHAT, {"tools": [json.loads(json.dumps(CODE).replace("[a-c]", "("))]}, "tools.0"),
        (RESPONSES, {"tools": [FLAT | {"format": {"type": "grammar", "syntax": "regex"}}]},
         "tools.0.format.definition"),
    ],
)  # fmt: skip
def test_wrong_fields(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    given = GREEDY | body if path == CHAT else {"input": "a"} | body
    assert server.post(path, given).error["param"] == param


def test_an_expression_cannot_leave_its_group(server: Running) -> None:
    """`^(?:a)|(?:b)$` is valid: the input would only begin with "a"."""
    grammar = {"syntax": "regex", "definition": "a)|(?:b"}
    tool = {"type": "custom", "custom": {"name": "code", "format": {"type": "grammar", "grammar": grammar}}}
    answer = server.post(CHAT, GREEDY | {"tools": [tool], "tool_choice": "required"})
    assert answer.status == 400 and answer.error["param"] == "tools.0.custom.format.grammar.definition"
