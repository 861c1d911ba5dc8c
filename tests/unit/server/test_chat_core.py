"""Tools, reasoning and templates of a chat. Expressions and grammars make the story model write calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import ANY

import pytest

from numballama.generate import TextPart
from numballama.model import Model
from numballama.server.chat_core import ChatAnswers, forced_call, offered_tools, plain_tools
from numballama.server.fields import parse
from numballama.server.http import dumps
from numballama.server.protocol import ChatRequest
from numballama.server.settings import Settings
from numballama.server.tools import choose_format
from numballama.server.tools.parser import Parser
from tests.helpers.http_server import Running, eventually, serving

PATH = "/v1/chat/completions"
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
PARAMETERS = {"type": "object", "properties": {"x": NUMBER}, "required": ["x"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("look", "go")]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me of a dog."}], "temperature": 0, "max_tokens": 80, "tools": TOOLS,
}  # fmt: skip
CALL = r'\{"name": "look", "arguments": \{"x": 12\}\}'
"""An expression that matches one call only, so that its text is known."""
THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{# ends with </think> #}"


@pytest.fixture(scope="module")
def thinking(model: Model) -> Iterator[Running]:
    """A server whose template has reasoning."""
    with serving(model, Settings(chat_template=THINKS)) as running:
        yield running


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    made = choice["message"]["tool_calls"]
    assert all(call["type"] == "function" and call["id"] for call in made)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in made]


def test_a_call(server: Running) -> None:
    answer = server.post(PATH, BODY | {"regex": CALL}).json
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert calls_of(choice) == [("look", {"x": 12})]
    events = server.post(PATH, BODY | {"regex": CALL, "stream": True}).events
    deltas = [c["delta"]["tool_calls"][0] for e in events for c in e["choices"] if "tool_calls" in c["delta"]]
    assert deltas[0]["function"] == {"name": "look", "arguments": ""} and deltas[0]["id"] and len(deltas) >= 2
    assert all(delta["index"] == 0 for delta in deltas)
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"x": 12}'
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text(server: Running) -> None:
    for body in (BODY | {"tools": None}, BODY | {"tool_choice": "none"}):
        choice = server.post(PATH, body | {"regex": CALL}).json["choices"][0]
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
        assert json.loads(choice["message"]["content"]) == {"name": "look", "arguments": {"x": 12}}


def test_calls_in_the_other_protocols(server: Running) -> None:
    named = {"type": "tool", "name": "look"}
    body = {"messages": BODY["messages"], "max_tokens": 60, "temperature": 0, "tool_choice": named}
    answer = server.post("/v1/messages", body | {"tools": [{"name": "look", "input_schema": PARAMETERS}]}).json
    assert answer["stop_reason"] == "tool_use"
    (block,) = answer["content"]
    assert block["type"] == "tool_use" and block["name"] == "look" and 0 <= block["input"]["x"] <= 99
    tool = {"type": "function", "name": "look", "parameters": PARAMETERS}
    body = {"input": "Hi", "max_output_tokens": 60, "tools": [tool], "tool_choice": "required",
            "parallel_tool_calls": False}  # fmt: skip
    (item, *_) = (output := server.post("/v1/responses", body).json["output"])
    assert item["type"] == "function_call", output
    assert 0 <= json.loads(item["arguments"])["x"] <= 99


def test_an_answer_that_goes_on(server: Running) -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "Once there was a dog"}]
    body = BODY | {"tools": None, "messages": messages, "continue_final_message": True, "max_tokens": 8}
    prompt = server.post("/apply-template", {"messages": messages, "continue_final_message": True}).json["prompt"]
    assert prompt.endswith("Once there was a dog")
    (choice,) = server.post(PATH, body).json["choices"]
    assert choice["message"]["content"].startswith(" ")  # the space belongs to the text


@pytest.mark.parametrize("name", ["look", "go"])
def test_a_named_call(server: Running, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    answer = server.post(PATH, BODY | {"tool_choice": choice}).json
    assert "choices" in answer, answer
    ((found, arguments),) = calls_of(answer["choices"][0])
    assert found == name and set(arguments) == {"x"}


def test_required_calls(server: Running) -> None:
    body = BODY | {"tool_choice": "required", "parallel_tool_calls": False, "n": 3, "temperature": 1, "seed": 1}
    for choice in server.post(PATH, body).json["choices"]:
        ((name, arguments),) = calls_of(choice)
        assert name in ("look", "go") and 0 <= arguments["x"] <= 99 and choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "go"}}])
def test_required_calls_of_a_stream_are_those_of_the_answer(server: Running, choice: Any, parallel: bool) -> None:
    """vLLM #24509, #49216."""
    body = BODY | {
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "temperature": 1,
        "seed": 5,
        "max_tokens": 60,
    }
    (whole,) = server.post(PATH, body).json["choices"]
    calls: list[list[str]] = []
    parts = [c for event in server.post(PATH, body | {"stream": True}).events for c in event["choices"]]
    for made in (made for part in parts for made in part["delta"].get("tool_calls", ())):
        if "id" in made:
            calls.append([made["function"]["name"], ""])
        calls[made["index"]][1] += made["function"]["arguments"]
    assert calls and not [part for part in parts if part["delta"].get("content")]
    assert calls == [
        [each["function"][name] for name in ("name", "arguments")] for each in whole["message"]["tool_calls"]
    ]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]


