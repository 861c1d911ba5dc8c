"""`GrammarConstraint`: a grammar and how far one text has come in it, as the engine's `Constraint`."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Error
from .checker import first_lines, make_matcher
from .forced import ForcedText, ForcedTokens, byte_vocabulary

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

BLOCK = 64
"""Masks that lie one behind the other, so that one call computes many."""
MASK_THREADS = 4
"""Most threads that compute masks of one step."""
COPIES = 8
"""Most copies of a compiled grammar. Texts of one copy share automata behind a lock, so their masks are computed one
after the other."""


class GrammarError(Error):
    """A text has come to a place where its grammar cannot be followed further."""


class MaskBlocks:
    """Memory for the masks of a vocabulary: blocks of BLOCK rows, which constraints borrow."""

    def __init__(self, words: int) -> None:
        self.words = words
        self._free: list[tuple[NDArray[np.uint32], int]] = []
        self._lock = threading.Lock()

    def borrow(self) -> tuple[NDArray[np.uint32], int]:
        """(block uint32 [BLOCK, words], a row of it that nobody else has)."""
        with self._lock:
            if not self._free:
                block = np.zeros((BLOCK, self.words), np.uint32)
                self._free = [(block, row) for row in range(BLOCK - 1, -1, -1)]
            return self._free.pop()

    def give_back(self, block: NDArray[np.uint32], row: int) -> None:
        # Called by the garbage collector, so without the lock; a list's append is atomic.
        self._free.append((block, row))


def _executor() -> LLExecutor:
    return _executor_of(os.getpid())


@cache  # a forked child has none of the threads, and must not end those of its parent
def _executor_of(pid: int) -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor(min(MASK_THREADS, os.cpu_count() or 1))


class Grammar:
    """A compiled grammar and its first mask. Raises `Error` for one that cannot be followed, or allows no text.

    `forces`: look for text that it leaves no choice about.
    """

    def __init__(self, tokenizer: LLTokenizer, text: str, what: str, forces: bool = False) -> None:
        self.what, self.tokenizer, self._text = what, tokenizer, text
        matcher = make_matcher(tokenizer, text)
        if matcher.is_error():
            raise Error(f"{what} cannot be followed: {first_lines(matcher.get_error())}")
        self.end = tokenizer.eos_token
        """The bit of a mask that says that the text may end here."""
        self.mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        """uint32 [words]: the first mask."""
        matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if matcher.is_error():
            raise Error(f"{what} allows no text, or is too complex")
        others = self.mask.copy()
        others[self.end >> 5] &= ~np.uint32(1 << (self.end & 31))
        if not others.any():
            raise Error(f"{what} allows only the empty text")
        self.uses = 0
        """How often it was asked for again. Its automata grow with its texts."""
        self.failed = False
        bytewise = make_matcher(byte_vocabulary(), text) if forces else None
        self._bytewise = None if bytewise is None or bytewise.is_error() else bytewise
        self._copies = [matcher]
        self._numbers = itertools.count()

    def add_copy(self) -> None:
        """Compile it once more, so that more masks can be computed at the same time."""
        if len(self._copies) < COPIES:
            self._copies.append(make_matcher(self.tokenizer, self._text))

    def start(self) -> LLMatcher:
        """A matcher for a new text."""
        copies = self._copies
        return copies[next(self._numbers) % len(copies)].deep_copy()

    def start_forced(self) -> ForcedText | None:
        """What finds forced text of a new text. None: nothing does."""
        return None if self._bytewise is None else ForcedText(self._bytewise.deep_copy())


class GrammarConstraint:
    """Follows one text. `stops` are the tokens that end it, `special` those of them that add nothing to a text.

    A stop token is allowed where the grammar may end, and nowhere else; a special one also where the grammar names it.
    `vocab_size` is the number of logits, which sets the length of the mask. `forced`: accept tokens of forced text with
    the token before them.
    """

    def __init__(
        self,
        grammar: Grammar,
        blocks: MaskBlocks,
        vocab_size: int,
        stops: Collection[int],
        special: Collection[int],
        forced: ForcedTokens | None = None,
    ) -> None:
        from llguidance import LLMatcher

        self._grammar, self._blocks = grammar, blocks
        self._matcher = grammar.start()
        self.forced: Sequence[int] = ()
        """Tokens that must follow the last one, and were accepted with it."""
        self._forced_tokens, self._forced_text = forced, None if forced is None else grammar.start_forced()
        self._stop_ids = frozenset(stops)
        self._nothing = LLMatcher(grammar.tokenizer, "{", log_level=0)  # no grammar, so it does no work
        self._block, self._row = blocks.borrow()
        self._computed = self._block[self._row]
        words = -(-vocab_size // 32)
        padded = words > blocks.words  # the model has more rows than the tokenizer has tokens
        self._mask = np.zeros(words, np.uint32) if padded else self._computed[:words]
        self._words = (self._mask if padded else self._computed).data  # its items are Python's integers
        self._stops = _words_of(stop for stop in stops if stop < vocab_size)
        self._text_stops = _words_of(stop for stop in stops if stop < vocab_size and stop not in special)
        self._computed[:] = grammar.mask
        self._finish_mask()

    def __del__(self) -> None:
        if hasattr(self, "_row"):
            self._blocks.give_back(self._block, self._row)

    def mask(self) -> NDArray[np.uint32]:
        """uint32 [ceil(vocab_size / 32)]: the tokens that may come next."""
        return self._mask

    def accept(self, token: int) -> bool:
        """Advance by a token that the mask allows, and those that it forces; compute the next mask. True: the end."""
        (result,) = self.advance([(self, token)])
        if isinstance(result, Exception):
            raise result
        return result

    @staticmethod
    def advance(steps: Sequence[tuple[GrammarConstraint, int]]) -> list[bool | Exception]:
        """`accept` for many, in parallel. Does not hold Python's lock, except for a few microseconds each."""
        executor = _executor()
        pairs: list[tuple[Any, int]] = [(each._matcher, token) for each, token in steps]
        if len(pairs) == 1:  # with one, the lock would be held
            pairs.append((steps[0][0]._nothing, steps[0][0]._grammar.end))
        executor.consume_token_par(pairs)
        for each, token in steps:
            each._push(token)
        _compute_masks([each for each, _ in steps])
        _compute_masks(_accept_forced(steps))
        return [each._result() for each, _ in steps]

    def _push(self, token: int) -> None:
        self.forced = ()
        if self._forced_tokens is not None and self._forced_text is not None:
            self._forced_text.push(self._forced_tokens.bytes_of(token))

    def _accept_next(self, last: int) -> bool:
        """Accept the tokens that must follow `last`. False if there are none."""
        tokens, text = self._forced_tokens, self._forced_text
        assert tokens is not None and text is not None
        data, following = text.next()
        found = tokens.tokens(last, data, following) if data else ()
        stop = next((place for place, token in enumerate(found) if token in self._stop_ids), len(found))
        self.forced = found[: self._matcher.try_consume_tokens(list(found[:stop]))] if stop else ()
        for token in self.forced:
            text.push(tokens.bytes_of(token))
        return bool(self.forced)

    def _result(self) -> bool | Exception:
        if self._matcher.is_error():
            self._grammar.failed = True
            return GrammarError(f"{self._grammar.what} is too complex to follow here, or allows no further token")
        try:
            return self._matcher.is_stopped() or self._finish_mask()
        except GrammarError as error:  # others are advanced with this one
            return error

    def _finish_mask(self) -> bool:
        """Allow stop tokens where the text may end. True: nothing else may come."""
        words, end = self._words, self._grammar.end
        if len(self._mask) > len(self._computed):
            self._mask[: len(self._computed)] = self._computed
        place, bit = end >> 5, 1 << (end & 31)
        may_end = bool(words[place] & bit)
        words[place] &= ~bit
        if may_end and not self._mask.any():
            return True
        for place, bits in self._stops if may_end else ():
            words[place] |= bits
        for place, bits in () if may_end else self._text_stops:
            words[place] &= ~bits
        if self._text_stops and not (may_end or self._mask.any()):
            raise GrammarError(
                f"{self._grammar.what} allows only tokens of stop_token_ids here, where the text may not end: "
                "take them out, or stop at strings"
            )
        return False


