"""Request models: limits, and hypothesis' requests, none of which may be answered with a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from numballama.model import Model
from numballama.server.answers import ANSWERS, ErrorAnswer
from numballama.server.app import POSTS
from numballama.server.errors import ApiError
from numballama.server.fields import Request, parse
from numballama.server.http import dumps
from numballama.server.messages import MessagesRequest
from numballama.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Message, template_message
from numballama.server.responses_protocol import ResponsesRequest
from numballama.server.settings import Settings
from tests.helpers.http_server import Running, eventually, serving

MESSAGES = [{"role": "user", "content": "Hi"}]


def error_of(kind: Any, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as found:
        parse(kind, dumps(body))
    return found.value


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_objects_are_bounded() -> None:
    assert parse(ChatRequest, dumps({"messages": MESSAGES, "json_schema": nested(63)}))
    assert error_of(ChatRequest, messages=MESSAGES, json_schema=nested(64)).param == "json_schema"
    assert error_of(ChatRequest, messages=MESSAGES, json_schema={"a": "b" * (256 << 10)}).param == "json_schema"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert error_of(ChatRequest, messages=MESSAGES, tools=tools * 129).param == "tools"


NOT_FINITE = '{"messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 1, '


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
@pytest.mark.parametrize(
    ("path", "field", "param"),
    [
        ("/v1/chat/completions", '"json_schema": {"default": NUMBER}', "json_schema"),
        ("/v1/chat/completions", '"chat_template_kwargs": {"x": [NUMBER]}', "chat_template_kwargs"),
        ("/v1/responses", '"text": {"format": {"type": "json_schema", "schema": {"default": NUMBER}}}',
         "text.format.schema"),
        ("/v1/messages", '"tools": [{"name": "f", "input_schema": {"default": NUMBER}}]', "tools.0.input_schema"),
    ],
)  # fmt: skip
def test_numbers_that_json_does_not_have(server: Running, path: str, field: str, param: str, number: str) -> None:
    """Python's parser takes them, and an answer that repeats one could not be written."""
    answer = server.post(path, f"{NOT_FINITE}{field.replace('NUMBER', number)}}}".encode())
    assert answer.status == 400 and answer.error["param"] == param and "finite" in answer.error["message"]


def test_choices_are_bounded() -> None:
    choices = {"choice": ["a" * 1000] * 300}
    assert error_of(CompletionRequest, prompt="a", structured_outputs=choices).param == "structured_outputs.choice"


def test_long_lists_of_wrong_items_give_one_error() -> None:
    error = error_of(CompletionRequest, prompt=[[1.5]] * 256)
    assert error.param == "prompt.0.0" and len(error.message) < 200


@pytest.mark.parametrize("prompts", [["a"] * 257, [[1]] * 257])
def test_a_list_that_is_too_long_is_named_so(prompts: list[object]) -> None:
    """Other types that a prompt may have go deeper into the list, and fail at its first item."""
    error = error_of(CompletionRequest, prompt=prompts)
    assert error.param == "prompt" and "at most 256 items" in error.message and "integer" not in error.message


def test_the_message_of_an_error_is_short() -> None:
    assert len(error_of(CompletionRequest, prompt="a", **{"x" * 100_000: 1}, n="x" * 100_000).message) < 1100


def test_unknown_fields_are_ignored_and_known_ones_refused() -> None:
    request = parse(CompletionRequest, dumps({"prompt": "a", "new": 1, "suffix": None}))
    assert request.ignored == ["new", "suffix"]
    for name in ("suffix", "chat_template", "model_path", "use_beam_search", "guided_json"):
        error = error_of(CompletionRequest, prompt="a", **{name: "x"})
        assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")


def test_unknown_fields_inside_others_are_named(server: Running) -> None:
    """They change neither the prompt nor what is repeated."""
    function: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "new": 1}}
    plain: dict[str, Any] = {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 1,
    }
    more: dict[str, Any] = {
        **plain,
        "messages": [MESSAGES[0] | {"name": None, "refusal": None, "annotations": [], "weight": 2}],
        "tools": [{"type": "function", "function": function | {"cache": {"a": 1}}, "é": 1}],
        "stream_options": {"continuous_usage_stats": True},
    }
    answers = [server.post("/v1/chat/completions", body) for body in (plain, more)]
    assert answers[1].headers["x-ignored-fields"] == (
        "stream_options.continuous_usage_stats,messages.0.weight,tools.0.function.cache"
    )
    assert "x-ignored-fields" not in answers[0].headers
    assert len({each.json["usage"]["prompt_tokens"] for each in answers}) == 1
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    body = {"input": "a", "max_output_tokens": 1, "tools": [tools[0] | {"new": 1}]}
    answer = server.post("/v1/responses", body)
    assert answer.headers["x-ignored-fields"] == "tools.0.new" and answer.json["tools"] == tools


def test_messages_for_templates() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "[1]"}}
    found = template_message(Message.model_validate_json(json.dumps({"role": "assistant", "tool_calls": [call]})))
    assert found["content"] == "" and found["tool_calls"][0]["function"]["arguments"] == "[1]"


