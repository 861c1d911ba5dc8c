"""Tokenizers in the metadata of GGUF files: "llama" (sentencepiece's BPE) and "gpt2" (byte-level BPE)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from ... import progress
from ...errors import FormatError, UnsupportedError
from ...tokenizers.base import BYTE_PIECE, MAX_VOCAB, SPACE, PieceType, Tokenizer, Vocabulary
from ...tokenizers.bpe import BPETokenizer, build_library
from ...tokenizers.eog import EOG_NAMES, not_eog
from ...tokenizers.gguf import GgufTokenizer
from ...tokenizers.library import BYTE_TO_UNICODE, library_errors
from ...tokenizers.pretokenizers import DEFAULT, NOT_READ, PRE_TOKENIZERS, PreTokenizer, build_pre_tokenizer
from .header import Header

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_KEY = "tokenizer.ggml."

_FIM_NAMES = frozenset(
    [
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
        *("<|prefix|>", "<|suffix|>", "<|middle|>"),
    ]
)
"""Names of tokens around a gap in a text. llama.cpp takes them for control tokens, whatever their type."""


def read_gguf_tokenizer(header: Header) -> Tokenizer | None:
    """The tokenizer in a file's metadata; None if it holds none. Some damage shows only in `Tokenizer.prepare`.

    Raises `FormatError` for damaged metadata, `UnsupportedError` for another type of tokenizer.
    """
    model = header.text(f"{_KEY}model")
    if model in (None, "none", "no_vocab"):
        return None
    if model == "llama" and _is_byte_level(header):
        return _read_mislabelled(header)
    if model == "llama":
        return _read_llama(header)
    if model == "gpt2":
        return _read_gpt2(header)
    kind = {"bert": "WordPiece", "t5": "unigram"}.get(str(model), "unknown")
    raise UnsupportedError(
        f"{header.path}: tokenizer {model!r} ({kind}) is not read; supported are 'llama' (sentencepiece) and "
        "'gpt2' (byte-level BPE)"
    )


def chat_templates(header: Header, notes: list[str]) -> dict[str, str]:
    """Name → chat template: `tokenizer.chat_template` is "default", `tokenizer.chat_template.NAME` is NAME.

    A note says if one is not UTF-8, which for llama.cpp is no reason to refuse the file.
    """
    key = "tokenizer.chat_template"
    names = {"default": key}
    names |= {name.removeprefix(f"{key}."): name for name in header.fields if name.startswith(f"{key}.")}
    return {name: text for name, full in names.items() if (text := header.text(full, notes=notes))}


def template_tokens(header: Header, tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens that a chat template sees as variables: "pad_token" … → text. BOS and EOS are the tokenizer's."""
    keys = {"pad": "padding", "unk": "unknown", "sep": "seperator", "cls": "cls", "mask": "mask"}  # as GGUF spells them
    ids = {name: _token_id(header, key, tokenizer.vocab_size) for name, key in keys.items()}
    return {f"{name}_token": tokenizer.piece(token) for name, token in ids.items() if token is not None}


def _fault(header: Header, name: str, expected: str, found: object) -> FormatError:
    where = f"metadata key {_KEY}{name}"
    return FormatError("bad vocabulary", path=header.path, where=where, expected=expected, found=found)


def _pieces(header: Header) -> list[bytes]:
    pieces = header.strings(f"{_KEY}tokens") or []
    if not 0 < len(pieces) <= MAX_VOCAB:
        raise _fault(header, "tokens", f"1 to {MAX_VOCAB:,} pieces", f"{len(pieces):,}")
    return pieces


def _numbers(header: Header, name: str, count: int) -> np.ndarray | None:
    """The array of a key, one number for each piece; None when the key is missing."""
    numbers = header.numbers(f"{_KEY}{name}")
    if numbers is not None and len(numbers) != count:
        raise _fault(header, name, f"{count:,} numbers", f"{len(numbers):,}")
    return numbers


def _token_id(header: Header, name: str, count: int, default: int | None = None) -> int | None:
    """The id of a special token such as "bos". None for an id outside the vocabulary: files write -1 for "none"."""
    token = header.integer(f"{_KEY}{name}_token_id", default)
    return token if token is not None and 0 <= token < count else None


def _beyond(header: Header, count: int) -> list[str]:
    """Notes on ids of special tokens outside the vocabulary, except -1, which means that there is none."""
    notes = []
    for name in ("bos", "eos", "unknown", "eot", "eom"):
        token = header.integer(key := f"{_KEY}{name}_token_id", 0)
        if token is not None and token >= count and token not in (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF):
            notes.append(f"{key} is {token:,}, outside the vocabulary of {count:,}: taken for none")
    return notes


