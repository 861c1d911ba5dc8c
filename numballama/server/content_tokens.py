"""`ContentTokens`: which generated tokens wrote an answer's content. Those of reasoning, calls and markers did not."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.request import TokenLogprobs
from .tools.events import Content, Event

Written = tuple[int, TokenLogprobs | None]
"""A token and its log probabilities."""


class ContentTokens:
    """Follows one answer, a token at a time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Written | None]] = []
        """(text that a token added and of which no event has told the kind, the token). None instead of a token that
        has been returned, because an earlier part of its text was content."""

    def add(self, text: str, token: Written, events: Sequence[Event], held: int) -> list[Written]:
        """The tokens that have written content with this one, which adds `text`.

        `events`: what the parser found when it read that; `held`: how many characters it still holds back.
        """
        self._waiting.append((text, token))
        return self.settle(events, held)

    def settle(self, events: Sequence[Event], held: int = 0) -> list[Written]:
        """The tokens that wrote the content in `events`. These tell of all new text but its last `held` characters."""
        if not events:
            return []
        text = "".join(text for text, _ in self._waiting)
        content = "".join(event.text for event in events if isinstance(event, Content))
        rest = len(text) - held
        start = max(rest - len(content), 0)  # a marker and white space behind it come before the content
        if not text.startswith(content, start):  # or behind it
            start = max(text.rfind(content, 0, rest), 0)
        end = start + len(content)
        found: list[Written] = []
        waiting, self._waiting = self._waiting, []
        at = 0
        for piece, token in waiting:
            begin, at = at, at + len(piece)
            inside = begin < end and (at > start or begin == start)
            if inside and token is not None:
                found.append(token)
            if at > rest or begin >= rest:
                self._waiting.append((piece[max(rest - begin, 0) :], None if inside else token))
        return found
