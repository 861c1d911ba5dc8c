"""/v1/responses: requests and answers converted."""

from __future__ import annotations

from typing import Any

import pytest

from numballama.server.answers import ResponsesAnswer
from numballama.server.errors import ApiError
from numballama.server.fields import MAX_MESSAGES, MAX_SCHEMA, parse
from numballama.server.http import dumps
from numballama.server.protocol import template_message
from numballama.server.responses import _Writer, chat_request
from numballama.server.responses_protocol import ResponsesRequest
from numballama.server.tools.events import CallArguments, CallStart, Content, Reasoning
from tests.helpers.http_server import Answered, Running

PATH = "/v1/responses"
GREEDY: dict[str, Any] = {"input": "Tell me of a dog.", "temperature": 0, "max_output_tokens": 10}


def converted(**body: Any) -> Any:
    return chat_request(parse(ResponsesRequest, dumps(GREEDY | body)))


def test_an_answer(server: Running) -> None:
    answer = server.post(PATH, GREEDY | {"instructions": "Be brief.", "metadata": {"a": "b"}}).json
    ResponsesAnswer.model_validate(answer)
    (item,) = answer["output"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": GREEDY["input"]}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 10}
    chat = server.post("/v1/chat/completions", body).json
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["status"] == "incomplete" and answer["metadata"] == {"a": "b"} and answer["store"] is False


def test_streamed_is_not_streamed(server: Running) -> None:
    whole = server.post(PATH, GREEDY).json
    events = server.post(PATH, GREEDY | {"stream": True}).events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == text
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == text and final["usage"]["output_tokens"] == 10


def test_an_answer_that_was_cut_is_incomplete(server: Running) -> None:
    item = server.post(PATH, GREEDY).json["output"][-1]
    streamed = server.post(PATH, GREEDY | {"stream": True}).events[-1]["response"]["output"][-1]
    assert item["status"] == streamed["status"] == "incomplete"


def test_an_error_names_the_fields_of_this_interface(server: Running) -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"properties": {"a": {"contains": {}}}}}
    error = server.post(PATH, GREEDY | {"text": {"format": form}}).error
    assert error["param"] == "text.format"
    assert error["message"].startswith("text.format: 'contains' at #/properties/a is not enforced")


def test_the_last_event_of_a_stream_that_fails() -> None:
    writer = _Writer()
    data = writer.write([Content("a")]) + writer.error(ApiError("too late", 504, code="timeout"))
    *events, last = Answered(200, {"content-type": "text/event-stream"}, data).events
    assert last == {
        "type": "error", "code": "timeout", "message": "too late", "param": None, "sequence_number": len(events),
    }  # fmt: skip


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert [template_message(message) for message in converted(input=items).messages] == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


def test_formats_and_tools() -> None:
    schema = {"type": "object"}
    request = converted(
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
    )
    assert request.response_format.json_schema.schema_ == schema
    assert request.tools[0].function.name == "f" and request.tool_choice.function.name == "f"


LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def test_log_probabilities(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": GREEDY["input"]}], "temperature": 0, "max_tokens": 10}
    chat = server.post("/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 2}).json["choices"][0]
    whole = server.post(PATH, GREEDY | LOGPROBS)
    (part,) = whole.json["output"][0]["content"]
    assert part["logprobs"] == chat["logprobs"]["content"] and len(part["logprobs"]) == 10
    assert [len(entry["top_logprobs"]) for entry in part["logprobs"]] == [2] * 10
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode().strip() == part["text"].strip()
    assert whole.json["top_logprobs"] == 2 and "x-ignored-fields" not in whole.headers
    events = server.post(PATH, GREEDY | LOGPROBS | {"stream": True}).events
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for each in deltas for entry in each] == part["logprobs"] and len(deltas) > 1
    (done,) = [event["logprobs"] for event in events if event["type"] == "response.output_text.done"]
    assert done == events[-1]["response"]["output"][0]["content"][0]["logprobs"] == part["logprobs"]
    assert server.post(PATH, GREEDY).json["output"][0]["content"][0]["logprobs"] == []


def test_a_call_has_no_log_probabilities(server: Running) -> None:
    body = GREEDY | LOGPROBS | {"max_output_tokens": 60, "tools": TWO, "tool_choice": "required"}
    assert {item["type"] for item in server.post(PATH, body).json["output"]} == {"function_call"}


def test_what_cannot_be_included_is_ignored_and_what_nobody_knows_refused(server: Running) -> None:
    include = ["reasoning.encrypted_content", "message.output_text.logprobs", "file_search_call.results"]
    answer = server.post(PATH, GREEDY | {"include": include, "new": 1})
    assert answer.headers["x-ignored-fields"] == "new,include.0,include.2"
    assert answer.json["output"][0]["content"][0]["logprobs"]
    error = server.post(PATH, GREEDY | {"include": ["usage"]}).error
    assert error["param"] == "include.0" and error["code"] == "invalid_value"
    assert "'message.output_text.logprobs', 'reasoning.encrypted_content'" in error["message"]


ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "go"}]}
TWO = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("look", "go")]


