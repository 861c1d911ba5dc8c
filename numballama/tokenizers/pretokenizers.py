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
_END = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_PUNCTUATED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_THOUSANDS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_WORDS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK_CJK = r"[一-龥ࠀ-一가-퟿&&\S]+"  # white space of Unicode is in no range of llama.cpp's
_DEEPSEEK_LETTERS = (  # escaped, because some of them are equal to others after normalisation
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


def _cased(kinds: str, upper: str, lower: str, end: str, numbers: str) -> str:
    """Words of upper-case, then lower-case characters of the classes `kinds`, either of them optional.

    llama.cpp takes every one but a-z for upper case and every one but A-Z for lower case, where its `tokenizer.json`
    has classes; this is written as an intersection of classes.
    """
    start = r"[^\r\n\p{L}\p{N}]?"
    first, second = f"[{kinds}&&{upper}]", f"[{kinds}&&{lower}]"
    words = f"{start}{first}*{second}+{end}|{start}{first}+{second}*{end}"
    return f"{words}|{numbers}|{_OTHERS}[\\r\\n/]*|{_SPACES}"


_TEKKEN = _cased(r"\p{L}", "[^a-z]", "[^A-Z]", "", r"\p{N}")
_GPT4O = _cased(r"\p{L}", "[^a-z]", "[^A-Z]", _END, r"\p{N}{1,3}")
_GRANITE = _cased(r"\p{L}\p{M}", "[^a-z]", "[^A-Z]", _END, r"\p{N}{1,3}")
_AYA = _cased(r"\p{L}\p{M}", r"\p{L}\p{M}", r"\p{L}\p{M}", _END, r"\p{N}{1,3}")  # to llama.cpp, \p{Lu} is \p{L}
_YOUTU = _AYA.replace(r"\p{N}{1,3}", r"\p{N}")


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

_BY_RULES: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", DEFAULT),
    ("gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum modern-bert exaone4", GPT2),
    ("jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe", GPT2),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", LLAMA3),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", QWEN2),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", DIGITS),
    ("smaug-bpe dbrx chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    ("granite-embed-multi-97m", PreTokenizer((_GRANITE,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((rf"{_THOUSANDS}|{_AYA}",))),
    (
        "youtu",
        PreTokenizer(
            (r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK, _YOUTU),
            ignore_merges=True,
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。&&\S]+",
                r"\s+$",
                _DEEPSEEK_CJK,
                r"\p{N}+",
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    ),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_PUNCTUATED}[\r\n]*|{_SPACES}")),
    ),
    (
        "spark2_5",
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_PUNCTUATED}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    ),
    (
        "afmoe",
        PreTokenizer(
            (
                r"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
                rf"{_THOUSANDS}|{_PUNCTUATED}[\r\n]*|{_SPACES}",
            )
        ),
    ),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_WORDS,))),
    ("viking", PreTokenizer((_WORDS, r"\p{N}"))),
    (
        "chameleon",
        PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    ("qwen35", PreTokenizer((_QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),))),
    (
        "jais-2",
        PreTokenizer(
            (
                _LLAMA3.removesuffix(r"\s+(?!\S)|\s+")
                + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"|\s{1,2}(?!\S)|\s{1}",
            )
        ),
    ),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                rf"{_OTHERS}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("seed-coder", PreTokenizer((_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),))),
    ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"),))),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    (
        "exaone-moe",
        PreTokenizer(
            (
                _QWEN2.replace(r"?\p{L}+", r"?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+")
                .replace(r"[\r\n]*", r"[\r\n/]?")
                .replace(r"\s*[\r\n]+", r"\s*[\r\n]"),
            )
        ),
    ),
    (
        "minicpm5",
        PreTokenizer((r"\p{N}{1,3}", _QWEN2.replace(r"\p{N}|", r"\p{N}+|")), ignore_merges=True),
    ),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: rules for names, rules in _BY_RULES for name in names.split()}
"""`tokenizer.ggml.pre` → pre-tokenizer. Writers use the first of several names for the same one.

The names are those of llama.cpp in llama-cpp-python 0.3.36, except for `NOT_READ`.
"""

NOT_READ = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace", "kimi-k2")
"""Names of llama.cpp that are not read: their BPE is not byte-level, or their rules are no regular expressions."""


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
