"""tiktoken's files, such as Llama 3's `tokenizer.model`: one line for each token, its bytes in base64 and its rank."""

from __future__ import annotations

import base64
import binascii
import re
from operator import itemgetter

from ..errors import FormatError
from ..files import MappedFile
from .base import MAX_VOCAB
from .bpe import BPETokenizer, build_library
from .library import BYTE_TO_UNICODE, library_errors
from .pretokenizers import LLAMA3, build_pre_tokenizer

MAX_TOKEN = 1 << 10
"""Maximum size of a token in bytes. The longest of Llama 3 has 128."""

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,7}\r?\n")
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_SPECIAL = 256


def _special_tokens() -> list[str]:
    """The 256 tokens after the ranks, with Llama 3.1's names. Tokens without a name are "reserved" and numbered."""
    names: list[str] = []
    reserved = 0
    for number in range(_SPECIAL):
        if number in _NAMED:
            names.append(_NAMED[number])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def looks_like_tiktoken(file: MappedFile) -> bool:
    """Whether the first line has base64 and a rank."""
    return _LINE.match(file.data[:MAX_TOKEN]) is not None


def read_tiktoken(file: MappedFile) -> BPETokenizer:
    """Llama 3's tokenizer: the tokens of the file by rank, then 256 control tokens. Encoding adds BOS.

    Raises `FormatError` with the byte offset for damaged files.
    """
    ranks: dict[bytes, int] = {}
    offset = 0
    while offset < file.size:
        end = file.data.find(b"\n", offset)
        line = file.data[offset : end if end >= 0 else file.size]
        text, _, rank = line.strip().partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
            if int(rank) != len(ranks) or token in ranks or not 0 < len(token) <= MAX_TOKEN:
                raise ValueError
        except (binascii.Error, ValueError):
            expected = f"base64 of a new token of 1 to {MAX_TOKEN:,} bytes, a space and {len(ranks)}"
            raise FormatError(
                "bad tiktoken file", path=file.path, where=offset, expected=expected, found=line[:60]
            ) from None
        ranks[token] = len(ranks)
        if len(ranks) > MAX_VOCAB - _SPECIAL:
            raise FormatError("bad tiktoken file", path=file.path, expected=f"at most {MAX_VOCAB:,} tokens")
        offset = end + 1 if end >= 0 else file.size
    from tokenizers import models

    texts = {token: "".join(map(BYTE_TO_UNICODE.__getitem__, token)) for token in ranks}
    special = _special_tokens()
    vocabulary = {texts[token]: rank for token, rank in ranks.items()}
    with library_errors("bad tiktoken file", file.path):
        model = models.BPE(
            vocab=vocabulary,
            merges=[(texts[a], texts[b]) for a, b in _merges(ranks)],
            ignore_merges=LLAMA3.ignore_merges,
        )
        library = build_library(model, build_pre_tokenizer(LLAMA3), [(name, True) for name in special])
    added = {name: len(ranks) + number for number, name in enumerate(special)}
    names = {number: token for token, number in added.items()}
    bos, eos = added["<|begin_of_text|>"], added["<|end_of_text|>"]
    pieces = [*vocabulary, *(names[token] for token in sorted(names))]
    return BPETokenizer(lambda: library, pieces, added, frozenset(names), bos, eos, add_bos=True)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs of tokens that join to a third, by the rank of the third: tiktoken merges the pair with the lowest."""
    result: list[tuple[bytes, bytes]] = []
    for token in ranks:
        cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
        pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        result += [(a, b) for _, _, a, b in sorted(pairs, key=itemgetter(0, 1))]
    return result
