"""The parser: any pieces of a text give the same answer, nothing is lost or doubled, and what each format reads."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.server.tools import CallArguments, CallStart, Content, Reasoning
from numballama.server.tools.call import MAX_HELD
from tests.helpers.tool_texts import FORMATS, SPELLED, TOOLS, Answer, answer, arguments, events, read, texts

WEATHER = '{"city": "Oslo"}'
CALL = Answer("", "", [("get_weather", WEATHER)])
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>'
FENCE = f'```json\n{{"name": "get_weather", "arguments": {WEATHER}}}\n```'
names = st.sampled_from(sorted(FORMATS))


@settings(max_examples=100)
@given(names, texts, st.data(), st.booleans())
def test_any_pieces_give_the_same_answer(name: str, text: str, data: st.DataObject, in_reasoning: bool) -> None:
    """vLLM #10395, #9693, #10589, #13622, #48318, #16214, #39584, #20028: streamed calls differ."""
    whole = read(name, text, in_reasoning)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert answer(events(FORMATS[name].parser(TOOLS, in_reasoning), pieces)) == whole
    assert answer(events(FORMATS[name].parser(TOOLS, in_reasoning), text)) == whole, "by characters"


@given(names, texts)
def test_text_without_calls_and_reasoning_is_content(name: str, text: str) -> None:
    assert answer(events(FORMATS[name].parser(None), [text])).calls == []
    found = read(name, text)
    if not found.calls and not found.reasoning and "think" not in text.lower():
        assert found.content == text


@given(names, texts)
def test_nothing_is_doubled(name: str, text: str) -> None:
    """All that comes out is in the text, in its order."""
    at = 0
    for event in events(FORMATS[name].parser(TOOLS), [text]):
        if not isinstance(event, CallStart) and event.text != "{}":  # of a call without arguments
            at = text.index(event.text, at) + len(event.text) if not isinstance(event, CallArguments) else at
            assert event.text in text


@given(st.sampled_from(sorted(SPELLED)), arguments, st.integers(1, 7))
def test_arguments_are_the_text_that_the_model_wrote(name: str, text: str, size: int) -> None:
    """Braces, quotes, escapes and markers in their strings end nothing."""
    written = SPELLED[name].format(text)
    pieces = [written[at : at + size] for at in range(0, len(written), size)]
    assert answer(events(FORMATS[name].parser(TOOLS), pieces)) == Answer("", "", [("get_weather", text)])


