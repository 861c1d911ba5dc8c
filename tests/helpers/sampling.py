"""Samplers for tests, made in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numballama.cpu.sampling import choose_tokens
from numballama.sampling import REPEAT_WINDOW, SamplerTable, SamplingParams


def make_sampler(
    vocab_size: int, temperature: float = 0.8, top_k: int = 40, prompt: Sequence[int] = (),
    n_candidates: int | None = None, **settings: Any,
) -> SamplerTable:  # fmt: skip
    """A `SamplerTable` of one slot, with these fields of `SamplingParams`."""
    table = SamplerTable(1, vocab_size, n_candidates)
    table.assign(0, SamplingParams(temperature=temperature, top_k=top_k, **settings), prompt)
    return table


def choose_token(table: SamplerTable, logits: np.ndarray, slot: int = 0) -> int:
    """The token that a slot's sampler chooses from `logits` float32 [vocab]."""
    return int(choose_tokens(table, logits[None], np.array([slot], np.int32)).tokens[0])


# What the settings mean, once more and in other terms: in float64, over whole arrays


def changed_logits(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = (),
    stop_ids: Sequence[int] = (), allowed: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Logits float64 [n] from which a token is chosen after `output`. `allowed` bool [n] is the mask."""
    logits = logits.astype(np.float64)
    tokens = np.arange(len(logits))
    forbidden = np.zeros(len(logits), bool) if allowed is None else ~allowed
    if len(output) < params.min_tokens:
        forbidden |= np.isin(tokens, list(stop_ids))
    logits = np.where(forbidden, -np.inf, logits)
    logits += np.array([(params.logit_bias or {}).get(int(token), 0.0) for token in tokens])
    recent = np.isin(tokens, [*prompt, *output][-REPEAT_WINDOW:])
    penalty = params.repetition_penalty
    logits = np.where(recent, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    times = np.array([list(output).count(token) for token in tokens])
    return np.asarray(logits - params.frequency_penalty * times - params.presence_penalty * (times > 0))


def possible_tokens(logits: np.ndarray, params: SamplingParams, slack: float = 0.0) -> set[int]:
    """Tokens that may be chosen from changed logits; `slack` > 0 admits those that rounding may admit, < 0 leaves out
    those that it may leave out.
    """
    if params.temperature < 1e-5:
        return {int(token) for token in np.flatnonzero(logits >= logits.max() - slack)}
    mass = np.exp(logits - logits.max())
    above = logits[None, :] > logits[:, None] + slack  # above[i, j]: token j comes before token i
    rank = above.sum(axis=1)
    k = params.top_k or len(logits)
    among = np.sort(mass)[::-1][:k].sum()
    before = np.where(above, mass[None, :], 0).sum(axis=1)
    kept = (rank < k) & ((before < params.top_p * among * (1 + slack) + slack) | (params.top_p >= 1) | (rank == 0))
    kept &= mass >= params.min_p * (1 - slack)
    return {int(token) for token in np.flatnonzero(kept & (mass > 0))}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities float64 [n]."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def likeliest(logits: np.ndarray, count: int) -> list[int]:
    """The `count` largest logits' tokens, largest first, of equals the smaller id first."""
    return [int(token) for token in np.lexsort((np.arange(len(logits)), -logits))[:count]]


def mask_of(allowed: np.ndarray) -> np.ndarray:
    """bool [n] as the bits of uint32 [ceil(n / 32)]."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)
