"""Explanations on a terminal: colours where they belong, the same text without them."""

from __future__ import annotations

import io
import re

import pytest

from numballama.explain.explanation import Explanation
from numballama.explain.terminal import ATTENTION_TOKENS, as_text, lines
from tests.unit.explain.samples import HOSTILE, sample


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


def shown(explanation: Explanation, out: io.StringIO) -> str:
    explanation.show(out)
    return out.getvalue()


ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shown(sample(), io.StringIO())
    assert "\x1b" not in plain and plain.rstrip("\n") == as_text(sample()) == str(sample())
    coloured = shown(sample(), Terminal())
    assert ESCAPE.sub("", coloured) == plain
    assert "48;2;" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"[34]8;[25];", shown(sample(), Terminal()))


def test_hostile_text_reaches_no_terminal() -> None:
    text = as_text(sample())
    assert "\\x1b[31m\\u202e" in text and HOSTILE in text
    assert text.replace("\n", "").isprintable()


def test_lines_of_a_pipe_are_not_folded() -> None:
    wide = sample(60, " " + "word" * 60)
    assert shown(wide, io.StringIO()).rstrip("\n") == as_text(wide)


def test_what_the_lines_say() -> None:
    text = as_text(sample(6)).splitlines()
    assert text[0] == f"{HOSTILE}.gguf: 6 tokens"
    assert text[1] == f"<s>\\x1b[31m\\u202e{HOSTILE}\\n", "a line ends where the text's does"
    assert text[2] == " a a a"
    rows = [line for line in text if line.startswith("   0.")]
    assert [row.split()[0] for row in rows] == ["0.1250", "0.2500", "0.9000", "0.9000", "0.9000"]
    assert any(row.split("'")[1] == " a" for row in rows)
    start = text.index(
        "attention of layer 1, mean of all heads, in tenths: a line for each token, a column for each it sees"
    )
    triangle = [line[14:].split() for line in text[start + 1 : start + 7]]
    assert triangle == [["9"], ["5", "5"], ["3"] * 3, ["2"] * 4, ["2"] * 5, ["2"] * 6]
    lens = text[text.index("logit lens: the token that each layer would write next") :]
    assert [line.split()[:2] for line in lens[2:]] == [["layer", "1"], ["layer", "0"]]


def test_a_long_text_shows_the_end_of_attention() -> None:
    text = as_text(sample(100))
    assert f"the last {ATTENTION_TOKENS} of 100 tokens" in text
    assert max(len(line) for line in text[text.index("in tenths") :].splitlines()) <= 90


def test_wide_characters_keep_the_columns() -> None:
    found = list(lines(sample(5, "狗" * 20)))
    from rich.cells import cell_len

    labels = [line[0].text for line in found if line and "狗" in line[0].text and line[0].text.endswith(" ")]
    assert labels and {cell_len(label) for label in labels} == {14}
