"""Which tokens wrote the content of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.server.content_tokens import ContentTokens
from tests.helpers.tool_texts import FORMATS, TOOLS, answer

CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def content_of(name: str, pieces: list[str]) -> tuple[str, list[int]]:
    """(the content, the numbers of the pieces that wrote it)."""
    parser, follower = FORMATS[name].parser(TOOLS), ContentTokens()
    written, events = [], []
    for number, text in enumerate(pieces):
        found = parser.feed(text)
        events += found
        written += follower.add(text, (number, None), found, parser.held)
    events += (rest := parser.finish())
    written += follower.settle(rest)
    return answer(events).content, [number for number, _ in written]


@pytest.mark.parametrize(
    ("pieces", "content", "numbers"),
    [
        (["A", " dog", ".", ""], "A dog.", [0, 1, 2]),  # the last one ends the text
        (["A ", "<tool", "_box", ">"], "A <tool_box>", [0, 1, 2, 3]),  # held back, and then no call
        (["A <", "b", " c <", "tool"], "A <b c <tool", [0, 1, 2, 3]),  # a part of a token is held back
        (["<", "<", " ", "<", "a"], "<< <a", [0, 1, 2, 3, 4]),
        (
            ["<tool_call>", '{"name": "', "times", '", ', "}", "b"],
            '<tool_call>{"name": "times", }b',
            [0, 1, 2, 3, 4, 5],
        ),
        ([*CALL, " <", "b>"], "<b>", [len(CALL), len(CALL) + 1]),
        (["A", "\n", *CALL, "\n"], "A", [0]),
        (["<think>", "hm", "</think>", "\n\n", "A", " dog"], "A dog", [4, 5]),
        (["<think>hm", "</think>A", " dog"], "A dog", [1, 2]),
        (["", "", "🙂", " ok"], "🙂 ok", [0, 1, 2, 3]),  # tokens of bytes, which are a character together
        (["<think>", "</think>", "", "", "🙂"], "🙂", [2, 3, 4]),
    ],
)
def test_tokens_of_content(pieces: list[str], content: str, numbers: list[int]) -> None:
    assert content_of("qwen3", pieces) == (content, numbers)


@given(st.lists(st.sampled_from(["a", " ", "\n", "<", "<tool_call>", "{", "b<t", "", "é"]), max_size=12))
def test_each_token_of_text_without_calls_is_content(pieces: list[str]) -> None:
    text, numbers = content_of("hermes", pieces)
    shown = [number for number, piece in enumerate(pieces) if piece]
    assert text == "".join(pieces) and [number for number in numbers if pieces[number]] == shown
