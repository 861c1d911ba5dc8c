"""A GGUF file's tokenizer "gpt2": byte-level BPE from tokens, merges and the name of a pre-tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import FormatError, UnsupportedError
from ...tokenizers.base import MAX_VOCAB, PieceType
from ...tokenizers.bpe import BPETokenizer, faults, library_from
from ...tokenizers.pretokenizers import WORDS, pre_tokenizer
from .header import Header

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_KEY = "tokenizer.ggml."


def bpe_from_gguf(header: Header) -> BPETokenizer:
    """The tokenizer, with llama.cpp's ids: a control or user-defined token is one only where it is asked for.

    Raises `FormatError` for damaged metadata, `UnsupportedError` for a pre-tokenizer of unknown name.
    """

    def fault(name: str, expected: str, found: object) -> FormatError:
        where = f"metadata key {_KEY}{name}"
        return FormatError("bad vocabulary", path=header.path, where=where, expected=expected, found=found)

    if (words := WORDS.get(pre := header.text(f"{_KEY}pre", "default") or "default")) is None:
        raise UnsupportedError(
            f"{header.path}: pre-tokenizer {pre!r} is not known; known are {', '.join(map(repr, WORDS))}"
        )
    pieces = [piece.decode(errors="replace") for piece in header.strings(f"{_KEY}tokens") or []]
    if not 0 < len(pieces) <= MAX_VOCAB:
        raise fault("tokens", f"1 to {MAX_VOCAB:,} pieces", f"{len(pieces):,}")
    if f"{_KEY}merges" not in header.fields:
        raise fault("merges", "merges of two pieces", "no such key")
    types = header.numbers(f"{_KEY}token_type")
    if types is not None and len(types) != len(pieces):
        raise fault("token_type", f"{len(pieces):,} numbers", f"{len(types):,}")

    def special(name: str) -> int | None:
        found = header.integer(f"{_KEY}{name}_token_id")
        return found if found is not None and 0 <= found < len(pieces) else None  # files say -1 for "none"

    bos, eos = special("bos"), special("eos")
    kinds = [PieceType.NORMAL] * len(pieces) if types is None else [int(kind) for kind in types.tolist()]
    for token in (bos, eos, special("eot"), special("eom")):  # whatever their type: a text never contains them
        if token is not None:
            kinds[token] = PieceType.CONTROL
    wanted = (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
    added = {pieces[token]: token for token, kind in enumerate(kinds) if kind in wanted and pieces[token]}
    silent = frozenset(token for token, kind in enumerate(kinds) if kind in (PieceType.CONTROL, PieceType.UNKNOWN))
    add_bos, add_eos = (header.flag(f"{_KEY}add_{name}_token") for name in ("bos", "eos"))

    def build() -> Library:
        from tokenizers import models  # 0.03 s to import

        merges: list[tuple[str, str]] = []
        for number, merge in enumerate(header.strings(f"{_KEY}merges") or []):
            left, space, right = merge[1:].partition(b" ")
            if not space:
                raise fault("merges", "two pieces with a space between them", f"{merge[:40]!r} (number {number:,})")
            merges.append(((merge[:1] + left).decode(errors="replace"), right.decode(errors="replace")))
        vocabulary = {piece: token for token, piece in reversed(list(enumerate(pieces)))} | added
        with faults("bad vocabulary", header.path):
            model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.ignore_merges)
            special = [(piece, token in silent) for piece, token in added.items()]
            return library_from(model, pre_tokenizer(words), special)

    return BPETokenizer(
        build,
        pieces,
        added,
        silent,
        bos,
        eos,
        add_bos=words.add_bos if add_bos is None else add_bos,
        add_eos=add_eos is True,
    )
