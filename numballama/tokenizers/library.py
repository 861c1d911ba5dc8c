"""Tokenizers that the tokenizers library runs."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import Error, FormatError, UnsupportedError
from .base import BYTE_PIECE, SPACE, Strip, Tokenizer, TokenKind, Vocabulary

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding
    from tokenizers import Tokenizer as Library


def _unicode_to_byte() -> dict[str, int]:
    """GPT-2's `bytes_to_unicode`, inverted: visible Latin-1 stands for itself, the other bytes follow from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


UNICODE_TO_BYTE = _unicode_to_byte()
BYTE_TO_UNICODE = {byte: character for character, byte in UNICODE_TO_BYTE.items()}


_GUARDS = (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE))
"""Code points that no text is expected to contain: Unicode's noncharacters, then a plane for private use."""


@dataclass(frozen=True)
class Decoding:
    """How pieces become text."""

    strip: Strip = Strip.NONE
    byte_level: bool = False
    """Pieces write bytes as GPT-2 does. Otherwise they write bytes as <0xNN>, and other text as `replaced` says."""
    replaced: tuple[tuple[str, str], ...] = ((SPACE, " "),)
    """(what pieces write, the text that it stands for), in the order in which they are replaced."""
    separator: bytes = b""
    """Written in front of each piece. The first is one of the spaces that `strip` removes."""


BYTE_LEVEL = Decoding(byte_level=True)


LONG = 4096
"""Characters of a text that takes milliseconds to encode."""


def _encoding(library: Library, text: str) -> Encoding:
    """The library's encoding of a text. It holds Python's lock for one, and not for a list: 8 MB take it seconds, in
    which no other thread would run."""
    if len(text) < LONG:
        return library.encode(text, add_special_tokens=False)
    return library.encode_batch([text], add_special_tokens=False)[0]


