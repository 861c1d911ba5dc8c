"""Reads and writes the files of a Hugging Face directory that concern text: tokenizer, chat template, stop ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ...errors import Error, UnsupportedError
from ...files import expand_user
from ...tokenizers.base import Tokenizer
from ...tokenizers.bpe import BPETokenizer
from .. import tokenizer_files
from .text_settings import NAMED_TEMPLATES, TextSettings

DEFAULT_TEMPLATE = "chat_template.jinja"
"""File of the chat template named "default"."""


@dataclass(frozen=True)
class TextFiles:
    """Tokenizer, chat template and stop ids of a directory. `Checkpoint` has fields of the same names."""

    tokenizer: Tokenizer | None
    chat_templates: Mapping[str, str]
    template_tokens: Mapping[str, str]
    stop_token_ids: tuple[int, ...]
    """Ids that end a text, from generation_config.json, else config.json. The tokenizer's EOS is not among them unless
    a file lists it."""
    notes: tuple[str, ...]
    tokenizer_error: str = ""

    @property
    def chat_template(self) -> str | None:
        """The template named "default"."""
        return self.chat_templates.get("default")


def read_text_files(directory: str | PathLike[str], load_tokenizer: bool = True) -> TextFiles:
    """Read tokenizer, chat template and stop ids of a directory; each may be missing.

    `load_tokenizer` False leaves the tokenizer out. An unsupported tokenizer is left out with a note. Raises
    `FormatError` for damaged files, `Error` when the directory does not exist.
    """
    folder = expand_user(directory)
    if not folder.is_dir():
        raise Error(f"{directory}: no such directory")
    settings, tokenizer, error = TextSettings(folder), None, ""
    if load_tokenizer and tokenizer_files.has_tokenizer(folder):
        try:
            tokenizer = tokenizer_files.load_tokenizer(folder)
        except UnsupportedError as unsupported:
            error = str(unsupported)
    notes = (f"its tokenizer is left out: {error}",) if error else ()
    templates, tokens = settings.chat_templates, settings.template_tokens
    return TextFiles(tokenizer, templates, tokens, settings.stop_token_ids, notes, error)


def tokenizer_texts(
    tokenizer: Tokenizer, chat_template: str | None, context: int, named: Mapping[str, str] | None = None
) -> dict[str, str]:
    """File name → content of the files that describe a tokenizer; `context` is the model's, in tokens.

    `named` are special tokens besides BOS and EOS, "pad_token" → text. Those that are no control tokens are left out:
    a token that has a name becomes one, and would no longer be printed.
    Raises `UnsupportedError` for tokenizers other than BPE, because a `tokenizer.json` needs merges.
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
    settings |= {name: text for name, text in (named or {}).items() if text in tokenizer.special_tokens}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    config = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": config}


def template_texts(templates: Mapping[str, str]) -> dict[str, str]:
    """Path in the directory → content of the files that hold chat templates, given as name → template.

    Names become names of files, so the caller must not give any that lead elsewhere.
    """
    return {
        DEFAULT_TEMPLATE if name == "default" else f"{NAMED_TEMPLATES}/{name}.jinja": text
        for name, text in templates.items()
    }
