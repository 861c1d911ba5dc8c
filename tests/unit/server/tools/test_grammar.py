"""Grammars: what llguidance accepts are calls that the parser reads and that fit the tools' schemas."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from numballama.errors import Error
from numballama.server.tools import choose_format
from numballama.server.tools.custom import custom_parameters
from numballama.server.tools.grammar import CALL_ID
from numballama.structured.lark import check_grammar
from tests.helpers.tool_texts import FORMATS, TEMPLATES, TIME, TOOLS, Answer, answer, events

llguidance = pytest.importorskip("llguidance")
BYTES = llguidance.LLTokenizer("byte")

RICH: list[dict[str, Any]] = [
    *TOOLS,
    {
        "type": "function",
        "function": {
            "name": "order-2_x",
            "parameters": {
                "$defs": {"Item": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
                "type": "object",
                "properties": {
                    "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "maxItems": 2},
                    "size": {"enum": ["S", "M\"}</tool_call>"]},
                    "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
                    "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
                },
                "required": ["items", "size"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "anything", "parameters": {}}},
]  # fmt: skip
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters") for tool in RICH}


def matcher(grammar: str) -> Any:
    found = llguidance.LLMatcher(BYTES, check_grammar(grammar)[0])
    assert not found.is_error(), found.get_error()
    return found


def accepts(grammar: str, text: str) -> bool:
    found = matcher(grammar)
    data = list(text.encode())
    return bool(found.try_consume_tokens(data) == len(data) and found.is_accepting())


def walk(grammar: str, seed: int) -> str:
    """A random text that the grammar accepts. It prefers to end strings and objects."""
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    random_ = random.Random(seed)
    state, mask, text = matcher(grammar), allocate_token_bitmask(1, BYTES.vocab_size), bytearray()
    while True:
        fill_next_token_bitmask(state, mask)
        allowed = [code for code in range(128) if mask[0, code // 32] >> (code % 32) & 1]
        if state.is_accepting() and (not allowed or random_.random() < 0.3):
            return text.decode()
        assert allowed and len(text) < 5000, text
        closers = [code for code in allowed if chr(code) in '"}]<']
        chosen = random_.choice(closers if closers and random_.random() < 0.7 else allowed)
        assert state.consume_token(chosen)
        text.append(chosen)


def check(found: Answer) -> None:
    assert found.calls and not found.content
    for name, arguments in found.calls:
        value = json.loads(arguments)
        assert isinstance(value, dict)
        schema = SCHEMAS[name]
        if schema is None:
            assert value == {}
        else:
            jsonschema.validate(value, schema)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_accepted_texts_are_valid_calls(name: str) -> None:
    grammar = replace(FORMATS[name], reasoning=None).grammar(RICH, "required", True)
    found = []
    for seed in range(8):
        text = walk(grammar, seed)
        found.append(answer(events(FORMATS[name].parser(RICH), text)))
        check(found[-1])
    assert len({call[0] for each in found for call in each.calls}) == 4, "each tool is called"
    assert any(len(each.calls) > 1 for each in found)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_named_calls(name: str) -> None:
    grammar = replace(FORMATS[name], reasoning=None).grammar(RICH, "get_weather", True)
    for seed in range(2):
        ((called, arguments),) = answer(events(FORMATS[name].parser(RICH), walk(grammar, seed))).calls
        assert called == "get_weather" and "city" in json.loads(arguments)


def test_what_is_accepted() -> None:
    one = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    many, single = (FORMATS["hermes"].grammar(TOOLS, "required", parallel) for parallel in (True, False))
    assert accepts(many, one) and accepts(single, one)
    assert accepts(many, f"{one}\n{one}") and not accepts(single, f"{one}\n{one}")
    assert not accepts(many, "Hello") and not accepts(many, one.replace("time", "other"))
    assert not accepts(FORMATS["hermes"].grammar(TOOLS, "get_weather", True), one)
    assert accepts(FORMATS["llama"].grammar(TOOLS, "time"), '{"name": "time", "parameters": {}}')
    assert accepts(FORMATS["mistral named"].grammar(TOOLS), "[TOOL_CALLS]time[ARGS]{}" * 2)
    assert accepts(FORMATS["mistral id"].grammar(TOOLS), "[TOOL_CALLS]time[CALL_ID]abc123XYZ[ARGS]{}")
    assert accepts(FORMATS["mistral"].grammar(TOOLS), '[TOOL_CALLS][{"name": "time", "arguments": {}}]')


def spelled(name: str, *called: str) -> str:
    """Calls as a format writes them."""
    text = FORMATS[name].call_text
    calls = (f"{text.begin}{each}{text.middle}{{}}{text.end}" for each in called)
    return f"{text.before}{text.between.join(calls)}{text.after}".replace(CALL_ID, "abc123XYZ")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_some_tools_may_be_called(name: str) -> None:
    """Any text, and calls of these tools wherever the parser reads one."""
    grammar = FORMATS[name].grammar([TIME, {"function": {"name": "today"}}], "auto")
    time, today, weather = (spelled(name, each) for each in ("time", "today", "get_weather"))
    parser = FORMATS[name].parser([*TOOLS, {"function": {"name": "today"}}])
    assert [call[0] for call in answer(events(parser, [weather])).calls] == ["get_weather"]
    for text in ("", "Hello.\nIt is {late}.", time, today, spelled(name, "time", "today"), "{}", '[{"a": "time"}]'):
        assert accepts(grammar, text), text
    for text in (weather, spelled(name, "time", "get_weather"), weather.replace("get_weather", "tim")):
        assert not accepts(grammar, text), text
    behind = "Hello. "
    if name == "llama":
        behind += "<|python_tag|>"
    elif name == "json":
        behind += "```json\n"
    assert accepts(grammar, behind + time) and not accepts(grammar, behind + weather)
    assert accepts(grammar, f"{behind}{time}\nHello.")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_arguments_of_some_tools_are_enforced_in_text_with_calls(name: str) -> None:
    code = {"type": "function", "function": {"name": "code", "parameters": custom_parameters("[ab]{2}")}}
    grammar = FORMATS[name].grammar([TIME, code], "auto", enforced={"code"})
    good, bad = (spelled(name, "code").replace("{}", f'{{"input": "{text}"}}') for text in ("ab", "abc"))
    time = spelled(name, "time").replace("{}", '{"any": 1}')
    assert accepts(grammar, "Hello.") and accepts(grammar, time) and accepts(grammar, good)
    assert not accepts(grammar, bad) and not accepts(grammar, spelled(name, "code"))
    loose = FORMATS[name].grammar([TIME, code], "auto")
    assert accepts(loose, bad)


@pytest.mark.parametrize("name", ["qwen3", "magistral"])
def test_some_tools_may_be_called_after_reasoning(name: str) -> None:
    first, last = FORMATS[name].reasoning or ("", "")
    time, weather = (spelled(name, each) for each in ("time", "get_weather"))
    for in_reasoning in (False, True):
        grammar = FORMATS[name].grammar([TIME], "auto", in_reasoning=in_reasoning)
        thoughts = f"{'' if in_reasoning else first}\nhm, get_weather?\n{last}\n\n"
        assert accepts(grammar, thoughts + "Hi.") and accepts(grammar, thoughts + time)
        assert not accepts(grammar, thoughts + weather)


def test_reasoning_may_come_first() -> None:
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    grammar = FORMATS["qwen3"].grammar(TOOLS)
    assert accepts(grammar, call) and accepts(grammar, f"<think>\nhm</thin\n</think>\n\n{call}")
    assert not accepts(grammar, f"hm</think>{call}") and not accepts(grammar, "<think>hm</think>")
    inside = FORMATS["qwen3"].grammar(TOOLS, in_reasoning=True)
    assert accepts(inside, f"hm</think>\n{call}") and not accepts(inside, call)
    assert not accepts(FORMATS["hermes"].grammar(TOOLS), f"<think>hm</think>{call}")


class Vocabulary:
    """Bytes and control tokens, as llguidance wants a tokenizer."""

    special = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "</s>")
    tokens = (*(bytes([code]) for code in range(256)), *(b"\xff" + token.encode() for token in special))
    special_token_ids, bos_token_id, eos_token_id = [*range(256, 261)], None, 260

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def test_markers_that_are_control_tokens() -> None:
    """They are ids in the grammar: their spelling in ordinary tokens is something else."""
    vocabulary = Vocabulary()
    special = {token: 256 + n for n, token in enumerate(vocabulary.special)}
    found = choose_format(TEMPLATES["magistral"], special)
    assert found.tokens_to_show == special.keys() - {"</s>"}
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), n_vocab=261, eos_token=260)
    grammar = found.grammar(TOOLS)

    def accepts_tokens(text: str) -> bool:
        """The text's control tokens are the capitals."""
        ids = [{"T": 256, "A": 257, "B": 258, "E": 259}.get(each, ord(each)) for each in text]
        state = llguidance.LLMatcher(tokenizer, check_grammar(grammar)[0])
        return bool(state.try_consume_tokens(ids) == len(ids) and state.is_accepting())

    assert accepts_tokens("TtimeA{}") and accepts_tokens("BhmETtimeA{}TtimeA{}")
    grammar = found.grammar(TOOLS[1:], "auto")
    for text in ("hi", "TtimeA{}", "BhmETtimeA{}TtimeA{}", "hi TtimeA{} hi", "Bhm\n\nEhi"):
        assert accepts_tokens(text), text
    for text in ("Tget_weatherA{}", "BhmTtimeA{}", "hiA{}", "TtimA{}"):
        assert not accepts_tokens(text), text
    grammar = found.grammar(TOOLS)
    assert not accepts_tokens("[tool]timeA{}") and not accepts_tokens("BhmTtimeA{}") and not accepts_tokens("hi")


def test_the_largest_list_of_tools_compiles() -> None:
    tools = [{**RICH[2], "function": {**RICH[2]["function"], "name": f"f{number}"}} for number in range(128)]
    text = '{"name": "f127", "parameters": {"items": [{"id": 1}], "size": "S"}}'
    assert accepts(FORMATS["llama"].grammar(tools), text)


def test_errors() -> None:
    with pytest.raises(Error, match="no tool is named 'other'"):
        FORMATS["llama"].grammar(TOOLS, "other")
    with pytest.raises(Error, match="there are no tools"):
        FORMATS["llama"].grammar([], "required")
    with pytest.raises(Error, match=r"tools\[0\]\.function\.name"):
        FORMATS["llama"].grammar([{"type": "function", "function": {"name": "a b"}}])
