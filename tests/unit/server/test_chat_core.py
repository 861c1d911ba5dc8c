"""Tools and templates of a chat: the module of tools is a simple one of these tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from numballama.errors import Error
from numballama.server import chat_core
from tests.helpers.http_server import Running, eventually

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me of a dog."}], "temperature": 0, "max_tokens": 8, "stop": ["zzz"],
}  # fmt: skip


@dataclass
class Content:
    text: str


@dataclass
class Reasoning:
    text: str


@dataclass
class CallStart:
    index: int
    id: str
    name: str


@dataclass
class CallArguments:
    index: int
    text: str


class Parser:
    """Finds one call after everything that the model says, if there are tools."""

    def __init__(self, tools: Any) -> None:
        self.tools, self.first = tools, True

    def feed(self, text: str) -> list[Any]:
        first, self.first = self.first, False
        return [*([Reasoning("hm")] if first else []), Content(text)]

    def finish(self) -> list[Any]:
        if not self.tools:
            return []
        return [
            CallStart(0, "c1", self.tools[0]["function"]["name"]),
            CallArguments(0, '{"x"'),
            CallArguments(0, ":1}"),
        ]


class Format:
    parser = staticmethod(Parser)

    @staticmethod
    def grammar(tools: Any, choice: str, parallel: bool) -> str:
        return json.dumps([choice, parallel])


class Tools:
    """In place of `numballama.server.tools`."""

    @staticmethod
    def choose_format(template: str | None, special_tokens: Any) -> Format:
        assert template is not None and "[INST]" in template and "</s>" in special_tokens
        return Format()


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_core, "tool_formats", lambda: Tools)


def test_without_the_module_tools_are_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_core, "tool_formats", lambda: None)
    answer = server.post("/v1/chat/completions", BODY | {"tools": TOOLS})
    assert answer.status == 400 and answer.error["param"] == "tools" and "not supported" in answer.error["message"]
    assert server.post("/v1/chat/completions", BODY | {"tools": TOOLS, "tool_choice": "none"}).status == 200


@pytest.mark.usefixtures("tools")
def test_a_call(server: Running) -> None:
    body = BODY | {"tools": TOOLS, "stop": [" a", " the", "."], "max_tokens": 60}
    choice = server.post("/v1/chat/completions", body).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning_content"] == "hm"
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}}
    assert choice["message"]["tool_calls"] == [call]
    events = server.post("/v1/chat/completions", body | {"stream": True}).events
    deltas = [c["delta"]["tool_calls"][0] for e in events for c in e["choices"] if "tool_calls" in c["delta"]]
    assert deltas[0] == {"index": 0, **call, "function": {"name": "look", "arguments": ""}}
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"x":1}'
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.usefixtures("tools")
def test_calls_in_the_other_protocols(server: Running) -> None:
    messages = {"messages": BODY["messages"], "max_tokens": 60, "stop_sequences": [" a", " the", "."], "temperature": 0}
    answer = server.post("/v1/messages", messages | {"tools": [{"name": "look", "input_schema": {}}]}).json
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"][-1] == {"type": "tool_use", "id": "c1", "name": "look", "input": {"x": 1}}
    body = {"input": "Hi", "max_output_tokens": 3, "tools": [{"type": "function", "name": "look", "parameters": {}}]}
    items = server.post("/v1/responses", body).json["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert items[2]["arguments"] == '{"x":1}'


@pytest.mark.usefixtures("tools")
def test_a_required_call_is_a_grammar(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def params(request: Any, limit: Any, logprobs: Any, field: str, **more: Any) -> NoReturn:
        seen.append(json.loads(more["grammar"]) if more else None)
        raise chat_core.ApiError("enough")

    monkeypatch.setattr(chat_core, "sampling_params", params)
    named = {"type": "function", "function": {"name": "look"}}
    for choice, parallel in (("auto", None), ("required", None), ("required", False), (named, True)):
        body = BODY | {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}
        assert server.post("/v1/chat/completions", body).error["message"] == "enough"
    assert seen == [None, ["required", True], ["required", False], ["look", True]]
    other = {"type": "function", "function": {"name": "other"}}
    answer = server.post("/v1/chat/completions", BODY | {"tools": TOOLS, "tool_choice": other})
    assert answer.status == 400 and answer.error["param"] == "tool_choice"


@pytest.mark.usefixtures("tools")
def test_a_parser_that_fails_ends_its_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Parser, text: str) -> NoReturn:
        raise ValueError("a bug")

    monkeypatch.setattr(Parser, "feed", fail)
    answer = server.post("/v1/chat/completions", BODY)
    assert answer.status == 500 and "a bug" not in answer.error["message"]
    events = server.post("/v1/chat/completions", BODY | {"stream": True}).events
    assert events[-1]["error"]["code"] == "server_error"
    eventually(lambda: server.idle, "the end of the requests")


@pytest.mark.usefixtures("tools")
def test_tools_that_the_format_refuses(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> NoReturn:
        raise Error("a schema with patternProperties is not supported")

    monkeypatch.setattr(Format, "grammar", staticmethod(refuse))
    answer = server.post("/v1/chat/completions", BODY | {"tools": TOOLS, "tool_choice": "required"})
    assert answer.status == 400 and answer.error["param"] == "tools"


def test_restricted_answers_ask_the_engine(server: Running) -> None:
    """`SamplingParams` decides whether this version can; what it cannot is a 400 with the field's name."""
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}
    for body, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": schema}, "response_format"),
        ({"regex": "a"}, "regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ):
        answer = server.post("/v1/chat/completions", BODY | body)
        assert answer.status == 200 or answer.error["param"] == param, answer.body