def _is_byte_level(header: Header) -> bool:
    """Whether the pieces write a space as GPT-2 does, and none as sentencepiece does."""
    pieces = header.strings(f"{_KEY}tokens") or []
    written = SPACE.encode(), BYTE_TO_UNICODE[ord(" ")].encode()
    return [any(space in piece for piece in pieces) for space in written] == [False, True]


def _read_mislabelled(header: Header) -> BPETokenizer:
    """A byte-level BPE whose file calls it "llama", as a converter did with Llama 3. llama.cpp ends on such a file.

    Raises `UnsupportedError` if the file has no merges.
    """
    said = f"{_KEY}model is 'llama', but its pieces are those of a byte-level BPE, 'gpt2'"
    if f"{_KEY}merges" not in header.fields:
        raise UnsupportedError(f"{header.path}: {said}, and there are no merges; convert the model again")
    tokenizer = _read_gpt2(header)
    tokenizer.notes = (f"{said}: read as that", *tokenizer.notes)
    return tokenizer


def _mark_bytes(types: list[int], pieces: Sequence[bytes]) -> list[str]:
    """Make <0x00> to <0xFF> tokens of bytes, if all are there, whatever their type: llama.cpp encodes by their names.
    Returns notes.
    """
    named = [token for token, piece in enumerate(pieces) if BYTE_PIECE.fullmatch(piece)]
    wrong = [token for token in named if types[token] != PieceType.BYTE]
    if not wrong or len({pieces[token] for token in named}) < 256:
        return []
    for token in wrong:
        types[token] = PieceType.BYTE
    which = pieces[wrong[0]].decode()
    return [
        f"tokens of bytes by their names, not their types: {which}{f' and {len(wrong) - 1} more' * (len(wrong) > 1)}"
    ]


_UNSTRIPPED = (b"<unk>", b"<s>", b"<|endoftext|>")


