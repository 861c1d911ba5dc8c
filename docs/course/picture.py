"""Shapes of the course's pictures, written as SVG. A picture has the colours of the reader's theme, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
svg { font-family: sans-serif; font-size: 14px }
.page { fill: #ffffff } .text { fill: #1f2328 } .note { fill: #59636e; font-size: 12px }
.a { fill: #e3edfb; stroke: #4a6fa5 } .b { fill: #fdeecb; stroke: #a8761a } .c { fill: #dff3e1; stroke: #3d8b4a }
.d { fill: #f6f8fa; stroke: #8c959f } .line { stroke: #59636e; fill: none } .head { fill: #59636e }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } .text { fill: #e6edf3 } .note { fill: #9da7b1 }
.a { fill: #16304f; stroke: #7aa5dd } .b { fill: #47340f; stroke: #d9a441 } .c { fill: #143a1f; stroke: #6cc07a }
.d { fill: #161b22; stroke: #6e7681 } .line { stroke: #9da7b1 } .head { fill: #9da7b1 }
}
"""


class Picture:
    """Shapes on a page of `width` × `height`. Boxes have one of the colours a, b, c and d."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height, self.parts = width, height, list[str]()

    def box(self, x: float, y: float, w: float, h: float, lines: str | Sequence[str] = "", kind: str = "a") -> None:
        """A rectangle with centred lines of text; all but the first are small."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="4"/>')
        lines = [lines] if isinstance(lines, str) else list(lines)
        top = y + h / 2 + 5 - 8 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + 16 * i, line, "middle", small=i > 0)

    def text(self, x: float, y: float, text: str, anchor: str = "start", small: bool = False) -> None:
        kind = "note" if small else "text"
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.text(x, y, text, anchor, small=True)

    def arrow(self, *points: float) -> None:
        """A line through points x, y, x, y … with a head at its end."""
        pairs = " L".join(f"{x},{y}" for x, y in zip(points[::2], points[1::2], strict=True))
        self.parts.append(f'<path class="line" d="M{pairs}" marker-end="url(#head)"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(f'<path class="line" d="M{x1},{y1} L{x2},{y2}"/>')

    def __str__(self) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = '<marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        head += '<path class="head" d="M0,0 L9,4 L0,8 Z"/></marker>'
        page = f'<rect class="page" width="{self.width}" height="{self.height}"/>'
        top = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style><defs>{head}</defs>{page}'
        return "\n".join([top, *self.parts, "</svg>\n"])
