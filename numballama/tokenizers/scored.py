"""Vocabularies of pieces with scores, as llama2.c's `.bin` and GGUF's "llama" hold them, and encoding with them."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from ..errors import Error, FormatError
from ..files import MappedFile
from ..formats.gguf.header import Header
from .base import BYTE_PIECE, MAX_VOCAB, SPACE, UNKNOWN_TEXT, PieceType, Strip, Tokenizer, TokenKind, Vocabulary

_NO_TOKEN, _MERGED = -1, -2


class ScoredTokenizer(Tokenizer):
    """Encodes by merging: again and again the adjacent pair whose joint piece scores best becomes one symbol, the
    leftmost of equals.

    `ids` maps the pieces that may arise so to their ids.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        scores: Sequence[float],
        ids: Mapping[bytes, int],
        bos_id: int | None,
        eos_id: int | None,
        strip: Strip,
    ) -> None:
        super().__init__(len(pieces), bos_id, eos_id, strip)
        self._pieces, self._scores, self._ids = pieces, scores, ids

    def _merge(self, symbols: list[bytes], ids: list[int]) -> dict[bytes, tuple[bytes, bytes]]:
        """Merge pairs of `symbols` by score, in place, with a heap: O(n log n).

        `ids` holds each symbol's id, or _NO_TOKEN; what has gone into the symbol before it becomes _MERGED. Returns
        the pair that each new symbol was last found to be.

        Not the tokenizers library: its BPE ranks merges instead of their results, so that "▁▁"+"▁" and "▁"+"▁▁"
        cannot tie, and it splits long runs of spaces otherwise than llama2.c; and it takes 0.1 s to load 32,000
        pieces with all their splits, against 0.02 s here.
        """
        scores, known, n = self._scores, self._ids, len(ids)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # a linked list; n ends it
        pairs: dict[bytes, tuple[bytes, bytes]] = {}

        def candidate(left: int) -> tuple[float, int, int, bytes, bytes, int] | None:
            right = after[left]
            if right == n:
                return None
            a, b = symbols[left], symbols[right]
            merged = known.get(a + b)
            if merged is None or not scores[merged] > -1e10:  # llama2.c starts its search for the best there
                return None
            pairs[a + b] = a, b
            return -scores[merged], left, right, a, b, merged

        heap = [found for left in range(n) if (found := candidate(left))]
        heapq.heapify(heap)
        while heap:
            _, left, right, a, b, merged = heapq.heappop(heap)
            if ids[left] == _MERGED or ids[right] == _MERGED or symbols[left] != a or symbols[right] != b:
                continue  # an earlier merge took one of the two
            symbols[left], ids[left], ids[right] = a + b, merged, _MERGED
            after[left] = following = after[right]
            if following < n:
                before[following] = left
            for start in (before[left], left):
                if start >= 0 and (found := candidate(start)):
                    heapq.heappush(heap, found)
        return pairs


class Llama2cTokenizer(ScoredTokenizer):
    """llama2.c's `tokenizer.bin`: ids 0, 1, 2 are unknown, BOS and EOS, 3 to 258 the bytes, then pieces with scores.

    Encoding is llama2.c's: a space in front, a token for each character (its bytes if it has none), then merges.
    """

    FIRST_BYTE, FIRST_PIECE = 3, 259

    def __init__(self, pieces: list[bytes], scores: list[float]) -> None:
        # Backwards, so that of equal pieces the first wins. Control tokens and bytes cannot be spelled out in text.
        ids = {pieces[token]: token for token in range(len(pieces) - 1, self.FIRST_PIECE - 1, -1)}
        super().__init__(pieces, scores, ids, bos_id=1, eos_id=2, strip=Strip.ONE)

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
        self._merge([self._pieces[token] for token in ids], ids)
        return [token for token in ids if token != _MERGED]

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


