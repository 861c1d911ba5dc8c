"""sentencepiece's `.model` files; the sentencepiece library encodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..files import MappedFile
from .base import BYTE_PIECE, MAX_VOCAB, SPACE, PieceType, Strip, Tokenizer, TokenKind, Vocabulary
from .eog import EOG_NAMES, not_eog
from .partition import AddedToken, Partition
from .sentencepiece_proto import known_fields, message_bytes, message_fields

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer on top of the library's processor, with `added` tokens that the model does not have.

    Text between added and control tokens is encoded by the library: each part as a new text (`legacy`, as llama.cpp
    and sentencepiece itself do), or without the space in front that the model adds to a text, except for the first.
    """

    def __init__(
        self,
        model: SentencePieceProcessor,
        added: Sequence[AddedToken] = (),
        eos_id: int | None = None,
        legacy: bool = True,
    ) -> None:
        bos, eos = (token if token >= 0 else None for token in (model.bos_id(), model.eos_id()))
        size = max([model.vocab_size(), *(entry.token + 1 for entry in added)])
        super().__init__(size, bos, eos if eos_id is None else eos_id, _observe_strip(model))
        self._model, self._legacy = model, legacy
        # All pieces now (5 ms for 32,000): one with invalid UTF-8 must fail here, not in the middle of a stream.
        self._pieces: list[str] = model.id_to_piece(list(range(model.vocab_size())))
        self._pieces += [""] * (size - len(self._pieces))
        self._added = {entry.token: entry for entry in added}
        for entry in added:
            self._pieces[entry.token] = entry.text
        self._unknown = model.decode([model.unk_id()]).encode()

    @cached_property
    def _partition(self) -> Partition:
        controls = (
            AddedToken(text, token, True) for text, token in self.special_tokens.items() if token not in self._added
        )
        return Partition([*controls, *self._added.values()])

    @cached_property
    def _continuing(self) -> SentencePieceProcessor:
        """The model, but without a space in front of a text."""
        return changed_model(self._model.serialized_model_proto(), add_dummy_prefix=False)

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:  # type: ignore[override]
        found = {
            piece: token for token, piece in enumerate(self._pieces) if piece and self._kind(token) is TokenKind.CONTROL
        }
        unknown = self._model.unk_id()
        return found | {self._pieces[unknown]: unknown}

    def _kind(self, token: int) -> TokenKind | None:
        """CONTROL for a control token, TEXT for another added one, None for a piece of the model that is neither."""
        if (entry := self._added.get(token)) is not None:
            return TokenKind.CONTROL if entry.control else TokenKind.TEXT
        if token >= self._model.vocab_size() or self._model.is_control(token):
            return TokenKind.CONTROL
        return None

    def _encode(self, text: str, trusted: bytes) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._partition.split(text, trusted)):
            if isinstance(part, int):
                ids.append(part)
            else:
                model = self._model if self._legacy or number == 0 else self._continuing
                ids += model.encode(part)
        return ids

    def _byte_token(self, byte: int) -> int | None:
        token: int = self._model.piece_to_id(f"<0x{byte:02X}>")
        return token if self._model.is_byte(token) else None

    def _read_entry(self, token: int) -> tuple[TokenKind, bytes]:
        piece = self._pieces[token]
        if (kind := self._kind(token)) is not None:
            return kind, b"" if kind is TokenKind.CONTROL else piece.replace(SPACE, " ").encode()
        if self._model.is_unknown(token):
            return TokenKind.UNKNOWN, self._unknown
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
        for number, value in known_fields(self._model.serialized_model_proto(), dict.fromkeys(_FIELDS, bytes)):
            if number == _PIECE:
                entry: dict[int, Any] = dict(known_fields(value, _FIELDS[number]))
                kind, piece = entry.get(3, PieceType.NORMAL), entry.get(1, b"")
                pieces.append(piece.replace(SPACE.encode(), b" ") if kind == PieceType.USER_DEFINED else piece)
                scores.append(entry.get(2, 0.0))
                types.append(kind)
            else:
                specs[number] |= known_fields(value, _FIELDS[number])
        for token in range(len(pieces), self.vocab_size):
            pieces.append(self._pieces[token].encode() or f"[PAD{token}]".encode())
            scores.append(0.0)
            types.append(PieceType.UNUSED)
        for token, known in self._added.items():
            pieces[token] = known.text.encode()
            types[token] = PieceType.CONTROL if known.control else PieceType.USER_DEFINED
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
        return Vocabulary(
            pieces, scores, types, bos, eos, unknown, self.add_bos, self.add_eos, prefix, notes=tuple(notes)
        )


