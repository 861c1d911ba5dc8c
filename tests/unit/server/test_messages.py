"""/v1/messages: requests and answers converted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from numballama.model import Model
from numballama.server.answers import MessagesAnswer
from numballama.server.chat import WholeMessage
from numballama.server.chat_core import ChatPiece
from numballama.server.errors import ApiError
from numballama.server.fields import MAX_MESSAGES, MAX_SCHEMA, MAX_TOOLS, parse
from numballama.server.http import dumps
from numballama.server.messages import MessagesRequest, _content, _Writer, chat_request
from numballama.server.protocol import template_message
from numballama.server.tools.events import CallArguments, CallStart, Content, Reasoning
from tests.helpers.http_server import Answered, Running

PATH = "/v1/messages"
GREEDY: dict[str, Any] = {
    "model": "m", "messages": [{"role": "user", "content": "Tell me of a dog."}], "temperature": 0, "max_tokens": 10,
}  # fmt: skip


def converted(**body: Any) -> Any:
    return chat_request(parse(MessagesRequest, dumps(GREEDY | body)))


def test_an_answer(server: Running) -> None:
    answer = server.post(PATH, GREEDY | {"system": "Be brief."}).json
    MessagesAnswer.model_validate(answer, strict=True)
    messages = [{"role": "system", "content": "Be brief."}, *GREEDY["messages"]]
    chat = server.post("/v1/chat/completions", GREEDY | {"messages": messages}).json
    assert answer["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["stop_reason"] == "max_tokens" and usage["output_tokens"] == 10
    counted = server.post(f"{PATH}/count_tokens", {"system": "Be brief.", "messages": GREEDY["messages"]}).json
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_streamed_is_not_streamed(server: Running) -> None:
    word = server.post(PATH, GREEDY).json["content"][0]["text"].split()[2]
    body = GREEDY | {"stop_sequences": [word]}
    whole, events = server.post(PATH, body).json, server.post(PATH, body | {"stream": True}).events
    assert whole["stop_reason"] == "stop_sequence" and whole["stop_sequence"] == word
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": word}
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


SCHEMA = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_format_is_enforced(server: Running, name: str) -> None:
    form: dict[str, Any] = {"type": "json_schema", "schema": SCHEMA}
    body = GREEDY | {name: {"format": form} if name == "output_config" else form, "max_tokens": 30}
    answer = server.post(PATH, body).json
    assert json.loads(answer["content"][0]["text"]) == {"a": 7} and answer["stop_reason"] == "end_turn"
    form["schema"] = {"type": "array", "uniqueItems": True}
    error = server.post(PATH, body).error
    assert error["param"] == "output_config.format"
    assert error["message"].startswith("output_config.format: 'uniqueItems' at # is not enforced")


def test_an_answer_continues_a_last_message_of_the_assistant(server: Running) -> None:
    beginning = {"role": "assistant", "content": "Once there was a dog"}
    body = GREEDY | {"messages": [*GREEDY["messages"], beginning]}
    chat = server.post("/v1/chat/completions", body | {"continue_final_message": True}).json
    answer = server.post(PATH, body).json
    assert answer["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (
        answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    )


def test_blocks_are_in_the_order_in_which_they_were_written() -> None:
    message = WholeMessage()
    written = [Content("a"), CallStart(0, "c0", "f"), CallArguments(0, '{"x"'), CallArguments(0, ": 1}"), Content("b")]
    message.add(ChatPiece(0, [*written, Content("c"), CallStart(1, "c1", "g"), CallArguments(1, '{"y')]))
    assert _content(message) == [
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "c0", "name": "f", "input": {"x": 1}},
        {"type": "text", "text": "bc"},
        {"type": "tool_use", "id": "c1", "name": "g", "input": {}},
    ]


@pytest.mark.parametrize("tokens", [3, 12, 30, 50])
def test_a_call_that_was_cut_is_no_text(server: Running, tokens: int) -> None:
    tool = {"name": "look", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
    body = GREEDY | {"max_tokens": tokens, "tools": [tool], "tool_choice": {"type": "any"}}
    answer = server.post(PATH, body).json
    assert {block["type"] for block in answer["content"]} <= {"tool_use"}
    events = server.post(PATH, body | {"stream": True}).events
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["tool_use"] * len(answer["content"])


def test_a_call_that_a_stop_sequence_cuts_is_none_to_make(server: Running) -> None:
    form = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    body = GREEDY | {"max_tokens": 80, "tools": [{"name": "look", "input_schema": form}], "stop_sequences": ['"x"']}
    body["tool_choice"] = {"type": "any"}
    answer = server.post(PATH, body).json
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", '"x"')
    ends = [event["delta"] for event in server.post(PATH, body | {"stream": True}).events if "usage" in event]
    assert ends == [{"stop_reason": "stop_sequence", "stop_sequence": '"x"'}]


def test_the_context_ends_an_answer(server: Running, model: Model) -> None:
    """The prompt leaves room for a few tokens, too few to end the story."""
    words = {"role": "user", "content": "the dog " * 238}
    answers = [server.post(PATH, GREEDY | {"messages": [words], "max_tokens": most}).json for most in (1, 1000)]
    assert [each["stop_reason"] for each in answers] == ["max_tokens", "model_context_window_exceeded"]
    assert sum(answers[1]["usage"].values()) == model.context + 1  # the last token is never read


def test_blocks_become_messages() -> None:
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}, use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}]},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    system = [{"type": "text", "text": "s"}]
    assert [template_message(message) for message in converted(system=system, messages=turns).messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u\nv"},
        {"role": "assistant", "content": "a", "reasoning_content": "t", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


def test_turns_of_one_role_in_a_row_are_one(server: Running) -> None:
    """So Anthropic's reference says. Many chat templates refuse them otherwise."""
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "2"}
    turns = [
        {"role": "user", "content": "u"},
        {"role": "user", "content": [{"type": "text", "text": "v"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, use]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [result]},
        {"role": "user", "content": "w"},
    ]
    found = [template_message(message) for message in converted(messages=turns).messages]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert found == [
        {"role": "user", "content": "u\nv"},
        {"role": "assistant", "content": "a\nb", "reasoning_content": "t", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "user", "content": "w"},
    ]
    assert server.post(PATH, GREEDY | {"messages": turns[:2]}).status == 200


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none")],
)
def test_tool_choices(given: dict[str, Any], expected: str) -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    request = converted(tools=tools, tool_choice=given | {"disable_parallel_tool_use": True})
    assert request.tool_choice == expected and request.parallel_tool_calls is False
    assert request.tools[0].function.parameters == {"type": "object"}
    assert converted(tools=tools, tool_choice={"type": "tool", "name": "f"}).tool_choice.function.name == "f"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ],
)
def test_wrong_fields(server: Running, body: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, GREEDY | body)
    assert answer.status == 400 and answer.error["param"] == param, answer.body


