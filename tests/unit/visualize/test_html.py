"""Pieces of HTML and of text: what comes from a file is text and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from numballama.visualize.html import COLOURS, bar, escape, fold, frame, heading, page, printable, table, text_table
from numballama.visualize.parts import PARTS
from tests.helpers.markup import parsed, tags

HOSTILE = '<script>alert(1)</script><img src=x onerror="x">&amp;\x1b[31m\x00\u202e'


@given(st.text() | st.just(HOSTILE))
def test_escaped_text_is_text_and_has_no_control_characters(text: str) -> None:
    root = parsed(f'<b title="{escape(text)}">{escape(text)}</b>')
    assert tags(root) == {"b"}
    (element,) = root.children
    assert element.text == element.attributes["title"] == printable(text)
    assert printable(text).isprintable() and printable(printable(text)) == printable(text)


def test_lines_stay_where_they_are_wanted() -> None:
    assert escape("a\n\tb\x1b") == "a\\n\\tb\\x1b" and escape("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


def test_pieces_are_escaped_and_nest() -> None:
    pieces = heading(HOSTILE, HOSTILE) + bar([("#fff", 0.25, HOSTILE)]) + fold("<b>s</b>", "body", is_open=True)
    root = parsed(page(HOSTILE, frame(pieces)))
    assert not tags(root) & {"script", "img"}
    (bar_piece,) = root.all("i")
    assert "width:25.00%" in bar_piece.attributes["style"]
    assert [element.attributes for element in root.all("details")] == [{"open": ""}]
    (title,) = root.all("title")
    assert title.own_text == printable(HOSTILE)


def test_a_table_as_html_and_as_text() -> None:
    headings, rows = ["name", "n"], [["a", "1"], ["bc", "20"], ["sum", "21"]]
    root = parsed(table(headings, rows, totals=1))
    lines = [[cell.text for cell in row.children] for row in root.all("tr")]
    assert lines == [headings, *rows]
    assert [row.attributes.get("class", "") for row in root.all("tr")] == ["", "", "", "total"]
    assert text_table(headings, rows) == ["  name   n", "  a      1", "  bc    20", "  sum   21"]
    assert text_table(["", ""], [["a", "b"]]) == ["  a  b"] and text_table(["", ""], []) == []
    assert text_table(headings, rows, "ll")[1] == "  a     1"
    classes = [
        cell.attributes.get("class", "") for cell in parsed(table(["", "", ""], [["a", "b", "c"]], "lw")).all("td")
    ]
    assert classes == ["l", "l w", ""]


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_part_has_a_colour_that_is_seen_on_white_and_on_black() -> None:
    """WCAG 2 asks for a contrast of 3 for graphics; notebooks' dark themes are #111 and darker."""
    assert set(COLOURS) == set(PARTS) and len(set(COLOURS.values())) == len(PARTS)
    for colour in COLOURS.values():
        assert 1.05 / (luminance(colour) + 0.05) >= 2.7 and (luminance(colour) + 0.05) / 0.056 >= 3
