"""Texts that a grammar allows, chosen at random, byte by byte."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import TYPE_CHECKING

from numballama.structured.checker import make_matcher

if TYPE_CHECKING:
    from llguidance import LLTokenizer

END = 261
"""The token that ends a text, of llguidance's vocabulary of bytes."""


@lru_cache
def byte_vocabulary() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def random_text(grammar: str, seed: int, length: int = 120) -> str | None:
    """A text that the grammar allows, or None: it allows none, or none of about this length was found."""
    rng, matcher, text = random.Random(seed), make_matcher(byte_vocabulary(), grammar), bytearray()
    for _ in range(3 * length):
        if matcher.is_stopped():
            break
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if bits >> byte & 1]
        if bits >> END & 1 and (not allowed or rng.random() < 0.3 or len(text) > length):
            break
        closing = [byte for byte in allowed if byte in b'"}],'] if len(text) > length else []
        plain = [byte for byte in allowed if 32 <= byte < 127] if rng.random() < 0.5 else []
        text.append(rng.choice(closing or plain or allowed))
        assert matcher.consume_token(text[-1])
    else:
        return None
    return None if matcher.is_error() else text.decode()


def accepts(grammar: str, text: str) -> bool:
    """Whether the grammar allows the text as a whole."""
    matcher, data = make_matcher(byte_vocabulary(), grammar), text.encode()
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()
