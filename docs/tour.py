"""Set the line numbers of docs/tour.md to where each named line is now: `python docs/tour.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tour.md"
ANCHOR = re.compile(r"\[`(numballama/[\w/]+\.py):(\d+)` · `([^`]+)`\]\(\.\./(numballama/[\w/]+\.py)#L(\d+)\)")
"""[`file:line` · `text`](../file#Lline): a line of a file that begins with the text."""


def line_of(file: str, text: str) -> int:
    """The line of a file that begins with `text`, counted from 1. Raises `ValueError` unless there is exactly one."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.startswith(text)]
    if len(found) != 1:
        raise ValueError(f"docs/tour.md: {len(found)} lines of {file} begin with {text!r}, expected one")
    return found[0]


def with_lines(page: str) -> str:
    """The page with the right line in each anchor."""

    def anchor(match: re.Match[str]) -> str:
        file, text = match[1], match[3]
        line = line_of(file, text)
        return f"[`{file}:{line}` · `{text}`](../{file}#L{line})"

    return ANCHOR.sub(anchor, page)


if __name__ == "__main__":
    PAGE.write_text(with_lines(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
