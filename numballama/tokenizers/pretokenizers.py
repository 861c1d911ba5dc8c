"""Pre-tokenizers by their names in GGUF: regular expressions that split a text into words. Byte-level BPE merges only
within a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers.pre_tokenizers import PreTokenizer as LibraryPreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions. Each of them splits the results of the previous one."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token becomes that token, even if merges do not lead to it."""
    add_bos: bool = False
    """Whether encoding adds BOS, unless the file says otherwise."""


LLAMA3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
QWEN2 = PreTokenizer((_QWEN2,))
GPT2 = PreTokenizer((_GPT2,))
DIGITS = PreTokenizer((r"\p{N}", _GPT2))
DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
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
"""`tokenizer.ggml.pre` → pre-tokenizer. Writers use the first of several names for the same one."""


def build_pre_tokenizer(rules: PreTokenizer) -> LibraryPreTokenizer:
    """The pre-tokenizer of the tokenizers library: the splits, then GPT-2's characters for bytes."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_name(library: Library) -> str | None:
    """The GGUF name of a library tokenizer's pre-tokenizer; None when it is none of `PRE_TOKENIZERS`."""
    if library.pre_tokenizer is None:
        return None
    patterns = _patterns(json.loads(library.pre_tokenizer.__getstate__()))
    ignore_merges = bool(library.model.ignore_merges)
    for name, rules in PRE_TOKENIZERS.items():
        if (rules.patterns, rules.ignore_merges) == (patterns, ignore_merges):
            return name
    return None


def _patterns(node: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns by which a pre-tokenizer of the library, given as JSON, splits; None if it does anything else."""
    kind = node.get("type")
    if kind == "Sequence":
        inner = [_patterns(child) for child in node["pretokenizers"]]
        return None if None in inner else tuple(pattern for patterns in inner for pattern in patterns or ())
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return (_GPT2,) if node["use_regex"] else ()
    if kind == "Digits" and node["individual_digits"]:
        return (r"\p{N}",)
    if kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        pattern: str | None = node["pattern"].get("Regex")
        return None if pattern is None else (pattern,)
    return None
