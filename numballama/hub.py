"""Models named by their id on the Hugging Face hub, "owner/name": downloads them into the hub library's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from .errors import Error

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (".bin", ".gguf", ".safetensors", ".pth", ".pt", ".model", ".json")

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a tokenizer and of its settings."""

MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES)
"""Files that `formats.hf` reads. The rest of a repository (other formats, pictures) is not downloaded."""


def is_id(name: str) -> bool:
    """Whether `name` can be a hub id: two words with one slash between them, without the suffix of a model file."""
    return bool(_ID.fullmatch(name)) and ".." not in name and not name.lower().endswith(_FILES)


def resolve(path: str | PathLike[str], patterns: Sequence[str] = MODEL_FILES) -> str | PathLike[str]:
    """`path` itself, or the directory of the downloaded files if it is a hub id and nothing local has that name."""
    if isinstance(path, str) and is_id(path) and not os.path.exists(path):
        return download(path, patterns)
    return path


def download(name: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Download the files of model `name` that match `patterns`, unless they are in the hub's cache; returns their
    directory.

    Raises `Error` when the library is missing or the files cannot be downloaded. The message says what to download and
    where to put it.
    """
    by_hand = (
        f"or download config.json, generation_config.json, {', '.join(MODEL_FILES[:2])} and the tokenizer's files from "
        f"https://huggingface.co/{name} into a directory, and give its path"
    )
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise Error(
            f"{name}: no such file or directory, and a model of the hub needs huggingface_hub: "
            f"pip install 'numballama[hub]'; {by_hand}"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0))
        reason = {401: "it needs a login (hf auth login)", 403: "its licence must be accepted there first"}.get(status)
        reason = reason or ("there is no such model" if status == 404 else f"the hub answers {status}")
        raise Error(f"{name}: no such file or directory, and on the hub {reason}; {by_hand}") from error
    except Exception as error:  # the hub library, its HTTP library and the system raise many classes
        offline = "the hub is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        raise Error(
            f"{name}: no such file or directory, and {offline}; on a machine that reaches it, run "
            f"'hf download {name}' and copy its folder into {constants.HF_HUB_CACHE}; {by_hand}"
        ) from error
