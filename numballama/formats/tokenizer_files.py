"""Text ↔ token ids, for every tokenizer file the project reads: sentencepiece's and tiktoken's `.model`, Hugging Face's
`tokenizer.json`, llama2.c's `.bin`, GGUF."""

from __future__ import annotations

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ..errors import Error, FormatError, UnsupportedError
from ..files import expand_user, map_file
from ..tokenizers.base import MAX_VOCAB, Decoder, PieceType, Strip, Tokenizer, TokenKind, Vocabulary
from ..tokenizers.bpe import BPETokenizer
from ..tokenizers.huggingface import Settings, read_json
from ..tokenizers.scored import GgufTokenizer, Llama2cTokenizer, read_llama2c, scored_from_gguf
from ..tokenizers.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from ..tokenizers.tiktoken import looks_like_tiktoken, read_tiktoken
from .gguf import header as gguf_header
from .gguf.header import Header
from .gguf.tokenizer import bpe_from_gguf

__all__ = [
    "MAX_VOCAB",
    "BPETokenizer",
    "Decoder",
    "GgufTokenizer",
    "Llama2cTokenizer",
    "PieceType",
    "SentencePieceTokenizer",
    "Strip",
    "TextFiles",
    "TokenKind",
    "Tokenizer",
    "Vocabulary",
    "from_gguf",
    "load_tokenizer",
    "read_text_files",
]

SUPPORTED = "tokenizer.json, sentencepiece's and tiktoken's .model, llama2.c's tokenizer.bin and GGUF"

_NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
"""Files that hold a directory's tokenizer, the one to prefer first."""


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Open the tokenizer file at `path`, recognised by its content, or the one of a directory.

    Of a directory it is `tokenizer.json`, else `tokenizer.model`, else `tokenizer.bin`, else its only GGUF file. What
    stands beside a `tokenizer.json` says when BOS and EOS are added. Raises `FormatError` for a damaged file or one of
    an unknown format, `UnsupportedError` for a known one that is not read, and `Error` when it cannot be opened.
    """
    if os.path.isdir(expand_user(path)):
        if (found := _in_directory(expand_user(path))) is None:
            raise FormatError(
                "a directory without a tokenizer", path=path, expected=f"one of {', '.join(_NAMES)}, *.gguf"
            )
        return _by_settings(load_tokenizer(found), Settings(expand_user(path)))
    file = map_file(path)
    if file.data[:4] == gguf_header.MAGIC:
        if (tokenizer := from_gguf(Header(file))) is None:
            raise FormatError(
                "a GGUF file without a tokenizer", path=path, expected="tokenizer.ggml.tokens", found="no such key"
            )
        tokenizer.prepare()
        return tokenizer
    if file.data[:64].lstrip().startswith(b"{"):
        return read_json(file)
    if looks_like_tiktoken(file):
        return read_tiktoken(file)
    try:
        return read_llama2c(file)
    except FormatError as error:
        fault = error
    if (model := read_sentencepiece(file)) is None:
        raise FormatError(
            f"not a tokenizer of a known kind, nor a sentencepiece model, nor a llama2.c tokenizer.bin ({SUPPORTED})",
            path=path,
            where=fault.where,
            expected=fault.expected,
            found=fault.found,
        )
    return model


def _by_settings(tokenizer: Tokenizer, settings: Settings) -> Tokenizer:
    """A sentencepiece model in a Hugging Face directory, which says there when BOS and EOS are added."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        add_bos, add_eos = (settings.flag(f"add_{name}_token") for name in ("bos", "eos"))
        tokenizer.add_bos = tokenizer.add_bos if add_bos is None else add_bos
        tokenizer.add_eos = tokenizer.add_eos if add_eos is None else add_eos
    return tokenizer


def _in_directory(directory: Path) -> Path | None:
    for name in _NAMES:
        if (path := directory / name).is_file():
            return path
    found = sorted(directory.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def from_gguf(header: Header) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata; None if it holds none. Damage may show in its `prepare` only.

    Raises `FormatError` for damaged metadata, `UnsupportedError` for a tokenizer of another kind.
    """
    model = header.text("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    if model == "llama":
        return scored_from_gguf(header)
    if model == "gpt2":
        return bpe_from_gguf(header)
    named = {"bert": "WordPiece", "t5": "unigram"}.get(str(model), "unknown")
    raise UnsupportedError(
        f"{header.path}: tokenizer {model!r} ({named}) is not read; supported are 'llama' (sentencepiece) and "
        "'gpt2' (byte-level BPE)"
    )


@dataclass(frozen=True)
class TextFiles:
    """What a Hugging Face directory says about text: `Checkpoint` has fields of these names."""

    tokenizer: Tokenizer | None
    chat_template: str | None
    stop_token_ids: tuple[int, ...]
    """Ids that generation_config.json, else config.json, names as the end of a text; EOS is the tokenizer's matter."""
    notes: tuple[str, ...]


def read_text_files(directory: str | PathLike[str], own_tokenizer: bool = True) -> TextFiles:
    """Tokenizer, chat template and stop ids of a Hugging Face directory; each may be missing.

    A tokenizer of a kind that is not supported, or, if not `own_tokenizer`, any, is left out, the former with a note.
    Raises `FormatError` for damaged files.
    """
    folder = expand_user(directory)
    if not folder.is_dir():
        raise Error(f"{directory}: no such directory")
    settings, tokenizer, notes = Settings(folder), None, []
    if own_tokenizer and _in_directory(folder) is not None:
        try:
            tokenizer = load_tokenizer(folder)
        except UnsupportedError as error:
            notes.append(f"its tokenizer is left out: {error}")
    if isinstance(tokenizer, SentencePieceTokenizer):
        added = settings.tokenizer_config.get("added_tokens_decoder")
        ids = [int(key) for key in added if key.isdecimal()] if isinstance(added, dict) else []
        unknown = [token for token in ids if token >= tokenizer.vocab_size]
        if unknown:
            notes.append(f"{len(unknown)} added tokens, which tokenizer.model does not have, are left out")
    return TextFiles(tokenizer, settings.chat_template, settings.stop_token_ids, tuple(notes))
