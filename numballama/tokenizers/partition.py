"""Cuts added tokens out of a text before the rest of it is encoded, as llama.cpp does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text by its spelling."""

    text: str
    token: int
    control: bool
    """Found where its spelling is trusted only."""
    lstrip: bool = False
    """White space before it belongs to it."""
    rstrip: bool = False
    """White space after it belongs to it."""


class Partition:
    """Added tokens, the longest first. Each is cut out of the text that longer ones leave."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = sorted((token for token in tokens if token.text), key=lambda token: -len(token.text))

    def split(self, text: str, trusted: bytes) -> list[str | int]:
        """The text in parts: ids of added tokens, and the text between them. No part is empty."""
        parts: list[tuple[int, int] | int] = [(0, len(text))]  # ids, and (start, end) of text
        for token in self._tokens:
            if token.text in text and (not token.control or 1 in trusted):
                parts = [new for part in parts for new in _cut(part, token, text, trusted)]
        return [part if isinstance(part, int) else text[slice(*part)] for part in parts]


def _cut(part: tuple[int, int] | int, token: AddedToken, text: str, trusted: bytes) -> list[tuple[int, int] | int]:
    """The part, with the token's id in place of each occurrence."""
    if isinstance(part, int):
        return [part]
    found: list[tuple[int, int] | int] = []
    start, end = part
    at = text.find(token.text, start, end)
    while at >= 0:
        stop = at + len(token.text)
        if token.control and 0 in trusted[at:stop]:
            at = text.find(token.text, at + 1, end)
            continue
        before = at
        while token.lstrip and before > start and text[before - 1].isspace():
            before -= 1
        while token.rstrip and stop < end and text[stop].isspace():
            stop += 1
        found += [(start, before), token.token] if before > start else [token.token]
        start, at = stop, text.find(token.text, stop, end)
    return [*found, (start, end)] if end > start else found
