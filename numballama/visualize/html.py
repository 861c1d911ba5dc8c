"""Pieces of HTML for a notebook, and the one style sheet of all of them.

Text has the colour of the notebook, lines and fills are shades that are seen on light and on dark, so that no theme
must be known. Nothing needs JavaScript: what folds is a `<details>`. Whatever comes from a file goes through `escape`.

Some viewers take parts away. JupyterLab, before a notebook is trusted, drops style sheets and drawings but shows the
words that were in them; GitHub drops style sheets and styles. So tables need no style, and beside a drawing stands its
text: the style sheet hides the text and shows the drawing, which its own style hides.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .parts import ATTENTION, CLASSIFIER, COMMUNICATION, EMBEDDING, FEED_FORWARD, OTHER

COLOURS = {
    EMBEDDING: "#9b6fd0", ATTENTION: "#3f88d8", FEED_FORWARD: "#d98324", CLASSIFIER: "#2f9e6e",
    COMMUNICATION: "#d0527a", OTHER: "#8a8f98",
}  # fmt: skip
"""Part → its colour. Each is seen on white and on black."""

STYLE = """
.numballama{font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;text-align:left;
 max-width:980px}
.numballama code,.numballama .mono{font:12px/1.4 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 background:none;padding:0;color:inherit}
.numballama .box{border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:10px 14px;margin:4px 0}
.numballama .head{font-size:15px;font-weight:600;overflow-wrap:anywhere}
.numballama .muted{opacity:.72}
.numballama .columns{display:flex;flex-wrap:wrap;gap:6px 36px;align-items:flex-start}
.numballama .columns>div{min-width:0;max-width:100%}
.numballama h4{font-size:13px;font-weight:600;margin:12px 0 3px}
.numballama table{border-collapse:collapse;margin:0;font-size:12.5px;color:inherit;border:0;width:auto}
.numballama th,.numballama td{padding:1px 14px 1px 0!important;border:0!important;text-align:right!important;
 white-space:nowrap;background:none;color:inherit;vertical-align:baseline;max-width:none}
.numballama th{font-weight:600;border-bottom:1px solid rgba(128,128,128,.4)!important}
.numballama .l{text-align:left!important}
.numballama td.w{white-space:normal;overflow-wrap:anywhere}
.numballama thead,.numballama tr{background:none!important}
.numballama tr.total td{border-top:1px solid rgba(128,128,128,.4)!important}
.numballama .bar{display:flex;height:10px;border-radius:3px;overflow:hidden;margin:4px 0;
 background:rgba(128,128,128,.18)}
.numballama .bar i{display:block;height:100%}
.numballama .chip{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:6px}
.numballama details{margin:4px 0}
.numballama summary{cursor:pointer;padding:2px 0}
.numballama summary:focus-visible{outline:2px solid #3f88d8;outline-offset:1px}
.numballama .scroll{overflow-x:auto}
.numballama .drawing{display:block!important}
.numballama .instead{display:none}
.numballama svg{display:block;color:inherit;max-width:100%;height:auto}
.numballama svg text{fill:currentColor;font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
.numballama svg .m{font:10.5px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.numballama svg .b{font-weight:600;font-size:12px}
.numballama svg .q{opacity:.72}
.numballama .text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px}
""".strip()


def escape(text: object, lines: bool = False) -> str:
    """Text for HTML. Control characters, which a file's metadata may hold, are shown as "\\x1b"; with `lines`, those
    that break lines stay.
    """
    return html.escape(printable(str(text), "\n\t" if lines else ""))


def printable(text: str, allowed: str = "") -> str:
    """The text with its control characters written out, so that a terminal does not obey them."""
    return "".join(c if c.isprintable() or c in allowed else repr(c)[1:-1] for c in text)


def frame(body: str, box: bool = True) -> str:
    """A piece for a notebook: the style sheet and the body."""
    inner = f'<div class="box">{body}</div>' if box else body
    return f'<div class="numballama"><style>{STYLE}</style>{inner}</div>'


def page(title: str, *pieces: str) -> str:
    """A whole page, for a browser. It is light or dark as the system is."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title></head>'
        f'<body style="margin:16px">{"".join(pieces)}</body></html>\n'
    )


def heading(title: str, about: str = "") -> str:
    rest = f'<div class="muted">{escape(about)}</div>' if about else ""
    return f'<div class="head">{escape(title)}</div>{rest}'


def fold(summary: str, body: str, is_open: bool = False) -> str:
    """A part that unfolds by a click or by Enter. `summary` and `body` are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def chip(part: str) -> str:
    """A small square in the colour of a part."""
    return f'<span class="chip" style="background:{COLOURS[part]}"></span>'


def bar(shares: Iterable[tuple[str, float, str]]) -> str:
    """A bar of (colour, fraction of the width, tooltip)."""
    pieces = "".join(
        f'<i style="width:{100 * share:.2f}%;background:{colour}" title="{escape(text)}"></i>'
        for colour, share, text in shares
    )
    return f'<div class="bar">{pieces}</div>'


def svg(width: float, height: float, pieces: Iterable[str], instead: Iterable[str] = ()) -> str:
    """A drawing of these pixels. It shrinks a little where there is no room, then it gets a scroll bar.

    The lines `instead` are read where the viewer drops style sheets. Pieces are on lines of their own, so that their
    words stay apart where it drops drawings.
    """
    lines = "\n".join(escape(line) for line in instead)
    text = f'<pre class="instead">{lines}</pre>' if lines else ""
    drawing = "\n".join(pieces)
    return (
        f'{text}<div class="scroll drawing" style="display:none"><svg xmlns="http://www.w3.org/2000/svg" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="min-width:{0.7 * width:.0f}px" fill="currentColor" font-family="system-ui,sans-serif" font-size="11">'
        f"{drawing}</svg></div>"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], columns: str = "l", totals: int = 0) -> str:
    """A table. Cells are HTML. The last `totals` rows are sums.

    `columns` has a letter for each column: "l" is text, "w" text that may have several lines, "r" a number. Those that
    it does not reach are numbers.
    """
    rows = list(rows)

    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        classes = {"l": ' class="l"', "w": ' class="l w"', "r": ""}
        kinds = columns.ljust(len(cells), "r")
        inner = "".join(f"<{tag}{classes[each]}>{cell}</{tag}>" for each, cell in zip(kinds, cells, strict=True))
        return f"<tr{kind}>{inner}</tr>"

    head = f"<thead>{line(headings, 'th')}</thead>" if any(headings) else ""
    first_total = len(rows) - totals
    body = "".join(line(cells, "td", ' class="total"' if n == first_total else "") for n, cells in enumerate(rows))
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]], columns: str = "l") -> list[str]:
    """The same as lines of text, for a terminal or a pipe."""
    lines = [list(row) for row in ([headings, *rows] if any(headings) else rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    kinds = columns.ljust(len(widths), "r")

    def padded(cells: Sequence[str]) -> Iterable[str]:
        for cell, width, kind in zip(cells, widths, kinds, strict=True):
            yield cell.rjust(width) if kind == "r" else cell.ljust(width)

    return [f"  {'  '.join(padded(line))}".rstrip() for line in lines]
