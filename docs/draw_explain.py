"""Draw docs/images/explain.webp, an explanation in a light and a dark notebook: `python -m docs.draw_explain`.

It needs Debian's package chromium.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import numballama
from tests.helpers.chromium import chromium

TEXT = "Once upon a time, there was a little girl named Lily."
WIDTH, HEIGHT = 1240, 682
HALF = (
    "display: inline-block; vertical-align: top; box-sizing: border-box; width: 50%; padding: 0 14px; overflow: hidden;"
)


def main() -> None:
    with numballama.compile(None, device="cpu") as model:
        shown = model.explain(TEXT, layer=2, head=3)._repr_html_()
    halves = [
        f'<div style="{HALF}; height: 100%; color-scheme: {scheme}; background: {back}; color: {ink}">{shown}</div>'
        for scheme, back, ink in (("light", "#fff", "#111"), ("dark", "#111", "#eee"))
    ]
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser:
        page = Path(folder) / "page.html"
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><body style="margin: 0; height: 100vh">{"".join(halves)}', "utf-8"
        )
        browser.size(WIDTH, HEIGHT)
        browser.open(page.as_uri())
        browser.run("document.querySelectorAll('.token')[9].focus()")
        # only one element has the focus: show the card of the other half by hand
        browser.run("document.querySelectorAll('.card')[8 + 14].style.display = 'block'")
        image = browser.send("Page.captureScreenshot", format="webp", quality=60)["data"]  # a third of the size of PNG
        (Path(__file__).parent / "images" / "explain.webp").write_bytes(base64.b64decode(image))


if __name__ == "__main__":
    main()
