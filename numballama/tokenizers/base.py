"""`Tokenizer`, the base class of all tokenizers: text ↔ ids, a decoder for streams, a vocabulary for writers."""

from __future__ import annotations

import codecs
import contextlib
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from typing import SupportsIndex

from ..errors import Error
from .eog import eog_ids

MAX_VOCAB = 1 << 20
"""Maximum number of tokens in a vocabulary: four times the largest known one. It limits memory."""

SPACE = "▁"  # a space, in the pieces of a vocabulary
UNKNOWN_TEXT = " ⁇ ".encode()  # as sentencepiece shows it
BYTE_PIECE = re.compile(rb"<0x([0-9A-F]{2})>")


Span = tuple[str, bool]
"""(text, trusted): a part of a text, and whether control tokens that it spells are tokens."""


class TokenKind(Enum):
    """What a token contributes to text: whole characters; bytes of UTF-8 that may end inside a character (one for a
    byte piece, several for a token of byte-level BPE); nothing; or a mark for unknown text.
    """

    TEXT = "text"
    BYTE = "byte"
    CONTROL = "control"
    UNKNOWN = "unknown"


class Strip(Enum):
    """Leading spaces that decoding removes because encoding added one: none, the first, or all."""

    NONE = 0
    ONE = 1
    ALL = 2


class PieceType(IntEnum):
    """Type of a piece, numbered as in sentencepiece and GGUF."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as GGUF describes it. `model` "llama" is sentencepiece's BPE, "gpt2" is byte-level BPE.

    "llama": `pieces` have `scores` and write a space as ▁, except user-defined ones. "gpt2": `pieces` write bytes as
    GPT-2 does, `merges` lists pairs of pieces that join ("a b"), first merge first, and `pre` names the pre-tokenizer.
    `add_bos`, `add_eos` and `add_space_prefix` say what encoding adds to a text.
    """

    pieces: Sequence[bytes]
    scores: Sequence[float]
    types: Sequence[int]
    """`PieceType` of each piece."""
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True
    notes: tuple[str, ...] = ()
    """Features of the source tokenizer that this description cannot express, one sentence each."""
    model: str = "llama"
    merges: Sequence[bytes] = ()
    pre: str | None = None


