"""Log probabilities from logits: those of given tokens, and the likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .request import TokenLogprobs

ROWS = 64
"""Rows of logits that are turned into log probabilities at a time: it limits memory."""


class Likeliest(NamedTuple):
    """The likeliest tokens after each of n tokens: ids and log probabilities [n, top], the likeliest first."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]

    @classmethod
    def empty(cls, n: int, top: int) -> Likeliest:
        """Room for `n` tokens."""
        return cls(np.empty((n, top), np.int64), np.empty((n, top)))

    def put(self, start: int, part: Likeliest) -> None:
        """Set the tokens from `start` on."""
        end, top = start + len(part.ids), part.ids.shape[1]
        self.ids[start:end, :top], self.logprobs[start:end, :top] = part

    def pairs(self) -> list[list[tuple[int, float]]]:
        """(token, log probability) pairs of each token."""
        each = zip(self.ids.tolist(), self.logprobs.tolist(), strict=True)
        return [list(zip(ids, logprobs, strict=True)) for ids, logprobs in each]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """logits [vocab] or [n, vocab] → log probabilities of the same shape."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def log_softmax_parts(logits: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(first row, log probabilities) of `ROWS` rows at a time."""
    for start in range(0, len(logits), ROWS):
        yield start, log_softmax(logits[start : start + ROWS])


def likeliest(logprobs: NDArray[np.float64], top: int) -> Likeliest:
    """The `top` likeliest tokens of each row; of equal ones, the smaller id first."""
    top = min(top, logprobs.shape[1])
    ids = np.argpartition(-logprobs, max(top - 1, 0), axis=1)[:, :top]
    order = np.lexsort((ids, -np.take_along_axis(logprobs, ids, axis=1)))
    ids = np.take_along_axis(ids, order, axis=1)
    return Likeliest(ids, np.take_along_axis(logprobs, ids, axis=1))


def prompt_logprobs(logits: NDArray[np.float32], ids: Sequence[int], top: int) -> list[TokenLogprobs | None]:
    """Log probability of each token of a text after those before it, and the `top` likeliest in its place.

    `logits` [len(ids), vocab], as `Model.logits` gives them. The first token has none.
    """
    found: list[TokenLogprobs | None] = [None]
    for start, rows in log_softmax_parts(logits[: len(ids) - 1]):
        after = ids[start + 1 : start + 1 + len(rows)]
        for row, token, top_tokens in zip(rows, after, likeliest(rows, top).pairs(), strict=True):
            found.append(TokenLogprobs(float(row[token]), top_tokens))
    return found
