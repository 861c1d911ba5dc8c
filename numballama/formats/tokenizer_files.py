"""`load_tokenizer`: opens tokenizer files of every supported format, recognised by content."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from ..errors import FormatError
from ..files import expand_user, map_file
from ..tokenizers.base import Tokenizer
from ..tokenizers.huggingface import read_tokenizer_json
from ..tokenizers.llama2c import read_llama2c
from ..tokenizers.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from ..tokenizers.tiktoken import looks_like_tiktoken, read_tiktoken
from .gguf.header import MAGIC as GGUF_MAGIC
from .gguf.header import Header
from .gguf.tokenizer import read_gguf_tokenizer
from .hf.text_settings import TextSettings

SUPPORTED = "tokenizer.json, sentencepiece's and tiktoken's .model, llama2.c's tokenizer.bin and GGUF"

_NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
"""Names of tokenizer files in a directory, in order of preference."""


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Open the tokenizer file at `path`, recognised by its content, or the one in a directory.

    In a directory it looks for `tokenizer.json`, `tokenizer.model`, `tokenizer.bin` and a single GGUF file, in this
    order. The files beside a `tokenizer.json` say whether encoding adds BOS and EOS. Raises `FormatError` for a damaged
    file or an unknown format, `UnsupportedError` for a known format that is not supported, and `Error` when the file
    cannot be opened.
    """
    directory = expand_user(path)
    if os.path.isdir(directory):
        if (chosen := find_tokenizer(directory)) is None:
            raise FormatError(
                "a directory without a tokenizer", path=path, expected=f"one of {', '.join(_NAMES)}, *.gguf"
            )
        tokenizer = load_tokenizer(chosen)
        if isinstance(tokenizer, SentencePieceTokenizer):  # the model does not say it; the files beside it may
            settings = TextSettings(directory).tokens
            tokenizer.add_bos = tokenizer.add_bos if settings.add_bos is None else settings.add_bos
            tokenizer.add_eos = tokenizer.add_eos if settings.add_eos is None else settings.add_eos
        return tokenizer
    file = map_file(path)
    if file.data[: len(GGUF_MAGIC)] == GGUF_MAGIC:
        if (in_gguf := read_gguf_tokenizer(Header(file))) is None:
            raise FormatError(
                "a GGUF file without a tokenizer", path=path, expected="tokenizer.ggml.tokens", found="no such key"
            )
        in_gguf.prepare()
        return in_gguf
    if file.data[:64].lstrip().startswith(b"{"):
        return read_tokenizer_json(file, TextSettings(file.path.parent).tokens)
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


def find_tokenizer(directory: Path) -> Path | None:
    """The file that holds a directory's tokenizer; None if there is none."""
    for name in _NAMES:
        if (path := directory / name).is_file():
            return path
    files = sorted(path for path in directory.glob("*.gguf") if not path.name.startswith("."))
    return files[0] if len(files) == 1 else None