@pytest.mark.parametrize("tokens", [3, 12, 30, 40, 50, 60])
def test_whole_answers_are_those_of_streams(server: Running, tokens: int) -> None:
    """Their items are in the same order, and a required call that was cut off before its name is no text."""
    body = GREEDY | {"max_output_tokens": tokens, "tools": TWO, "tool_choice": "required"}
    whole = [without_ids(item) for item in server.post(PATH, body).json["output"]]
    events = server.post(PATH, body | {"stream": True}).events
    assert whole == [without_ids(item) for item in events[-1]["response"]["output"]]
    assert [item["type"] for item in whole] == ["function_call"] * len(whole) or whole[0]["content"][0]["text"] == ""
    assert whole[-1]["status"] == "incomplete"


def without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_required_calls_of_some_tools(server: Running) -> None:
    assert converted(tools=TWO, tool_choice=ALLOWED).tool_choice.names == {"go"}
    body = GREEDY | {"max_output_tokens": 40, "tools": TWO, "tool_choice": ALLOWED}
    answer = server.post(PATH, body).json
    assert {(item["type"], item["name"]) for item in answer["output"]} == {("function_call", "go")}
    assert answer["tool_choice"] == ALLOWED and [tool["name"] for tool in answer["tools"]] == ["look", "go"]


@pytest.mark.parametrize(
    ("choice", "param", "found"),
    [
        ({"tools": [{"type": "function", "name": "run"}]}, "tool_choice", "'run', which is not among the tools: look"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tool_choice.tools.0.type", "'function'"),
        ({"tools": []}, "tool_choice.tools", "at least 1"),
        ({"mode": "any"}, "tool_choice.mode", "'auto' or 'required'"),
    ],
)
def test_wrong_lists_of_allowed_tools(server: Running, choice: dict[str, Any], param: str, found: str) -> None:
    answer = server.post(PATH, GREEDY | {"tools": TWO, "tool_choice": ALLOWED | choice})
    assert answer.status == 400 and answer.error["param"] == param and found in answer.error["message"], answer.body


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "function_call"}]}, "input.0.name"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        (LOGPROBS | {"top_logprobs": 21}, "top_logprobs"),
        ({"include": "message.output_text.logprobs"}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_wrong_fields(server: Running, body: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, GREEDY | body)
    assert answer.status == 400 and answer.error["param"] == param, answer.body


def test_events_of_reasoning_and_calls() -> None:
    writer = _Writer()
    found = [
        Reasoning("hm"), Content("a"), Content("b"), CallStart(0, "c1", "f"), CallArguments(0, "{}"),
        CallStart(1, "c2", "g"), CallArguments(1, "{}"),
    ]  # fmt: skip
    data = b"".join(writer.write([each]) for each in found) + writer.close()
    events = Answered(200, {"content-type": "text/event-stream"}, data).events
    assert [item["type"] for item in writer.items] == ["reasoning", "message", "function_call", "function_call"]
    assert writer.items[2]["name"] == "f" and writer.items[2]["call_id"] == "c1" and writer.items[3]["call_id"]
    assert writer.items[1]["content"][0]["text"] == "ab"
    opened = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    closed = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert opened == closed == [0, 1, 2, 3]


def test_input_without_a_message() -> None:
    with pytest.raises(ApiError, match="no message"):
        converted(input=[{"type": "reasoning"}])


@pytest.mark.parametrize("kind", ["function", "custom"])
def test_more_than_a_chat_may_have_is_refused(kind: str) -> None:
    """Each part keeps its limit, and the chat that they become does not."""
    with pytest.raises(ApiError, match="input: too many messages") as refused:
        converted(instructions="Be brief.", input=[{"role": "user", "content": "Tell me."}] * MAX_MESSAGES)
    assert refused.value.status == 400 and refused.value.param == "input"
    with pytest.raises(ApiError, match=r"tools\.0\.description: String should have at most"):
        converted(tools=[{"type": kind, "name": "f", "description": "d" * (MAX_SCHEMA + 1)}])