class Tokenizer(ABC):
    """Text ↔ ids of one vocabulary. Methods that take an id raise `Error` if it is outside the vocabulary."""

    add_bos, add_eos = True, False
    """Whether encoding puts BOS before a text, and EOS after it."""

    invalid = "numballama.replace-bytes"
    """Python's name of the error handler with which `decode` replaces invalid UTF-8. This one writes one U+FFFD for
    each byte, as sentencepiece does.
    """

    notes: tuple[str, ...] = ()
    """What the user should know about how the files were interpreted, one sentence each."""

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None, strip: Strip) -> None:
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self._limit = vocab_size
        self._strip = strip
        self._entries: dict[int, tuple[TokenKind, bytes]] = {}
        self.whole: dict[int, str] = {}
        """Texts of tokens that are whole characters, as far as decoders have met them."""

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """`text` → ids. With `bos`, adds BOS and EOS where the vocabulary asks for them (`add_bos`, `add_eos`).

        Control tokens spelled in `text` ("<s>", "<|im_end|>") are encoded as ordinary text. With `special` they become
        their ids. Other added tokens (runs of spaces, "<think>") become their ids in any case. Raises `Error` when
        `text` holds a lone surrogate, which is not valid Unicode.
        """
        return self.encode_spans([(text, special)], bos)

    def encode_spans(self, spans: Sequence[Span], bos: bool = False) -> list[int]:
        """Ids of one text, given as spans `(text, trusted)`. Control tokens are recognised in trusted spans only.

        Everything else is as in one `encode` of the joined text: normalisation, pre-tokenisation and merges work
        across the borders of spans, and so do added tokens that are no control tokens. A control token whose spelling
        is not trusted as a whole is encoded as ordinary text. `bos` and errors are as in `encode`.
        """
        text = "".join(part for part, _ in spans)
        _require_unicode(text)
        ids: list[int] = []
        if text:
            ids = self._encode(text, b"".join((b"\1" if trusted else b"\0") * len(part) for part, trusted in spans))
            if max(ids, default=0) >= self._limit:
                ids = [part for token in ids for part in (self._spell(token) if token >= self._limit else [token])]
        return [*self._before, *ids, *self._after] if bos else ids

    def encode_continuation(self, data: bytes) -> list[int]:
        """Ids of UTF-8 bytes that continue a text: their bytes together are `data`, so no space is put in front.

        `data` may begin and end inside a character. Control tokens that it spells are encoded as ordinary text. Raises
        `Error` for bytes that the vocabulary has no token for.
        """
        ids: list[int] = []
        while data:
            try:
                text, bad = data.decode(), b""
            except UnicodeDecodeError as error:
                text, bad = data[: error.start].decode(), data[error.start : error.end]
            size = len(text.encode())
            if text:
                ids += self._continue_text(text, data[:size])
            ids += self._single_bytes(bad)
            data = data[size + len(bad) :]
        return ids

    def _continue_text(self, text: str, data: bytes) -> list[int]:
        """`encode_continuation` of whole characters: `data` are their bytes."""
        for marker in ("", "\2", "\n", "."):  # what encoding puts in front of a text goes before the marker
            ids = self.encode(marker + text, bos=False)
            start, before = 0, b""
            while marker and start < len(ids) and not before.endswith(marker.encode()):
                before += self.token_bytes(ids[start])
                start += 1
            if b"".join(map(self.token_bytes, ids[start:])) == data:
                return ids[start:]
        return self._single_bytes(data)

    def _single_bytes(self, data: bytes) -> list[int]:
        found = [(byte, self._byte_token(byte)) for byte in data]
        if missing := [byte for byte, token in found if token is None or self.token_bytes(token) != bytes([byte])]:
            raise Error(f"the vocabulary has no token for the byte 0x{missing[0]:02X}")
        return [token for _, token in found if token is not None]

    @property
    def bos(self) -> list[int]:
        """The BOS id, if the vocabulary has one and a text begins with it; else empty."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    @property
    def _before(self) -> Sequence[int]:
        """Ids that encoding puts before a text."""
        return self.bos

    @property
    def _after(self) -> Sequence[int]:
        """Ids that encoding puts after a text."""
        return [self.eos_id] if self.add_eos and self.eos_id is not None else []

    def limit(self, rows: int) -> None:
        """Encode text without ids from `rows` on, for which the model's embedding has no row.

        A token beyond is spelled by tokens of single bytes. BOS and EOS beyond are not added.
        """
        self._limit = min(rows, self.vocab_size)
        self.add_bos = self.add_bos and self.bos_id is not None and self.bos_id < rows
        self.add_eos = self.add_eos and self.eos_id is not None and self.eos_id < rows

    @property
    def usable(self) -> int:
        """Ids from here on have no row in the model's embedding; `vocab_size` if all have one."""
        return self._limit

    def _spell(self, token: int) -> list[int]:
        """The text of a token as tokens of single bytes, as far as the vocabulary has them."""
        found = (self._byte_token(byte) for byte in self._read_text(token))
        return [byte for byte in found if byte is not None and byte != token and byte < self._limit]

    def _read_text(self, token: int) -> bytes:
        """The bytes of a token, those of a control token as well."""
        kind, data = self.entry(token)
        return self._read_piece(token).encode() if kind is TokenKind.CONTROL else data

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Text → id of the control tokens: those that `encode` produces with `special=True` only."""

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        """Ids that end a generation: EOS, and control tokens with a name that says so. See `eog`."""
        return eog_ids(self.special_tokens, self.eos_id)

    def prepare(self) -> None:  # noqa: B027  (most have nothing to do)
        """Do the work that would delay the first `encode`. Raises `FormatError` for damage that is found only now."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Ids → text, without the leading space that encoding adds. Invalid UTF-8 becomes U+FFFD."""
        decoder = self.decoder()
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self, strip_leading_space: bool = True, shown: Collection[int] = ()) -> Decoder:
        """A `Decoder` for a stream of ids. `strip_leading_space` False: its text continues another, so spaces stay.

        `shown`: ids of control tokens whose names are text here; others add nothing to the text.
        """
        return Decoder(self, self._strip if strip_leading_space else Strip.NONE, shown)

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """The UTF-8 bytes that a token contributes to text, with its leading space; b"" for control tokens."""
        return self.entry(token)[1]

    def entry(self, token: SupportsIndex) -> tuple[TokenKind, bytes]:
        """Kind and bytes of a token. Cached on first use, so that opening a vocabulary stays cheap."""
        checked = self._check(token)
        if (entry := self._entries.get(checked)) is None:
            entry = self._entries[checked] = self._read_entry(checked)
        return entry

    def piece(self, token: SupportsIndex) -> str:
        """A token as the vocabulary writes it, for display: "▁the", "<0x0A>", "<s>"."""
        return self._read_piece(self._check(token))

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, for writers. Raises `UnsupportedError` when `Vocabulary` cannot express it."""

    def _check(self, token: SupportsIndex) -> int:
        checked = operator.index(token)  # NumPy's integers become Python's
        if not 0 <= checked < self.vocab_size:
            raise Error(f"token id {checked} is outside the vocabulary of {self.vocab_size:,}")
        return checked

    @abstractmethod
    def _encode(self, text: str, trusted: bytes) -> list[int]:
        """Ids of valid Unicode text that is not empty. `trusted[i]` is 1 where character i is in a trusted span."""

    @abstractmethod
    def _byte_token(self, byte: int) -> int | None:
        """The token of a single byte; None when the vocabulary has none."""

    @abstractmethod
    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]: ...

    @abstractmethod
    def _read_piece(self, token: int) -> str: ...


class Decoder:
    """Turns a stream of ids into text that never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, strip: Strip, shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._strip, self._shown = strip, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.invalid)

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes; "" while bytes of a character are missing."""
        kind, data = self._tokenizer.entry(token)
        if kind is TokenKind.BYTE:
            self._strip = Strip.NONE
            return self._utf8.decode(data)
        if token in self._shown:
            data = self._tokenizer.piece(token).encode()
        if kind is TokenKind.TEXT and self._strip is not Strip.NONE:
            stripped = data.removeprefix(b" ")
            if stripped or (stripped != data and self._strip is Strip.ONE):
                self._strip = Strip.NONE
            data = stripped
        elif data:
            self._strip = Strip.NONE
        return self._utf8.decode(data, True)  # True: other tokens end an unfinished character

    def push_all(self, tokens: Sequence[int]) -> list[str]:
        """The text that each of several tokens completes, as `push` returns it."""
        texts: list[str] = []
        while len(texts) < len(tokens) and (self._strip is not Strip.NONE or self._shown or self._utf8.getstate()[0]):
            texts.append(self.push(tokens[len(texts)]))
        rest, whole = tokens[len(texts) :], self._tokenizer.whole
        try:
            return texts + list(map(whole.__getitem__, rest))
        except KeyError:
            self._learn(rest)
        return texts + [self.push(token) for token in rest]

    def _learn(self, tokens: Sequence[int]) -> None:
        """Keep the texts of those of the tokens that are whole characters."""
        for token in tokens:
            with contextlib.suppress(UnicodeDecodeError):
                self._tokenizer.whole[token] = self._tokenizer.entry(token)[1].decode()

    def hidden(self, token: SupportsIndex) -> str:
        """What a control token is called ("<|im_end|>"), which is no part of the text; "" for other tokens."""
        is_hidden = self._tokenizer.entry(token)[0] is TokenKind.CONTROL and token not in self._shown
        return self._tokenizer.piece(token) if is_hidden else ""

    def flush(self) -> str:
        """End the text: the bytes of an unfinished character become U+FFFD."""
        return self._utf8.decode(b"", True)


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise Error(f"the text is not valid Unicode: a lone surrogate, {found}") from None


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# Python's own "replace" writes one U+FFFD for a whole truncated character, sentencepiece one for each byte.
codecs.register_error(Tokenizer.invalid, _replace_bytes)