def test_an_answer_ends_at_its_second_call(server: Running) -> None:
    two = BODY | {"regex": rf"{CALL}\n{CALL}"}
    assert len(calls_of(server.post(PATH, two).json["choices"][0])) == 2
    one = server.post(PATH, two | {"parallel_tool_calls": False}).json["choices"][0]
    assert len(calls_of(one)) == 1 and one["finish_reason"] == "tool_calls"
    events = server.post(PATH, two | {"parallel_tool_calls": False, "stream": True}).events
    deltas = [c["delta"]["tool_calls"][0] for e in events for c in e["choices"] if "tool_calls" in c["delta"]]
    assert {delta["index"] for delta in deltas} == {0}
    assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_at_its_second_call_is_counted_as_complete(either: Running, stream: bool) -> None:
    def counted() -> list[float]:
        text = either.get("/metrics").body.decode()
        names = ("request_success_total", "request_aborted_total", "request_generation_tokens_count")
        return [sum(map(float, re.findall(rf"^numballama:{name}.* (\S+)$", text, re.MULTILINE))) for name in names]

    before = counted()
    calls = rf"({CALL.replace('12', '[1-9]{12}')}\n){{20}}"  # whose numbers are chosen, so they do not come at once
    body = BODY | {"regex": calls, "max_tokens": 400, "n": 2, "stream": stream}
    assert either.post(PATH, body | {"parallel_tool_calls": False}).status == 200
    eventually(lambda: either.idle, "the end of the request")
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 0, 2]


@pytest.mark.parametrize(
    ("stop", "reason", "arguments"),
    [("12", "stop", '{"x": '), ("}", "stop", '{"x": 12'), (" done", "tool_calls", '{"x": 12}')],
)
def test_a_call_that_a_stop_string_cuts_is_none_to_make(
    server: Running, stop: str, reason: str, arguments: str
) -> None:
    """Clients call the function when they read tool_calls or tool_use, and with {} where the arguments are cut."""
    body = BODY | {"regex": rf"{CALL} done", "stop": [stop]}
    (choice,) = server.post(PATH, body).json["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop)
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [arguments]
    last = server.post(PATH, body | {"stream": True}).events[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == (reason, stop)


@pytest.mark.parametrize(
    ("text", "reason"), [('{"x": 1', "stop"), ('{"x": 1}', "tool_calls"), ('{"x": 1}}', "tool_calls")]
)
def test_a_call_that_the_model_does_not_end_is_none_to_make(text: str, reason: str) -> None:
    """But small models forget the last bracket now and then, behind whole arguments."""
    parsers = choose_format(None, ()).parsers(plain_tools(parse(ChatRequest, dumps(BODY)).tools), 1, False)
    answers = ChatAnswers(SimpleNamespace(), parsers)  # type: ignore[arg-type]
    part = TextPart(0, ['{"name": "look", "arguments": ' + text], [5], [None], "stop", 2)
    assert answers._read(part).finish_reason == reason


def test_the_template_sees_tools_calls_and_results(server: Running) -> None:
    made = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x": 12}'}}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
    ]
    prompt = server.post("/apply-template", {"messages": messages, "tools": TOOLS}).json["prompt"]
    assert '"look"' in prompt and '"maximum": 99' in prompt  # described
    assert '{"name": "look", "arguments": {"x": 12}}' in prompt and "a cat" in prompt
    assert prompt.index('"x": 12') < prompt.index("a cat")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "regex": "a"}, "regex"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Running, body: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, BODY | body)
    assert answer.status == 400 and answer.error["param"] == param, answer.body