def test_events_of_reasoning_and_calls() -> None:
    writer = _Writer()
    found = [
        Reasoning("hm"), Content("a"), CallStart(0, "c1", "f"), CallArguments(0, "{"), CallArguments(0, "}"),
        CallStart(1, "c2", "g"),
    ]  # fmt: skip
    data = b"".join(map(writer.write, found)) + writer.close()
    events = Answered(200, {"content-type": "text/event-stream"}, data).events
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == ["thinking_delta", "text_delta", "input_json_delta", "input_json_delta"]


TURN = {"role": "user", "content": "Tell me."}
CALLS = [{"type": "tool_use", "id": str(number), "name": "f", "input": {}} for number in range(MAX_TOOLS + 1)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [TURN, {"role": "assistant", "content": CALLS}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": 900 * [{"type": "tool_result", "content": "1"}]}] * 3}, "messages"),
        (
            {"messages": [TURN, {"role": "assistant", "content": "No."}] * (MAX_MESSAGES // 2), "system": "s"},
            "messages",
        ),
        ({"messages": [{"role": "assistant", "content": CALLS[:100]}] * 2}, "messages.1.content"),
        (
            {"tools": [{"name": "f", "description": "d" * (MAX_SCHEMA + 1), "input_schema": {}}]},
            "tools.0.description",
        ),
    ],
)
def test_more_than_a_chat_may_have_is_refused(body: dict[str, Any], param: str) -> None:
    """Each part keeps its limit, and the chat that they become does not."""
    with pytest.raises(ApiError) as refused:
        converted(**body)
    assert refused.value.status == 400 and refused.value.param == param


def test_numbers_that_json_does_not_have_are_null() -> None:
    message = WholeMessage()
    message.add(ChatPiece(0, [CallStart(0, "call_1", "f"), CallArguments(0, '{"a": [NaN, 1e999, -Infinity, 1.5]}')]))
    (block,) = json.loads(dumps(_content(message)))
    assert block["input"] == {"a": [None, None, None, 1.5]}
