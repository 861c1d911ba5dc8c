"""sentencepiece's `.model` files; the sentencepiece library encodes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..files import MappedFile
from .base import BYTE_PIECE, MAX_VOCAB, SPACE, PieceType, Strip, Tokenizer, TokenKind, Vocabulary
from .partition import AddedToken, Partition
from .sentencepiece_proto import message_fields

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer on top of the library's processor."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        bos, eos = (token if token >= 0 else None for token in (model.bos_id(), model.eos_id()))
        super().__init__(model.vocab_size(), bos, eos, _observe_strip(model))
        self._model = model
        # All pieces now (5 ms for 32,000): one with invalid UTF-8 must fail here, not in the middle of a stream.
        self._pieces: list[str] = model.id_to_piece(list(range(self.vocab_size)))
        self._unknown = model.decode([model.unk_id()]).encode()

    @cached_property
    def _partition(self) -> Partition:
        return Partition(AddedToken(text, token, True) for text, token in self.special_tokens.items())

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:  # type: ignore[override]
        return {piece: token for token, piece in enumerate(self._pieces) if piece and self._model.is_control(token)}

    def _encode(self, text: str, trusted: bytes) -> list[int]:
        ids: list[int] = []
        for part in self._partition.split(text, trusted):
            ids += [part] if isinstance(part, int) else self._model.encode(part)
        return ids

    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]:
        if self._model.is_control(token):
            return TokenKind.CONTROL, b""
        if self._model.is_unknown(token):
            return TokenKind.UNKNOWN, self._unknown
        piece = self._pieces[token]
        if self._model.is_byte(token) and (match := BYTE_PIECE.fullmatch(piece.encode())):
            return TokenKind.BYTE, bytes([int(match[1], 16)])
        return TokenKind.TEXT, piece.replace(SPACE, " ").encode()

    def _read_piece(self, token: int) -> str:
        return self._pieces[token]

    def vocabulary(self) -> Vocabulary:
        pieces: list[bytes] = []
        scores: list[float] = []
        types: list[int] = []
        specs: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
        for number, value in message_fields(self._model.serialized_model_proto()):
            if number == _PIECE:
                entry: dict[int, Any] = dict(message_fields(value))
                kind, piece = entry.get(3, PieceType.NORMAL), entry.get(1, b"")
                pieces.append(piece.replace(SPACE.encode(), b" ") if kind == PieceType.USER_DEFINED else piece)
                scores.append(entry.get(2, 0.0))
                types.append(kind)
            elif number in specs:
                specs[number] |= message_fields(value)
        trainer, normalizer = specs[_TRAINER], specs[_NORMALIZER]
        if trainer.get(3, 1) != 2:
            raise UnsupportedError("a sentencepiece model whose model_type is not BPE cannot be expressed")
        if trainer.get(24, 0) or not normalizer.get(5, 1):
            raise UnsupportedError(
                "a sentencepiece model that puts spaces after words, or drops them, cannot be expressed"
            )
        notes = []
        if normalizer.get(2) or normalizer.get(4, 1):
            notes.append(
                "the sentencepiece model normalises its text (Unicode forms, repeated spaces), which GGUF does not: "
                "ids differ on text that is not normalised"
            )
        bos, eos, unknown = self.bos_id, self.eos_id, self._model.unk_id()
        prefix = bool(normalizer.get(3, 1))
        return Vocabulary(pieces, scores, types, bos, eos, unknown, add_space_prefix=prefix, notes=tuple(notes))


# Fields of sentencepiece's ModelProto. Piece: 1 text, 2 score, 3 type. TrainerSpec: 3 model_type (2 is BPE),
# 24 treat_whitespace_as_suffix. NormalizerSpec: 2 precompiled_charsmap, 3 add_dummy_prefix,
# 4 remove_extra_whitespaces, 5 escape_whitespaces (3 to 5 are true by default).
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3


def _observe_strip(model: SentencePieceProcessor) -> Strip:
    """Which leading spaces the library removes when it decodes. Its Python interface does not say, so try."""
    space = model.piece_to_id(SPACE)
    if model.is_unknown(space):
        return Strip.ONE
    left = len(model.decode([space, space]))
    return {0: Strip.ALL, 1: Strip.ONE}.get(left, Strip.NONE)


def read_sentencepiece(file: MappedFile) -> SentencePieceTokenizer | None:
    """The sentencepiece model in the file; None when the library does not accept it."""
    if file.data[0] != 0x0A:  # the tag of the first piece: rejects other files before the library is imported
        return None
    from sentencepiece import SentencePieceProcessor  # 0.03 s to import

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(file.data[:])
        return SentencePieceTokenizer(model) if 0 < model.vocab_size() <= MAX_VOCAB else None
    except (RuntimeError, ValueError, IndexError):
        return None
