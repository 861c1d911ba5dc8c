"""Whatever a model writes, the parts of a streamed answer are those of the whole one, in all three protocols.

The texts are made of halves of calls, of JSON, of markers of reasoning, of control tokens, and of characters in bytes.
They are tokens that a `ForcedEngine` gives, so many at a time as an example says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

import numballama
from numballama.model import Model
from numballama.server import messages
from numballama.server.app import create_app
from numballama.server.http import dumps
from numballama.server.service import Service
from numballama.server.settings import Settings
from numballama.tokenizers.base import Tokenizer
from tests.helpers.bpe import chat_model
from tests.helpers.forced_engine import ForcedEngine, post
from tests.helpers.tool_texts import FRAGMENTS, SPELLED, TEMPLATES, TIME, WEATHER, arguments

pytestmark = pytest.mark.slow
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SAID = [{"role": "user", "content": "Hi"}]
TOOLS: list[dict[str, Any]] = [WEATHER, TIME, {"type": "custom", "custom": {"name": "code"}}]
RENDERED = "{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{{% if never %}}{}{{% endif %}}"
SOURCES = {name: RENDERED.format(source) for name, source in TEMPLATES.items()}
SOURCES["qwen3 inside"] = SOURCES["qwen3"] + "{% if add_generation_prompt %}<think>\n{% endif %}"
"""Chat templates by the format of calls that they tell. The last ends prompts inside reasoning."""
CUT = [
    "<tool", "_call>", "</tool_c", "all>", "<thi", "nk>", "</th", "ink>", "[TOOL_", "CALLS]", "[AR", "GS]", "```js",
    "on\n", '{"name": "get_wea', 'ther", "argu', 'ments": {"city": "Os', 'lo"}}', '{"name": "code", "arguments": ',
    '{"input": "a\\u00', 'e9\\n\\"\\ud83d', '\\ude42"}}', '{"input": "x"}', "\\ud8", "end", "<|im_end", "|>",
]  # fmt: skip
"""What a text may break in its midst."""


class Forced(NamedTuple):
    """Applications by template, whose engine is `engine`."""

    apps: dict[str, Starlette]
    engine: ForcedEngine
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=["text", "control"])
def forced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forced]:
    """Markers of calls and of reasoning are text, or control tokens of the vocabulary."""
    path = chat_model(tmp_path_factory.mktemp("model"), 4096, controls=request.param == "control")  # for the tools
    with numballama.compile(path, device="reference") as model, pytest.MonkeyPatch.context() as patch:
        engine = ForcedEngine(model)
        patch.setattr(Model, "engine", lambda self: engine)
        patch.setattr(Service, "pause", lambda self, _: asyncio.sleep(0))  # sizes say what comes together, not the time
        apps = {name: create_app(model, Settings(chat_template=source)) for name, source in SOURCES.items()}
        yield Forced(apps, engine, model.require_tokenizer())
        for app in apps.values():
            app.state.service.close()


TEMPLATE = st.sampled_from([*SOURCES, "qwen3", "qwen3 inside", "magistral"])
"""Those with reasoning twice as often."""
FORMAT_OF_CALLS = {"qwen3": "hermes", "qwen3 inside": "hermes", "magistral": "mistral named"}
"""Template → name in `SPELLED`, where it is another."""


@st.composite
def hostile(draw: st.DrawFn, template: str) -> str:
    """Reasoning, calls and other text; half of the texts have something cut out or put in."""
    spelled = SPELLED[FORMAT_OF_CALLS.get(template, template)]
    inputs = st.builds(json.dumps, st.fixed_dictionaries({"input": st.sampled_from(FRAGMENTS) | st.text(max_size=8)}))
    called = st.tuples(st.sampled_from(["get_weather", "time", "code", "other"]), arguments | inputs)
    call = called.map(lambda given: spelled.replace("get_weather", given[0]).format(given[1]))
    junk = st.sampled_from(FRAGMENTS) | st.sampled_from(CUT) | st.text(max_size=3)
    marks = ("[THINK]", "[/THINK]") if template == "magistral" else ("<think>", "</think>")
    reasoning = st.tuples(st.sampled_from([marks[0], ""]), junk, st.sampled_from([marks[1], ""])).map("".join)
    between = st.sampled_from(["\n", "; ", ", ", ""])
    first, parts = (
        draw(st.just("") | reasoning | junk),
        draw(st.lists(call | call | reasoning | junk, min_size=1, max_size=4)),
    )
    text = first + draw(call) + "".join(draw(between) + part for part in parts)
    for place in draw(st.just([]) | st.lists(st.integers(0, len(text)), min_size=1, max_size=3)):
        text = text[:place] + draw(junk | st.just("")) + text[place + draw(st.integers(0, 3)) :]
    return text


@st.composite
def tokens(draw: st.DrawFn, tokenizer: Tokenizer, template: str) -> list[int]:
    """Tokens of a hostile text: as the tokenizer makes them of its parts, one character at a time, or byte by byte."""

    def encoded(part: str, how: str) -> list[int]:
        if how == "whole":
            return tokenizer.encode(part, special=True)
        if how == "characters":
            return [token for character in part for token in tokenizer.encode(character)]
        return [token for byte in part.encode() if (token := tokenizer._byte_token(byte)) is not None]

    text = draw(hostile(template))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    found: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += encoded(text[start:end], draw(st.sampled_from(["whole", "whole", "characters", "bytes"])))
    for token in draw(st.just([]) | st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=2)):
        found.insert(draw(st.integers(0, len(found))), token)
    return found + draw(st.sampled_from([[], sorted(tokenizer.eog_ids)[-1:]])) or [0]


SIZES = st.sampled_from([[1], [1000]]) | st.lists(st.integers(1, 6), min_size=1, max_size=6)
STOPS: st.SearchStrategy[list[str]] = st.just([]) | st.sampled_from(
    [["}}", "🙂"], ["</", "<|im_end|>"], ["lo", "\ufffd"], ["]"], ["time"], ["\n"]]
)
"""Strings that end a text."""


def twice(
    forced: Forced, data: st.DataObject, path: str, body: dict[str, Any], n: int = 1
) -> tuple[dict[str, Any], list[Any]]:
    """(the whole answer, events of the stream) of the same tokens, which come in other pieces each time."""
    template = data.draw(TEMPLATE, "template")
    app = forced.apps[template]
    forced.engine.answers = [data.draw(tokens(forced.tokenizer, template), "tokens") for _ in range(n)]
    forced.engine.sizes = data.draw(st.sampled_from([[1], [1000]]), "sizes of the whole")
    whole = post(app, path, body)
    assert whole.status == 200, whole.body
    forced.engine.sizes = data.draw(SIZES, "sizes of the stream")
    stream = post(app, path, body | {"stream": True})
    assert stream.status == 200, stream.body
    return whole.json, stream.events


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice of a whole answer, of the choices of chunks."""
    message: dict[str, Any] = {"role": "", "content": "", "reasoning_content": ""}
    calls: list[dict[str, Any]] = []
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    for choice in choices[:-1]:
        assert choice["finish_reason"] is None and choice["delta"]
        (*others, (name, value)) = choice["delta"].items()
        assert not others or choice is choices[0]
        if name != "tool_calls":
            assert value or choice is choices[0]
            message |= {field: message[field] + text for field, text in choice["delta"].items()}
            continue
        (made,) = value
        kind, text_name = ("custom", "input") if "custom" in made else ("function", "arguments")
        if "id" in made:
            assert made["index"] == len(calls) and made[kind][text_name] == ""
            calls.append({"id": made["id"], "type": made["type"], kind: dict(made[kind])})
        else:
            assert made["index"] == len(calls) - 1 and set(made[kind]) == {text_name} and made[kind][text_name]
            calls[-1][kind][text_name] += made[kind][text_name]
    last = choices[-1]
    assert last["delta"] == {} and last["finish_reason"] is not None
    return {
        "message": plain(message | ({"tool_calls": calls} if calls else {})),
        "finish_reason": last["finish_reason"],
        "stop_reason": last["stop_reason"],
    }


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without ids, which are random, and without what is empty. Ids of its calls differ."""
    calls = message.get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls) and all(call["id"] for call in calls)
    given = {name: value for name, value in message.items() if value and name != "refusal"}
    return given | ({"tool_calls": [{**call, "id": ""} for call in calls]} if calls else {})


OFFERED: st.SearchStrategy[dict[str, Any]] = st.sampled_from([
    {"tools": TOOLS}, {"tools": TOOLS}, {"tools": TOOLS}, {"tools": TOOLS, "parallel_tool_calls": False},
    {"tools": TOOLS, "tool_choice": "required"}, {"tools": TOOLS, "tool_choice": "none"}, {},
])  # fmt: skip
many = settings(max_examples=100, derandomize=True)


@many
@given(data=st.data())
def test_deltas_of_a_chat_are_its_message(forced: Forced, data: st.DataObject) -> None:
    n = data.draw(st.sampled_from([1, 1, 1, 2]), "n")
    body: dict[str, Any] = {"messages": SAID, "n": n, "stop": data.draw(STOPS), **data.draw(OFFERED)}
    whole, events = twice(forced, data, CHAT, body | {"stream_options": {"include_usage": True}}, n)
    *chunks, last = events
    for index, choice in enumerate(whole["choices"]):
        parts = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        reasons = {name: choice[name] for name in ("finish_reason", "stop_reason")}
        assert joined(parts) == {"message": plain(choice["message"]), **reasons}
        assert (choice["finish_reason"] == "tool_calls") <= ("tool_calls" in choice["message"])
    if body.get("parallel_tool_calls", True):  # else tokens after a call may have been read, or not
        assert last["usage"] == whole["usage"]


def named(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of an answer without ids, which are random."""
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


