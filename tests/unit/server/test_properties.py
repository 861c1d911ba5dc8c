"""Properties of answers: parts of streams are the whole, usage is what was counted, cached pages change nothing."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.model import Model
from numballama.server.settings import Settings
from tests.helpers.http_server import Running, eventually, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{# ends with </think> #}"
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("look", "go")]
CALL = r'\{"name": "(look|go)", "arguments": \{"x": [1-9]{1,3}\}\}'
SHAPES = [None, CALL, rf"{CALL}\n{CALL}", "<think>[a-z ]{1,9}</think>[a-z é→]{1,12}", "[a-z ]{5,20}", "(é|→|😀){1,5}"]
STOPS = st.lists(st.sampled_from([" the", "e", ", ", "a l", ".", "zebra", "T", "\n", "😀"]), max_size=3, unique=True)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31),
    "temperature": st.sampled_from([0, 1, 2]),
    "max_tokens": st.integers(1, 40),
    "n": st.integers(1, 2),
    "stop": STOPS,
    "regex": st.sampled_from(SHAPES),
}


@pytest.fixture(scope="module")
def thinking(model: Model) -> Iterator[Running]:
    """A server whose template has reasoning."""
    with serving(model, Settings(chat_template=THINKS, queue_sequences=100)) as running:
        yield running
        eventually(lambda: running.idle, "the end of all requests")


def whole_of(choice: dict[str, Any]) -> dict[str, Any]:
    """What a choice says: text, reasoning, calls, why it ended, and its tokens."""
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    text, reasoning = message["content"] or "", message.get("reasoning_content", "")
    return {"text": text, "reasoning": reasoning, "calls": calls, "tokens": tokens, "why": choice["finish_reason"]}


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of the choices of chunks."""
    found: dict[str, Any] = {"text": "", "reasoning": "", "calls": [], "tokens": [], "why": None}
    for choice in choices:
        delta = choice["delta"]
        found["text"] += delta.get("content") or ""
        found["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or []:
            if "id" in call:
                found["calls"].append({"name": call["function"]["name"], "arguments": ""})
            found["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        if choice["logprobs"] is not None:
            found["tokens"] += [entry["token"] for entry in choice["logprobs"]["content"]]
        found["why"] = choice["finish_reason"] or found["why"]
    return found


@settings(max_examples=15)
@given(body=st.fixed_dictionaries(OPTIONS), tools=st.booleans())
def test_the_parts_of_a_chat_are_the_whole(thinking: Running, body: dict[str, Any], tools: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Once upon a time"}], "logprobs": True} | body
    if tools:
        body["tools"] = TOOLS
    answer = thinking.post(CHAT, body)
    assert answer.status == 200, answer.body
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = thinking.post(CHAT, stream).events
    found = [whole_of(choice) for choice in answer.json["choices"]]
    parts = [choice for event in events for choice in event["choices"]]
    assert found == [joined([each for each in parts if each["index"] == index]) for index in range(body["n"])]
    usage = answer.json["usage"]
    assert (
        usage["completion_tokens"] == last["usage"]["completion_tokens"] == sum(len(each["tokens"]) for each in found)
    )
    asked = {"messages": body["messages"], "tools": TOOLS if tools else []}
    assert usage["prompt_tokens"] == thinking.post("/tokenize", asked).json["count"]
    assert not [stop for stop in body["stop"] for each in found if not tools and stop in each["text"]]


@settings(max_examples=15)
@given(body=st.fixed_dictionaries(OPTIONS), echo=st.booleans())
def test_the_parts_of_a_completion_are_the_whole(thinking: Running, body: dict[str, Any], echo: bool) -> None:
    """llama.cpp #10914, PR #9867, #13780, #10720: text of a stream that is doubled, lost, or of a stop string."""
    body = {"prompt": ["One day", "A dog"], "logprobs": 0, "echo": echo} | body
    answer = thinking.post(TEXT, body)
    assert answer.status == 200, answer.body
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = thinking.post(TEXT, stream).events
    assert len(answer.json["choices"]) == 2 * body["n"]
    counted = 0
    for choice in answer.json["choices"]:
        own = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [token for each in own if each["logprobs"] for token in each["logprobs"]["tokens"]] == (
            choice["logprobs"]["tokens"]
        )
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        counted += len(choice["logprobs"]["tokens"])
    usage, prompts = (
        answer.json["usage"],
        [thinking.post("/tokenize", {"prompt": text}).json["count"] for text in body["prompt"]],
    )
    assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"] == sum(prompts)
    assert usage["completion_tokens"] == last["usage"]["completion_tokens"]
    assert usage["completion_tokens"] == counted - (sum(prompts) * body["n"] if echo else 0)


FAMILY, CHUNK = 4, 64
"""On a CPU, runs of this many rows and more share kernels, so they share bits; a prompt is computed in chunks."""


def last_rows(tokens: int) -> int:
    """Rows of the last chunk of this many tokens."""
    return (tokens - 1) % CHUNK + 1


@settings(max_examples=30)
@given(data=st.data())
def test_cached_pages_never_change_logits(thinking: Running, data: st.DataObject) -> None:
    """vLLM #7900, #9918, #8230: wrong values with a prefix cache only."""
    token = st.integers(3, 4000)
    prompt = data.draw(st.lists(token, min_size=34, max_size=100))
    shared = data.draw(st.integers(0, len(prompt)))
    other = prompt[:shared] + data.draw(st.lists(token, max_size=40))
    salt = uuid.uuid4().hex  # not drawn: an example that is tried again must find nothing
    body = {"max_tokens": 4, "temperature": 0, "logprobs": 5}
    thinking.post(TEXT, body | {"prompt": other or [1], "cache_salt": f"{salt} a"})
    with_pages, without = (
        thinking.post(TEXT, body | {"prompt": prompt, "cache_salt": f"{salt} {name}"}).json for name in "ab"
    )
    assert without["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert with_pages["usage"]["prompt_tokens_details"]["cached_tokens"] >= min(shared, len(prompt) - 1) // 32 * 32
    (one,), (other_one,) = with_pages["choices"], without["choices"]
    assert one["text"] == other_one["text"]
    a, b = (entry["logprobs"]["token_logprobs"] for entry in (one, other_one))
    cached = with_pages["usage"]["prompt_tokens_details"]["cached_tokens"]
    if all(last_rows(computed) >= FAMILY for computed in (len(prompt) - cached, len(prompt))):
        assert a == b
    else:  # runs of fewer rows have kernels of their own: docs/engine.md
        assert a == pytest.approx(b, abs=1e-4)
