"""Models by their name on the Hugging Face hub, "owner/name": what they need, in the cache of the hub's own library."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from .errors import Error

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (".bin", ".gguf", ".safetensors", ".pth", ".pt", ".model", ".json")

TEXT = (
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
"""Files that a tokenizer is read from, with what stands beside it."""

WANTED = ("model*.safetensors", "model.safetensors.index.json", *TEXT)
"""Files that `formats.hf` and the tokenizers read; the rest of a repository (other formats, pictures) stays there."""


def is_id(name: str) -> bool:
    """Whether `name` can be a hub id: two words with one slash, and not a file of a kind that is opened by its path."""
    return bool(_ID.fullmatch(name)) and ".." not in name and not name.lower().endswith(_FILES)


def local(path: str | PathLike[str], wanted: Sequence[str] = WANTED) -> str | PathLike[str]:
    """`path` itself, or, if it is a hub id and no file or directory has that name, the directory with its files."""
    if isinstance(path, str) and is_id(path) and not os.path.exists(path):
        return download(path, wanted)
    return path


def download(name: str, wanted: Sequence[str] = WANTED) -> Path:
    """The directory in the hub's cache that holds the `wanted` files of model `name`, downloaded if they are not there.

    Raises `Error` when the library is missing or the files cannot be had: it says what to download and where to put
    it.
    """
    by_hand = (
        f"or download config.json, generation_config.json, {', '.join(WANTED[:2])} and the tokenizer's files from "
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
        return Path(snapshot_download(name, allow_patterns=list(wanted)))
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0))
        reason = {401: "it needs a login (hf auth login)", 403: "its licence must be accepted there first"}.get(status)
        reason = reason or ("there is no such model" if status == 404 else f"the hub answers {status}")
        raise Error(f"{name}: no such file or directory, and on the hub {reason}; {by_hand}") from error
    except Exception as error:  # the library's own, its HTTP library's and the system's: no files, whatever it is
        offline = "the hub is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        raise Error(
            f"{name}: no such file or directory, and {offline}; on a machine that reaches it, run "
            f"'hf download {name}' and copy its folder into {constants.HF_HUB_CACHE}; {by_hand}"
        ) from error
