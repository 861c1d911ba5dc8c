"""`Session`: the tokens of one sequence and its KV cache. `SharedSession`: a session that several callers share."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .backend import Program
from .errors import CLOSED, FORKED, ContextError, DeviceError, Error
from .sampling import SamplerTable
from .validation import whole_number


class Session:
    """The tokens of a sequence so far, and the programs that append to them. The KV cache holds up to `context` tokens.

    `decode` is a program for one token, `prompt` one for a chunk of several. `tokens` grows only after a run has
    ended, so a session can continue after an interrupt: the next run writes the same cache positions again.
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

    def validate_token_ids(self, ids: Iterable[object]) -> list[int]:
        """The ids as a list of int. Raises `Error` if there are none or one is outside the vocabulary, `ContextError`
        for more than the context holds.
        """
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

    def truncate(self, length: int = 0) -> None:
        """Forget all tokens after the first `length`. The cache entries of those stay valid."""
        del self.tokens[length:]

    def common_prefix_length(self, ids: Sequence[int]) -> int:
        """Number of leading `ids` that are in the cache. The last id never counts: its logits must be computed."""
        limit = min(len(self.tokens), len(ids) - 1)
        return next((n for n in range(limit) if self.tokens[n] != ids[n]), max(limit, 0))

    def prefill(self, ids: Sequence[int], sampler: SamplerTable | None = None) -> int | None:
        """Append tokens, one run per chunk. Computes logits for the last only. Returns the sampler's next token."""
        if not ids:
            raise Error("there is no token to append")
        *whole, rest = (ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk))
        for chunk in whole:
            self.set_inputs(self._prompt, chunk)
            self._prompt.run(len(chunk), 0, self._prompt.prefill_end)
            self.tokens.extend(chunk)
        return self._run(self._decode if len(rest) == 1 else self._prompt, rest, sampler)

    def step(self, token: int, sampler: SamplerTable | None = None) -> int | None:
        """Append one token, in one call into compiled code. Returns the sampler's next token."""
        return self._run(self._decode, (token,), sampler)

    def set_inputs(self, program: Program, ids: Sequence[int]) -> None:
        """Write the inputs of a run that appends `ids`. Raises `ContextError` when they do not fit the cache."""
        start, count = len(self.tokens), len(ids)
        if not all(0 <= token < self.vocab_size for token in ids):  # a kernel would read outside the embedding table
            raise Error(f"a token is not in the vocabulary of {self.vocab_size:,}: {list(ids)}")
        if start + count > self.context:
            raise ContextError(f"{start} tokens are in the context of {self.context}, {count} more do not fit")
        program.inputs["ids"][:count] = ids
        program.inputs["positions"][:count] = range(start, start + count)
        program.inputs["sequences"][:count] = self._sequence
        if "rows" in program.inputs:
            program.inputs["rows"][0] = count - 1

    def _run(self, program: Program, ids: Sequence[int], sampler: SamplerTable | None) -> int | None:
        if sampler is not None and sampler.vocab_size != self.vocab_size:
            raise Error(f"the sampler has {sampler.vocab_size:,} tokens, the vocabulary {self.vocab_size:,}")
        self.set_inputs(program, ids)
        self._last = program
        token = program.run(len(ids), sampler=sampler)
        self.tokens.extend(ids)
        return None if sampler is None else token


class SharedSession:
    """One session that the streams of a model share, from any thread.

    `owner` is the stream whose tokens the KV cache holds. Another stream that takes the session computes its own
    tokens again.
    """

    def __init__(self, session: Session) -> None:
        self.owner: object = None
        self._session: Session | None = session
        self._lock, self._pid = threading.RLock(), os.getpid()

    @property
    def session(self) -> Session:
        """The session. Raises `Error` once the model is closed."""
        if self._session is None:
            raise Error(CLOSED)
        return self._session

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads out. Raises `DeviceError` in a forked child, where a lost thread may hold the lock."""
        if os.getpid() != self._pid:
            raise DeviceError(FORKED)
        with self._lock:
            yield

    @contextlib.contextmanager
    def reset(self) -> Iterator[Session]:
        """Empty the session for the block, and again after it. Running streams compute their tokens again."""
        session, self.owner = self.session, None
        session.truncate()
        try:
            yield session
        finally:
            session.truncate()

    def close(self) -> None:
        """Drop the session. Afterwards `session` raises `Error`."""
        self._session = None
