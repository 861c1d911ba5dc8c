"""The small files beside a model in a Hugging Face directory that concern text, such as `tokenizer_config.json`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...files import map_file
from ...tokenizers.base import MAX_VOCAB
from ...tokenizers.huggingface import AddedTokenSetting, TokenSettings

MAX_SETTINGS = 1 << 24
"""Maximum size of one of these files in bytes."""


NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates with names, NAME.jinja."""

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


_MORE = ("extra_special_tokens", "model_specific_special_tokens")
"""Keys whose value may be an object of special tokens by name."""


def _by_name(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a file, and those of the objects in it that name special tokens."""
    inner = (table.get(key) for key in _MORE)
    return {**{name: value for each in inner if isinstance(each, Mapping) for name, value in each.items()}, **table}


def _token_text(value: object) -> str | None:
    """The text of a token: a string, or an AddedToken written out."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) and value else None


class TextSettings:
    """Settings in a directory's small files. Each file may be missing, and is read on first use.

    Raises `FormatError`, naming file and key, for a file that cannot be read and a value of the wrong type.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        return self._read("tokenizer_config.json")

    @cached_property
    def tokens(self) -> TokenSettings:
        """What concerns the tokenizer."""
        name = self.tokenizer_config.get("tokenizer_class") or self._read("config.json").get("tokenizer_class")
        kind = self._read("config.json").get("model_type")
        special = tuple(dict.fromkeys(self._special_texts()))
        return TokenSettings(
            bos=self.token("bos_token"),
            eos=self.token("eos_token"),
            special=special,
            added=self._added_tokens(special),
            add_bos=self.flag("add_bos_token"),
            add_eos=self.flag("add_eos_token"),
            add_prefix_space=self.flag("add_prefix_space"),
            legacy=self.flag("legacy"),
            tokenizer_class=name.removesuffix("Fast") if isinstance(name, str) else None,
            model_type=kind if isinstance(kind, str) else None,
        )

    def token(self, name: str) -> str | None:
        """The text of "bos_token", "eos_token", …, from tokenizer_config.json and special_tokens_map.json.

        As in transformers 5, special_tokens_map.json comes first, unless tokenizer_config.json has the key
        added_tokens_decoder.
        """
        tables = [self.tokenizer_config, self._special_tokens_map]
        if "added_tokens_decoder" not in self.tokenizer_config:
            tables.reverse()
        for table in tables:
            if (text := _token_text(_by_name(table).get(name))) is not None:
                return text
        return None

    @cached_property
    def _special_tokens_map(self) -> Mapping[str, Any]:
        return self._read("special_tokens_map.json")

    def _special_texts(self) -> Iterator[str]:
        """Texts of all special tokens that have a name, and of those in lists of more."""
        for name in (*_NAMES, *(key for key in self.tokenizer_config if key.endswith("_token"))):
            if (text := self.token(name)) is not None:
                yield text
        for table in (self.tokenizer_config, self._special_tokens_map):
            for name in ("additional_special_tokens", *_MORE):
                more = table.get(name)
                values = list(more.values()) if isinstance(more, Mapping) else more if isinstance(more, list) else []
                yield from (text for value in values if (text := _token_text(value)) is not None)

    def _added_tokens(self, special: Collection[str]) -> tuple[AddedTokenSetting, ...]:
        """Tokens of added_tokens_decoder in tokenizer_config.json, else of added_tokens.json, by id."""
        file, key = "tokenizer_config.json", "added_tokens_decoder"
        found: list[AddedTokenSetting] = []
        if isinstance(table := self.tokenizer_config.get(key), Mapping):
            for name, entry in table.items():
                entry = {"content": entry} if isinstance(entry, str) else entry
                text = _token_text(entry)
                if not name.isdecimal() or len(name) > 7 or int(name) >= MAX_VOCAB or text is None:
                    raise self._fault(file, key, "ids of tokens with their content", {name: entry})
                flags = {flag: entry.get(flag, False) is True for flag in _FLAGS}
                found.append(AddedTokenSetting(text, int(name), **flags))
        else:
            file, key = "added_tokens.json", ""
            for text, token in self._read(file).items():
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MAX_VOCAB:
                    raise self._fault(file, text[:100], "a token id", token)
                found.append(AddedTokenSetting(text, token, text in special, normalized=text not in special))
        return tuple(sorted(found, key=lambda token: token.token))

    def flag(self, name: str) -> bool | None:
        """A key of tokenizer_config.json that is true, false or missing."""
        value = self.tokenizer_config.get(name)
        if not isinstance(value, bool | None):
            raise self._fault("tokenizer_config.json", name, "true or false", value)
        return value

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """Name → chat template; "default" is the usual one.

        From `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else from tokenizer_config.json, else
        from `chat_template.json`. The first of these that has any is taken, as transformers does.
        """
        files = {path.stem: path for path in self.named_template_files}
        if (path := self.directory / "chat_template.jinja").is_file():
            files.setdefault("default", path)
        if found := {name: _text(path) for name, path in files.items() if path.stat().st_size}:
            return found
        for name in ("tokenizer_config.json", "chat_template.json"):
            if found := self._named_templates(name, self._read(name).get("chat_template")):
                return found
        return {}

    @property
    def named_template_files(self) -> list[Path]:
        """The files of chat templates with names."""
        return sorted((self.directory / NAMED_TEMPLATES).glob("*.jinja"))

    def _named_templates(self, file: str, value: object) -> dict[str, str]:
        """A value of the key "chat_template": a template, or several with their names."""
        if not value and value in (None, "", []):
            return {}
        if isinstance(value, str):
            return {"default": value}
        items: list[Any] = list(value.items()) if isinstance(value, Mapping) else []
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            items = [(item.get("name"), item.get("template")) for item in value]
        if not items or not all(isinstance(part, str) for item in items for part in item):
            raise self._fault(file, "chat_template", "a template, or a list of names and templates", value)
        return dict(items)

    @cached_property
    def template_tokens(self) -> Mapping[str, str]:
        """The special tokens that templates see as variables: "bos_token", "pad_token" … → text of the token.

        As transformers' `special_tokens_map`: every key that ends in "_token" and has a text, also those of
        `extra_special_tokens` and `model_specific_special_tokens`.
        """
        found: dict[str, str] = {}
        for table in (self._special_tokens_map, self.tokenizer_config):
            for name in _by_name(table):
                if name.endswith("_token") and (text := self.token(name)) is not None:
                    found[name] = text
        return found

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, from `generation_config.json`, otherwise from `config.json`."""
        for name in ("generation_config.json", "config.json"):
            value = self._read(name).get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
                raise self._fault(name, "eos_token_id", "a token id or several", value)
            if ids:
                return tuple(token for token in ids if token >= 0)
        return ()

    def _read(self, name: str) -> Mapping[str, Any]:
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(_data(path))
        except (ValueError, RecursionError) as error:
            raise FormatError("not JSON", path=path, found=error) from None
        if not isinstance(value, dict):
            raise FormatError("not a JSON object", path=path, expected="{…}", found=type(value).__name__)
        return value

    def _fault(self, name: str, key: str, expected: str, found: object) -> FormatError:
        path = self.directory / name
        return FormatError("bad value", path=path, where=f"key {key}", expected=expected, found=repr(found)[:200])


def _data(path: Path) -> bytes:
    file = map_file(path)
    if file.size > MAX_SETTINGS:
        raise FormatError("too large", path=path, expected=f"at most {MAX_SETTINGS:,} bytes", found=f"{file.size:,}")
    return file.data[:]


def _text(path: Path) -> str:
    try:
        return _data(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", path=path, where=error.start) from None
