"""Text ↔ token ids, for every tokenizer file the project reads: sentencepiece's `.model` and llama2.c's `.bin`."""

from __future__ import annotations

import codecs
import heapq
import operator
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import Enum
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, SupportsIndex

from .errors import Error, FormatError, UnsupportedError
from .files import MappedFile, map_file

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_VOCAB = 1 << 20
"""Tokens that a vocabulary may have: four times the largest that is known, and a bound on the memory one takes."""

_SPACE = "▁"  # stands for a space in the pieces of a vocabulary
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Kind(Enum):
    """What a token contributes to text: characters, one raw byte of UTF-8, nothing, or a mark for what was unknown."""

    TEXT = "text"
    BYTE = "byte"
    CONTROL = "control"
    UNKNOWN = "unknown"


class Strip(Enum):
    """Leading spaces that decoding takes away, because encoding put one there: none, the first, or every one."""

    NONE = 0
    ONE = 1
    ALL = 2


class Tokenizer(ABC):
    """Text ↔ ids of one vocabulary. Every method that takes an id raises `Error` for one outside the vocabulary."""

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None, strip: Strip) -> None:
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self._strip = strip
        self._entries: dict[int, tuple[Kind, bytes]] = {}

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """`text` → ids, with BOS first if `bos` and the vocabulary has one.

        Control tokens spelled out in `text` ("<s>", "</s>") stay text, unless `special`: then they become their ids,
        and what stands between them is encoded as texts of their own. Raises `Error` when `text` holds a lone
        surrogate, which no Unicode text does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise Error(f"the text is not valid Unicode: a lone surrogate, {found}") from None
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        if not special:
            return ids + self._encode_text(text)
        for part in self._control_pattern.split(text):
            control = self._controls.get(part)
            ids += [control] if control is not None else self._encode_text(part)
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Ids → text, without the leading space that encoding adds; bytes that are no UTF-8 become U+FFFD each."""
        decoder = self.decoder()
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def decoder(self, at_start: bool = True) -> Decoder:
        """A `Decoder` for a stream of ids; `at_start` False when its text continues another, so that spaces stay."""
        return Decoder(self, self._strip if at_start else Strip.NONE)

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """The bytes of UTF-8 that a token contributes to text, its leading space included; control tokens have none."""
        return self.entry(token)[1]

    def entry(self, token: SupportsIndex) -> tuple[Kind, bytes]:
        """The kind and the bytes of a token; looked up once, so that a vocabulary costs nothing until it is used."""
        checked = self._check(token)
        if (entry := self._entries.get(checked)) is None:
            entry = self._entries[checked] = self._read_entry(checked)
        return entry

    def piece(self, token: SupportsIndex) -> str:
        """A token as the vocabulary spells it, for display: "▁the", "<0x0A>", "<s>"."""
        return self._read_piece(self._check(token))

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
        """Spelling → id of the control tokens."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of valid Unicode text; none for the empty one."""

    @abstractmethod
    def _read_entry(self, token: int) -> tuple[Kind, bytes]: ...

    @abstractmethod
    def _read_piece(self, token: int) -> str: ...