def _stripping(header: Header, pieces: Sequence[bytes], types: Sequence[int]) -> frozenset[int]:
    """Ids of added tokens that white space after them belongs to. GGUF does not say it. As in llama.cpp, they are those
    of models whose name has "phi-3".
    """
    name = (header.text("general.name", notes=[]) or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    added = (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
    found = (token for token, kind in enumerate(types) if kind in added or pieces[token] == b"</s>")
    return frozenset(token for token in found if pieces[token] not in _UNSTRIPPED)


def _read_llama(header: Header) -> GgufTokenizer:
    """Defaults for missing keys are llama.cpp's: unknown, BOS and EOS are 0, 1 and 2; encoding adds BOS and a space."""
    pieces = _pieces(header)
    count = len(pieces)
    scores, numbers = _numbers(header, "scores", count), _numbers(header, "token_type", count)
    if scores is None:
        scores = np.zeros(count, np.float32)  # as in llama.cpp
    bos, eos, unknown = (_token_id(header, name, count, n) for name, n in (("bos", 1), ("eos", 2), ("unknown", 0)))
    if numbers is not None:
        types = [int(number) for number in numbers.tolist()]
    else:
        types = [PieceType.BYTE if BYTE_PIECE.fullmatch(piece) else PieceType.NORMAL for piece in pieces]
        if unknown is not None:
            types[unknown] = PieceType.UNKNOWN
    notes = _beyond(header, count) + _mark_bytes(types, pieces)
    notes += _mark_control(types, [piece.decode(errors="replace") for piece in pieces], (bos, eos))
    tokenizer = GgufTokenizer(
        Vocabulary(
            pieces,
            scores.tolist(),
            types,
            bos,
            eos,
            unknown,
            add_bos=header.flag(f"{_KEY}add_bos_token") is not False,
            add_eos=header.flag(f"{_KEY}add_eos_token") is True,
            add_space_prefix=header.flag(f"{_KEY}add_space_prefix") is not False,
        ),
        _stripping(header, pieces, types),
    )
    tokenizer.notes = tuple(notes)
    return tokenizer


def _read_gpt2(header: Header) -> BPETokenizer:
    """Ids are llama.cpp's.

    Raises `UnsupportedError` for a pre-tokenizer that is not known.
    """
    rules, notes = _pre_tokenizer(header)
    pieces = [piece.decode(errors="replace") for piece in _pieces(header)]
    count = len(pieces)
    if f"{_KEY}merges" not in header.fields:
        raise _fault(header, "merges", "merges of two pieces", "no such key")
    numbers = _numbers(header, "token_type", count)
    types: list[int] = [PieceType.NORMAL] * count if numbers is None else [int(number) for number in numbers.tolist()]
    bos, eos, eot, eom = (_token_id(header, name, count) for name in ("bos", "eos", "eot", "eom"))
    notes += _beyond(header, count)
    notes += _mark_control(types, pieces, (bos, eos, eot, eom), lambda name: _is_merged(header, name))
    special = (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
    added = {pieces[token]: token for token, kind in enumerate(types) if kind in special and pieces[token]}
    silent = frozenset(token for token, kind in enumerate(types) if kind in (PieceType.CONTROL, PieceType.UNKNOWN))

    def build() -> Library:
        from tokenizers import models  # 0.03 s to import

        vocabulary = {piece: token for token, piece in reversed(list(enumerate(pieces)))} | added
        merges = _merges(header, vocabulary)
        with library_errors("bad vocabulary", header.path):
            model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignore_merges)
            added_tokens = [(piece, token in silent) for piece, token in added.items()]
            return build_library(model, build_pre_tokenizer(rules), added_tokens)

    add_bos, add_eos = (header.flag(f"{_KEY}add_{name}_token") for name in ("bos", "eos"))
    return BPETokenizer(
        build,
        pieces,
        added,
        silent,
        bos,
        eos,
        add_bos=rules.add_bos if add_bos is None else add_bos,
        add_eos=add_eos is True,
        notes=tuple(notes),
    )


def _merges(header: Header, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that merge to a token. Others are left out: a vocabulary that was cut may keep its old merges, which
    llama.cpp accepts. Raises `FormatError` for a merge that is no pair, or if none leads to a token.
    """
    merges: list[tuple[str, str]] = []
    given = header.strings(f"{_KEY}merges") or []
    for number, merge in enumerate(given):
        left, space, right = merge[1:].partition(b" ")
        if not space:
            found = f"{merge[:40]!r} (number {number:,})"
            raise _fault(header, "merges", "two pieces with a space between them", found)
        pair = (merge[:1] + left).decode(errors="replace"), right.decode(errors="replace")
        if vocabulary.keys() >= {*pair, "".join(pair)}:
            merges.append(pair)
    if lost := len(given) - len(merges):
        if not merges:
            raise _fault(header, "merges", "merges of two tokens to a third", f"none of {lost:,}")
        progress.log.warning(
            "%s: %s of %s merges lead to no token: left out", header.path, f"{lost:,}", f"{len(given):,}"
        )
    return merges


def _pre_tokenizer(header: Header) -> tuple[PreTokenizer, list[str]]:
    """The pre-tokenizer that a file names, and notes. As in llama.cpp, a missing name is "default", with a warning."""
    name = header.text(f"{_KEY}pre")
    if not name:
        said = "the file names no pre-tokenizer (tokenizer.ggml.pre), 'default' is used as in llama.cpp"
        return DEFAULT, [
            f"{said}: text may be split otherwise than in training, and answers be worse; convert it again"
        ]
    if name in NOT_READ:
        why = "its BPE is not byte-level, or its rules are no regular expressions"
        raise UnsupportedError(f"{header.path}: pre-tokenizer {name!r} is not read: {why}")
    if (rules := PRE_TOKENIZERS.get(name)) is None:
        raise UnsupportedError(
            f"{header.path}: pre-tokenizer {name[:100]!r} (tokenizer.ggml.pre: how text is split into words) is not "
            f"known; known are {len(PRE_TOKENIZERS)} names of llama.cpp, such as "
            f"{', '.join(map(repr, get_close_matches(name[:100], PRE_TOKENIZERS, cutoff=0.0)))}"
        )
    return rules, []


def _mark_control(
    types: list[int],
    pieces: Sequence[str],
    ids: Iterable[int | None],
    is_word: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Make tokens that a file calls BOS, EOS, … (`ids`) or whose name says so control tokens, whatever their type.

    A name for which `is_word` is true is an ordinary word. Returns notes.
    """
    for token in ids:
        if token is not None:
            types[token] = PieceType.CONTROL
    skipped, changed = not_eog(pieces), []
    for token, piece in enumerate(pieces):
        if types[token] in (PieceType.CONTROL, PieceType.UNUSED) or piece not in EOG_NAMES | _FIM_NAMES:
            continue
        if piece not in skipped and (types[token] != PieceType.NORMAL or not is_word(piece)):
            types[token] = PieceType.CONTROL
            changed.append(piece)
    names = ", ".join(changed[:5]) + (" …" if len(changed) > 5 else "")
    return [f"control tokens by their names, not their types: {names}"] if changed else []


def _is_merged(header: Header, name: str) -> bool:
    """Whether merges make the token: then it is a word, such as Qwen's "</s>"."""
    return any(merge.replace(b" ", b"", 1) == name.encode() for merge in header.strings(f"{_KEY}merges") or [])
