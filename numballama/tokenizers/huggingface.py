"""Hugging Face's `tokenizer.json`, read by the tokenizers library."""

from __future__ import annotations

import contextlib
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, UnsupportedError
from ..files import MappedFile
from .base import MAX_VOCAB, SPACE, Strip
from .bpe import BPETokenizer
from .eog import EOG_NAMES, not_eog
from .library import BYTE_LEVEL, Decoding, LibraryTokenizer, copy_token, library_errors, library_nodes, library_parts

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

MAX_TOKENIZER = 1 << 27
"""Maximum size of a tokenizer.json in bytes. The largest known has 33 million."""


_PROBE = "Ab1 e\u0301\ufb01\u00a0\U0001f642\u4e00\n\t \x00 \u2581"
"""Damaged rules that do not fail on this text hardly fail on any."""


@dataclass(frozen=True)
class AddedTokenSetting:
    """A token that a file beside the tokenizer adds to its vocabulary."""

    text: str
    token: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenSettings:
    """What the files beside a tokenizer say about it. None: they do not say."""

    bos: str | None = None
    """Text of the token."""
    eos: str | None = None
    special: tuple[str, ...] = ()
    """Texts of all tokens that have a name there, such as "pad_token"."""
    added: tuple[AddedTokenSetting, ...] = ()
    """By id."""
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str | None = None
    """transformers' class, without "Fast" at its end."""
    model_type: str | None = None


def require_size(file: MappedFile) -> None:
    """Raise `FormatError` for a file of more than `MAX_TOKENIZER` bytes."""
    if file.size > MAX_TOKENIZER:
        raise FormatError(
            "too large", path=file.path, expected=f"at most {MAX_TOKENIZER:,} bytes", found=f"{file.size:,}"
        )


def read_tokenizer_json(file: MappedFile, settings: TokenSettings) -> LibraryTokenizer:
    """The tokenizer of a `tokenizer.json`; `settings` are those of the files beside it.

    Raises `FormatError` for damaged files, `UnsupportedError` for WordPiece and unknown decoders.
    """
    require_size(file)
    from tokenizers import Tokenizer as Library  # 0.03 s to import
    from tokenizers import models

    data = file.data[:].removeprefix(BOM_UTF8)
    try:
        with library_errors("not a tokenizer.json", file.path):
            library = Library.from_buffer(data)
    except FormatError as error:
        raise _bad_merge(data, file.path) or error from None
    with library_errors("not a tokenizer.json", file.path):
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):  # of training: ids would be random
            library.model.dropout = None
    if isinstance(library.model, models.WordPiece):
        raise UnsupportedError(f"{file.path}: a WordPiece model; supported are BPE, Unigram and WordLevel")
    if file.data.find(b'"ByteLevel"') < 0:  # transformers looks for it in the same way
        with library_errors("not a tokenizer.json", file.path):
            _use_class(library, settings)
    return tokenizer_of(library, settings, file.path)


def _bad_merge(data: bytes, path: Path) -> FormatError | None:
    """The error for the first merge that is none of two tokens to a third. The library names the token, not the merge.

    None for files that have another fault.
    """
    try:
        model = json.loads(data)["model"]
        vocabulary, merges, prefix = model["vocab"], model["merges"], model.get("continuing_subword_prefix") or ""
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or not isinstance(prefix, str):
        return None
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            expected, found = "two tokens", repr(merge)[:80]
        elif lost := [part for part in (*pair, pair[0] + pair[1][len(prefix) :]) if part not in vocabulary]:
            expected, found = "two tokens of model.vocab that join to a third", f"no token {lost[0][:80]!r}"
            found += f" for {' and '.join(repr(part[:40]) for part in pair)}; vocabulary and merges are of two "
            found += "tokenizers, or one of them was cut: take the model's own file"
        else:
            continue
        where = f"model.merges, number {number:,}"
        return FormatError("bad merges", path=path, where=where, expected=expected, found=found)
    return None


