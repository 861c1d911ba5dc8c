"""`ValueScanner`: where a JSON value ends, in text that arrives in pieces."""

from __future__ import annotations

import re

from .definitions import MAX_DEPTH

_IN_STRING = re.compile(r'["\\]')
_NO_WORD = re.compile(r"[^\w.+-]")
_CLOSERS = {"{": "}", "[": "]"}


class ValueScanner:
    """Finds the end of one JSON value. Only brackets and strings are checked: a model may write `{"a": NaN,}`.

    `forbidden` are characters that break a value outside its strings, such as the "<" of "</tool_call>". A bracket of
    the wrong kind breaks it too, and nesting deeper than 64.
    """

    def __init__(self, forbidden: str = "") -> None:
        self.done = self.broken = False
        """Whether the value is complete; whether a character came that cannot belong to it."""
        self._outside = re.compile(f'["{{}}\\[\\]{re.escape(forbidden)}]')
        self._closers: list[str] = []
        self._in_string = self._escaped = self._in_word = False

    def feed(self, text: str, start: int, end: int) -> int:
        """Scan text[start:end]. Returns the end of what belongs to the value.

        That is `end`, unless the value is done or broken. The value's first character must be no space.
        """
        at = start
        while at < end and not (self.done or self.broken):
            if self._escaped:
                self._escaped = False
                at += 1
            elif self._in_string:
                found = _IN_STRING.search(text, at, end)
                if found is None:
                    return end
                at = found.end()
                self._escaped = found[0] == "\\"
                self._in_string = self._escaped
                self.done = not self._in_string and not self._closers
            elif self._in_word:
                found = _NO_WORD.search(text, at, end)
                self.done = found is not None
                at = found.start() if found else end
            elif not self._closers and text[at] not in '"{[':
                self._in_word = _NO_WORD.match(text, at) is None
                self.broken = not self._in_word
            else:
                found = self._outside.search(text, at, end)
                if found is None:
                    return end
                at = found.start()
                self._take(found[0])
                if not self.broken:
                    at += 1
        return at

    def _take(self, character: str) -> None:
        """A quote, a bracket or a forbidden character, outside a string."""
        if character == '"':
            self._in_string = True
        elif character in _CLOSERS and len(self._closers) < MAX_DEPTH:
            self._closers.append(_CLOSERS[character])
        elif self._closers and self._closers[-1] == character:
            self._closers.pop()
            self.done = not self._closers
        else:
            self.broken = True