class GgufTokenizer(ScoredTokenizer):
    """A GGUF file's tokenizer "llama": sentencepiece's BPE from pieces, scores and types.

    Ids are sentencepiece's for the model that the vocabulary came from, if that neither normalises text nor defines
    pieces of the user's own. Those are cut out of a text before all else, the longest first, and what remains is
    encoded as texts of their own, each with its space in front: so does llama.cpp, and so are such models trained.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        v = self._vocabulary = vocabulary
        reserved = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.BYTE)
        ids = {piece: token for token, piece in enumerate(v.pieces) if v.types[token] not in reserved}
        strip = Strip.ONE if v.add_space_prefix else Strip.NONE
        super().__init__(v.pieces, v.scores, ids, v.bos_id, v.eos_id, strip)
        self.add_bos, self.add_eos = v.add_bos, v.add_eos
        self._bytes = {
            int(match[1], 16): token
            for token, kind in enumerate(v.types)
            if kind == PieceType.BYTE and (match := BYTE_PIECE.fullmatch(v.pieces[token]))
        }
        own = (token for token, kind in enumerate(v.types) if kind == PieceType.USER_DEFINED and v.pieces[token])
        self._own = [(v.pieces[t].decode(errors="replace"), t) for t in sorted(own, key=lambda t: -len(v.pieces[t]))]

    @cached_property
    def _controls(self) -> dict[str, int]:
        controls = (token for token, kind in enumerate(self._vocabulary.types) if kind == PieceType.CONTROL)
        return {spelling: token for token in controls if (spelling := self._pieces[token].decode(errors="replace"))}

    def _encode_text(self, text: str) -> list[int]:
        parts: list[str | int] = [text]
        for spelling, token in self._own:
            if spelling in text:
                parts = [piece for part in parts for piece in _cut(part, spelling, token)]
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        if not text:
            return []
        prefix = SPACE if self._vocabulary.add_space_prefix else ""
        symbols = [character.encode() for character in prefix + text.replace(" ", SPACE)]
        ids = [self._ids.get(symbol, _NO_TOKEN) for symbol in symbols]
        pairs = self._merge(symbols, ids)
        # From the right, as a stack. Unused pieces help to make others, but are taken apart again in the end.
        rest = [symbol for symbol, token in zip(symbols, ids, strict=True) if token != _MERGED]
        backwards: list[int] = []
        while rest:
            symbol = rest.pop()
            token = self._ids.get(symbol)
            if token is not None and self._vocabulary.types[token] != PieceType.UNUSED:
                backwards.append(token)
            elif symbol in pairs:
                rest += pairs[symbol]
            else:
                backwards += reversed(self._spell(symbol))
        unknown = self._vocabulary.unknown_id
        found: list[int] = []
        for token in reversed(backwards):
            if token != unknown or not found or found[-1] != unknown:  # a run of unknown characters is one token
                found.append(token)
        return found

    def _spell(self, symbol: bytes) -> list[int]:
        """The byte tokens of a character that is no piece, or the token for what is unknown."""
        if all(byte in self._bytes for byte in symbol):
            return [self._bytes[byte] for byte in symbol]
        if (unknown := self._vocabulary.unknown_id) is None:
            raise Error(f"the vocabulary has no token for {symbol.decode(errors='replace')!r}, nor for unknown text")
        return [unknown]

    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]:
        kind, piece = self._vocabulary.types[token], self._pieces[token]
        if kind == PieceType.CONTROL:
            return TokenKind.CONTROL, b""
        if kind == PieceType.UNKNOWN:
            return TokenKind.UNKNOWN, UNKNOWN_TEXT
        if kind == PieceType.BYTE and (match := BYTE_PIECE.fullmatch(piece)):
            return TokenKind.BYTE, bytes([int(match[1], 16)])
        return TokenKind.TEXT, piece if kind == PieceType.USER_DEFINED else piece.replace(SPACE.encode(), b" ")

    def _read_piece(self, token: int) -> str:
        return self._pieces[token].decode(errors="replace")

    def vocabulary(self) -> Vocabulary:
        return self._vocabulary


def _cut(part: str | int, spelling: str, token: int) -> Iterable[str | int]:
    """The part, with `token` for each occurrence of its spelling."""
    if isinstance(part, int):
        return [part]
    texts = part.split(spelling)
    return [piece for text in texts for piece in (text, token)][:-1]


def read_llama2c(file: MappedFile) -> Llama2cTokenizer:
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


def scored_from_gguf(header: Header) -> GgufTokenizer:
    """The tokenizer "llama" in a GGUF file's metadata.

    What the keys leave out is as in llama.cpp: ids 0, 1 and 2 are unknown, BOS and EOS; a text gets a BOS and a space
    in front. Raises `FormatError` for damaged metadata.
    """

    def fault(name: str, expected: str, found: object) -> FormatError:
        where = f"metadata key tokenizer.ggml.{name}"
        return FormatError("bad vocabulary", path=header.path, where=where, expected=expected, found=found)

    pieces = header.strings("tokenizer.ggml.tokens") or []
    if not 0 < len(pieces) <= MAX_VOCAB:
        raise fault("tokens", f"1 to {MAX_VOCAB:,} pieces", f"{len(pieces):,}")
    lists: dict[str, list[float]] = {}
    for name in ("scores", "token_type"):
        if (numbers := header.numbers(f"tokenizer.ggml.{name}")) is not None:
            if len(numbers) != len(pieces):
                raise fault(name, f"{len(pieces):,} numbers", f"{len(numbers):,}")
            lists[name] = numbers.tolist()
    if "scores" not in lists:
        raise fault("scores", "a score for each piece", "none")

    def special(name: str, default: int) -> int | None:
        found = header.integer(f"tokenizer.ggml.{name}_token_id", default)
        return found if found is not None and 0 <= found < len(pieces) else None  # files say -1 for "none"

    bos, eos, unknown = special("bos", 1), special("eos", 2), special("unknown", 0)
    types = [int(kind) for kind in lists.get("token_type", [])]
    if not types:
        types = [PieceType.BYTE if BYTE_PIECE.fullmatch(piece) else PieceType.NORMAL for piece in pieces]
        if unknown is not None:
            types[unknown] = PieceType.UNKNOWN
    for token in (bos, eos):  # whatever their type: a text never contains them
        if token is not None:
            types[token] = PieceType.CONTROL
    return GgufTokenizer(
        Vocabulary(
            pieces,
            lists["scores"],
            types,
            bos,
            eos,
            unknown,
            add_bos=header.flag("tokenizer.ggml.add_bos_token") is not False,
            add_eos=header.flag("tokenizer.ggml.add_eos_token") is True,
            add_space_prefix=header.flag("tokenizer.ggml.add_space_prefix") is not False,
        )
    )