def tokenizer_of(library: Library, settings: TokenSettings, path: Path, notes: Sequence[str] = ()) -> LibraryTokenizer:
    """The tokenizer of a library's, with what `settings` add to it. Errors name the file at `path`."""
    from tokenizers import models

    notes = list(notes)
    with library_errors("bad vocabulary", path):
        _add_tokens(library, settings)
        ids: dict[str, int] = library.get_vocab(with_added_tokens=True)
        decoding = _decoding(library, path, notes)
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB:
        raise FormatError("bad vocabulary", path=path, expected=f"1 to {MAX_VOCAB:,} tokens", found=f"{size:,}")
    pieces: list[str | None] = [None] * size
    for piece, token in ids.items():
        pieces[token] = piece
    entries = library.get_added_tokens_decoder()
    added = {entry.content: token for token, entry in entries.items()}
    rules = _rules(library, settings, ids, path, notes)
    exceptions = not_eog(added)
    special = {token for token, entry in entries.items() if entry.special}
    special |= {token for text, token in added.items() if text in EOG_NAMES and text not in exceptions}
    special |= {token for token in (rules.bos, rules.eos) if token is not None}
    of = BPETokenizer if isinstance(library.model, models.BPE) else LibraryTokenizer
    return of(
        lambda: library,
        pieces,
        added,
        frozenset(special),
        rules.bos,
        rules.eos,
        rules.add_bos,
        rules.add_eos,
        decoding,
        rules.template,
        tuple(notes),
    )


# ---- what the files beside it change ----


def _use_class(library: Library, settings: TokenSettings) -> None:
    """The rules of transformers' `LlamaTokenizer`, which replace those of a file of that class.

    Its `legacy` says whether each text between added tokens gets a space in front, or only one at the beginning.
    """
    from tokenizers import decoders, models, pre_tokenizers

    of_class = settings.tokenizer_class == "LlamaTokenizer" and settings.model_type not in ("mistral", "qwen2")
    if not of_class or not isinstance(library.model, models.BPE):
        return
    prefix = settings.add_prefix_space is not False
    scheme = "never" if not prefix else "always" if settings.legacy else "first"
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _add_tokens(library: Library, settings: TokenSettings) -> None:
    """Add the tokens that the files beside it add, with their flags, and tokens of the model with special names."""
    from tokenizers import AddedToken

    entries = {entry.content: entry for entry in library.get_added_tokens_decoder().values()}
    new: dict[str, AddedToken] = {}
    for a in settings.added:
        new[a.text] = AddedToken(
            a.text,
            single_word=a.single_word,
            lstrip=a.lstrip,
            rstrip=a.rstrip,
            normalized=a.normalized,
            special=a.special or a.text in settings.special or (a.text in entries and entries[a.text].special),
        )
    for text in settings.special:
        if text not in new and library.token_to_id(text) is not None:
            entry = entries.get(text)
            known = AddedToken(text, normalized=False) if entry is None else entry
            new[text] = copy_token(known, special=True)
    for text in EOG_NAMES.difference(entries, new):
        if _is_apart(library, text):
            new[text] = AddedToken(text, special=True, normalized=False)
    library.add_tokens([token for token in new.values() if token.content])


def _is_apart(library: Library, text: str) -> bool:
    """Whether `text` is a token of a BPE that merges do not make: a control token that the file does not mark as one.

    Qwen's "</s>" is a word like others.
    """
    from tokenizers import models

    token, model = library.token_to_id(text), library.model
    if token is None or not isinstance(model, models.BPE):
        return False
    if not model.ignore_merges:
        return [found.id for found in model.tokenize(text)] != [token]
    merges = json.loads(model.__getstate__())["merges"]
    return all((merge if isinstance(merge, str) else " ".join(merge)).replace(" ", "", 1) != text for merge in merges)


# ---- what is put around a text ----


@dataclass(frozen=True)
class _Rules:
    bos: int | None
    eos: int | None
    add_bos: bool = False
    add_eos: bool = False
    template: tuple[Sequence[int], Sequence[int]] | None = None


def _rules(library: Library, settings: TokenSettings, ids: Mapping[str, int], path: Path, notes: list[str]) -> _Rules:
    """Tokens that encoding adds to a text: those of the post-processor, as in transformers 5, which ignores
    `add_bos_token` and `add_eos_token` beside a tokenizer.json.
    """
    bos, eos = (ids.get(text or "") for text in (settings.bos, settings.eos))
    if settings.eos is not None and eos is None:
        notes.append(f"the tokenizer has no {settings.eos!r}, its EOS according to the files beside it")
    before, after = _around(library, ids, path)
    known = set(ids.values())
    if unknown := sorted({*before, *after} - known):
        listed = ", ".join(map(str, unknown))
        notes.append(f"the post-processor of tokenizer.json adds id {listed}, which no token has: left out")
        before, after = ([token for token in part if token in known] for part in (before, after))
    bos = before[0] if bos is None and len(before) == 1 else bos
    eos = after[0] if eos is None and len(after) == 1 else eos
    for flag, name, token, added in (
        (settings.add_bos, "add_bos_token", bos, before),
        (settings.add_eos, "add_eos_token", eos, after),
    ):
        if flag is not None and token is not None and flag != (token in added):
            says = f"{name} is {str(flag).lower()}, but the post-processor of tokenizer.json"
            notes.append(
                f"{says} {'adds' if token in added else 'does not add'} it, and is followed as in transformers"
            )
    if before in ([], [bos]) and after in ([], [eos]):
        return _Rules(bos, eos, bool(before), bool(after))
    return _Rules(bos, eos, bos in before, eos in after, (before, after))


