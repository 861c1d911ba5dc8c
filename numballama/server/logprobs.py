"""Log probabilities in OpenAI's two shapes, and those of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.request import TokenLogprobs
from ..tokenizers.base import Tokenizer, TokenKind
from .http import number

ROWS = 64
"""Rows of logits that are turned into log probabilities at a time."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: control tokens by their names, bytes that are no whole character as U+FFFD."""
    if token >= tokenizer.vocab_size:
        return f"<token {token}>"
    kind, data = tokenizer.entry(token)
    return tokenizer.piece(token) if kind is TokenKind.CONTROL else data.decode("utf-8", "replace")


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int]:
    """The bytes that a token adds to the text: none for control tokens."""
    return list(tokenizer.token_bytes(token)) if token < tokenizer.vocab_size else []


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
) -> dict[str, Any]:
    """`logprobs` of a chat's choice: an entry for each generated token, the one that ended the text included."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": number(logprob),
            "bytes": token_bytes(tokenizer, token),
        }

    content = [
        {
            **entry(token, found.logprob),
            "top_logprobs": [entry(other, logprob) for other, logprob in found.top],
        }
        for token, found in zip(tokens, logprobs, strict=True)
        if found is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offset: int = 0,
    begins: bool = False,
) -> dict[str, Any]:
    """`logprobs` of a completion's choice. `offset`: characters of the choice's text before these tokens. `begins`:
    they begin a text, so the space does not count that the tokenizer's encoder prepends.

    A first token of a prompt has no log probability: null.
    """
    texts = [token_text(tokenizer, token) for token in tokens]
    offsets, decoder = [], tokenizer.decoder(strip_leading_space=begins)
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.push(token)) if token < tokenizer.vocab_size else 0
    top: list[dict[str, float | None] | None] = []
    for token, found in zip(tokens, logprobs, strict=True):
        if found is None:
            top.append(None)
            continue
        named: dict[str, float | None] = {}
        for other, logprob in found.top:
            named.setdefault(token_text(tokenizer, other), number(logprob))
        named.setdefault(token_text(tokenizer, token), number(found.logprob))
        top.append(named)
    return {
        "text_offset": offsets,
        "token_logprobs": [None if found is None else number(found.logprob) for found in logprobs],
        "tokens": texts,
        "top_logprobs": top,
    }


def prompt_logprobs(logits: np.ndarray, ids: Sequence[int], top: int) -> list[TokenLogprobs | None]:
    """Log probability of each token of a prompt after those before it, and the `top` likeliest in its place.

    `logits` float32 [len(ids), vocab], as `Model.logits` gives them. The first token has none.
    """
    found: list[TokenLogprobs | None] = [None]
    for start in range(0, len(ids) - 1, ROWS):
        rows = logits[start : min(start + ROWS, len(ids) - 1)].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        for row, token in zip(rows, ids[start + 1 : start + 1 + len(rows)], strict=True):
            best = np.argpartition(-row, top)[:top] if 0 < top < len(row) else range(min(top, len(row)))
            likeliest = sorted(((int(other), float(row[other])) for other in best), key=lambda one: (-one[1], one[0]))
            found.append(TokenLogprobs(float(row[token]), likeliest))
    return found
