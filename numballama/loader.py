"""Open a model file: recognise its format by content, hand over to that format's reader, and fit a tokenizer to it."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from . import hub
from .checkpoint import Checkpoint
from .errors import Error, FormatError, UnsupportedError
from .files import MappedFile, expand_user, map_file
from .formats import safetensors
from .formats.gguf import reader as gguf
from .formats.gguf.header import MAGIC as GGUF_MAGIC
from .formats.hf import reader as hf
from .formats.hf.text_files import read_text_files
from .formats.llama2c import kuiper, llama2c
from .formats.meta import reader as meta
from .formats.meta import torch_zip as torchfile
from .formats.tokenizer_files import load_tokenizer
from .tokenizers.base import Tokenizer

SUPPORTED = (
    "llama2.c v0, v1 and v2, KuiperLLama fp32 and int8, GGUF, directories of Hugging Face (safetensors) and of Meta "
    "(consolidated.*.pth)"
)

# Long enough that no llama2.c v0 header begins so: its first four bytes are the model's dim.
_FOREIGN = {
    b"\x80\x02}q": "a pickle",
    b"\x80\x04\x95": "a pickle",
    b"\x89HDF": "an HDF5 file",
}
_PADDING = 8, 512  # a vocabulary is padded to a multiple of at least the first, by less than the second


STORY_MODEL = Path(__file__).with_name("story.gguf")
"""The model inside this package: short stories in 5.5 million parameters, made by training/ of this project."""


def open_checkpoint(
    path: str | PathLike[str] | None,
    tokenizer: str | PathLike[str] | None = None,
    *,
    rope_pairing: str | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
) -> Checkpoint:
    """Open the model file at `path`, with the tokenizer whose path is given, else the file's own; no weight is read.

    Without a path it is the story model of this package. A directory is a Hugging Face model, and so is a hub id
    "owner/name", which is downloaded unless a file or directory has that name.
    `rope_pairing` ("interleaved" or "half"), `rope_theta` and `norm_eps` override what the file says or leaves out;
    what then still is assumed stands in `Checkpoint.notes`. Raises `FormatError` for damaged files, `UnsupportedError`
    for formats that are known but not read yet, and `Error` when a file cannot be opened, an override makes no sense
    or the tokenizer belongs to a model of another vocabulary.
    """
    opened = _read(STORY_MODEL if path is None else path, tokenizer is None)
    given = {"rope_pairing": rope_pairing, "rope_theta": rope_theta, "norm_eps": norm_eps}
    opened.config = opened.config.with_overrides(rope_pairing, rope_theta, norm_eps)
    opened.assumed = tuple(name for name in opened.assumed if given[name] is None)
    if opened.assumed:
        values = ", ".join(f"{name}={getattr(opened.config, name)!r}" for name in opened.assumed)
        opened.notes.append(f"{opened.format} files do not say {values}: assumed")
    if tokenizer is not None:
        tokenizer = hub.local(tokenizer, hub.TEXT)
        opened.tokenizer = load_tokenizer(tokenizer)
        if os.path.isdir(expand_user(tokenizer)):  # what else it says of text serves a model that says nothing
            found = read_text_files(tokenizer, load_tokenizer=False)
            opened.chat_template = opened.chat_template or found.chat_template
            opened.stop_token_ids = opened.stop_token_ids or found.stop_token_ids
    if opened.tokenizer is not None:
        _require_fit(opened, opened.tokenizer, tokenizer)
    return opened


open = open_checkpoint
"""`loader.open`, the short name."""


def _read(path: str | PathLike[str], load_tokenizer: bool) -> Checkpoint:
    path = hub.local(path)
    directory = expand_user(path)
    if os.path.isdir(directory):
        if hf.is_directory_of(directory):
            return hf.read(directory, load_tokenizer)
        if meta.is_directory_of(directory):
            return meta.read(directory, load_tokenizer)
        raise FormatError(f"is a directory without a model; supported are {SUPPORTED}", path=path)
    file = map_file(path)
    if file.data[: len(llama2c.MAGIC)] == llama2c.MAGIC:
        return llama2c.read(file)
    if file.data[: len(GGUF_MAGIC)] == GGUF_MAGIC:
        return gguf.read(file, load_tokenizer)
    if safetensors.looks_like(file):
        return hf.read(file.path.parent, load_tokenizer, file)
    if file.data[:4] == torchfile.MAGIC or file.data[: len(torchfile.LEGACY)] == torchfile.LEGACY:
        return meta.read_file(file, load_tokenizer)
    if foreign := _foreign(file):
        raise UnsupportedError(f"{path}: {foreign}, which is not read yet; supported are {SUPPORTED}")
    return kuiper.read(file)


def _foreign(file: MappedFile) -> str | None:
    """What the file is, if its first bytes are those of a known format that is not read."""
    head = file.data[:9]
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            return kind
    return None


def _require_fit(opened: Checkpoint, tokenizer: Tokenizer, path: str | PathLike[str] | None) -> None:
    """Raise `Error` unless the model's vocabulary is the tokenizer's, as it is or padded for the hardware's sake.

    `path` is the tokenizer's; None means that the model's file holds it, so that it may be padded in any way.
    """
    model, own = opened.config.vocab_size, tokenizer.vocab_size
    if model == own:
        return
    if path is None and own > model:
        raise FormatError(
            "more tokens than embeddings", path=opened.path, expected=f"at most {model:,} tokens", found=f"{own:,}"
        )
    multiple, most = _PADDING
    if path is not None and (model % multiple or not own < model < own + most):
        raise Error(
            f"{path}: a tokenizer of {own:,} tokens does not belong to a model of {model:,}; "
            f"give the one that {opened.path} was made with"
        )
    opened.notes.append(f"the last {model - own} of the model's {model:,} tokens are padding, unknown to the tokenizer")
