"""Explanations as HTML: well formed, escaped, and without anything from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from numballama.explain.explanation import Explanation
from numballama.explain.html import ATTENTION_TOKENS, LENS_TOKENS, TABLE_TOKENS, fragment, page
from tests.helpers.markup import parsed
from tests.helpers.viewers import shown_by_github
from tests.unit.explain.samples import CONTROLS, HOSTILE, sample

VOID = {"meta"}


class Reader(HTMLParser):
    """Checks that elements are nested, and collects them and the text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def classes(reader: Reader, name: str) -> list[dict[str, str | None]]:
    return [attrs for _, attrs in reader.elements if name in (attrs.get("class") or "").split()]


@pytest.mark.parametrize("html", [fragment(sample()), page(sample())], ids=["fragment", "page"])
def test_hostile_text_is_text(html: str) -> None:
    reader = read(html)
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "img", "link", "iframe", "b"}
    assert reader.text.count(HOSTILE) > 5, "every text is still there"
    assert not any(control in html for control in CONTROLS if not control.isprintable())
    assert "\\x1b[31m\\u202e" in reader.text
    attributes = {name for _, attrs in reader.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    assert not re.search(r"https?:|url\(|@import", html)


def test_a_token_has_a_colour_and_its_alternatives() -> None:
    html = fragment(sample())
    tokens = classes(read(html), "token")
    assert len(tokens) == 4 + 1, "and what may follow the text"
    assert "style" not in tokens[0], "nothing predicts the first token"
    colours = [re.search(r"rgba\((\d+)", str(token["style"]))[1] for token in tokens[1:4]]  # type: ignore[index]
    assert colours == ["240", "240", "40"], "orange below a half, blue above"
    assert "0.1250" in html, "a token that is not among the likeliest is beside them"
    assert html.count('class="row chosen"') == 3


def test_a_newline_ends_a_line() -> None:
    assert '<span class="mark">↵</span>\n' in fragment(sample())


def test_attention_is_a_triangle() -> None:
    reader = read(fragment(sample(6)))
    titles = [str(attrs["title"]) for tag, attrs in reader.elements if tag == "td" and "→" in str(attrs.get("title"))]
    assert len(titles) == 6 * 7 // 2
    assert titles[0] == "<s> → <s>: 1.000" and titles[-1] == " a →  a: 0.167"


def test_what_a_viewer_without_style_sheets_shows() -> None:
    """Nothing of the cards; the likeliest tokens as a table, and attention in tenths."""
    root = shown_by_github(parsed(fragment(sample(4))))
    running, *_ = root.all("p")
    assert running.text == f"<s>\\x1b[31m\\u202e{HOSTILE}↵\n a …"
    tables = [[[cell.text for cell in row.children] for row in each.all("tr")] for each in root.all("table")]
    likeliest, attention, _ = tables
    found = f"'{HOSTILE}' 0.500, ''&' 0.250"
    assert likeliest == [
        ["token", "probability", "likeliest in its place"],
        ["<s>", "", ""],
        ["\\x1b[31m\\u202e", "0.1250", found],
        [f"{HOSTILE}\\n", "0.2500", found],
        [" a", "0.9000", found],
        ["after the text", "", found],
    ]
    assert [row[1:] for row in attention[1:]] == [["9"], ["5", "5"], ["3", "3", "3"], ["2", "2", "2", "2"]]
    assert "Numbers are tenths." in root.text


def test_a_long_text_shows_the_end_of_attention_and_lens() -> None:
    html = fragment(sample(500))
    reader = read(html)
    cells = [attrs for tag, attrs in reader.elements if tag == "td"]
    assert len(cells) == ATTENTION_TOKENS * (ATTENTION_TOKENS + 1) // 2 + 2 * LENS_TOKENS + 2 * (TABLE_TOKENS + 1)
    assert f"the last {LENS_TOKENS} of 500 tokens" in html
    assert len(html) < 2_000_000


def test_parts_that_are_not_there() -> None:
    whole = sample()
    html = fragment(Explanation("story.gguf", whole.tokens))
    assert "Attention" not in html and "lens" not in read(html).text
    assert len(classes(read(html), "token")) == 4


def test_the_page_follows_the_readers_scheme() -> None:
    html = page(sample())
    assert html.startswith("<!doctype html>") and '<meta name="color-scheme" content="light dark">' in html
    assert fragment(sample()) in html
