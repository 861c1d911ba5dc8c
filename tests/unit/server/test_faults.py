"""Faults that users of other servers report, by the number of the report. Other files name those that they test."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from typing import Any

import pytest

from numballama.model import Model
from numballama.server.settings import Settings
from tests.helpers.http_server import Running, eventually, serving

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Tell me of a dog."}]
GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 80}


def content_of(answer: Any) -> str:
    found: str = answer["choices"][0]["message"]["content"]
    return found


def deltas_of(events: list[Any]) -> list[dict[str, Any]]:
    return [choice["delta"] for event in events for choice in event["choices"]]


# Clients that leave, and what stays of them


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_generated_for_a_client_that_left_before_its_first_token(
    server: Running, model: Model, stream: bool
) -> None:
    """llama.cpp #24496, #13262."""
    before = server.stats.generated_tokens
    with model.exclusive():  # the prompt is not computed meanwhile
        body = {"prompt": [9] * 300, "max_tokens": 100, "ignore_eos": True, "stream": stream}
        connection = server.begin(TEXT, body)
        eventually(lambda: server.service.admission.tokens == 300, "the request")
        connection.close()
        eventually(lambda: not server.service.admission.sequences, "the end of the request")
    eventually(lambda: server.idle, "the end of the engine's work")
    assert server.stats.generated_tokens == before


def test_nothing_stays_of_requests_that_have_ended(model: Model) -> None:
    """vLLM #44175, #28726, #15085, #50150: a little more memory with each request."""

    def objects() -> Counter[str]:
        gc.collect()
        modules = ((type(each).__qualname__, type(each).__module__) for each in gc.get_objects())
        return Counter(name for name, module in modules if str(module).startswith("numballama."))

    def requests(server: Running) -> None:
        for number in range(10):
            stream = number % 2 == 0
            prompt = [5 + number] * 40
            assert server.post(TEXT, {"prompt": prompt, "max_tokens": 2, "stream": stream}).status == 200
            assert server.post(CHAT, GREEDY | {"max_tokens": 2, "stream": stream, "n": 2}).status == 200
            assert server.post(CHAT, GREEDY | {"temperature": -1}).status == 400
            server.begin(TEXT, {"prompt": prompt, "max_tokens": 400, "stream": stream}).close()
        eventually(lambda: server.idle, "the end of all requests")

    with serving(model) as server:
        requests(server)  # some things are made once
        before = objects()
        requests(server)
        eventually(lambda: objects() <= before, "the end of all objects")


# Text in pieces


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_characters_of_several_tokens_stay_whole(server: Running, path: str) -> None:
    """llama.cpp PR #28926, lucebox PR #641. These characters are written in bytes."""
    text = "é→😀."
    body = GREEDY | {"prompt": "Once", "regex": text.replace(".", r"\."), "logprobs": True if path == CHAT else 1}
    body = {name: value for name, value in body.items() if name != ("prompt" if path == CHAT else "messages")}
    (choice,) = server.post(path, body).json["choices"]
    events = server.post(path, body | {"stream": True}).events
    if path == TEXT:
        assert choice["text"] == text and len(choice["logprobs"]["tokens"]) > len(text)
        parts = [choice["text"] for event in events for choice in event["choices"]]
    else:
        assert choice["message"]["content"] == text
        data = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
        assert data.decode() == text and len(choice["logprobs"]["content"]) > len(text)
        parts = [delta.get("content") or "" for delta in deltas_of(events)]
    assert "".join(parts) == text and "�" not in "".join(parts)


def test_arguments_of_characters_of_several_tokens(server: Running) -> None:
    """llama.cpp PR #28926."""
    tools = [{"type": "function", "function": {"name": "say", "parameters": {"type": "object"}}}]
    body = GREEDY | {"tools": tools, "regex": r'\{"name": "say", "arguments": \{"x": "→😀"\}\}'}
    (call,) = server.post(CHAT, body).json["choices"][0]["message"]["tool_calls"]
    deltas = deltas_of(server.post(CHAT, body | {"stream": True}).events)
    parts = [made["function"]["arguments"] for delta in deltas for made in delta.get("tool_calls", ())]
    assert "".join(parts) == call["function"]["arguments"] == '{"x": "→😀"}' and len(parts) >= 2


# Structured output: enforced, or refused

SCHEMAS: list[tuple[str, Any, str | None]] = [
    ("llama.cpp #27580", {"type": "string", "pattern": r"^\d{3}-\d$"}, r'"\d{3}-\d"'),
    ("llama.cpp #25746", {"type": "string", "pattern": "^(a(b|c)){2}d$", "maxLength": 2000}, None),
    ("llama.cpp #25746", {"type": "string", "pattern": "^x{2001}$"}, r'"x{1,2001}"?'),
    ("sglang #37707", {"type": "string", "pattern": "^a+$", "minLength": 5, "maxLength": 6}, None),
    ("sglang #37707", {"type": "string", "minLength": 5, "maxLength": 5}, r'"([^"\\]|\\.){5}"'),
    ("llguidance #265",
     {"type": "object", "patternProperties": {"^a$": {"enum": [7]}}, "additionalProperties": False},
     r'\{("a": ?7(, ?"a": ?7)*[,}]? ?|\}?)'),
    ("llama.cpp #19051", {"type": "array", "uniqueItems": True}, None),
    ("llama.cpp #7789", {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3},
     r"\[[12](, ?[12]){2}\]"),
]  # fmt: skip