# Hypothesis

STRANGE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.lists(st.integers(-3, 5000), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
TEXT = st.text(max_size=12)
PROMPT = st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.lists(st.integers(0, 4096), min_size=1, max_size=5))
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text", "image_url"]), "text": TEXT})
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
CALL = st.fixed_dictionaries({"id": TEXT, "function": st.fixed_dictionaries({"name": st.just("f"), "arguments": TEXT})})
CHAT_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLE, "content": st.one_of(TEXT, st.lists(PART, max_size=2), st.none())},
        optional={"tool_calls": st.lists(CALL, max_size=2), "name": TEXT, "reasoning_content": TEXT},
    ),
    max_size=3,
)
SCHEMA = st.sampled_from([{}, {"type": "object"}, {"type": "string"}, {"type": 3}, {"$ref": "#/x"}])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 3),
    "max_completion_tokens": st.integers(0, 3),
    "max_output_tokens": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
    "stop_sequences": st.lists(TEXT, max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 10**6), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 20)),
    "top_logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 5000).map(str), st.floats(-100, 100), max_size=3),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "min_tokens": st.integers(0, 4),
    "ignore_eos": st.booleans(),
    "priority": st.integers(-5, 5),
    "cache_salt": TEXT,
    "special": st.booleans(),
    "prompt": PROMPT,
    "content": TEXT,
    "messages": CHAT_MESSAGES,
    "input": st.one_of(TEXT, CHAT_MESSAGES),
    "system": TEXT,
    "instructions": TEXT,
    "tokens": st.lists(st.integers(0, 5000), max_size=5),
    "add_generation_prompt": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["a", "tools", "x y", "enable_thinking"]), STRANGE),
    "response_format": st.one_of(
        st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}),
        st.fixed_dictionaries(
            {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMA})}
        ),
    ),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries({"name": st.just("f"), "parameters": SCHEMA}),
            }
        ),
        max_size=2,
    ),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "metadata": st.dictionaries(TEXT, TEXT, max_size=2),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path and a body: mostly right, sometimes with a strange value or a field that does not exist."""
    path = draw(st.sampled_from(list(POSTS)))
    names = set(POSTS[path][0].model_fields)
    known = {name: values for name, values in FIELDS.items() if name in names}
    needed = {name for name, field in POSTS[path][0].model_fields.items() if field.is_required()} & set(known)
    chosen = needed | set(draw(st.lists(st.sampled_from(sorted(known)), max_size=6)))
    body = {name: draw(known[name]) for name in sorted(chosen)}
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from(sorted(names)))] = draw(STRANGE)
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=5))] = draw(STRANGE)
    if "max_tokens" in names:  # keep answers short
        body.setdefault("max_tokens", 2)
    return path, body


@pytest.fixture(scope="module")
def fuzzed(model: Model) -> Iterator[Running]:
    with serving(model, Settings(queue_sequences=1000)) as server:
        yield server
        eventually(lambda: server.idle, "the end of all requests")


@settings(max_examples=300)
@given(request=requests())
def test_no_request_makes_the_server_fail(fuzzed: Running, request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    if path == "/v1/responses":
        body.setdefault("max_output_tokens", 2)
    answer = fuzzed.post(path, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert answer.status in (200, 400), answer.body
    if answer.status == 400:
        ErrorAnswer.model_validate(answer.json, strict=True)
        assert answer.error["type"] == "invalid_request_error"
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.events and not [event for event in answer.events if event.get("error")]
    else:
        ANSWERS[path].model_validate(answer.json, strict=True)


WRONG = b"[" + b"{}," * 1023 + b"{}]"


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (DetokenizeRequest, b'{"tokens": [' + b'"a",' * 200_000 + b'"a"]}', "tokens.0"),
        (ChatRequest, b'{"messages": [' + b'{"role": "user", "content": %b},' % WRONG * 100 + b"{}]}", "messages.0"),
        (ResponsesRequest, b'{"input": [' + b'{"content": %b},' % WRONG * 100 + b"{}]}", "input.0"),
        (
            MessagesRequest,
            b'{"messages": [' + b'{"role": "user", "content": %b},' % WRONG * 100 + b"{}]}",
            "messages.0",
        ),
        (
            CompletionRequest,
            b'{"prompt": "a", "logit_bias": {' + b",".join(b'"x%d": 1' % n for n in range(100_000)) + b"}}",
            "logit_bias",
        ),
        (
            ResponsesRequest,
            b'{"input": "a", "metadata": {' + b",".join(b'"x%d": 1' % n for n in range(100_000)) + b"}}",
            "metadata",
        ),
    ],
)
def test_what_is_wrong_many_times_is_one_error(kind: type[Request], body: bytes, param: str) -> None:
    """Pydantic would make an error of each wrong item: 8 MB of them took a minute and 4 GB."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate_json(body)
    assert found.value.error_count() < 5000
    with pytest.raises(ApiError) as refused:
        parse(kind, body)
    assert refused.value.status == 400 and (refused.value.param or "").startswith(param)