def _compute_masks(constraints: Sequence[GrammarConstraint]) -> None:
    """The masks of constraints whose text goes on, as the grammar says."""
    going = [each for each in constraints if not each._matcher.is_stopped()]
    for block in {id(each._block): each._block for each in going}.values():
        rows = [(each._matcher, each._row) for each in going if each._block is block]
        _executor().unsafe_compute_mask_ptr(rows, block.ctypes.data, 4 * block.shape[1], BLOCK)


def _accept_forced(steps: Sequence[tuple[GrammarConstraint, int]]) -> list[GrammarConstraint]:
    """Accept what must follow the tokens of `steps`, whose masks are computed. Returns those that have gone on."""
    able = [each for each in steps if each[0]._forced_text is not None and not each[0]._matcher.is_stopped()]
    if not able:
        return []
    tokens = able[0][0]._forced_tokens
    assert tokens is not None
    forced = tokens.may_be_forced([each._computed for each, _ in able])
    return [each for (each, token), may in zip(able, forced, strict=True) if may and each._accept_next(token)]


def _words_of(tokens: Iterable[int]) -> list[tuple[int, int]]:
    """(word of a mask, bits in it) of some tokens."""
    words: dict[int, int] = {}
    for token in tokens:
        words[token >> 5] = words.get(token >> 5, 0) | 1 << (token & 31)
    return list(words.items())