class Decoder:
    """Ids one at a time → text that never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, strip: Strip) -> None:
        self._tokenizer = tokenizer
        self._strip = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_REPLACE_BYTES)

    def push(self, token: SupportsIndex) -> str:
        """The text that is complete with `token`: "" while a character's bytes are not all there."""
        kind, data = self._tokenizer.entry(token)
        if kind is Kind.BYTE:
            self._strip = Strip.NONE
            return self._utf8.decode(data)
        if kind is Kind.TEXT and self._strip is not Strip.NONE:
            stripped = data.removeprefix(b" ")
            if stripped or (stripped != data and self._strip is Strip.ONE):
                self._strip = Strip.NONE
            data = stripped
        elif data:
            self._strip = Strip.NONE
        return self._utf8.decode(data, True)  # True: any token that is no byte ends a character cut short

    def flush(self) -> str:
        """End the text: bytes held back, which no longer become a character, are given as U+FFFD each."""
        return self._utf8.decode(b"", True)


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# One U+FFFD a byte, as sentencepiece does; Python's own "replace" gives one for a whole truncated character.
_REPLACE_BYTES = "numballama.replace-bytes"
codecs.register_error(_REPLACE_BYTES, _replace_bytes)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; the library encodes."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        bos, eos = (token if token >= 0 else None for token in (model.bos_id(), model.eos_id()))
        super().__init__(model.vocab_size(), bos, eos, _observe_strip(model))
        self._model = model
        # All of them now, 5 ms for 32,000: a piece that is no UTF-8 shall stop loading, not a story half told.
        self._pieces: list[str] = model.id_to_piece(list(range(self.vocab_size)))
        self._unknown = model.decode([model.unk_id()]).encode()

    @cached_property
    def _controls(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self._pieces) if piece and self._model.is_control(token)}

    def _encode_text(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def _read_entry(self, token: int) -> tuple[Kind, bytes]:
        if self._model.is_control(token):
            return Kind.CONTROL, b""
        if self._model.is_unknown(token):
            return Kind.UNKNOWN, self._unknown
        piece = self._pieces[token]
        if self._model.is_byte(token) and (match := _BYTE.fullmatch(piece)):
            return Kind.BYTE, bytes.fromhex(match[1])
        return Kind.TEXT, piece.replace(_SPACE, " ").encode()

    def _read_piece(self, token: int) -> str:
        return self._pieces[token]


def _observe_strip(model: SentencePieceProcessor) -> Strip:
    """Which leading spaces the model's own decoding takes away: its Python interface does not say, so try."""
    space = model.piece_to_id(_SPACE)
    if model.is_unknown(space):
        return Strip.ONE
    left = len(model.decode([space, space]))
    return {0: Strip.ALL, 1: Strip.ONE}.get(left, Strip.NONE)


class Llama2cTokenizer(Tokenizer):
    """llama2.c's `tokenizer.bin`: ids 0, 1, 2 are unknown, BOS and EOS, 3 to 258 the bytes, then pieces with scores.

    Encoding is llama2.c's: a space in front, a token for each character (its bytes if it has none), then again and
    again the adjacent pair whose joint piece scores best becomes one token, the leftmost of equals.
    """

    FIRST_BYTE, FIRST_PIECE = 3, 259

    def __init__(self, pieces: list[bytes], scores: list[float]) -> None:
        super().__init__(len(pieces), bos_id=1, eos_id=2, strip=Strip.ONE)
        self._pieces, self._scores = pieces, scores
        # Backwards, so that of equal pieces the first wins. Control tokens and bytes cannot be spelled out in text.
        self._ids = {pieces[token]: token for token in range(len(pieces) - 1, self.FIRST_PIECE - 1, -1)}

    @property
    def _controls(self) -> dict[str, int]:
        return {"<s>": 1, "</s>": 2}

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = []
        for character in f" {text}":
            data = character.encode()
            token = self._ids.get(data)
            ids += [token] if token is not None else [byte + self.FIRST_BYTE for byte in data]
        return self._merge(ids)

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge pairs by score with a heap, O(n log n).

        Not the tokenizers library: its BPE ranks merges instead of their results, so that "▁▁"+"▁" and "▁"+"▁▁"
        cannot tie, and it splits long runs of spaces otherwise than llama2.c; and it takes 0.1 s to load 32,000
        pieces with all their splits, against 0.02 s here.
        """
        pieces, scores, known, n = self._pieces, self._scores, self._ids, len(ids)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # a linked list; n ends it

        def candidate(left: int) -> tuple[float, int, int, int, int, int] | None:
            right = after[left]
            if right == n:
                return None
            merged = known.get(pieces[ids[left]] + pieces[ids[right]])
            if merged is None or not scores[merged] > -1e10:  # llama2.c starts its search for the best there
                return None
            return -scores[merged], left, right, ids[left], ids[right], merged

        heap = [found for left in range(n) if (found := candidate(left))]
        heapq.heapify(heap)
        while heap:
            _, left, right, left_id, right_id, merged = heapq.heappop(heap)
            if ids[left] != left_id or ids[right] != right_id:
                continue  # an earlier merge took one of the two
            ids[left], ids[right] = merged, -1
            after[left] = following = after[right]
            if following < n:
                before[following] = left
            for start in (before[left], left):
                if start >= 0 and (found := candidate(start)):
                    heapq.heappush(heap, found)
        return [token for token in ids if token >= 0]

    def _read_entry(self, token: int) -> tuple[Kind, bytes]:
        if token == 0:
            return Kind.UNKNOWN, " ⁇ ".encode()  # as sentencepiece shows it
        if token < self.FIRST_BYTE:
            return Kind.CONTROL, b""
        if token < self.FIRST_PIECE:
            return Kind.BYTE, bytes([token - self.FIRST_BYTE])
        return Kind.TEXT, self._pieces[token]

    def _read_piece(self, token: int) -> str:
        # The file writes a line break around "<s>" and "</s>", for llama2.c's printing.
        piece = self._pieces[token].strip(b"\n") if token < self.FIRST_BYTE else self._pieces[token]
        return piece.decode(errors="replace").replace(" ", _SPACE)


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Open the tokenizer file at `path`, recognised by its content.

    Raises `FormatError` for a damaged file or one of an unknown format, `UnsupportedError` for a known one that is not
    read yet, and `Error` when it cannot be opened.
    """
    file = map_file(path)
    head = file.data[:64].lstrip()
    if head.startswith((b"GGUF", b"{")):
        kind = "a GGUF file" if head.startswith(b"GGUF") else "a tokenizer.json"
        raise UnsupportedError(
            f"{path}: {kind} is not read yet; supported are sentencepiece's .model and llama2.c's tokenizer.bin"
        )
    try:
        return _read_llama2c(file)
    except FormatError as error:
        fault = error
    if (model := _read_sentencepiece(file)) is None:
        raise FormatError(
            "neither a sentencepiece model nor a llama2.c tokenizer.bin",
            path=path,
            where=fault.where,
            expected=fault.expected,
            found=fault.found,
        )
    return model


def _read_llama2c(file: MappedFile) -> Llama2cTokenizer:
    """Read int32 longest piece, then float32 score, int32 length and bytes of every token, exactly to the end."""

    def fault(where: int, expected: str, found: object) -> FormatError:
        return FormatError("not a tokenizer.bin", path=file.path, where=where, expected=expected, found=found)

    data, size, entry = file.data[:], file.size, struct.Struct("<fi")
    longest = int.from_bytes(data[:4], "little", signed=True)
    if not 0 < longest < size:
        raise fault(0, "the length of the longest piece", longest)
    pieces: list[bytes] = []
    scores: list[float] = []
    offset = 4
    while offset < size:
        start = offset + entry.size
        if start > size:
            raise fault(offset, f"the {entry.size} bytes of a token's score and length", f"{size - offset}")
        score, length = entry.unpack_from(data, offset)
        if not 0 <= length <= min(longest, size - start):
            raise fault(offset + 4, f"a length of 0 to {min(longest, size - start)}", length)
        if len(pieces) == MAX_VOCAB:
            raise fault(offset, f"at most {MAX_VOCAB:,} tokens", "more")
        scores.append(score)
        pieces.append(data[start : start + length])
        offset = start + length
    byte_pieces = [b"<0x%02X>" % byte for byte in range(256)]
    if pieces[Llama2cTokenizer.FIRST_BYTE : Llama2cTokenizer.FIRST_PIECE] != byte_pieces:
        raise fault(4, "ids 3 to 258 to be <0x00> to <0xFF>", "other pieces")
    return Llama2cTokenizer(pieces, scores)


def _read_sentencepiece(file: MappedFile) -> SentencePieceTokenizer | None:
    """The sentencepiece model in the file, or None when the library finds none there."""
    if file.data[0] != 0x0A:  # the tag of the first piece: spares the library files that cannot be one
        return None
    from sentencepiece import SentencePieceProcessor  # 0.03 s to import

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(file.data[:])
        return SentencePieceTokenizer(model) if 0 < model.vocab_size() <= MAX_VOCAB else None
    except (RuntimeError, ValueError, IndexError):
        return None
