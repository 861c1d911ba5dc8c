"""Hugging Face's `tokenizer.json`, read by the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UnsupportedError
from ..files import MappedFile
from .base import MAX_VOCAB, Strip
from .bpe import BPETokenizer, library_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

MAX_TOKENIZER = 1 << 27
"""Maximum size of a tokenizer.json in bytes. The largest known has 33 million."""


@dataclass(frozen=True)
class TokenSettings:
    """BOS and EOS according to the files beside a tokenizer. None: the files do not say."""

    bos: str | None = None
    """Text of the token."""
    eos: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None


def read_tokenizer_json(file: MappedFile, settings: TokenSettings) -> BPETokenizer:
    """The BPE of a `tokenizer.json`; `settings` are those of the files beside it.

    Raises `FormatError` for damaged files, `UnsupportedError` for models other than BPE.
    """
    if file.size > MAX_TOKENIZER:
        raise FormatError(
            "too large", path=file.path, expected=f"at most {MAX_TOKENIZER:,} bytes", found=f"{file.size:,}"
        )
    from tokenizers import Tokenizer as Library  # 0.03 s to import
    from tokenizers import models

    with library_errors("not a tokenizer.json", file.path):
        library = Library.from_buffer(file.data[:])
        library.no_truncation()
        library.no_padding()
        ids: dict[str, int] = library.get_vocab(with_added_tokens=True)
        decoder = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {}
    if not isinstance(library.model, models.BPE):
        raise UnsupportedError(f"{file.path}: a {type(library.model).__name__} model; supported is BPE")
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB:
        raise FormatError("bad vocabulary", path=file.path, expected=f"1 to {MAX_VOCAB:,} tokens", found=f"{size:,}")
    pieces: list[str | None] = [None] * size
    for piece, token in ids.items():
        pieces[token] = piece
    entries = library.get_added_tokens_decoder()
    added = {entry.content: token for token, entry in entries.items()}
    rules = _rules(library, settings, added | ids, file.path)
    special = frozenset(token for token, entry in entries.items() if entry.special)
    special |= {token for token in (rules.bos, rules.eos) if token is not None}
    strip, byte_level = _decoding(decoder, file.path)
    return BPETokenizer(
        lambda: library, pieces, added, special, rules.bos, rules.eos, rules.add_bos, rules.add_eos, strip, byte_level
    )


@dataclass(frozen=True)
class _Rules:
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool


def _rules(library: Library, settings: TokenSettings, ids: Mapping[str, int], path: Path) -> _Rules:
    """Tokens that encoding adds to a text: according to the settings, otherwise according to the post-processor."""
    bos, eos = (ids.get(text or "") for text in (settings.bos, settings.eos))
    with library_errors("a tokenizer.json whose post-processor fails", path):
        encoded = library.encode("a")
    mask = list(encoded.special_tokens_mask)
    inner = mask.index(0) if 0 in mask else len(mask)
    before = list(encoded.ids[:inner])
    after = list(encoded.ids[len(mask) - mask[::-1].index(0) :]) if 0 in mask else []
    add_bos, add_eos = settings.add_bos, settings.add_eos
    if add_bos is None and add_eos is None:
        bos = before[0] if bos is None and len(before) == 1 else bos
        eos = after[0] if eos is None and len(after) == 1 else eos
        if before not in ([], [bos]) or after not in ([], [eos]):
            raise UnsupportedError(
                f"{path}: its post-processor puts ids {before} before a text and {after} after it; "
                f"supported are BOS ({bos}) and EOS ({eos})"
            )
        add_bos, add_eos = bool(before), bool(after)
    return _Rules(bos, eos, bool(add_bos) and bos is not None, bool(add_eos) and eos is not None)


def _decoding(decoder: Mapping[str, Any], path: Path) -> tuple[Strip, bool]:
    """Which leading spaces decoding removes, and whether pieces are byte-level."""
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = {part.get("type"): part for part in parts}
    if "ByteLevel" in kinds:
        return Strip.NONE, True
    if "Metaspace" in kinds:
        never = kinds["Metaspace"].get("prepend_scheme") == "never"
        return Strip.NONE if never else Strip.ONE, False
    if "ByteFallback" in kinds:
        strip = kinds.get("Strip", {})
        return Strip.ONE if strip.get("content") == " " and strip.get("start") else Strip.NONE, False
    raise UnsupportedError(
        f"{path}: decoder {decoder.get('type')!r}; supported are ByteLevel, ByteFallback and Metaspace"
    )
