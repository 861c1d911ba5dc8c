"""Pre-tokenizers: what cuts a text into the words within which byte-level BPE merges, by the names that GGUF uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Words:
    """Regular expressions, each of which cuts further what the one before it left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token becomes it, whether merges lead there or not."""
    add_bos: bool = False
    """Unless the file says otherwise."""


LLAMA3 = Words((_LLAMA3,), ignore_merges=True, add_bos=True)
QWEN2 = Words((_QWEN2,))
GPT2 = Words((_GPT2,))
DIGITS = Words((r"\p{N}", _GPT2))
DEFAULT = Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

WORDS: Mapping[str, Words] = {
    "default": DEFAULT,
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
}
"""`tokenizer.ggml.pre` → what it means. Of several names for one thing, the first is the one to write."""


def pre_tokenizer(words: Words) -> Any:
    """The library's pre-tokenizer: the cuts, then the letters that stand for bytes."""
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_name(library: Library) -> str | None:
    """The name of a library tokenizer's pre-tokenizer, or None when it is none of `WORDS`."""
    cuts = _cuts(json.loads(library.pre_tokenizer.__getstate__())) if library.pre_tokenizer is not None else None
    ignore = bool(library.model.ignore_merges)
    same = [name for name, words in WORDS.items() if cuts == words.patterns]
    exact = [name for name in same if WORDS[name].ignore_merges == ignore]
    return next(iter(exact), None)


def _cuts(part: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns by which a pre-tokenizer of the library, as JSON, cuts; None if it does more or anything else."""
    kind = part.get("type")
    if kind == "Sequence":
        found = [_cuts(inner) for inner in part["pretokenizers"]]
        return None if None in found else tuple(pattern for cuts in found for pattern in cuts or ())
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return (_GPT2,) if part["use_regex"] else ()
    if kind == "Digits" and part["individual_digits"]:
        return (r"\p{N}",)
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        pattern: str | None = part["pattern"].get("Regex")
        return None if pattern is None else (pattern,)
    return None
