"""Log probabilities in OpenAI's two shapes, and tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.request import TokenLogprobs
from ..tokenizers.base import Tokenizer, TokenKind
from .http import number


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


class TextOffsets:
    """Where each token of a text begins in it. The tokens may come in parts: those of a character may be in two.

    `start`: characters before the first. `begins`: they begin a text, so the space does not count that the tokenizer's
    encoder prepends.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, begins: bool = False) -> None:
        self._end, self._size = start, tokenizer.vocab_size
        self._decoder = tokenizer.decoder(strip_leading_space=begins)

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Those of the next tokens."""
        found = []
        for token in tokens:
            found.append(self._end)
            self._end += len(self._decoder.push(token)) if token < self._size else 0
        return found


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offsets: TextOffsets | None = None,
) -> dict[str, Any]:
    """`logprobs` of a completion's choice. `offsets`: of its text, if these tokens do not begin it.

    A first token of a prompt has no log probability: null.
    """
    texts = [token_text(tokenizer, token) for token in tokens]
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
        "text_offset": (offsets or TextOffsets(tokenizer)).of(tokens),
        "token_logprobs": [None if found is None else number(found.logprob) for found in logprobs],
        "tokens": texts,
        "top_logprobs": top,
    }
