"""Text that a grammar leaves no choice about, and its tokens: the engine adds them without a run for each."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import Error
from .vocabulary import VocabularyView

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_BYTES = 256
"""Most bytes of forced text that are looked for at a time: some grammars force an endless text."""
MAX_KEPT = 4096
"""Forced texts whose tokens are kept, for all grammars of a tokenizer."""
BYTES = (1 << 256) - 1
"""The bits of a mask of the vocabulary of bytes that stand for bytes. Later ones say that the text may end."""


@lru_cache(maxsize=1)
def byte_vocabulary() -> LLTokenizer:
    """llguidance's vocabulary of single bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


class ForcedText:
    """Follows one text byte by byte, and finds the bytes that must come next. `matcher` is of `byte_vocabulary`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._unread = bytearray()
        self._failed = False

    def push(self, data: bytes) -> None:
        """Add bytes to the text."""
        self._unread += data

    def next(self) -> tuple[bytes, int]:
        """(bytes that must come next, up to MAX_BYTES; the bits of the bytes that may come after them)."""
        unread, self._unread = self._unread, bytearray()
        if self._failed or self._matcher.try_consume_tokens(list(unread)) != len(unread):
            self._failed = True
            return b"", 0
        matcher, found = self._matcher.deep_copy(), bytearray()
        while not matcher.is_stopped():
            allowed = int.from_bytes(matcher.compute_bitmask(), "little")
            if allowed.bit_count() != 1 or allowed > BYTES or len(found) == MAX_BYTES:
                return bytes(found), allowed & BYTES
            found.append(allowed.bit_length() - 1)
            matcher.consume_token(found[-1])
        return (b"" if matcher.is_error() else bytes(found)), 0


class ForcedTokens:
    """Tokens of forced text, for one vocabulary. May be used from any thread."""

    def __init__(self, view: VocabularyView) -> None:
        self._view = view
        self._sorted = sorted(set(view.tokens))
        self._longest = max(map(len, self._sorted), default=0)
        single = [token for token, data in enumerate(view.tokens) if len(data) == 1]
        self._words = np.array(sorted({token >> 5 for token in single}), np.intp)  # few, and most stand together
        self._places = np.searchsorted(self._words, [token >> 5 for token in single])
        self._bits = np.array([1 << (token & 31) for token in single], np.uint32)
        self._bytes = np.array([view.tokens[token][0] for token in single], np.intp)
        self._kept: dict[tuple[int, bytes, int], Sequence[int]] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text."""
        return self._view.tokens[token]

    def may_be_forced(self, masks: Sequence[NDArray[np.uint32]]) -> NDArray[np.bool_]:
        """bool [n] for n masks uint32 [words]: whether all allowed tokens of a single byte are of the same one."""
        words = np.array([mask[self._words] for mask in masks])
        allowed = (words[:, self._places] & self._bits) != 0
        least = np.where(allowed, self._bytes, 256).min(axis=1, initial=256)
        most = np.where(allowed, self._bytes, -1).max(axis=1, initial=-1)
        return least == most

    def tokens(self, last: int, data: bytes, following: int) -> Sequence[int]:
        """Tokens that `data` has in any text that goes on with it after the token `last`: those of its beginning.

        `following` has the bits of the bytes that may come after it. A token that could be another one, depending on
        them, is left to the model. Empty if the vocabulary cannot spell `data`.
        """
        key = last, data, following
        if (found := self._kept.get(key)) is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            found = self._kept[key] = self._encode(last, data, following)
        return found

    def _encode(self, last: int, data: bytes, following: int) -> Sequence[int]:
        try:
            # what may begin at a border changes tokens before it as well: keep those that all borders agree on
            texts = [self._tokens_of(last, data[:border]) for border in self._borders(data, following)]
        except Error:
            return ()
        whole = texts[0]
        if b"".join(self._view.tokens[token] for token in whole) != data:
            return ()
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
        return tuple(tokens[0] for tokens in same)

    def _tokens_of(self, last: int, data: bytes) -> list[int]:
        """Tokens of a text after `last`: encoded with it, because some encoders look at what precedes."""
        ids = self._view(self._view.tokens[last] + data)
        return ids[1:] if ids[:1] == [last] else self._view(data)

    def _borders(self, data: bytes, following: int) -> list[int]:
        """The end of `data`, and where a token may begin that has an end of `data` and a byte of `following`."""
        after = [bytes([byte]) for byte in range(256) if following >> byte & 1]
        starts = range(max(0, len(data) - self._longest + 1), len(data))
        found = [n for n in starts if self._begins(data[n:]) and any(self._begins(data[n:] + b, True) for b in after)]
        return [len(data), *found]

    def _begins(self, data: bytes, or_is: bool = False) -> bool:
        """Whether a longer token begins with `data`; with `or_is`, also one that is `data`."""
        place = (bisect_left if or_is else bisect_right)(self._sorted, data)
        return place < len(self._sorted) and self._sorted[place].startswith(data)