@pytest.mark.parametrize(("report", "schema", "pattern"), SCHEMAS)
def test_a_schema_is_enforced_or_refused(server: Running, report: str, schema: Any, pattern: str | None) -> None:
    """Never ignored. With a `pattern`, it must be enforced."""
    jsonschema = pytest.importorskip("jsonschema")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = server.post(CHAT, GREEDY | {"response_format": form, "max_tokens": 200})
    if answer.status == 400 and pattern is None:
        assert answer.error["param"] == "response_format"
        assert set(re.findall(r"\w+", answer.error["message"])) & set(schema)  # it names the keyword
        return
    assert answer.status == 200, answer.body
    text = content_of(answer.json)
    assert re.fullmatch(pattern or ".*", text, re.DOTALL), text
    if answer.json["choices"][0]["finish_reason"] == "length":
        assert pattern is not None  # as far as it came, it is right
    else:
        jsonschema.validate(json.loads(text), schema)


# Prompts in the cache


@pytest.mark.parametrize("length", [64, 129])  # 128 tokens are one run, so the last run is the same both times
def test_a_prompt_that_is_cached_as_a_whole(server: Running, length: int) -> None:
    """nano-vllm #144: nothing was left to compute. One token always is."""
    body = {"prompt": [30 + length] * length, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    first, second = (server.post(TEXT, body).json for _ in range(2))
    assert first["choices"] == second["choices"]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second)]
    assert cached == [0, (length - 1) // 32 * 32]


def test_the_next_turn_finds_the_turn_before(model: Model) -> None:
    """llama.cpp #3738, #4329, #14113, #15082, #23030: all whole pages of the prompt and of the answer, where the text
    of the answer gives the tokens again that the model chose."""
    messages: list[Any] = [{"role": "user", "content": "Once upon a time"}]
    body = GREEDY | {"max_tokens": 100, "logprobs": True}
    with serving(model, Settings(chat_template=PLAIN, api_keys=("key",))) as server:
        bearer = {"Authorization": "Bearer key"}  # it is a part of what pages are found by
        first = server.post(CHAT, body | {"messages": messages}, **bearer).json
        messages += [first["choices"][0]["message"], {"role": "user", "content": " The end"}]
        told = {"messages": messages, "return_token_strs": True}
        read = [piece.replace("▁", " ") for piece in server.post("/tokenize", told, **bearer).json["token_strs"]]
        second = server.post(CHAT, body | {"messages": messages}, **bearer).json
    count = first["usage"]["prompt_tokens"]
    read = ["\n" if piece == "<0x0A>" else piece for piece in read]
    written = [entry["token"] for entry in first["choices"][0]["logprobs"]["content"]]
    assert read[count : count + 90] == written[:90]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second)]
    assert cached == [0, (count + 99) // 32 * 32]  # the last token was never read


# Hostile requests


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(" * 60_000 + "a" + ")" * 60_000},  # llama.cpp #26600
    {"regex": "[a-"},  # vLLM #17313, #19270
    {"regex": "*"},
    {"grammar": "root ::= root root"},  # llama.cpp #25960
    {"grammar": "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000},
    {"n": 10**9},  # CVE-2026-34756
    {"n_discard": -(2**31)},  # CVE-2026-21869
    {"chat_template": "{{ ''.__class__.__mro__ }}"},  # CVE-2024-34359, CVE-2026-5760
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"json_schema": {"$ref": "https://example.invalid/schema"}},
    {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: f"{body}"[:60])
def test_a_hostile_request_ends_alone(server: Running, body: dict[str, Any]) -> None:
    """It is refused, or does nothing; the server goes on."""
    answer = server.post(CHAT, GREEDY | {"max_tokens": 4} | body)
    if "n_discard" in body:
        assert answer.status == 200 and answer.headers["x-ignored-fields"] == "n_discard"
    else:
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error", answer.body
    assert server.get("/health").status == 200
    assert server.post(CHAT, GREEDY | {"max_tokens": 1}).status == 200


def test_other_sites_get_no_leave_to_read(model: Model) -> None:
    """llama.cpp PR #25606, PR #25655: the Origin header was sent back, with leave to send credentials."""
    with serving(model, Settings(api_keys=("key",))) as server:
        for origin in ("http://evil.example", "null"):
            headers = {"Origin": origin, "Authorization": "Bearer key", "Access_Control_Request_Method": "POST"}
            for method, path in (("OPTIONS", CHAT), ("GET", "/v1/models")):
                answer = server.request(method, path, **headers)
                assert not [name for name in answer.headers if name.startswith("access-control")]
