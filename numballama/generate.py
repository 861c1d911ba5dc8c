"""From tokens to text as it may be shown: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Iterable


class StopStringFilter:
    """Holds back text that may turn out to be the beginning of a stop string.

    `push(text)` returns what is safe to show; `stopped` becomes True once a stop string has come, and what precedes
    it is the end of the text. `flush()` returns what is still held back when the text ends otherwise.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [text.find(stop) for stop in self._stops]
        if any(place >= 0 for place in found):
            self.stopped, self._held = True, ""
            return text[: min(place for place in found if place >= 0)]
        keep = max(self._partial(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _partial(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