@given(st.sampled_from(sorted(SPELLED)), arguments, st.data())
def test_a_call_that_is_cut_keeps_its_arguments_so_far(name: str, text: str, data: st.DataObject) -> None:
    written = SPELLED[name].format(text)
    begin = written.index(text)
    cut = data.draw(st.integers(0, len(written)))
    found = read(name, written[:cut])
    if cut <= begin:
        assert found == Answer(written[:cut], "", [])
    else:
        assert found == Answer("", "", [("get_weather", text[: cut - begin])])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", f"Let me see.\n{HERMES}", Answer("Let me see.", "", CALL.calls)),
        ("hermes", f"{HERMES}\n{HERMES} Done.", Answer("Done.", "", CALL.calls * 2)),
        ("hermes", HERMES.removesuffix("\n</tool_call>"), CALL),
        ("hermes", HERMES.removesuffix("}\n</tool_call>"), CALL),
        ("hermes", HERMES.replace("}}", "}"), CALL),  # one brace too few
        ("hermes", HERMES.replace("}}", "}}}"), Answer("}", "", CALL.calls)),
        ("hermes", HERMES.replace("\n", ""), CALL),
        ("hermes", HERMES.replace("</tool_call>", "") + HERMES, Answer("", "", CALL.calls * 2)),
        ("hermes", HERMES.removesuffix("ll>"), CALL),
        ("hermes", f'<tool_call>{{"arguments": {WEATHER}, "name": "get_weather"}}</tool_call>', CALL),
        ("hermes", '<tool_call>{"name": "time"}</tool_call>', Answer("", "", [("time", "{}")])),
        ("hermes", f'<tool_call>[{{"name": "get_weather", "arguments": {WEATHER}}}]</tool_call>', CALL),
        ("hermes", '<tool_call>{"name": "time", "arguments": {"a": [1}}</tool_call>?',
         Answer("}}?", "", [("time", '{"a": [1')])),
        ("hermes", '<tool_call>{"name": "time", "arguments": {"a": 1</tool_call>',
         Answer("", "", [("time", '{"a": 1')])),
        ("llama", f'<|python_tag|>{{"name": "get_weather", "parameters": {WEATHER}}}', CALL),
        ("llama", f'{{"type": "function", "name": "get_weather", "parameters": {WEATHER}}}', CALL),
        ("llama", f'{{"type": "function", "function": "get_weather", "parameters": {WEATHER}}}', CALL),
        ("llama", f'{{"type": "function", "function": {{"name": "get_weather", "parameters": {WEATHER}}}}}', CALL),
        ("llama", "; ".join([SPELLED["llama"].format(WEATHER)] * 2), Answer("", "", CALL.calls * 2)),
        ("llama", SPELLED["llama"].format(WEATHER) + "; and", Answer("; and", "", CALL.calls)),
        ("llama", "I.<|python_tag|>" + ";<|python_tag|>".join([SPELLED["llama"].format(WEATHER)] * 2),
         Answer("I.", "", CALL.calls * 2)),
        ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}, "id": "123456789"}}, '
         '{"name": "time", "arguments": {}}]', Answer("", "", [*CALL.calls, ("time", "{}")])),
        ("mistral", f'[TOOL_CALLS]{{"name": "get_weather", "arguments": {WEATHER}}}', CALL),
        ("mistral", f"Well. [TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]time{{}}",
         Answer("Well.", "", [*CALL.calls, ("time", "{}")])),
        ("json", FENCE, CALL),
        ("json", f"I call:\n{FENCE}\nand wait", Answer("I call:and wait", "", CALL.calls)),
        ("json", SPELLED["json"].format(WEATHER) + "\n```py\n```", Answer("```py\n```", "", CALL.calls)),
        ("json", f"[{SPELLED['json'].format(WEATHER)},\n{SPELLED['json'].format('{}')}]",
         Answer("", "", [*CALL.calls, ("get_weather", "{}")])),
    ],
)  # fmt: skip
def test_formats(name: str, text: str, expected: Answer) -> None:
    assert read(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", HERMES.replace("get_weather", "other")),
        ("hermes", "Use <tool_call> and </tool_call>."),
        ("hermes", '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>'),
        ("hermes", "<tool_call>\n<function=time>\n</function>\n</tool_call>"),
        ("hermes", SPELLED["llama"].format("{}")),
        ("llama", '{"name": "time", "colour": "red"}'),
        ("llama", '{"name": "time"}'),
        ("llama", '  {"answer": 42}  '),
        ("llama", "<|python_tag|>print(1)"),
        ("llama", "So: " + SPELLED["llama"].format("{}")),
        ("mistral", "[TOOL_CALLS]other[ARGS]{}"),
        ("mistral", "[TOOL_CALLS][1, 2]"),
        ("mistral", "[TOOL_CALLS]get_weather is it"),
        ("json", "```json\n[1, 2]\n```"),
        ("json", "[1, 2]"),
        ("json", '{"name": "' + "x" * 600 + '"}'),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert read(name, text) == Answer(text, "", [])


@pytest.mark.parametrize(
    ("text", "in_reasoning", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, Answer("Yes", "hm", [])),
        ("hm\n</think>\n\nYes", True, Answer("Yes", "hm", [])),
        ("<think>\nhm\n</think>\n\nYes", True, Answer("Yes", "hm", [])),
        (f"<think>{HERMES}</think>{HERMES}", False, Answer("", HERMES, CALL.calls)),
        ("<think>\n\n</think>\n\nYes", False, Answer("Yes", "", [])),
        ("<think>hm", False, Answer("", "hm", [])),
        ("\nhm </thi", True, Answer("", "hm </thi", [])),
        ("The tag <think> opens", False, Answer("The tag <think> opens", "", [])),
        ("hm</think>Use </think>", True, Answer("Use </think>", "hm", [])),
    ],
)
def test_reasoning(text: str, in_reasoning: bool, expected: Answer) -> None:
    assert read("qwen3", text, in_reasoning) == expected
    if HERMES not in text:
        assert read("qwen3", text, in_reasoning, tools=None) == expected


