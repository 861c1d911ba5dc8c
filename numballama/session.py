"""`Session`: a token history and the KV cache that goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .backend import Program
from .errors import ContextError, Error
from .sampling import Sampler
from .validation import whole_number


class Session:
    """Tokens seen so far, in a KV cache that holds `context` of them.

    `decode` is a program for one token, `prompt` one for a chunk of several. The history grows only after a run has
    ended, so an interrupt between two steps leaves a session that can go on: the next run writes the same places
    again.
    """

    def __init__(self, decode: Program, prompt: Program, context: int, vocab_size: int, sequence: int = 0) -> None:
        self.tokens: list[int] = []
        self.context, self.vocab_size = context, vocab_size
        self._decode, self._prompt, self._sequence = decode, prompt, sequence
        self._last = decode
        self._chunk = len(prompt.inputs["ids"])

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab]: logits after the last token of the last run. A view that the next run overwrites."""
        return self._last.value("logits")[0]

    def check(self, ids: Iterable[object]) -> list[int]:
        """The ids, checked. Raises `Error` for none or one outside the vocabulary, `ContextError` for too many."""
        try:
            tokens = [whole_number("a token", token) for token in ids]
        except TypeError:
            raise Error(f"token ids must be a sequence of whole numbers, found {ids!r}") from None
        if not tokens:
            raise Error("the prompt is empty: at least one token is needed to start from")
        for index, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise Error(f"token {index} of the prompt is {token}; the vocabulary has 0 to {self.vocab_size - 1}")
        if len(tokens) > self.context:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens and the context {self.context}; "
                "shorten it, or compile with context="
            )
        return tokens

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens after the first `length`; the cache keeps what belongs to those."""
        del self.tokens[length:]

    def common(self, ids: Sequence[int]) -> int:
        """How many of `ids`, the last excepted, are the beginning of the history: what need not be computed again."""
        most = min(len(self.tokens), len(ids) - 1)
        return next((n for n in range(most) if self.tokens[n] != ids[n]), max(most, 0))

    def prefill(self, ids: Sequence[int], sampler: Sampler | None = None) -> int | None:
        """Append tokens, a chunk a run; logits are computed for the last one only. Returns a sampler's choice."""
        if not ids:
            raise Error("there is no token to append")
        *whole, rest = (ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk))
        for chunk in whole:
            self.feed(self._prompt, chunk)
            self._prompt.run(len(chunk), 0, self._prompt.prefill_end)
            self.tokens.extend(chunk)
        return self._run(self._decode if len(rest) == 1 else self._prompt, rest, sampler)

    def step(self, token: int, sampler: Sampler | None = None) -> int | None:
        """Append one token: one call into compiled code. With a sampler, returns the next token."""
        return self._run(self._decode, (token,), sampler)

    def feed(self, program: Program, ids: Sequence[int]) -> None:
        """Write the inputs of a run that continues this session. Raises `ContextError` when the cache is full."""
        start, count = len(self.tokens), len(ids)
        if not all(0 <= token < self.vocab_size for token in ids):  # a kernel would read beside the embedding table
            raise Error(f"a token is not in the vocabulary of {self.vocab_size:,}: {list(ids)}")
        if start + count > self.context:
            raise ContextError(f"{start} tokens are in the context of {self.context}, {count} more do not fit")
        program.inputs["ids"][:count] = ids
        program.inputs["positions"][:count] = range(start, start + count)
        program.inputs["sequences"][:count] = self._sequence

    def _run(self, program: Program, ids: Sequence[int], sampler: Sampler | None) -> int | None:
        if sampler is not None and len(sampler.ids) > self.vocab_size:
            raise Error(f"the sampler draws from {len(sampler.ids):,} tokens, the vocabulary has {self.vocab_size:,}")
        self.feed(program, ids)
        self._last = program
        token = program.run(len(ids), sampler=sampler)
        self.tokens.extend(ids)
        return None if sampler is None else token
