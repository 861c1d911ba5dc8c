"""The tokenizer that GGUF calls "llama": sentencepiece's BPE, from pieces, scores and types.

Why not the sentencepiece library, with a `ModelProto` built from these: it agrees on every line of
tests/golden/lines.py, but not if there are user-defined pieces. It does not start a new text after such a piece, so
4,562 of 5,000 lines with one get other ids than llama.cpp's. It also refuses vocabularies with an empty piece or with
two pieces of the same text. It takes longer to load (32,000 pieces: 56 ms and 37 ms of import, against 26 ms).

To merge a text as a whole would take 10 times as long as the library. Almost every vocabulary has ▁ at the beginning of
its pieces only, so no merge reaches over the end of a word: then words are merged one at a time, and kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property

from ..errors import Error
from .base import BYTE_PIECE, SPACE, UNKNOWN_TEXT, PieceType, Strip, TokenKind, Vocabulary
from .partition import AddedToken, Partition
from .scored import MERGED, NO_TOKEN, ScoredTokenizer

_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_SPACE_INSIDE = re.compile(f"[^{SPACE}]{SPACE}")
LONG = 1 << 16
"""Characters of a text of which the words are found one at a time."""
MOST_WORDS, LONGEST_WORD = 1 << 15, 32
"""How many words are kept, and of how many tokens at most: some 6 MB, 15 if a client sends the longest."""


class GgufTokenizer(ScoredTokenizer):
    """Ids are sentencepiece's for the model that the vocabulary came from, if that model neither normalises text nor
    has user-defined pieces.

    User-defined pieces are cut out of a text first, the longest first. The parts between them are encoded as separate
    texts, each with a space in front, as llama.cpp does and as such models were trained. White space after a token of
    `rstrip` belongs to it. A user-defined piece with ▁ is also merged from spaces, as in llama.cpp.
    """

    def __init__(self, vocabulary: Vocabulary, rstrip: Collection[int] = ()) -> None:
        v = self._vocabulary = vocabulary
        reserved = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.BYTE)
        ids = {piece: token for token, piece in enumerate(v.pieces) if v.types[token] not in reserved}
        strip = Strip.ONE if v.add_space_prefix else Strip.NONE
        super().__init__(v.pieces, v.scores, ids, v.bos_id, v.eos_id, strip)
        self.add_bos, self.add_eos = v.add_bos, v.add_eos
        self._words: dict[str, list[int]] = {}
        self._byte_ids = {
            int(match[1], 16): token
            for token, kind in enumerate(v.types)
            if kind == PieceType.BYTE and (match := BYTE_PIECE.fullmatch(v.pieces[token]))
        }
        control = (PieceType.CONTROL, PieceType.UNKNOWN)
        self._partition = Partition(
            AddedToken(v.pieces[token].decode(errors="replace"), token, kind in control, rstrip=token in rstrip)
            for token, kind in enumerate(v.types)
            if kind in control or kind == PieceType.USER_DEFINED
        )

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:  # type: ignore[override]
        kinds = (PieceType.CONTROL, PieceType.UNKNOWN)
        controls = (token for token, kind in enumerate(self._vocabulary.types) if kind in kinds)
        return {text: token for token in controls if (text := self._pieces[token].decode(errors="replace"))}

    def _encode(self, text: str, trusted: bytes) -> list[int]:
        ids: list[int] = []
        for part in self._partition.split(text, trusted):
            ids += [part] if isinstance(part, int) else self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        text = (SPACE if self._vocabulary.add_space_prefix else "") + text.replace(" ", SPACE)
        if not self._words_are_separate:
            return self._without_runs(self._encode_word(text))
        known, ids = self._words, list[int]()
        # a list of all words of 8 MB takes a second, in which no other thread runs
        for word in _WORD.findall(text) if len(text) < LONG else (match[0] for match in _WORD.finditer(text)):
            found = known.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(found) <= LONGEST_WORD:
                    if len(known) >= MOST_WORDS:
                        known.clear()
                    known[word] = found
            ids += found
        return self._without_runs(ids)

    @cached_property
    def _words_are_separate(self) -> bool:
        """Whether no merge reaches over the end of a word. Unused pieces are taken apart as the text's last pair says,
        wherever that is, so a vocabulary with such is merged as a whole."""
        if PieceType.UNUSED in self._vocabulary.types:
            return False
        return not any(_SPACE_INSIDE.search(piece.decode(errors="replace")) for piece in self._ids)

    def _encode_word(self, text: str) -> list[int]:
        """Ids of a text in which merges may reach from one end to the other."""
        symbols = [character.encode() for character in text]
        ids = [self._ids.get(symbol, NO_TOKEN) for symbol in symbols]
        pairs = self._merge(symbols, ids)
        # A stack, from the right. Unused pieces take part in merges but are taken apart again at the end.
        stack = [symbol for symbol, token in zip(symbols, ids, strict=True) if token != MERGED]
        backwards: list[int] = []
        while stack:
            symbol = stack.pop()
            token = self._ids.get(symbol)
            if token is not None and self._vocabulary.types[token] != PieceType.UNUSED:
                backwards.append(token)
            elif symbol in pairs:
                stack += pairs[symbol]
            else:
                backwards += reversed(self._byte_fallback(symbol))
        return backwards[::-1]

    def _without_runs(self, ids: list[int]) -> list[int]:
        """The ids, in which a run of unknown characters is one token."""
        unknown = self._vocabulary.unknown_id
        if unknown is None or unknown not in ids:
            return ids
        return [token for at, token in enumerate(ids) if token != unknown or not at or ids[at - 1] != unknown]

    def _byte_fallback(self, symbol: bytes) -> list[int]:
        """The byte tokens of a character that is not a piece; the unknown token if there are no byte tokens."""
        if all(byte in self._byte_ids for byte in symbol):
            return [self._byte_ids[byte] for byte in symbol]
        if (unknown := self._vocabulary.unknown_id) is None:
            raise Error(f"the vocabulary has no token for {symbol.decode(errors='replace')!r}, nor for unknown text")
        return [unknown]

    def _byte_token(self, byte: int) -> int | None:
        return self._byte_ids.get(byte)

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
