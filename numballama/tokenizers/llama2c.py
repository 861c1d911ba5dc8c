"""llama2.c's `tokenizer.bin`: pieces with scores, encoded as llama2.c's `run.c` does."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ..errors import FormatError
from ..files import MappedFile
from .base import MAX_VOCAB, SPACE, UNKNOWN_TEXT, PieceType, Strip, TokenKind, Vocabulary
from .partition import AddedToken, Partition
from .scored import MERGED, ScoredTokenizer


class Llama2cTokenizer(ScoredTokenizer):
    """Ids 0, 1 and 2 are unknown, BOS and EOS, 3 to 258 the bytes; pieces with scores follow.

    Encoding puts a space in front, takes the token of each character (its bytes if it has none), then merges.
    """

    FIRST_BYTE, FIRST_PIECE = 3, 259

    def __init__(self, pieces: list[bytes], scores: list[float]) -> None:
        # Backwards, so that of equal pieces the first wins. Control tokens and bytes cannot be written out in text.
        ids = {pieces[token]: token for token in range(len(pieces) - 1, self.FIRST_PIECE - 1, -1)}
        super().__init__(pieces, scores, ids, bos_id=1, eos_id=2, strip=Strip.ONE)
        self._partition = Partition(AddedToken(text, token, True) for text, token in self.special_tokens.items())

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {"<s>": 1, "</s>": 2}

    def _encode(self, text: str, trusted: bytes) -> list[int]:
        ids: list[int] = []
        for part in self._partition.split(text, trusted):
            ids += [part] if isinstance(part, int) else self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in f" {text}":
            data = character.encode()
            token = self._ids.get(data)
            ids += [token] if token is not None else [byte + self.FIRST_BYTE for byte in data]
        self._merge([self._pieces[token] for token in ids], ids)
        return [token for token in ids if token != MERGED]

    def _byte_token(self, byte: int) -> int:
        return byte + self.FIRST_BYTE

    def vocabulary(self) -> Vocabulary:
        types = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL, *[PieceType.BYTE] * 256]
        types += [PieceType.NORMAL] * (self.vocab_size - len(types))
        pieces = [self._read_piece(token).encode() for token in range(self.FIRST_PIECE)]
        pieces += [piece.replace(b" ", SPACE.encode()) for piece in self._pieces[self.FIRST_PIECE :]]
        return Vocabulary(pieces, self._scores, types, bos_id=1, eos_id=2, unknown_id=0)

    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]:
        if token == 0:
            return TokenKind.UNKNOWN, UNKNOWN_TEXT
        if token < self.FIRST_BYTE:
            return TokenKind.CONTROL, b""
        if token < self.FIRST_PIECE:
            return TokenKind.BYTE, bytes([token - self.FIRST_BYTE])
        return TokenKind.TEXT, self._pieces[token]

    def _read_piece(self, token: int) -> str:
        # The file writes a line break around "<s>" and "</s>", for llama2.c's printing.
        piece = self._pieces[token].strip(b"\n") if token < self.FIRST_BYTE else self._pieces[token]
        return piece.decode(errors="replace").replace(" ", SPACE)


def read_llama2c(file: MappedFile) -> Llama2cTokenizer:
    """Read a `tokenizer.bin`: int32 length of the longest piece, then for each token float32 score, int32 length and
    that many bytes, exactly to the end of the file.

    Raises `FormatError` with the byte offset for anything else.
    """

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