def test_reasoning_of_mistral() -> None:
    text = "[THINK]hm[/THINK]Well.[TOOL_CALLS]time[ARGS]{}"
    assert read("magistral", text) == Answer("Well.", "hm", [("time", "{}")])
    assert read("mistral named", "[THINK]hm[/THINK]") == Answer("[THINK]hm[/THINK]", "", [])


def test_events_come_as_early_as_possible() -> None:
    parser = FORMATS["qwen3"].parser(TOOLS)
    assert parser.feed("<think>") == [] and parser.feed("a") == [Reasoning("a")]
    assert parser.feed(" b") == [Reasoning(" b")] and parser.feed("</think>") == []
    assert parser.feed("\n\nHi") == [Content("Hi")]
    assert parser.feed(" 1 <") == [Content(" 1")] and parser.feed(" 2") == [Content(" < 2")]
    assert parser.feed('\n<tool_call>\n{"name": "get_weather", "arguments": ') == []
    start, piece = parser.feed('{"ci')
    assert isinstance(start, CallStart) and piece == CallArguments(0, '{"ci')
    assert parser.feed("ty") == [CallArguments(0, "ty")]
    assert parser.feed('": 1}') == [CallArguments(0, '": 1}')] and parser.feed("}\n</tool") == []
    assert parser.finish() == [] and parser.finish() == []


def test_ids_are_unique_and_of_the_format() -> None:
    def ids(name: str, text: str) -> list[str]:
        return [event.id for event in events(FORMATS[name].parser(TOOLS), [text]) if isinstance(event, CallStart)]

    found = ids("hermes", HERMES * 20)
    assert len(set(found)) == 20 and all(re.fullmatch("call_[a-zA-Z0-9]{24}", each) for each in found)
    given = ids("mistral", "[TOOL_CALLS]time[CALL_ID]abc123XYZ[ARGS]{}" * 2 + "[TOOL_CALLS]time[CALL_ID]short[ARGS]{}")
    assert given[0] == "abc123XYZ" and len(set(given)) == 3
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", each) for each in given)


@pytest.mark.parametrize("name", sorted(SPELLED))
def test_what_is_held_back_has_a_bound(name: str) -> None:
    """Arguments before a name, white space and other members, whatever the pieces are."""
    opening = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "json": "```json"}.get(name, "[TOOL_CALLS]")
    for filler in (' {"arguments": {"a": "', ' {"type": [', "", ' {"id"'):
        text = opening + filler + " " * 2 * MAX_HELD
        parser = FORMATS[name].parser(TOOLS)
        found = parser.feed(text)
        assert sum(len(event.text) for event in found if isinstance(event, Content)) >= MAX_HELD
        assert answer([*found, *parser.finish()]) == Answer(text, "", [])
        sizes = [text[at : at + 997] for at in range(0, len(text), 997)]
        assert answer(events(FORMATS[name].parser(TOOLS), sizes)) == Answer(text, "", [])


def test_nesting_has_a_bound() -> None:
    deep = '{"a": ' * 64 + "1" + "}" * 64
    assert read("llama", SPELLED["llama"].format(deep)).calls == [("get_weather", deep)]
    found = read("llama", SPELLED["llama"].format('{"a": ' + deep + "}"))
    assert found.calls == [("get_weather", '{"a": ' * 64)] and found.content.startswith('{"a": 1}')


@pytest.mark.parametrize("name", ["qwen3", "mistral", "json"])
def test_little_text_is_read_twice(name: str) -> None:
    """A feed reads what was held back and the new text, so time is linear."""
    units = [
        "word ",
        "<",
        "<tool",
        " ",
        '"',
        "\\",
        "{",
        '<tool_call>{"name": "',
        HERMES,
        "[TOOL_CALLS]time",
        "```json[",
    ]
    for unit in units:
        parser = FORMATS[name].parser(TOOLS)
        for character in (unit * 1000)[:1000]:
            parser.feed(character)
            assert len(parser._held) < 200


def test_arguments_are_streamed_while_they_are_long() -> None:
    body = json.dumps({"text": "x\\" * 50_000})
    parser = FORMATS["hermes"].parser(TOOLS)
    parser.feed('<tool_call>{"name": "time", "arguments": ')
    assert all(parser.feed(body[at : at + 1000]) for at in range(0, len(body), 1000))
