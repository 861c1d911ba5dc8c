"""llguidance's view of a tokenizer: the bytes of each token, and which tokens are special."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from ..tokenizers.base import Tokenizer, TokenKind

if TYPE_CHECKING:
    from llguidance import LLTokenizer

INSTALL = 'a grammar needs the library llguidance: pip install "numballama[serve]"'
"""Message of the `UnsupportedError` without the library."""
TEXT = r'[^"\\\x00-\x1F\x7F]'
"""A character of a string."""
WORD = "[a-zA-Z0-9]"
NAME = "[a-zA-Z0-9_]"
ATOM = r"[a-zA-Z0-9!#$%&'*+\-/=?\^_`{|}~]"
"""A character of an e-mail address, before the @."""
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{TEXT}{{1,{most}}}" for most in (3, 6, 10, 15, 22, 30)),
    f"{TEXT}+",
    "[a-z]+",
    *(f"{each}+" for each in (WORD, NAME, r"[a-zA-Z0-9_\-]", ATOM)),
    *(f"{each}{{1,{most}}}" for most in (30, 15) for each in (WORD, NAME, ATOM)),
]
"""Texts whose tokens a mask takes from a table where the grammar allows them all; it looks at each other token that may
begin there. So what a string, a name or an address allows should be in tables, also near the end of its `maxLength`.

llguidance makes a tree of these expressions: each is placed when all that contain it are, below the first of them. In
this order the table of a string of limited length is found without a look at those of names."""
SPECIAL = b"\xff"
"""The first byte of a special token, for llguidance. No text has it, so a grammar can name such a token only."""


class VocabularyView:
    """What `LLTokenizer` asks of a tokenizer.

    It has no end-of-sequence token, so `LLTokenizer` adds one behind the vocabulary: its bit in a mask says that the
    text may end. Which tokens end it is the request's choice.
    """

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = weakref.ref(tokenizer)  # who looks this up by the tokenizer must not keep it alive
        self.tokens, self.special_token_ids = token_bytes(tokenizer)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of text that continues another."""
        tokenizer, data = self._tokenizer(), text.encode() if isinstance(text, str) else text
        return [] if tokenizer is None else tokenizer.encode_continuation(data)


def token_bytes(tokenizer: Tokenizer) -> tuple[list[bytes], list[int]]:
    """Bytes of each token, and the ids of special ones: control tokens and those of unknown text.

    No grammar allows an empty token: those that the model has no row for, and the byte that marks special tokens.
    """
    tokens: list[bytes] = []
    special: list[int] = []
    for token in range(tokenizer.vocab_size):
        kind, data = tokenizer.entry(token)
        if token >= tokenizer.usable or data.startswith(SPECIAL):
            data = b""
        elif kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
            data = SPECIAL + (tokenizer.piece(token).encode() or b"[%d]" % token)
            special.append(token)
        tokens.append(data)
    return tokens, special


def make_tokenizer(view: VocabularyView) -> LLTokenizer:
    """llguidance's tokenizer. Takes about 8 µs and 1 kB a token. Raises `UnsupportedError` without the library."""
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise UnsupportedError(INSTALL) from None
    return LLTokenizer(view, slices=SLICES)  # type: ignore[arg-type]