# Fields of sentencepiece's ModelProto. Piece: 1 text, 2 score, 3 type. TrainerSpec: 3 model_type (2 is BPE),
# 24 treat_whitespace_as_suffix. NormalizerSpec: 2 precompiled_charsmap, 3 add_dummy_prefix,
# 4 remove_extra_whitespaces, 5 escape_whitespaces (3 to 5 are true by default).
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_FIELDS: dict[int, dict[int, type]] = {
    _PIECE: {1: bytes, 2: float, 3: int},
    _TRAINER: {3: int, 24: int},
    _NORMALIZER: {2: bytes, 3: int, 4: int, 5: int},
}
"""Message → number of a field that is read → its type."""


def _observe_strip(model: SentencePieceProcessor) -> Strip:
    """Which leading spaces the library removes when it decodes. Its Python interface does not say, so try."""
    space = model.piece_to_id(SPACE)
    if model.is_unknown(space):
        return Strip.ONE
    left = len(model.decode([space, space]))
    return {0: Strip.ALL, 1: Strip.ONE}.get(left, Strip.NONE)


def read_sentencepiece(
    file: MappedFile,
    added: Sequence[AddedToken] = (),
    eos: str | None = None,
    legacy: bool = True,
    add_prefix_space: bool | None = None,
) -> SentencePieceTokenizer | None:
    """The sentencepiece model in the file; None when the library does not accept it.

    `added` are tokens that other files add, `eos` is the text of EOS if it is not the model's, `legacy` as in
    `SentencePieceTokenizer`, `add_prefix_space` replaces the model's add_dummy_prefix. Pieces with a name of
    `EOG_NAMES` become control tokens.
    """
    if file.data[0] != 0x0A:  # the tag of the first piece: rejects other files before the library is imported
        return None
    from sentencepiece import SentencePieceProcessor  # 0.03 s to import

    model, data = SentencePieceProcessor(), file.data[:]
    try:
        model.LoadFromSerializedProto(data)
        if not 0 < model.vocab_size() <= MAX_VOCAB:
            return None
        names = {name: token for name in EOG_NAMES if not model.is_unknown(token := model.piece_to_id(name))}
        marked = [token for name, token in names.items() if name not in not_eog(names)]
        if add_prefix_space is not None or not all(map(model.is_control, marked)):
            model = changed_model(data, marked, add_prefix_space)
        entries = {entry.text: entry for entry in added}
        end = entries[eos].token if eos in entries else model.piece_to_id(eos) if eos is not None else None
        if end is not None and end < model.vocab_size() and model.is_unknown(end):
            end = None
        return SentencePieceTokenizer(model, added, end, legacy)
    except (RuntimeError, ValueError, IndexError):
        return None


def changed_model(
    data: bytes, control: Collection[int] = (), add_dummy_prefix: bool | None = None
) -> SentencePieceProcessor:
    """The model with another setting, and with the pieces of the ids `control` as control tokens."""
    from sentencepiece import SentencePieceProcessor

    fields: list[tuple[int, int | float | bytes]] = []
    token = 0
    for number, value in message_fields(data):
        if number == _PIECE and isinstance(value, bytes):
            if token in control:
                value = message_bytes(
                    [*(pair for pair in message_fields(value) if pair[0] != 3), (3, PieceType.CONTROL)]
                )
            token += 1
        elif number == _NORMALIZER and isinstance(value, bytes) and add_dummy_prefix is not None:
            kept = [pair for pair in message_fields(value) if pair[0] != 3]
            value = message_bytes([*kept, (3, int(add_dummy_prefix))])
        fields.append((number, value))
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(message_bytes(fields))
    return model