class LibraryTokenizer(Tokenizer):
    """A model of the library. The library encodes; decoding is done here.

    `build` makes the library's tokenizer when it is first needed, because a large one takes half a second. It contains
    the added tokens, which `added` maps to their ids; those in `special` contribute no text. `pieces[id]` is None for
    an unused id. `template` has the ids before and after a text, if they are others than BOS and EOS.
    """

    def __init__(
        self,
        build: Callable[[], Library],
        pieces: Sequence[str | None],
        added: Mapping[str, int],
        special: frozenset[int],
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        decoding: Decoding = BYTE_LEVEL,
        template: tuple[Sequence[int], Sequence[int]] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        strip, byte_level = decoding.strip, decoding.byte_level
        super().__init__(len(pieces), bos_id, eos_id, strip)
        self.add_bos, self.add_eos = add_bos, add_eos
        self._build: Callable[[], Library] | None = build
        self._pieces, self._added, self._special = pieces, dict(added), special
        self._added_ids = frozenset(self._added.values())
        self._byte_level, self._separator, self._replaced = byte_level, decoding.separator, decoding.replaced
        self._template, self.notes = template, notes
        self._guarded: tuple[str, Library, Mapping[int, int]] | None = None
        if byte_level:
            self.invalid = "replace"  # as the library does: one U+FFFD for an unfinished character

    def prepare(self) -> None:
        _ = self._library

    @cached_property
    def _library(self) -> Library:
        assert self._build is not None
        library, self._build = self._build(), None  # `build` may keep a whole file mapped
        return library

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {text: token for text, token in self._added.items() if token in self._special}

    def _encode(self, text: str, trusted: bytes) -> list[int]:
        with library_errors("the tokenizer's own rules fail on this text", quiet=self._may_panic):
            encoding = _encoding(self._library, text)
            ids: list[int] = list(encoding.ids)
            if 0 not in trusted or self._special.isdisjoint(ids):
                return ids
            found = (
                (token, place) for token, place in zip(ids, encoding.offsets, strict=True) if token in self._special
            )
            places = [place for pair in found if (place := self._place(text, *pair)) is not None]
            tokens = [start for start, end in places if 0 not in trusted[start:end]]
            return ids if len(tokens) == len(places) else self._encode_guarded(text, tokens)

    @cached_property
    def _may_panic(self) -> bool:
        """Whether the library has rules that are known to panic on some text if their file is damaged."""
        model = self._library.model
        return "Precompiled" in library_parts(self._library) or bool(getattr(model, "continuing_subword_prefix", None))

    def _place(self, text: str, token: int, offsets: tuple[int, int]) -> tuple[int, int] | None:
        """(start, end) of an added token's spelling in `text`, without white space that its flags make part of it.

        None when it is not spelled there: the unknown token stands for any text.
        """
        start, end = offsets
        content = self._pieces[token] or ""
        if (at := text.find(content, start, end)) >= 0:
            return at, at + len(content)
        inner, normalizer = text[start:end].strip(), self._library.normalizer
        if not inner or normalizer is None or normalizer.normalize_str(inner) != normalizer.normalize_str(content):
            return None
        at = text.index(inner, start, end)  # another spelling, which the normalizer makes the same
        return at, at + len(inner)

    def _encode_guarded(self, text: str, tokens: Sequence[int]) -> list[int]:
        """Ids of `text` in which the control tokens that start at `tokens` are tokens, and others are ordinary text.

        A guard, which is a character that the text does not contain, is put in front of these tokens. A second library
        tokenizer knows control tokens with the guard in front, and takes those without it for text. So one encode of
        the whole text does it.
        """
        guard = next(guard for guard in map(chr, _GUARDS) if guard not in text)
        if self._guarded is None or self._guarded[0] != guard:
            self._guarded = guard, *self._guarded_library(guard)
        _, library, controls = self._guarded
        starts = [0, *tokens]
        guarded = guard.join(text[start:end] for start, end in zip(starts, [*tokens, len(text)], strict=True))
        found = _encoding(library, guarded)
        ids: list[int] = []
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            text = guarded[start:end]
            if token in controls and guard in text:
                ids.append(controls[token])
            elif token in self._special and text.strip() == (self._pieces[token] or "").strip(f"{SPACE}Ġ"):
                ids += self._spell(token)  # a word of the model that is a control token; "<unk>" for other text stays
            else:
                ids.append(token)
        return ids

    def _guarded_library(self, guard: str) -> tuple[Library, dict[int, int]]:
        """A tokenizer that knows control tokens with `guard` in front, and the ids that it gives them → their ids.

        It takes control tokens without the guard for text.
        """
        from tokenizers import Tokenizer as Library

        library = Library(self._library.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(self._library, part)) is not None:
                setattr(library, part, value)
        library.encode_special_tokens = True  # the library's name for: leave them in the text
        entries = sorted(self._library.get_added_tokens_decoder().items())
        library.add_tokens([copy_token(entry, special=token in self._special) for token, entry in entries])
        normalizer = library.normalizer
        guarded: dict[int, AddedToken] = {}
        for token, entry in entries:
            if token in self._special:
                text = guard + entry.content
                kept = normalizer is None or guard in normalizer.normalize_str(text)
                guarded[token] = copy_token(entry, text, special=False, normalized=entry.normalized and kept)
        library.add_tokens(list(guarded.values()))
        ids = ((library.token_to_id(entry.content), token) for token, entry in guarded.items())
        return library, {other: token for other, token in ids if other is not None}

    @property
    def _before(self) -> Sequence[int]:
        return super()._before if self._template is None else self._within(self._template[0])

    @property
    def _after(self) -> Sequence[int]:
        return super()._after if self._template is None else self._within(self._template[1])

    def _within(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token < self._limit]

    def _byte_token(self, byte: int) -> int | None:
        found: int | None = self._library.model.token_to_id(
            BYTE_TO_UNICODE[byte] if self._byte_level else f"<0x{byte:02X}>"
        )
        return found

    def _read_text(self, token: int) -> bytes:
        piece = self._pieces[token] or ""
        if not self._byte_level:
            return self._plain(piece).encode()
        known = all(character in UNICODE_TO_BYTE for character in piece)
        return bytes(map(UNICODE_TO_BYTE.__getitem__, piece)) if known else piece.encode()

    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]:
        piece = self._pieces[token]
        if piece is None or token in self._special:
            return TokenKind.CONTROL, b""
        if token in self._added_ids:  # the library's decoders read ▁ in these too
            piece = self._library.id_to_token(token) or piece  # since 0.23 as the normalizer makes it
            return TokenKind.TEXT, self._separator + (piece if self._byte_level else self._plain(piece)).encode()
        if self._byte_level:
            return TokenKind.BYTE, self._read_text(token)
        if match := BYTE_PIECE.fullmatch(piece.encode()):
            data = bytes([int(match[1], 16)])
            # TEXT, because the library strips this space like any other
            return (TokenKind.TEXT if data == b" " else TokenKind.BYTE), data
        return TokenKind.TEXT, self._separator + self._plain(piece).encode()

    def _plain(self, piece: str) -> str:
        """The text of a piece that is not byte-level."""
        for written, text in self._replaced:
            piece = piece.replace(written, text)
        return piece

    def _read_piece(self, token: int) -> str:
        return self._pieces[token] or ""

    def vocabulary(self) -> Vocabulary:
        raise UnsupportedError(f"GGUF cannot hold a {type(self._library.model).__name__} model")

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, with a post-processor that adds tokens as `encode` does."""
        data = json.loads(self._library.to_str())
        before, after = (list(map(self.piece, ids)) for ids in (self._before, self._after))
        if before or after:

            def template(sequence: str, type_id: int) -> list[Any]:
                first, last = (
                    [{"SpecialToken": {"id": name, "type_id": type_id}} for name in names] for names in (before, after)
                )
                return [*first, {"Sequence": {"id": sequence, "type_id": type_id}}, *last]

            data["post_processor"] = {
                "type": "TemplateProcessing",
                "single": template("A", 0),
                "pair": template("A", 0) + template("B", 1),
                "special_tokens": {
                    self.piece(token): {"id": self.piece(token), "ids": [token], "tokens": [self.piece(token)]}
                    for token in (*self._before, *self._after)
                },
            }
        return json.dumps(data, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def library_errors(message: str, path: str | PathLike[str] | None = None, quiet: bool = False) -> Iterator[None]:
    """Turn the library's exceptions, Rust panics included, into an `Error`, or a `FormatError` if `path` is given.

    With `path` or `quiet`, what a panic prints is dropped.
    """
    try:
        with _without_panics() if path is not None or quiet else contextlib.nullcontext():
            yield
    except Error:
        raise
    except Exception as error:
        raise _error(message, path, error) from None
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise _error(message, path, error) from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # not an Exception, and cannot be imported


def _error(message: str, path: str | PathLike[str] | None, error: BaseException) -> Error:
    text = " ".join(str(error).split())[:300]
    return Error(f"{message}: {text}") if path is None else FormatError(message, path=path, found=text)


_STDERR = threading.Lock()


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, where Rust reports a panic before Python sees it.

    It is written when the block ends; the report of a panic is not.
    """
    with _STDERR, contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            shown = os.dup(2)
        except OSError:  # no standard error, or no space for the file
            yield
            return
        os.dup2(held.fileno(), 2)
        panic = False
        try:
            yield
        except BaseException as error:
            panic = _is_panic(error)
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
            held.seek(0)
            text = held.read()
            with contextlib.suppress(OSError):
                os.write(2, text.partition(b"\nthread '")[0] if panic else text)


def library_nodes(state: Mapping[str, Any], inner: str) -> Iterator[Mapping[str, Any]]:
    """A part of the library given as JSON, or the parts of a sequence, which it has under the key `inner`."""
    if state.get("type") == "Sequence":
        for child in state.get(inner, []):
            yield from library_nodes(child, inner)
    else:
        yield state


def library_parts(library: Library) -> dict[str, Mapping[str, Any]]:
    """Type → description of the normalizers, pre-tokenizers and decoders of a library's tokenizer."""
    found: dict[str, Mapping[str, Any]] = {}
    for part, inner in (
        (library.normalizer, "normalizers"),
        (library.pre_tokenizer, "pretokenizers"),
        (library.decoder, "decoders"),
    ):
        if part is not None:
            found |= {str(node.get("type")): node for node in library_nodes(json.loads(part.__getstate__()), inner)}
    return found


def copy_token(token: AddedToken, content: str | None = None, **flags: bool) -> AddedToken:
    """A copy of the library's added token with another content or other flags."""
    from tokenizers import AddedToken

    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    kept: dict[str, bool] = {name: getattr(token, name) for name in names}
    return AddedToken(token.content if content is None else content, **(kept | flags))
