"""What Hugging Face keeps of a tokenizer: `tokenizer.json`, and beside it the files that say how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UnsupportedError
from ..files import MappedFile, map_file
from .base import MAX_VOCAB, Strip, Tokenizer
from .bpe import BPETokenizer, faults

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

MAX_TOKENIZER, MAX_SETTINGS = 1 << 27, 1 << 24
"""Bytes of a tokenizer.json (the largest known has 33 million), and of one of the small files beside it."""


class Settings:
    """The small files of a Hugging Face directory, as far as they concern text. Each may be missing.

    Raises `FormatError`, naming file and key, for what cannot be read or has the wrong type.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        return self._read("tokenizer_config.json")

    def token(self, name: str) -> str | None:
        """The spelling of "bos_token", "eos_token", …; tokenizer_config.json goes before special_tokens_map.json."""
        for found in (self.tokenizer_config, self._special_tokens_map):
            value = found.get(name)
            if isinstance(value, Mapping):  # an AddedToken written out
                value = value.get("content")
            if isinstance(value, str):
                return value
        return None

    @cached_property
    def _special_tokens_map(self) -> Mapping[str, Any]:
        return self._read("special_tokens_map.json")

    def flag(self, name: str) -> bool | None:
        """True, false or not said, in tokenizer_config.json."""
        value = self.tokenizer_config.get(name)
        if not isinstance(value, bool | None):
            raise self._fault("tokenizer_config.json", name, "true or false", value)
        return value

    @cached_property
    def chat_template(self) -> str | None:
        """`chat_template.jinja`, else tokenizer_config.json's; of several templates the one named "default"."""
        if (path := self.directory / "chat_template.jinja").is_file():
            try:
                return _data(path).decode()
            except UnicodeDecodeError as error:
                raise FormatError("not UTF-8", path=path, where=error.start) from None
        found = self.tokenizer_config.get("chat_template")
        if isinstance(found, Sequence) and not isinstance(found, str):
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
            found = named.get("default")
        if not isinstance(found, str | None):
            raise self._fault("tokenizer_config.json", "chat_template", "a template", found)
        return found

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, of `generation_config.json`, else of `config.json`."""
        for name in ("generation_config.json", "config.json"):
            found = self._read(name).get("eos_token_id")
            ids = found if isinstance(found, list) else [] if found is None else [found]
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
                raise self._fault(name, "eos_token_id", "a token id or several", found)
            if ids:
                return tuple(token for token in ids if token >= 0)
        return ()

    def _read(self, name: str) -> Mapping[str, Any]:
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            found = json.loads(_data(path))
        except (ValueError, RecursionError) as error:
            raise FormatError("not JSON", path=path, found=error) from None
        if not isinstance(found, dict):
            raise FormatError("not a JSON object", path=path, expected="{…}", found=type(found).__name__)
        return found

    def _fault(self, name: str, key: str, expected: str, found: object) -> FormatError:
        path = self.directory / name
        return FormatError("bad value", path=path, where=f"key {key}", expected=expected, found=repr(found)[:200])


def _data(path: Path) -> bytes:
    file = map_file(path)
    if file.size > MAX_SETTINGS:
        raise FormatError("too large", path=path, expected=f"at most {MAX_SETTINGS:,} bytes", found=f"{file.size:,}")
    return file.data[:]


def text_files(tokenizer: Tokenizer, chat_template: str | None, context: int) -> dict[str, str]:
    """File name → content of what a Hugging Face directory holds of a tokenizer, for a model of `context` tokens.

    Raises `UnsupportedError` for any but BPE, which alone can be told in merges.
    """
    if not isinstance(tokenizer, BPETokenizer):
        raise UnsupportedError(f"a {type(tokenizer).__name__} has no merges, which a tokenizer.json must have")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is not None:
            settings[name] = tokenizer.piece(token)
    if chat_template is not None:
        settings["chat_template"] = chat_template
    config = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": config}


def read_json(file: MappedFile) -> BPETokenizer:
    """The BPE of a `tokenizer.json`, with what the files beside it say of BOS and EOS.

    Raises `FormatError` for damaged files, `UnsupportedError` for models other than BPE.
    """
    if file.size > MAX_TOKENIZER:
        raise FormatError(
            "too large", path=file.path, expected=f"at most {MAX_TOKENIZER:,} bytes", found=f"{file.size:,}"
        )
    from tokenizers import Tokenizer as Library  # 0.03 s to import
    from tokenizers import models

    with faults("not a tokenizer.json", file.path):
        library = Library.from_buffer(file.data[:])
        library.no_truncation()
        library.no_padding()
        spellings: dict[str, int] = library.get_vocab(with_added_tokens=True)
        decoder = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {}
    if not isinstance(library.model, models.BPE):
        raise UnsupportedError(f"{file.path}: a {type(library.model).__name__} model; supported is BPE")
    size = max(spellings.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB:
        raise FormatError("bad vocabulary", path=file.path, expected=f"1 to {MAX_VOCAB:,} tokens", found=f"{size:,}")
    pieces: list[str | None] = [None] * size
    for piece, token in spellings.items():
        pieces[token] = piece
    listed = library.get_added_tokens_decoder()
    added = {entry.content: token for token, entry in listed.items()}
    rules = _rules(library, Settings(file.path.parent), added | spellings, file.path)
    special = frozenset(token for token, entry in listed.items() if entry.special)
    special |= {token for token in (rules.bos, rules.eos) if token is not None}
    strip, byte_level = _decoding(decoder, file.path)
    return BPETokenizer(
        lambda: library, pieces, added, special, rules.bos, rules.eos, rules.add_bos, rules.add_eos, strip, byte_level
    )


@dataclass(frozen=True)
class _Rules:
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool


def _rules(library: Library, settings: Settings, ids: Mapping[str, int], path: Path) -> _Rules:
    """What stands before and after a text: tokenizer_config.json's word, else what the post-processor does."""
    bos, eos = (ids.get(settings.token(f"{name}_token") or "") for name in ("bos", "eos"))
    with faults("a tokenizer.json whose post-processor fails", path):
        encoded = library.encode("a")
    mask = list(encoded.special_tokens_mask)
    inner = mask.index(0) if 0 in mask else len(mask)
    before = list(encoded.ids[:inner])
    after = list(encoded.ids[len(mask) - mask[::-1].index(0) :]) if 0 in mask else []
    add_bos, add_eos = settings.flag("add_bos_token"), settings.flag("add_eos_token")
    if add_bos is None and add_eos is None:
        bos = before[0] if bos is None and len(before) == 1 else bos
        eos = after[0] if eos is None and len(after) == 1 else eos
        if before not in ([], [bos]) or after not in ([], [eos]):
            raise UnsupportedError(
                f"{path}: its post-processor puts ids {before} before a text and {after} behind it; "
                f"supported are BOS ({bos}) and EOS ({eos})"
            )
        add_bos, add_eos = bool(before), bool(after)
    return _Rules(bos, eos, bool(add_bos) and bos is not None, bool(add_eos) and eos is not None)


def _decoding(decoder: Mapping[str, Any], path: Path) -> tuple[Strip, bool]:
    """Which leading spaces decoding takes away, and whether pieces spell bytes as GPT-2 does."""
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = {part.get("type"): part for part in parts}
    if "ByteLevel" in kinds:
        return Strip.NONE, True
    if "Metaspace" in kinds:
        never = kinds["Metaspace"].get("prepend_scheme") == "never"
        return Strip.NONE if never else Strip.ONE, False
    if "ByteFallback" in kinds:
        strip = kinds.get("Strip", {})
        return Strip.ONE if strip.get("content") == " " and strip.get("start") else Strip.NONE, False
    raise UnsupportedError(
        f"{path}: decoder {decoder.get('type')!r}; supported are ByteLevel, ByteFallback and Metaspace"
    )
