"""What viewers of notebooks leave of an output: GitHub's page, and JupyterLab before a notebook is trusted.

GitHub drops style sheets, `style`, `class`, `id` and `hidden` (pydata/xarray#4053, jupyter/nbviewer#450); drawings
stay. JupyterLab's sanitizer drops style sheets and the tags of drawings, but neither their words nor `style`.
"""

from __future__ import annotations

from tests.helpers.markup import Element

DRAWN = {"svg", "g", "path", "rect", "text", "title"}


def shown_by_github(element: Element) -> Element:
    """A copy without what GitHub drops."""
    kept = {name: value for name, value in element.attributes.items() if name not in ("style", "class", "id", "hidden")}
    copy = Element(element.tag, kept)
    for piece in element.pieces:
        if isinstance(piece, str):
            copy.pieces.append(piece)
        elif piece.tag != "style":
            copy.pieces.append(shown_by_github(piece))
    return copy


def shown_by_jupyterlab(element: Element) -> Element:
    """A copy without what an untrusted notebook does not show, and without what is not displayed."""
    copy = Element(element.tag, element.attributes)
    for piece in element.pieces:
        if isinstance(piece, str):
            copy.pieces.append(piece)
        elif piece.tag != "style" and "display:none" not in piece.attributes.get("style", ""):
            inner = shown_by_jupyterlab(piece)
            copy.pieces += inner.pieces if piece.tag in DRAWN else [inner]
    return copy
