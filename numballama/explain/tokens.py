"""Tokens with their probabilities: of a text, or of a generated one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.request import TokenLogprobs
from ..tokenizers.base import Tokenizer, TokenKind

INCOMPLETE = "·"
"""What stands in a text for a token that completes no character."""


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
    completes: str
    """What the text has with this token and did not have before: whole characters, "" while a character's bytes are
    missing. The name of a control token."""
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    """The likeliest tokens at its place, the likeliest first. The token itself is one of them if it is likely."""

    @property
    def probability(self) -> float | None:
        """0 to 1, after all tokens before it; None for a text's first token."""
        return None if self.logprob is None else math.exp(self.logprob)


def explained_tokens(
    tokenizer: Tokenizer | None, ids: Iterable[int], found: Iterable[TokenLogprobs | None]
) -> tuple[ExplainedToken, ...]:
    """Tokens of a text with what is known of their log probabilities."""
    decoder = None if tokenizer is None else tokenizer.decoder(strip_leading_space=False)
    tokens = []
    for token, each in zip(ids, found, strict=True):
        text = completes = token_text(tokenizer, token)
        if decoder is not None and tokenizer is not None and token < tokenizer.vocab_size:
            completes = decoder.push(token) or decoder.hidden(token)
        logprob, top = each or (None, [])
        tokens.append(ExplainedToken(token, text, completes, logprob, alternatives(tokenizer, top)))
    return tuple(tokens)


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
