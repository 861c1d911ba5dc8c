"""GPT-2's pair of files, `vocab.json` and `merges.txt`: a byte-level BPE without the rules by which text is split.

They come from transformers before `tokenizer.json`, and from programs that save its slow tokenizers. The rules are
those of the class that tokenizer_config.json or the model's type names.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from dataclasses import replace

from ..errors import FormatError, UnsupportedError
from ..files import MappedFile, map_file
from .base import MAX_VOCAB
from .bpe import build_library
from .huggingface import TokenSettings, require_size, tokenizer_of
from .library import UNICODE_TO_BYTE, LibraryTokenizer, library_errors
from .pretokenizers import GPT2, QWEN2, build_pre_tokenizer

VOCABULARY, MERGES = "vocab.json", "merges.txt"
_END = "<|endoftext|>"
"""EOS of both classes, if no file gives another."""


def read_vocab_merges(file: MappedFile, settings: TokenSettings) -> LibraryTokenizer:
    """The tokenizer of a `vocab.json` and the `merges.txt` beside it; `settings` are those of the other files there.

    Raises `FormatError` for damaged files or missing merges, `UnsupportedError` for vocabularies not of bytes.
    """
    from tokenizers import models, normalizers  # 0.03 s to import

    vocabulary = _vocabulary(file)
    if not (path := file.path.with_name(MERGES)).is_file():
        raise FormatError("a vocabulary without its merges", path=file.path, expected=f"{MERGES} beside it")
    if missing := UNICODE_TO_BYTE.keys() - vocabulary.keys():
        raise UnsupportedError(
            f"{file.path}: not a byte-level vocabulary: {len(missing)} of 256 bytes have no token; give a "
            "tokenizer.json"
        )
    qwen = settings.tokenizer_class == "Qwen2Tokenizer" or settings.model_type in ("qwen2", "qwen3")
    merges = _merges(map_file(path), vocabulary)
    with library_errors("bad vocabulary", file.path):
        model = models.BPE(vocab=vocabulary, merges=merges)
        library = build_library(model, build_pre_tokenizer(QWEN2 if qwen else GPT2), [])
        if qwen:
            library.normalizer = normalizers.NFC()
    added = {*vocabulary, *(token.text for token in settings.added)}
    eos = _END if settings.eos is None and _END in added else settings.eos
    rules = "Qwen2's" if qwen else "GPT-2's"
    found = tokenizer_of(
        library,
        replace(settings, eos=eos, add_bos=None, add_eos=None),
        file.path,
        [f"{VOCABULARY} and {MERGES} do not say how text is split: {rules} rules are used, as in transformers"],
    )
    found.add_bos, found.add_eos = settings.add_bos is True, settings.add_eos is True
    return found


def _vocabulary(file: MappedFile) -> dict[str, int]:
    require_size(file)
    try:
        found = json.loads(file.data[:].removeprefix(BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise FormatError("not JSON", path=file.path, found=str(error)[:200]) from None
    if not isinstance(found, dict) or not found:
        raise FormatError("bad vocabulary", path=file.path, expected="tokens with their ids", found=repr(found)[:60])
    for text, token in found.items():
        if type(token) is not int or not 0 <= token < MAX_VOCAB:
            raise FormatError(
                "bad vocabulary", path=file.path, where=f"key {text[:100]}", expected="a token id",
                found=repr(token)[:60],
            )  # fmt: skip
    return found


def _merges(file: MappedFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of a merges.txt in order. Its first line may be a version."""
    try:
        lines = file.data[:].removeprefix(BOM_UTF8).decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", path=file.path, where=error.start) from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not (line := line.rstrip("\r")) or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise FormatError(
                "bad merges", path=file.path, where=f"line {number:,}",
                expected=f"two tokens of {VOCABULARY} that join to a third", found=repr(line[:60]),
            )  # fmt: skip
        merges.append((left, right))
    return merges