def _around(library: Library, vocabulary: Iterable[str], path: Path) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a text."""
    with library_errors("a tokenizer.json whose post-processor fails", path):
        _require_template(library, path)
        with contextlib.suppress(Exception):  # unknown text is an error of some vocabularies, but never a panic
            library.encode(_PROBE)
        text = _encodable(library, vocabulary)
        encoded, bare = library.encode(text), library.encode(text, add_special_tokens=False)
    ids, inner = list(encoded.ids), len(bare.ids)
    mask = list(encoded.special_tokens_mask)
    start = mask.index(0) if 0 in mask else len(mask) - inner
    return ids[:start], ids[start + inner :]


def _encodable(library: Library, vocabulary: Iterable[str]) -> str:
    """A short text that the vocabulary has tokens for."""
    for text in ("a", *islice(vocabulary, 10)):
        with contextlib.suppress(Exception):
            library.encode(text)
            return text
    return ""


def _require_template(library: Library, path: Path) -> None:
    """Raise `FormatError` for a template with a token that it does not define: the library would panic."""
    state = json.loads(library.post_processor.__getstate__()) if library.post_processor is not None else {}
    for node in library_nodes(state, "processors"):
        if node.get("type") != "TemplateProcessing":
            continue
        for part in (*node.get("single", []), *node.get("pair", [])):
            name = part.get("SpecialToken", {}).get("id")
            if name is not None and name not in node.get("special_tokens", {}):
                raise FormatError(
                    "a post-processor with a token that is not there",
                    path=path,
                    where="key post_processor",
                    expected="a token of its special_tokens",
                    found=repr(name)[:100],
                )


# ---- decoding ----


def _decoding(library: Library, path: Path, notes: list[str]) -> Decoding:
    """How to decode. A file without a decoder is decoded as its pre-tokenizer encodes."""
    if library.decoder is None:
        parts = library_parts(library)
        if "ByteLevel" in parts:
            notes.append("tokenizer.json has no decoder; text is decoded as its pre-tokenizer ByteLevel encodes")
            return BYTE_LEVEL
        spaces = "Metaspace" in parts or parts.get("Replace", {}).get("content") == SPACE
        if spaces:
            own = parts.get("Metaspace", {})
            space = str(own.get("replacement", SPACE))
            notes.append(f"tokenizer.json has no decoder; text is decoded with {space} as a space")
            strip = Strip.NONE if own.get("prepend_scheme") == "never" else Strip.ONE
            return Decoding(strip, replaced=((space, " "),))
        notes.append("tokenizer.json has no decoder; a space is put between tokens, as the tokenizers library does")
        return Decoding(Strip.ONE, separator=b" ")
    nodes = list(library_nodes(json.loads(library.decoder.__getstate__()), "decoders"))
    kinds = [str(node.get("type")) for node in nodes]
    if "ByteLevel" in kinds:
        if others := sorted({*kinds} - {"ByteLevel", "ByteFallback", "Fuse"}):
            notes.append(f"decoder ByteLevel alone is followed, not {', '.join(others)} beside it")
        return BYTE_LEVEL
    replaced: list[tuple[str, str]] = []
    strip, fused = Strip.NONE, False
    for kind, node in zip(kinds, nodes, strict=True):
        fused = fused or kind == "Fuse"
        if kind == "Metaspace":
            replaced.append((str(node.get("replacement")), " "))
            strip = Strip.NONE if node.get("prepend_scheme") == "never" else Strip.ONE
        elif kind == "Replace" and (written := node.get("pattern", {}).get("String")) and not fused:
            replaced.append((written, str(node.get("content"))))
        elif kind == "BPEDecoder":
            replaced.append((str(node.get("suffix")), " "))
            notes.append(f"decoder BPEDecoder: each {node.get('suffix')} is a space, the last of a text too")
        elif kind == "Strip" and fused and (node.get("content"), node.get("start"), node.get("stop")) == (" ", 1, 0):
            strip = Strip.ONE
        elif kind not in ("ByteFallback", "Fuse"):
            raise UnsupportedError(
                f"{path}: decoder {json.dumps(node)[:120]}; supported are ByteLevel, ByteFallback, Fuse, Metaspace, "
                "BPEDecoder, Replace of a text before Fuse, and Strip of one space in front after Fuse"
            )
    return Decoding(strip, replaced=tuple(replaced))
