"""The small files beside a model in a Hugging Face directory that concern text, such as `tokenizer_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...files import map_file
from ...tokenizers.huggingface import TokenSettings

MAX_SETTINGS = 1 << 24
"""Maximum size of one of these files in bytes."""


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
        """BOS and EOS, and whether encoding adds them."""
        return TokenSettings(
            bos=self.token("bos_token"),
            eos=self.token("eos_token"),
            add_bos=self.flag("add_bos_token"),
            add_eos=self.flag("add_eos_token"),
        )

    def token(self, name: str) -> str | None:
        """The text of "bos_token", "eos_token", …, from tokenizer_config.json, else special_tokens_map.json."""
        for table in (self.tokenizer_config, self._special_tokens_map):
            value = table.get(name)
            if isinstance(value, Mapping):  # an AddedToken written out
                value = value.get("content")
            if isinstance(value, str):
                return value
        return None

    @cached_property
    def _special_tokens_map(self) -> Mapping[str, Any]:
        return self._read("special_tokens_map.json")

    def flag(self, name: str) -> bool | None:
        """A key of tokenizer_config.json that is true, false or missing."""
        value = self.tokenizer_config.get(name)
        if not isinstance(value, bool | None):
            raise self._fault("tokenizer_config.json", name, "true or false", value)
        return value

    @cached_property
    def chat_template(self) -> str | None:
        """From `chat_template.jinja`, otherwise from tokenizer_config.json: of several templates the one named
        "default".
        """
        if (path := self.directory / "chat_template.jinja").is_file():
            try:
                return _data(path).decode()
            except UnicodeDecodeError as error:
                raise FormatError("not UTF-8", path=path, where=error.start) from None
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, Sequence) and not isinstance(template, str):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
            template = named.get("default")
        if not isinstance(template, str | None):
            raise self._fault("tokenizer_config.json", "chat_template", "a template", template)
        return template

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
