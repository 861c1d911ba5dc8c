"""Text ↔ token ids, for every tokenizer file the project reads: sentencepiece's `.model`, llama2.c's `.bin`, GGUF."""

from __future__ import annotations

from os import PathLike

from . import gguf_header
from .errors import FormatError, UnsupportedError
from .files import map_file
from .gguf_header import Header
from .tokenizers.base import MAX_VOCAB, Decoder, Kind, PieceType, Strip, Tokenizer, Vocabulary
from .tokenizers.library import SentencePieceTokenizer, read_sentencepiece
from .tokenizers.scored import GgufTokenizer, Llama2cTokenizer, from_gguf, read_llama2c

__all__ = [
    "MAX_VOCAB",
    "Decoder",
    "GgufTokenizer",
    "Kind",
    "Llama2cTokenizer",
    "PieceType",
    "SentencePieceTokenizer",
    "Strip",
    "Tokenizer",
    "Vocabulary",
    "from_gguf",
    "load_tokenizer",
]


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Open the tokenizer file at `path`, recognised by its content.

    Raises `FormatError` for a damaged file or one of an unknown format, `UnsupportedError` for a known one that is not
    read yet, and `Error` when it cannot be opened.
    """
    file = map_file(path)
    if file.data[:4] == gguf_header.MAGIC:
        if (found := from_gguf(Header(file))) is None:
            raise FormatError(
                "a GGUF file without a tokenizer", path=path, expected="tokenizer.ggml.tokens", found="no such key"
            )
        return found
    if file.data[:64].lstrip().startswith(b"{"):
        raise UnsupportedError(
            f"{path}: a tokenizer.json is not read yet; supported are sentencepiece's .model, llama2.c's tokenizer.bin "
            "and GGUF"
        )
    try:
        return read_llama2c(file)
    except FormatError as error:
        fault = error
    if (model := read_sentencepiece(file)) is None:
        raise FormatError(
            "neither a sentencepiece model nor a llama2.c tokenizer.bin",
            path=path,
            where=fault.where,
            expected=fault.expected,
            found=fault.found,
        )
    return model
