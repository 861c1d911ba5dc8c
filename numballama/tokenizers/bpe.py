"""Byte-pair encoding by the tokenizers library: byte-level BPE, and sentencepiece's BPE as `tokenizer.json` has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .base import PieceType, Vocabulary
from .library import LibraryTokenizer
from .pretokenizers import pre_tokenizer_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


class BPETokenizer(LibraryTokenizer):
    """A BPE model."""

    def vocabulary(self) -> Vocabulary:
        if not self._byte_level:
            raise UnsupportedError("GGUF cannot hold a sentencepiece BPE that has merges in place of scores")
        if (pre := pre_tokenizer_name(self._library)) is None:
            raise UnsupportedError(f"GGUF has no name for this pre-tokenizer: {self._library.pre_tokenizer}")
        merges = json.loads(self._library.model.__getstate__())["merges"]
        types = [PieceType.NORMAL if piece is not None else PieceType.UNUSED for piece in self._pieces]
        for token in self._added_ids:
            types[token] = PieceType.CONTROL if token in self._special else PieceType.USER_DEFINED
        notes: tuple[str, ...] = ()
        if self._library.normalizer is not None:
            notes = ("the tokenizer normalises text, which GGUF does not: ids differ on text that is not normalised",)
        return Vocabulary(
            [f"[HOLE{token}]".encode() if p is None else p.encode() for token, p in enumerate(self._pieces)],
            (),
            types,
            self.bos_id,
            self.eos_id,
            None,
            self.add_bos,
            self.add_eos,
            add_space_prefix=False,
            notes=notes,
            model="gpt2",
            merges=[(merge if isinstance(merge, str) else " ".join(merge)).encode() for merge in merges],
            pre=pre,
        )

    @property
    def unreachable(self) -> list[int]:
        """Ids with the same text as another id. Encoding never gives them, and a `tokenizer.json` cannot hold them."""
        find = self._library.token_to_id
        return [token for token, piece in enumerate(self._pieces) if piece is not None and find(piece) != token]


def build_library(model: Any, pre_tokenizer: Any, added: Sequence[tuple[str, bool]]) -> Library:
    """The library's byte-level tokenizer with this model and pre-tokenizer; `added` lists (text, special)."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Library

    library = Library(model)
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
    return library
