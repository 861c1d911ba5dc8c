"""Reads HTML that the package writes: its tags must nest, and what is text must be text."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"hr", "br", "meta", "img", "input"}


class Element:
    """A tag with its attributes, and what is inside it: elements and text, in order."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.pieces: list[Element | str] = []

    @property
    def children(self) -> list[Element]:
        return [piece for piece in self.pieces if isinstance(piece, Element)]

    @property
    def own_text(self) -> str:
        """The text directly inside it."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    def all(self, tag: str) -> Iterator[Element]:
        """Every element below this one with a tag, in the order of the document."""
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.all(tag)

    @property
    def text(self) -> str:
        """What is read: the text of the element, of its children and of theirs, without style sheets and tooltips."""
        shown = (piece for piece in self.pieces if isinstance(piece, str) or piece.tag not in ("style", "title"))
        return "\n" if self.tag == "br" else "".join(each if isinstance(each, str) else each.text for each in shown)

    def number(self, name: str) -> float:
        return float(self.attributes[name])


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].pieces.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].pieces.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].pieces.append(data)


def parsed(html: str) -> Element:
    """The document. Fails if a tag does not end where it must."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].tag}> does not end"
    return parser.root


def tags(root: Element) -> set[str]:
    """The tags of a document."""
    return {child.tag for child in root.children}.union(*(tags(child) for child in root.children))