def allow(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


@pytest.mark.parametrize("name", ["look", "go"])
def test_required_calls_of_some_tools(server: Running, name: str) -> None:
    """The prompt shows all tools."""
    body = BODY | allow(name, mode="required") | {"n": 4, "temperature": 1, "seed": 3, "parallel_tool_calls": False}
    answer = server.post(PATH, body).json
    assert [calls_of(choice)[0][0] for choice in answer["choices"]] == [name] * 4
    usage = server.post(PATH, BODY | {"max_tokens": 1}).json["usage"]
    assert answer["usage"]["prompt_tokens"] == usage["prompt_tokens"]


def test_some_tools_may_be_called(server: Running) -> None:
    answer = server.post(PATH, BODY | allow("look")).json
    assert answer["choices"][0]["message"]["content"] and "tool_calls" not in answer["choices"][0]["message"]
    for name in ("look", "go"):  # an expression makes the model call it
        (choice,) = server.post(PATH, BODY | allow(name) | {"regex": CALL}).json["choices"]
        events = server.post(PATH, BODY | allow(name) | {"regex": CALL, "stream": True}).events
        streamed = any("tool_calls" in each["delta"] for event in events for each in event["choices"])
        if name == "look":
            assert streamed and calls_of(choice) == [("look", {"x": 12})]
        else:
            assert not streamed and json.loads(choice["message"]["content"])["name"] == "look"


@pytest.mark.parametrize(
    ("choice", "restricts"), [(allow("look"), True), (allow("go", "look"), False), ({"tool_choice": "auto"}, False)]
)
def test_a_grammar_says_which_tools_may_be_called(choice: dict[str, Any], restricts: bool) -> None:
    request = parse(ChatRequest, dumps(BODY | choice))
    found = forced_call(choose_format(None, {}), request, offered_tools(request), False)
    assert bool(found) is restricts
    if restricts:
        assert '"look"' in found["grammar"] and '"go"' not in found["grammar"]


@pytest.mark.parametrize("name", ["auto", "required"])
def test_a_tool_may_have_the_name_of_a_mode(server: Running, name: str) -> None:
    tools = [TOOLS[0], {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}]
    choice = {"type": "function", "function": {"name": name}}
    ((found, _),) = calls_of(server.post(PATH, BODY | {"tools": tools, "tool_choice": choice}).json["choices"][0])
    assert found == name


@pytest.mark.parametrize(
    ("choice", "param", "found"),
    [
        (allow("look", "other"), "tool_choice", "names 'other', which is not among the tools: look, go"),
        (allow(), "tool_choice.allowed_tools.tools", "at least 1 item"),
        (allow("look", mode="none"), "tool_choice.allowed_tools.mode", "'auto' or 'required'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "required"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "mcp"}]}}},
         "tool_choice.allowed_tools.tools.0.type", "'function'"),
        ({"tool_choice": {"type": "other"}}, "tool_choice.type", "'function'"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tools": None, **allow("look")}, "tool_choice", "names tools, and there are no tools"),
        ({"regex": "a", **allow("look", mode="required")}, "regex", "tool_choice"),
    ],
)  # fmt: skip
def test_wrong_lists_of_allowed_tools(server: Running, choice: dict[str, Any], param: str, found: str) -> None:
    answer = server.post(PATH, BODY | choice)
    assert answer.status == 400 and answer.error["param"] == param and found in answer.error["message"], answer.body


UNIQUE = {"type": "array", "uniqueItems": True}
EITHER = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
NAMED_CHOICE = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize("choice", ["required", NAMED_CHOICE])
@pytest.mark.parametrize(("schema", "keyword"), [(UNIQUE, "uniqueItems"), (EITHER, "oneOf")])
def test_a_schema_that_a_forced_call_cannot_enforce(server: Running, schema: Any, keyword: str, choice: Any) -> None:
    """One is refused by our check, one by llguidance. The error names tool, keyword and place."""
    parameters = {"type": "object", "properties": {"x": schema}}
    tools = [*TOOLS[1:], {"type": "function", "function": {"name": "look", "parameters": parameters}}]
    error = server.post(PATH, BODY | {"tools": tools, "tool_choice": choice}).error
    assert error["param"] == "tools.1"
    beginning = f"tools.1: parameters of look: json_schema: {keyword!r} at #/properties/x "
    assert error["message"].startswith(beginning), error


def test_reasoning(thinking: Running) -> None:
    body = BODY | {"tools": None, "regex": "<think>\nhm, so\n</think>\n\nA dog\\."}
    message = thinking.post(PATH, body).json["choices"][0]["message"]
    assert message["reasoning_content"] == "hm, so" and message["content"] == "A dog."
    events = thinking.post(PATH, body | {"stream": True}).events
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm, so"
    assert "".join(delta.get("content", "") for delta in deltas) == "A dog."


@pytest.mark.parametrize("text", ["<think>\nhm, so\n</think>\n\nA dog.", "A dog.", "<th", "<think>hm, so"])
def test_tokens_of_reasoning_are_counted(thinking: Running, text: str) -> None:
    body = BODY | {"tools": None, "regex": re.escape(text), "logprobs": True, "n": 2}
    answer = thinking.post(PATH, body).json
    counted = 0
    for choice in answer["choices"]:
        tokens, read = [entry["token"] for entry in choice["logprobs"]["content"]], ""
        for token in tokens:
            counted += text.startswith("<think>") and "</think>" not in read
            read += token
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": counted}
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    assert thinking.post(PATH, stream).events[-1]["usage"] == answer["usage"] | {"prompt_tokens_details": ANY}
    assert (counted > 8) is text.startswith("<think>")


def test_a_restricted_answer_has_no_reasoning(thinking: Running) -> None:
    """Also if the template opens it: the grammar holds from the first token on."""
    body = BODY | {"tools": None, "messages": [{"role": "user", "content": "Hi <think>"}], "regex": "A dog\\."}
    message = thinking.post(PATH, body).json["choices"][0]["message"]
    assert message["content"] == "A dog." and "reasoning_content" not in message


def test_open_reasoning(thinking: Running) -> None:
    """A prompt that ends with `<think>`: the answer begins with reasoning. This one never closes it."""
    body = BODY | {"tools": None, "messages": [{"role": "user", "content": "Hi <think>"}], "max_tokens": 8}
    message = thinking.post(PATH, body).json["choices"][0]["message"]
    assert message["reasoning_content"] and not message["content"]


def test_a_parser_that_fails_ends_its_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Parser, text: str) -> NoReturn:
        raise ValueError("a bug")

    monkeypatch.setattr(Parser, "feed", fail)
    answer = server.post(PATH, BODY)
    assert answer.status == 500 and "a bug" not in answer.error["message"]
    events = server.post(PATH, BODY | {"stream": True}).events
    assert events[-1]["error"]["code"] == "server_error"
    eventually(lambda: server.idle, "the end of the requests")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}}, "true|false"),
        ({"response_format": {"type": "json_object", "schema": {"const": "42"}}}, '"42"'),  # llama.cpp's place
        ({"response_format": {"type": "json_schema", "schema": {"enum": [17]}}}, "17"),
        ({"regex": "[ab]c"}, "[ab]c"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"structured_outputs": {"choice": ["a.c", "b"]}}, r"a\.c|b"),
        ({"structured_outputs": {"regex": "a{2}"}}, "aa"),
        ({"json_schema": {"enum": [17]}}, "17"),
    ],
)
def test_restricted_answers(server: Running, body: dict[str, Any], text: str) -> None:
    choice = server.post(PATH, BODY | {"tools": None} | body).json["choices"][0]
    assert re.fullmatch(text, choice["message"]["content"]) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param", "found"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}},
         "response_format", "uniqueItems"),
        ({"regex": "(?=a)"}, "regex", "look"),
        ({"grammar": "root ::= other"}, "grammar", "other"),
        ({"regex": "a", "grammar": "b"}, "grammar", "regex"),
    ],
)  # fmt: skip
def test_restrictions_that_cannot_be_enforced(server: Running, body: dict[str, Any], param: str, found: str) -> None:
    answer = server.post(PATH, BODY | {"tools": None} | body)
    assert answer.status == 400 and answer.error["param"] == param, answer.body
    assert found in answer.error["message"]
