"""`load_tokenizer`: opens tokenizer files of every supported format, recognised by content."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from os import PathLike
from pathlib import Path

from ..errors import FormatError, UnsupportedError
from ..files import MappedFile, expand_user, map_file
from ..tokenizers.base import Tokenizer
from ..tokenizers.eog import EOG_NAMES, not_eog
from ..tokenizers.huggingface import read_tokenizer_json
from ..tokenizers.llama2c import read_llama2c
from ..tokenizers.partition import AddedToken
from ..tokenizers.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from ..tokenizers.tiktoken import looks_like_tiktoken, read_tiktoken
from ..tokenizers.vocab_merges import MERGES, VOCABULARY, read_vocab_merges
from .gguf.header import MAGIC as GGUF_MAGIC
from .gguf.header import Header
from .gguf.split import first_parts
from .gguf.tokenizer import read_gguf_tokenizer
from .hf.text_settings import TextSettings

SUPPORTED = (
    f"tokenizer.json, sentencepiece's and tiktoken's .model, {VOCABULARY} with {MERGES}, "
    "llama2.c's tokenizer.bin and GGUF"
)

_NAMES = ("tokenizer.json", "tokenizer.model", VOCABULARY, "tokenizer.bin")
"""Names of tokenizer files in a directory, in order of preference."""
_VERSIONED = re.compile(r"tokenizer\.model\.v\d+")
"""Mistral's names of sentencepiece models, after `_NAMES`."""
_BESIDE = (
    MERGES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json",
)  # fmt: skip
"""Files that are read beside a tokenizer and are none."""
_UNREAD = {
    "tekken.json": "Mistral's format for its own programs",
    "qwen.tiktoken": "the first Qwen's format",
    "vocab.txt": "a WordPiece vocabulary",
}
"""Files of tokenizers that are not read → what they are."""


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Open the tokenizer file at `path`, recognised by its content, or the one in a directory.

    In a directory it looks for `tokenizer.json`, `tokenizer.model`, `vocab.json` with `merges.txt`, `tokenizer.bin` and
    a single GGUF file, in this order; a file that is not supported gives way to the next. The small files beside the
    first three (`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`) are read too.

    Raises `FormatError` for a damaged file or an unknown format, `UnsupportedError` for a known format that is not
    supported, and `Error` when the file cannot be opened.
    """
    directory = expand_user(path)
    if not os.path.isdir(directory):
        return _load_file(path)
    if not (files := find_tokenizers(directory)):
        if names := [name for name in _UNREAD if (directory / name).is_file()]:
            raise UnsupportedError(
                f"{directory / names[0]}: {_UNREAD[names[0]]}, which is not read; give the tokenizer.json of the model "
                "or of another of its family"
            )
        raise FormatError("a directory without a tokenizer", path=path, expected=f"one of {', '.join(_NAMES)}, *.gguf")
    unsupported: UnsupportedError | None = None
    for file in files:
        try:
            tokenizer = _load_file(file)
        except UnsupportedError as error:
            unsupported = unsupported or error
            continue
        if unsupported is not None:
            tokenizer.notes = (f"{file.name} is used, because {unsupported}", *tokenizer.notes)
        return tokenizer
    assert unsupported is not None
    raise unsupported


def _load_file(path: str | PathLike[str]) -> Tokenizer:
    file = map_file(path)
    if file.data[: len(GGUF_MAGIC)] == GGUF_MAGIC:
        if (in_gguf := read_gguf_tokenizer(Header(file))) is None:
            raise FormatError(
                "a GGUF file without a tokenizer", path=path, expected="tokenizer.ggml.tokens", found="no such key"
            )
        in_gguf.prepare()
        return in_gguf
    if file.path.name in _BESIDE:
        raise FormatError(
            "a file beside a tokenizer, not the tokenizer",
            path=path,
            expected=f"one of {', '.join(_NAMES)}, or the directory",
            found=file.path.name,
        )
    if file.path.name == VOCABULARY:
        return read_vocab_merges(file, TextSettings(file.path.parent).tokens)
    if file.data[:64].removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
        return read_tokenizer_json(file, TextSettings(file.path.parent).tokens)
    if looks_like_tiktoken(file):
        return read_tiktoken(file)
    try:
        return read_llama2c(file)
    except FormatError as error:
        fault = error
    if (model := _read_sentencepiece(file)) is None:
        raise FormatError(
            f"not a tokenizer of a known kind, nor a sentencepiece model, nor a llama2.c tokenizer.bin ({SUPPORTED})",
            path=path,
            where=fault.where,
            expected=fault.expected,
            found=fault.found,
        )
    return model


def _read_sentencepiece(file: MappedFile) -> SentencePieceTokenizer | None:
    """The sentencepiece model, with what the files beside it add and say."""
    settings = TextSettings(file.path.parent).tokens
    # transformers: LlamaTokenizer puts a space in front of a text only, unless `legacy` says otherwise
    legacy = settings.tokenizer_class != "LlamaTokenizer" if settings.legacy is None else settings.legacy
    exceptions = not_eog(entry.text for entry in settings.added)
    added = [
        AddedToken(
            entry.text,
            entry.token,
            entry.special or entry.text in settings.special or entry.text in EOG_NAMES - exceptions,
            entry.lstrip,
            entry.rstrip,
        )
        for entry in settings.added
    ]
    if (model := read_sentencepiece(file, added, settings.eos, legacy, settings.add_prefix_space)) is None:
        return None
    if settings.add_bos is not None:  # the model does not say it; BOS is usual
        model.add_bos = settings.add_bos
    model.add_eos = settings.add_eos is True
    if settings.eos is not None and model.piece(model.eos_id or 0) != settings.eos:
        model.notes = (f"the tokenizer has no {settings.eos!r}, its EOS according to the files beside it",)
    return model


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer, of a format that is read or not."""
    return bool(find_tokenizers(directory)) or any((directory / name).is_file() for name in _UNREAD)


def find_tokenizers(directory: Path) -> list[Path]:
    """The files that may hold a directory's tokenizer, the preferred one first."""
    files = [path for name in _NAMES if (path := directory / name).is_file()]
    files += sorted(path for path in directory.glob("tokenizer.model.v*") if _VERSIONED.fullmatch(path.name))[-1:]
    gguf = first_parts(sorted(path for path in directory.glob("*.gguf") if not path.name.startswith(".")))
    return [*files, *(gguf if len(gguf) == 1 else [])]
