"""A stream in a cell: the text so far while it comes, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import numballama
from numballama.generate import GenerationResponse
from numballama.model import Model
from numballama.visualize.stream import update_cell
from tests.helpers.markup import parsed, tags
from tests.helpers.notebook import fake_ipython
from tests.unit.visualize.test_html import HOSTILE


def responses(*texts: str, **last: Any) -> Iterator[GenerationResponse]:
    for n, text in enumerate(texts, 1):
        yield GenerationResponse(text, n, tokens_per_second=10.0 * n, **(last if n == len(texts) else {}))


def shown(stream: Iterator[GenerationResponse], prompt: str = "", interval_s: float = 0.0) -> list[tuple[str, str]]:
    """The updates of a cell: plain text, and what a reader of the HTML sees."""
    found: list[tuple[str, str]] = []
    update_cell(stream, prompt, lambda text, page: found.append((text, parsed(page).text)), interval_s)
    return found


def test_a_cell_grows_and_says_how_the_text_ended() -> None:
    first, second, last = shown(responses("a\n", "b", finish_reason="stop", stop_reason="\n\n"), "Once ")
    assert first == ("Once a\n", "Once a\ngenerating … 1 token") and second[0] == "Once a\nb"
    assert last == ("Once a\nb", "Once a\nbstop at '\\n\\n'; 2 tokens; 20 tokens/s")


def test_updates_are_not_more_than_a_reader_sees() -> None:
    assert len(shown(responses(*"abcdefgh", finish_reason="length"), interval_s=60)) == 2


def test_several_texts_are_kept_apart() -> None:
    both = [GenerationResponse("x", 1, "length"), GenerationResponse("y", 2, "stop", index=1)]
    *_, (text, page) = shown(iter(both), "p")
    assert text == "px\n\npy" and page.startswith("pxpylength; stop; 2 tokens")


def test_lines_end_without_a_style_sheet() -> None:
    pages: list[str] = []
    update_cell(responses("b\nc"), "a\n", lambda text, page: pages.append(page))
    assert ">a<br></span>b<br>c</div>" in pages[-1]


def test_what_a_model_writes_is_only_text() -> None:
    pages: list[str] = []
    update_cell(responses(HOSTILE, finish_reason="stop"), HOSTILE, lambda text, page: pages.append(page))
    assert not any(tags(parsed(page)) & {"script", "img"} or "\x1b" in page for page in pages)


@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt, "interrupted"), (ValueError, "ValueError")])
def test_an_interrupt_keeps_the_text(error: type[BaseException], word: str) -> None:
    def broken() -> Iterator[GenerationResponse]:
        yield GenerationResponse("so far", 1)
        raise error

    found: list[str] = []
    with pytest.raises(error):
        update_cell(broken(), "", lambda text, page: found.append(parsed(page).text))
    assert found[-1] == f"so far{word}; 1 token"


@pytest.fixture
def model(tiny_file: Path, tiny_tokenizer: Path) -> Model:
    return numballama.compile(tiny_file, tokenizer=tiny_tokenizer, device="cpu", threads=1)


def test_a_stream_shows_itself_in_a_notebook(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate("ab", max_tokens=8, temperature=0)
    bundles = fake_ipython(monkeypatch, kernel=object())
    stream = model.stream("ab", max_tokens=8, temperature=0)
    stream._ipython_display_()
    assert bundles[-1]["text/plain"] == f"ab{expected}" and "8 tokens" in bundles[-1]["text/html"]
    stream._ipython_display_()
    assert "nothing is left to read" in bundles[-1]["text/html"]


def test_a_stream_prints_itself_in_a_terminal(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate("ab", max_tokens=8, temperature=0)
    assert fake_ipython(monkeypatch, kernel=None) == []
    model.stream("ab", max_tokens=8, temperature=0)._ipython_display_()
    assert capsys.readouterr().out == f"ab{expected}\n"