FLAT_TOOLS: list[dict[str, Any]] = [{"type": "function", **TOOLS[0]["function"]}, {"type": "custom", "name": "code"}]
TEXT_OF = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments",
           "custom_tool_call": "custom_tool_call_input"}  # fmt: skip
"""Type of an item → the middle of the names of events with its text."""


def text_of(item: dict[str, Any]) -> str:
    """The text of an item that has ended."""
    if item["type"] in ("message", "reasoning"):
        return "".join(part["text"] for part in item["content"])
    found: str = item["arguments" if item["type"] == "function_call" else "input"]
    return found


@many
@given(data=st.data(), parallel=st.booleans())
def test_events_of_a_response_are_its_output(forced: Forced, data: st.DataObject, parallel: bool) -> None:
    body = {"input": "Hi", "tools": FLAT_TOOLS, "parallel_tool_calls": parallel}
    whole, events = twice(forced, data, RESPONSES, body)
    last = events[-1]
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert last["type"] == f"response.{whole['status']}"
    assert named(last["response"]["output"]) == named(whole["output"])
    for index, item in enumerate(last["response"]["output"]):
        own = [each for each in events if each.get("output_index") == index]
        kind = TEXT_OF[item["type"]]
        assert "".join(each["delta"] for each in own if each["type"] == f"response.{kind}.delta") == text_of(item)
        assert own[0]["type"] == "response.output_item.added" and own[0]["item"]["id"] == item["id"]
        assert own[-1] == {**own[-1], "type": "response.output_item.done", "item": item}
    if parallel:
        assert last["response"]["usage"] == whole["usage"]


