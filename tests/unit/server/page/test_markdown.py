"""Markdown of a model becomes HTML with the tags that Markdown has, and nothing else."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.server.page import markdown
from numballama.server.page.markdown import ATTRIBUTES, SCHEMES, render

TAGS = {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol",
    "li", "a", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


class Elements(HTMLParser):
    """The tags of a document with their attributes, as a browser reads them, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> list[str]:
        return [str(attrs["href"]) for tag, attrs in self.found if tag == "a"]


def check(html: str) -> Elements:
    """Every tag and attribute is a harmless one."""
    elements = Elements(html)
    for tag, attrs in elements.found:
        assert tag in TAGS, html
        assert set(attrs) <= ATTRIBUTES, html
    for link in elements.links():
        assert link.lower().startswith(tuple(f"{scheme}:" for scheme in SCHEMES)), html
    return elements


def test_what_is_rendered() -> None:
    html = render("# Title\n\n**bold** ~~gone~~ `code`\nnext line\n\n```python\nx < 1\n```\n\n1. one\n2. two\n")
    assert "<h1>Title</h1>" in html
    assert "<strong>bold</strong> <s>gone</s> <code>code</code><br />\nnext line" in html
    assert '<pre><code class="language-python">x &lt; 1\n</code></pre>' in html
    assert "<ol>\n<li>one</li>" in html


def test_links_open_a_page_of_their_own() -> None:
    (link,) = [attrs for tag, attrs in check(render("[a](https://example.org 'title')")).found if tag == "a"]
    assert link == {
        "href": "https://example.org",
        "title": "title",
        "target": "_blank",
        "rel": "noopener noreferrer nofollow",
    }


def test_tables_have_classes_and_no_style() -> None:
    html = render("|a|b|c|\n|:-|-:|:-:|\n|1|2|3|\n")
    assert '<th class="align-left">a</th>' in html and '<td class="align-right">2</td>' in html
    assert '<td class="align-center">3</td>' in html and "style" not in html


def test_an_image_is_a_link() -> None:
    """Loading it would tell its host that the answer was read."""
    elements = check(render("![a *cat*](https://example.org/cat.png)"))
    assert elements.links() == ["https://example.org/cat.png"] and elements.text.strip() == "a cat"
    assert check(render("![](https://example.org/cat.png)")).text.strip() == "image"


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "text <b onclick='alert(1)'>bold</b>",
        "<!-- --><iframe src='//example.org'></iframe>",
        "```html\n<script>alert(1)</script>\n```",
        '```"onmouseover="alert(1)\nx\n```',
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "<style>*{display:none}</style>",
        "a\n===\n<svg/onload=alert(1)>",
    ],
)
def test_html_is_text(text: str) -> None:
    elements = check(render(text))
    assert not any(name.startswith("on") for _, attrs in elements.found for name in attrs)


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "javascript&#58;alert(1)",
        "&#106;avascript:alert(1)",
        "\x01javascript:alert(1)",
        "<java\tscript:alert(1)>",
        "vbscript:x",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/svg+xml,<svg/onload=alert(1)>",
        "file:///etc/passwd",
        "//example.org",
        "/metrics",
        "props",
        "#top",
        "blob:https://example.org/1",
    ],
)
def test_links_of_other_schemes_stay_text(target: str) -> None:
    for text in (f"[a]({target})", f"![a]({target})", f"<{target}>", f"[a]\n\n[a]: {target}"):
        assert check(render(text)).links() == []


@pytest.mark.parametrize("target", ["https://example.org/a_b?c=1&d=2", "http://127.0.0.1:8000", "MAILTO:a@example.org"])
def test_links_of_allowed_schemes(target: str) -> None:
    assert len(check(render(f"[a]({target})")).links()) == 1


@given(st.text(alphabet=st.sampled_from(list("ab \n\t*_~`[]()<>!#|-:=\"'&;\\/1.x\0é")), max_size=200))
def test_any_text_is_harmless(text: str) -> None:
    check(render(text))


PARTS = [
    "[a](", "![", "](javascript:x)", "<img", "onerror=x>", "&#58;", "</code>", "</pre>", "```", "~~~x", "<a", "href=x>",
    '"', "'", ">", "-", "|", "|-|-|", "[x]:", "\\", "\n", "\n\n", "    ", "http://a", " ",
]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=40))
def test_hostile_parts_in_any_order_are_harmless(parts: list[str]) -> None:
    check(render("".join(parts)))


HEAVY = {
    "quotes": ">" * 20_000,
    "lists": "- " * 10_000,
    "brackets": "[" * 20_000,
    "pairs of brackets": "[" * 10_000 + "]" * 10_000,
    "images": "![" * 10_000,
    "unclosed links": "[a](" * 5_000,
    "emphasis": "*a **b " * 3_000,
    "backticks": "".join("`" * n + "a" for n in range(200)),
    "nested list": "".join("  " * n + "- a\n" for n in range(200)),
    "table of missing cells": "|a" * 300 + "|\n" + "|-" * 300 + "|\n" + "|\n" * 5_000,
    "references": "".join(f"[{n}]: http://a\n" for n in range(1_000)) + "".join(f"[{n}]" for n in range(1_000)),
    "entities": "&amp;" * 4_000,
    "autolinks": "<http://a" * 2_000,
}


@pytest.mark.parametrize("text", HEAVY.values(), ids=HEAVY)
def test_the_work_is_bounded_by_the_length(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, tokens and HTML grow no faster than the text."""
    steps = 0
    count = markdown._count_step

    def counted(state: object, *rest: object) -> bool:
        nonlocal steps
        steps += 1
        return count(state, *rest)

    parser = markdown._make_parser()
    for ruler in (parser.block.ruler, parser.inline.ruler):
        ruler.at("count_step", counted)
    monkeypatch.setattr(markdown, "_PARSER", parser)
    html = render(text)
    check(html)
    assert 0 < steps <= markdown.STEPS_PER_CHARACTER * len(text) + markdown.FREE_STEPS + 1
    assert len(html) <= 100 * len(text)


def test_a_text_that_is_too_complex_is_shown_as_it_is() -> None:
    text = "<b>" + "[" * 5_000
    assert render(text) == f'<pre class="plain">&lt;b&gt;{"[" * 5_000}</pre>\n'


@pytest.mark.parametrize("depth", [5, 9, 30, 400])
def test_deep_nesting_is_no_deep_recursion_and_loses_nothing(depth: int) -> None:
    nested_list = "".join("  " * n + "- a\n" for n in range(depth)) + "  " * depth + "- end"
    for text in ("> " * depth + "end", nested_list, "> - " * depth + "end", "*" * depth + "end" + "*" * depth):
        assert "end" in check(render(text)).text
    assert ("<pre" in render("> " * depth + "end")) == (depth >= markdown.MAX_NESTING)
    assert ("<pre" in render(nested_list)) == (2 * depth >= markdown.MAX_NESTING)


def test_documentation_is_far_from_the_limit() -> None:
    """Text of people is rendered, not shown as it is."""
    text = (
        "See [the *manual*](https://example.org) for `x[0][1]`: [[1, 2], [3, 4]]\n\n- a\n- b\n\n|a|b|\n|-|-|\n|1|2|\n\n"
        * 200
    )
    assert "<pre" not in render(text)
    assert "<pre" not in render("- 1\n" * 5_000)
