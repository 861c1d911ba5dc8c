"""Tokens with their probabilities: of a text, or of a generated one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.request import TokenLogprobs
from ..tokenizers.base import Tokenizer, TokenKind


class Alternative(NamedTuple):
    """A token that may stand at a place of a text, and the logarithm of its probability there."""

    id: int
    text: str
    logprob: float

    @property
    def probability(self) -> float:
        """0 to 1."""
        return math.exp(self.logprob)


@dataclass(frozen=True)
class ExplainedToken:
    """A token of a text. `logprob` is None for a text's first token, which nothing predicts."""

    id: int
    text: str
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    """The likeliest tokens at its place, the likeliest first. The token itself is one of them if it is likely."""

    @property
    def probability(self) -> float | None:
        """0 to 1, after all tokens before it; None for a text's first token."""
        return None if self.logprob is None else math.exp(self.logprob)

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, token: int, found: TokenLogprobs | None) -> ExplainedToken:
        """A token with what is known of its log probability."""
        text = token_text(tokenizer, token)
        return (
            cls(token, text) if found is None else cls(token, text, found.logprob, alternatives(tokenizer, found.top))
        )


def alternatives(tokenizer: Tokenizer | None, top: Iterable[tuple[int, float]]) -> tuple[Alternative, ...]:
    """(token, log probability) pairs with the tokens' texts."""
    return tuple(Alternative(token, token_text(tokenizer, token), logprob) for token, logprob in top)


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """A token as text: control tokens by their names, bytes that are no whole character as "\\xf0", others as they are.

    Without a tokenizer, or beyond its vocabulary, "<token 5>".
    """
    if tokenizer is None or token >= tokenizer.vocab_size:
        return f"<token {token}>"
    kind, data = tokenizer.entry(token)
    return tokenizer.piece(token) if kind is TokenKind.CONTROL else data.decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    """A token's text with every character visible: what is no printable character or space is escaped, as in "\\n".

    That includes what would change a terminal's state or the direction of writing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
