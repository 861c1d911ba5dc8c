"""Outputs in a headless Chromium, as viewers of notebooks show them: in any theme, words have the page's colour."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

import pytest

from numballama.explain.html import fragment
from numballama.fusion import fuse
from numballama.plan import lower
from numballama.visualize import card
from numballama.visualize.graph import draw_graph
from numballama.visualize.profile import as_html
from tests.helpers.chromium import CHROMIUM, Browser, chromium
from tests.helpers.graphs import llama
from tests.unit.bench.test_profiler import WITH_PROMPT
from tests.unit.explain.samples import sample
from tests.unit.visualize.test_card import MADE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed"),
]

VSCODE = """
 html{background:#1f1f1f} body{color:rgb(204, 204, 204);background:transparent;font:13px sans-serif}
 code{color:#d7ba7d;background:#3c3c3c} table,thead,tr,th,td,tbody{border:none!important;border-collapse:collapse}
 table{width:100%} table,th,tr{text-align:left!important} thead{background:rgba(130,130,130,.16);font-weight:bold}
 th,td{padding:4px 8px} tr:nth-child(even){background:rgba(130,130,130,.08)}
"""
"""What VS Code's page for outputs has in a dark theme (its backLayerWebView.ts, in short)."""
COLAB = "html{background:#383838} body{color:rgb(213, 213, 213);font:14px Roboto,sans-serif} td,th{padding:4px 8px}"
"""Colab's frame for an output, with the ground that it lies on."""
GITHUB = "html{background:#0d1117} body{color:rgb(230, 237, 243)} td,th{border:1px solid #30363d;text-align:right}"

SHOWN = """[...document.querySelectorAll('#output *')].filter(each => each.checkVisibility() && each.tagName != 'TITLE'
 && [...each.childNodes].some(node => node.nodeType == 3 && node.data.trim()))"""
"""The elements with words that a reader sees."""
COLOURS = f"""[...new Set({SHOWN}.map(each =>
 getComputedStyle(each)[each.tagName == 'text' ? 'fill' : 'color']))].join()"""
WIDEST = "Math.max(...[...document.querySelectorAll('svg text')].map(each => each.getBBox().width), 0)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        browser.prefer("light")  # the system's scheme says nothing about a notebook's theme
        yield browser


def outputs() -> dict[str, str]:
    plan = lower(fuse(llama(), "cpu"), "cpu")
    return {
        "card": card.as_html(MADE),
        "graph": draw_graph(llama()),
        "plan": plan._repr_html_(),
        "profile": as_html(WITH_PROMPT),
        "explanation": fragment(sample(6)),
    }


def show(browser: Browser, folder: Path, css: str, output: str) -> None:
    (folder / "page.html").write_text(
        f'<!doctype html><html theme="dark"><meta charset="utf-8"><style>{escape(css, quote=False)}</style>'
        f'<body class="vscode-dark"><div id="output">{output}</div></body></html>',
        encoding="utf-8",
    )
    browser.open((folder / "page.html").as_uri())
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.mark.parametrize("name", outputs())
@pytest.mark.parametrize("css", [VSCODE, COLAB], ids=["vscode", "colab"])
def test_words_have_the_colour_of_a_dark_page(browser: Browser, tmp_path: Path, name: str, css: str) -> None:
    show(browser, tmp_path, css, outputs()[name])
    assert browser.run(COLOURS) == browser.run("getComputedStyle(document.body).color")
    assert browser.run("[...document.querySelectorAll('.instead')].every(each => !each.checkVisibility())")
    assert browser.run("[...document.querySelectorAll('svg')].every(each => each.checkVisibility())")
    aligned = "each => getComputedStyle(each).textAlign"
    if name == "profile":
        assert browser.run(f"[...document.querySelectorAll('th')].slice(1, 4).map({aligned})") == ["right"] * 3
    if name == "explanation":
        sides = "getComputedStyle(document.querySelector('.heat td')).width"
        assert browser.run(sides) == "13px", "a viewer's padding does not stretch the squares"


@pytest.mark.parametrize("name", outputs())
def test_words_without_style_sheets(browser: Browser, tmp_path: Path, name: str) -> None:
    """As on GitHub. Words of a drawing stay as narrow as its boxes."""
    show(browser, tmp_path, GITHUB, outputs()[name])
    widest = browser.run(WIDEST)
    browser.run(
        "document.querySelectorAll('#output style').forEach(each => each.remove()),"
        "document.querySelectorAll('#output *').forEach(each =>"
        " ['style', 'class', 'id', 'hidden'].forEach(name => each.removeAttribute(name)))"
    )
    assert browser.run(COLOURS) == browser.run("getComputedStyle(document.body).color")
    assert browser.run("[...document.querySelectorAll('svg')].every(each => each.checkVisibility())")
    assert browser.run(WIDEST) <= widest + 1


@pytest.mark.parametrize("name", outputs())
def test_a_narrow_page(browser: Browser, tmp_path: Path, name: str) -> None:
    """What is wider than a phone scrolls by itself; nothing is cut off."""
    browser.size(360, 740)
    show(browser, tmp_path, "body{margin:8px}", outputs()[name])
    # what scrolls does not widen the page; what is cut off by a frame ends outside it, and no ancestor scrolls
    cut = (
        "[...document.querySelectorAll('#output :is(td, th, svg, h4, p, div, summary)')].filter(each =>"
        " each.checkVisibility() && each.getBoundingClientRect().right > 360 && !each.closest('.scroll, .wide'))"
    )
    assert browser.run(f"{cut}.map(each => each.outerHTML.slice(0, 80))") == []
    browser.size(1280, 800)


def test_a_card_of_a_token(browser: Browser, tmp_path: Path) -> None:
    """The likeliest tokens beside a token that has the focus; a card's words are in no other place."""
    show(browser, tmp_path, COLAB, fragment(sample(4)))
    words = "document.body.innerText.replaceAll(/\\s/g, '')"
    before = browser.run(words)
    browser.run("document.querySelectorAll('.token')[1].focus()")
    assert browser.run("document.querySelectorAll('.token')[1].querySelector('.card').checkVisibility()")
    contents = browser.run(
        "[...document.querySelectorAll('.token')[1].querySelectorAll('[data-text]')].map(each =>"
        " getComputedStyle(each, '::before').content)"
    )
    assert contents[1] == '"0.5000"' and len(contents) == 6 and browser.run(words) == before
    assert browser.run("document.querySelectorAll('.card')[0].getBoundingClientRect().height") > 40