@many
@given(data=st.data(), choice=st.sampled_from(["auto", "any"]), alone=st.booleans())
def test_blocks_of_a_message_are_its_content(forced: Forced, data: st.DataObject, choice: str, alone: bool) -> None:
    tools = [{"name": tool["function"]["name"], "input_schema": {"type": "object"}} for tool in TOOLS[:2]]
    stops = data.draw(STOPS.filter(lambda stops: all(map(str.strip, stops))))
    body = {"messages": SAID, "max_tokens": 1000, "tools": tools, "stop_sequences": stops}
    body["tool_choice"] = {"type": choice, "disable_parallel_tool_use": alone}
    whole, events = twice(forced, data, MESSAGES, body)
    blocks: list[dict[str, Any]] = []
    for each in events:
        if each["type"] == "content_block_start":
            assert each["index"] == len(blocks)
            blocks.append(each["content_block"] | {"json": ""})
        elif each["type"] == "content_block_delta":
            delta, block = each["delta"], blocks[each["index"]]
            name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}[delta["type"]]
            block[name] += delta[{"json": "partial_json"}.get(name, name)]
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = messages._object(text)
    # UTF-8 has no halves of surrogate pairs, which JSON can spell: in a whole answer they are question marks
    assert json.loads(dumps(named(blocks))) == named(whole["content"])
    (ended,) = (each for each in events if each["type"] == "message_delta")
    assert ended["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    if not alone:
        assert ended["usage"] == whole["usage"]
