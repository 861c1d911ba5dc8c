"""Draw docs/images/notebook.webp: what a notebook shows of the story model, and the profile of another one.

PYTHONPATH=. python docs/draw_notebook.py MODEL

It needs Debian's package `chromium`. Use a quiet machine, and a model that is larger than its caches.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

import numballama
from numballama.visualize.html import page
from tests.helpers.chromium import chromium

PICTURE = Path(__file__).parent / "images" / "notebook.webp"
WIDTH, HEIGHT = 1490, 1383


def html(other: str) -> str:
    """The graph on the left; card, plan and profile on the right."""
    with numballama.compile(None, device="cpu", threads=1) as model:
        graph, card, plan = model.graph._repr_html_(), model._repr_html_(), model.plan._repr_html_()
    with numballama.compile(other, device="cpu", threads=1) as model:
        profile = model.profile("Once upon a time there was a little girl")._repr_html_()
    columns = f'<div style="width:655px">{graph}</div><div style="width:790px">{card}{plan}{profile}</div>'
    return page("notebook", f'<div style="display:flex;gap:14px;align-items:flex-start">{columns}</div>')


def main(other: str) -> None:
    with tempfile.TemporaryDirectory() as name, chromium(Path(name)) as browser:
        source = Path(name) / "page.html"
        source.write_text(html(other), encoding="utf-8")
        browser.prefer("light")
        browser.size(WIDTH, HEIGHT)
        browser.open(source.as_uri())
        browser.run("document.querySelector('details').open = true")
        taken = browser.send("Page.captureScreenshot", format="webp", quality=40)
    PICTURE.write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    main(sys.argv[1])
