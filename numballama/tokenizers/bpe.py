"""Byte-pair encoding by the `tokenizers` library: byte-level, as GPT-2 began it, and sentencepiece's in its JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import Error, FormatError, UnsupportedError
from .base import BYTE_PIECE, SPACE, PieceType, Strip, Tokenizer, TokenKind, Vocabulary
from .pretokenizers import pre_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte, to the byte: visible Latin-1 is itself, the others follow from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_letters()
LETTERS = {byte: letter for letter, byte in BYTES.items()}


class BPETokenizer(Tokenizer):
    """A BPE model that the library encodes with; text and pieces are taken apart here.

    `build` makes the library's tokenizer, when it is first needed: large ones take half a second. Its added tokens are
    in it, each special or not: `added` maps their spelling to ids, and `special` are the ids of those that contribute
    no text. `pieces[id]` is None where the ids have a hole.
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
        strip: Strip = Strip.NONE,
        byte_level: bool = True,
    ) -> None:
        super().__init__(len(pieces), bos_id, eos_id, strip)
        self.add_bos, self.add_eos = add_bos, add_eos
        self._build: Callable[[], Library] | None = build
        self._pieces, self._added, self._special = pieces, dict(added), special
        self._added_ids = frozenset(self._added.values())
        self._byte_level = byte_level
        if byte_level:
            self.invalid = "replace"  # as the library does: one U+FFFD for a character cut short

    def prepare(self) -> None:
        _ = self._library

    @cached_property
    def _library(self) -> Library:
        assert self._build is not None
        library, self._build = self._build(), None  # which may keep a whole file mapped
        return library

    @cached_property
    def _plain(self) -> Library:
        """The library's tokenizer without added tokens: what text alone becomes."""
        from tokenizers import Tokenizer as Library

        plain = Library(self._library.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (found := getattr(self._library, part)) is not None:
                setattr(plain, part, found)
        return plain

    @property
    def _controls(self) -> dict[str, int]:
        return self._added

    def _encode_text(self, text: str) -> list[int]:
        ids = self._run(self._plain, text)
        if not self._added_ids.isdisjoint(ids):  # a word that is an added token, and that the model holds as well
            ids = [part for token in ids for part in (self._spell(token) if token in self._added_ids else [token])]
        return ids

    def _encode_special(self, text: str) -> list[int]:
        return self._run(self._library, text)

    def _run(self, library: Library, text: str) -> list[int]:
        with faults("the tokenizer's own rules fail on this text"):
            return list(library.encode(text, add_special_tokens=False).ids)

    def _spell(self, token: int) -> list[int]:
        """The tokens of an added token's bytes, one each."""
        piece = self._pieces[token] or ""
        if not self._byte_level:
            letters = [f"<0x{byte:02X}>" for byte in piece.replace(SPACE, " ").encode()]
        elif all(letter in BYTES for letter in piece):
            letters = list(piece)
        else:
            letters = [LETTERS[byte] for byte in piece.encode()]
        found = map(self._library.model.token_to_id, letters)
        return [part for part in found if part is not None and part != token]

    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]:
        piece = self._pieces[token]
        if piece is None or token in self._special:
            return TokenKind.CONTROL, b""
        if token in self._added_ids:
            return TokenKind.TEXT, piece.encode()
        if self._byte_level:
            known = all(letter in BYTES for letter in piece)
            return TokenKind.BYTE, bytes(map(BYTES.__getitem__, piece)) if known else piece.encode()
        if match := BYTE_PIECE.fullmatch(piece.encode()):
            data = bytes([int(match[1], 16)])
            return (
                TokenKind.TEXT if data == b" " else TokenKind.BYTE,
                data,
            )  # the library strips this space as it does any other
        return TokenKind.TEXT, piece.replace(SPACE, " ").encode()

    def _read_piece(self, token: int) -> str:
        return self._pieces[token] or ""

    def vocabulary(self) -> Vocabulary:
        if not self._byte_level:
            raise UnsupportedError("GGUF cannot hold a BPE of sentencepiece's kind with merges in place of scores")
        if (pre := pre_name(self._library)) is None:
            raise UnsupportedError(f"GGUF has no name for this pre-tokenizer: {self._library.pre_tokenizer}")
        merges = json.loads(self._library.model.__getstate__())["merges"]
        types = [PieceType.NORMAL if piece is not None else PieceType.UNUSED for piece in self._pieces]
        for token in self._added_ids:
            types[token] = PieceType.CONTROL if token in self._special else PieceType.USER_DEFINED
        notes: tuple[str, ...] = ()
        if self._library.normalizer is not None:
            notes = ("the tokenizer normalises its text, which GGUF does not: ids differ on text that is not normal",)
        return Vocabulary(
            [f"[HOLE{token}]".encode() if p is None else p.encode() for token, p in enumerate(self._pieces)],
            (),
            types,
            self.bos_id,
            self.eos_id,
            None,
            self.add_bos,
            self.add_eos,
            add_space_prefix=False,
            notes=notes,
            model="gpt2",
            merges=[(merge if isinstance(merge, str) else " ".join(merge)).encode() for merge in merges],
            pre=pre,
        )

    def to_json(self) -> str:
        """A `tokenizer.json` of it, which puts BOS and EOS where the vocabulary wants them."""
        written = json.loads(self._library.to_str())
        ends = [self.bos_id if self.add_bos else None], [self.eos_id if self.add_eos else None]
        before, after = ([self.piece(token) for token in tokens if token is not None] for tokens in ends)
        if before or after:

            def around(text: str, type_id: int) -> list[Any]:
                first, last = (
                    [{"SpecialToken": {"id": name, "type_id": type_id}} for name in n] for n in (before, after)
                )
                return [*first, {"Sequence": {"id": text, "type_id": type_id}}, *last]

            ids = {self.piece(token): token for token in (self.bos_id, self.eos_id) if token is not None}
            written["post_processor"] = {
                "type": "TemplateProcessing",
                "single": around("A", 0),
                "pair": around("A", 0) + around("B", 1),
                "special_tokens": {n: {"id": n, "ids": [ids[n]], "tokens": [n]} for n in {*before, *after}},
            }
        return json.dumps(written, ensure_ascii=False) + "\n"

    @property
    def unreachable(self) -> list[int]:
        """Ids that no text becomes, because others are spelled like them: a `tokenizer.json` cannot hold them."""
        find = self._library.token_to_id
        return [token for token, piece in enumerate(self._pieces) if piece is not None and find(piece) != token]


@contextlib.contextmanager
def faults(message: str, path: str | PathLike[str] | None = None) -> Iterator[None]:
    """What the library raises, a Rust panic included, as an `Error`; a `FormatError` when a file is at fault."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise _fault(message, path, error) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which is no Exception, and cannot be imported
            raise
        raise _fault(message, path, error) from None


def _fault(message: str, path: str | PathLike[str] | None, error: BaseException) -> Error:
    found = " ".join(str(error).split())[:300]
    return Error(f"{message}: {found}") if path is None else FormatError(message, path=path, found=found)


def library_from(model: Any, pre_tokenizer: Any, added: Sequence[tuple[str, bool]]) -> Library:
    """A byte-level tokenizer of the library: a model, what cuts text into words, and (spelling, special) to add."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Library

    library = Library(model)
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
    return library
