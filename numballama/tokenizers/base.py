"""What every tokenizer is: text to ids and back, streams of ids to whole characters, a vocabulary to write."""

from __future__ import annotations

import codecs
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from typing import SupportsIndex

from ..errors import Error

MAX_VOCAB = 1 << 20
"""Tokens that a vocabulary may have: four times the largest that is known, and a bound on the memory one takes."""

SPACE = "▁"  # stands for a space in the pieces of a vocabulary
UNKNOWN_TEXT = " ⁇ ".encode()  # as sentencepiece shows it
BYTE_PIECE = re.compile(rb"<0x([0-9A-F]{2})>")


class TokenKind(Enum):
    """What a token contributes to text: characters, raw bytes of UTF-8 that may end inside a character (a byte piece
    is one, a token of byte-level BPE several), nothing, or a mark for what was unknown."""

    TEXT = "text"
    BYTE = "byte"
    CONTROL = "control"
    UNKNOWN = "unknown"


class Strip(Enum):
    """Leading spaces that decoding takes away, because encoding put one there: none, the first, or every one."""

    NONE = 0
    ONE = 1
    ALL = 2


class PieceType(IntEnum):
    """What a piece of a vocabulary is, as sentencepiece and GGUF number it."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary in the terms of GGUF's tokenizers: "llama" is sentencepiece's BPE, "gpt2" byte-level BPE.

    "llama": `pieces` spell a space as ▁, but for those that are user-defined, and have `scores`. "gpt2": `pieces` spell
    bytes as GPT-2 does, two pieces that make a third stand in `merges` ("a b"), the first merge first, and `pre` names
    what cuts a text into words. `add_bos`, `add_eos` and `add_space_prefix` say what encoding adds to a text.
    """

    pieces: Sequence[bytes]
    scores: Sequence[float]
    types: Sequence[int]
    """A `PieceType` each."""
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True
    notes: tuple[str, ...] = ()
    """In what the tokenizer that it was taken from is more than these terms can say, a sentence each."""
    model: str = "llama"
    merges: Sequence[bytes] = ()
    pre: str | None = None


class Tokenizer(ABC):
    """Text ↔ ids of one vocabulary. Every method that takes an id raises `Error` for one outside the vocabulary."""

    add_bos, add_eos = True, False
    """Whether the vocabulary wants BOS before a text, and EOS after it."""

    invalid = "numballama.replace-bytes"
    """How `decode` shows bytes that are no UTF-8, as Python names it: one U+FFFD a byte, as sentencepiece does."""

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None, strip: Strip) -> None:
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self._strip = strip
        self._entries: dict[int, tuple[TokenKind, bytes]] = {}

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """`text` → ids; if `bos`, with BOS first where the vocabulary wants it (and EOS last, which hardly one does).

        Control tokens spelled out in `text` ("<s>", "</s>") stay text, unless `special`: then they become their ids,
        and what stands between them is encoded as texts of their own. Raises `Error` when `text` holds a lone
        surrogate, which no Unicode text does.
        """
        _require_unicode(text)
        ids = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        ids += self._encode_special(text) if special else self._encode_text(text)
        return [*ids, self.eos_id] if bos and self.add_eos and self.eos_id is not None else ids

    def encode_guarded(self, text: str, guard: str) -> list[int]:
        """Like `encode(text, bos=False, special=True)`, but a control token spelled with `guard` inside stays text.

        `guard` is a character that `text` holds for this alone: none of it is left in what is encoded.
        """
        _require_unicode(text)
        ids: list[int] = []
        for part in self._control_pattern.split(text):
            control = self._controls.get(part)
            ids += [control] if control is not None else self._encode_text(part.replace(guard, ""))
        return ids

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Spelling → id of what `encode(…, special=True)` takes for a token and `special=False` for text."""
        return self._controls

    def prepare(self) -> None:  # noqa: B027  (most have nothing to do)
        """Do now what the first text would wait for. Raises `FormatError` for damage that only then shows."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Ids → text, without the leading space that encoding adds; bytes that are no UTF-8 become U+FFFD."""
        decoder = self.decoder()
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self, strip_leading_space: bool = True) -> Decoder:
        """A `Decoder` for a stream of ids. `strip_leading_space` False: the text continues another, so spaces stay."""
        return Decoder(self, self._strip if strip_leading_space else Strip.NONE)

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """The bytes of UTF-8 that a token contributes to text, its leading space included; control tokens have none."""
        return self.entry(token)[1]

    def entry(self, token: SupportsIndex) -> tuple[TokenKind, bytes]:
        """The kind and the bytes of a token; looked up once, so that a vocabulary costs nothing until it is used."""
        checked = self._check(token)
        if (entry := self._entries.get(checked)) is None:
            entry = self._entries[checked] = self._read_entry(checked)
        return entry

    def piece(self, token: SupportsIndex) -> str:
        """A token as the vocabulary spells it, for display: "▁the", "<0x0A>", "<s>"."""
        return self._read_piece(self._check(token))

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, to be written to a file. Raises `UnsupportedError` when these terms cannot express it."""

    def _encode_special(self, text: str) -> list[int]:
        """Ids of valid Unicode text in which control tokens are spelled out."""
        return self.encode_guarded(text, "") if text else []

    def _check(self, token: SupportsIndex) -> int:
        checked = operator.index(token)  # NumPy's integers become Python's
        if not 0 <= checked < self.vocab_size:
            raise Error(f"token id {checked} is outside the vocabulary of {self.vocab_size:,}")
        return checked

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")

    @property
    @abstractmethod
    def _controls(self) -> dict[str, int]:
        """Spelling → id of the control tokens, and of others that text must not become by itself."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of valid Unicode text; none for the empty one."""

    @abstractmethod
    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]: ...

    @abstractmethod
    def _read_piece(self, token: int) -> str: ...


class Decoder:
    """Ids one at a time → text that never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, strip: Strip) -> None:
        self._tokenizer = tokenizer
        self._strip = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.invalid)

    def push(self, token: SupportsIndex) -> str:
        """The text that is complete with `token`: "" while a character's bytes are not all there."""
        kind, data = self._tokenizer.entry(token)
        if kind is TokenKind.BYTE:
            self._strip = Strip.NONE
            return self._utf8.decode(data)
        if kind is TokenKind.TEXT and self._strip is not Strip.NONE:
            stripped = data.removeprefix(b" ")
            if stripped or (stripped != data and self._strip is Strip.ONE):
                self._strip = Strip.NONE
            data = stripped
        elif data:
            self._strip = Strip.NONE
        return self._utf8.decode(data, True)  # True: any token that is no byte ends a character cut short

    def flush(self) -> str:
        """End the text: bytes held back, which no longer become a character, are given as U+FFFD."""
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


# One U+FFFD a byte, as sentencepiece does; Python's own "replace" gives one for a whole truncated character.
codecs.register_error(Tokenizer.invalid, _replace_bytes)
