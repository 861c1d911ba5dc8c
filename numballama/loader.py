"""Opens model files: recognises the format by content, calls its reader, and checks that the tokenizer fits."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path

from . import hub
from .checkpoint import Checkpoint
from .config import RopePairing
from .errors import Error, FormatError, UnsupportedError
from .files import MappedFile, expand_user, map_file, require_target, require_targets, unfinished
from .formats import safetensors
from .formats.gguf import reader as gguf
from .formats.gguf import split
from .formats.gguf.header import MAGIC as GGUF_MAGIC
from .formats.hf import reader as hf
from .formats.hf import weight_files
from .formats.hf.text_files import read_text_files
from .formats.llama2c import kuiper, llama2c
from .formats.meta import reader as meta
from .formats.meta import torch_zip
from .formats.tokenizer_files import load_tokenizer
from .tokenizers.base import Tokenizer

SUPPORTED = (
    "llama2.c v0, v1 and v2, KuiperLLama fp32 and int8, GGUF, directories of Hugging Face (safetensors or "
    "pytorch_model.bin) and of Meta (consolidated.*.pth)"
)

_UNSUPPORTED_MAGICS = {
    b"\x80\x02}q": "a pickle",
    b"\x80\x04\x95": "a pickle",
    b"\x89HDF": "an HDF5 file",
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), "llama.cpp's format from before GGUF (convert the model again)"),
    b"algg": "a LoRA adapter of llama.cpp from before GGUF",
    b"\x93NUMPY": "an array of NumPy",
    b"\x1f\x8b\x08": "a gzip archive (unpack it)",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive (unpack it)",
    b"\xfd7zXZ\0": "an xz archive (unpack it)",
    b"BZh": "a bzip2 archive (unpack it)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it)",
    b"Rar!\x1a\x07": "a RAR archive (unpack it)",
}
"""First bytes → type of file. None of them is a plausible header of llama2.c v0, which begins with dim."""

_PIECE = re.compile(
    r"(?P<whole>.+\.(gguf|safetensors|bin))([.-]part[-_]?\d+(of\d+)?|[.-](split|part)-[a-z]+|\.\d{3})", re.I
)
"""Names of pieces of a file that was cut anywhere, as large ones are for an upload."""
_CONTENTS = {".gguf": "GGUF", ".safetensors": "a length and a directory that begins with {"}
"""Suffix that promises a format → how its files begin."""

_TAR, _TAR_AT = b"ustar", 257
"""Magic of a tar archive, and where it is."""
_TEXT_BYTES, _LEAST_TEXT_BYTES = 64, 8
"""Bytes at the beginning of a file by which a text is recognised, and the least of a text that ends in no newline."""
_PADDING_MULTIPLE, _MAX_PADDING = 8, 512
"""A vocabulary may be padded to a multiple of `_PADDING_MULTIPLE`, by fewer tokens than `_MAX_PADDING`."""
_MAX_BEYOND = 1 / 8
"""A tokenizer may have this share of tokens more than the embedding has rows, and one."""
_MAX_ADDED = 256
"""A tokenizer that is given beside the model has fewer tokens more than this: added ones."""

STORY_MODEL = Path(__file__).with_name("story.gguf")
"""The model inside this package: short stories, 5.5 million parameters, made by training/ of this project."""


def open_checkpoint(
    path: str | PathLike[str] | None,
    tokenizer: str | PathLike[str] | None = None,
    *,
    rope_pairing: RopePairing | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
    with_tokenizer: bool = True,
) -> Checkpoint:
    """Open the model at `path` with its own tokenizer, or with the one at `tokenizer`. No weight is read yet.

    Without `with_tokenizer` the model's own is not read: for a caller that wants weights only.

    `path` is a file, a directory of Hugging Face or Meta, or a model of the hub ("owner/name", "owner/name:Q4_K_M" or
    "owner/name/file.gguf"), which is downloaded unless a file or directory has that name; None is the story model of
    this package. `rope_pairing` ("interleaved" or "half"),
    `rope_theta` and `norm_eps` override the file. Defaults that are used for them are listed in `Checkpoint.notes`.

    Raises `FormatError` for damaged files, `UnsupportedError` for known formats that are not read, and `Error` when a
    file cannot be opened, an override is invalid, or the tokenizer belongs to a model with another vocabulary.
    """
    notes: list[str] = []
    found = STORY_MODEL if path is None else hub.locate(path, notes)
    opened = _read(found, load_tokenizer=tokenizer is None and with_tokenizer)
    opened.notes[:0] = notes
    overrides = {"rope_pairing": rope_pairing, "rope_theta": rope_theta, "norm_eps": norm_eps}
    opened.config = opened.config.with_overrides(rope_pairing, rope_theta, norm_eps)
    opened.defaulted_fields = tuple(name for name in opened.defaulted_fields if overrides[name] is None)
    if opened.defaulted_fields:
        values = ", ".join(f"{name}={getattr(opened.config, name)!r}" for name in opened.defaulted_fields)
        opened.notes.append(f"{opened.format} files do not say {values}: assumed")
    if tokenizer is not None:
        tokenizer = hub.resolve(tokenizer, hub.TOKENIZER_FILES)
        opened.tokenizer, opened.tokenizer_path = load_tokenizer(tokenizer), os.path.abspath(expand_user(tokenizer))
        if os.path.isdir(expand_user(tokenizer)):  # its chat template and stop tokens serve a model without any
            texts = read_text_files(tokenizer, load_tokenizer=False)
            opened.chat_templates = opened.chat_templates or texts.chat_templates
            opened.template_tokens = opened.template_tokens or texts.template_tokens
            opened.stop_token_ids = opened.stop_token_ids or texts.stop_token_ids
    if opened.tokenizer is not None:
        _require_fit(opened, opened.tokenizer, tokenizer)
        opened.tokenizer.limit(opened.config.vocab_size)
        opened.notes += opened.tokenizer.notes
    return opened


open = open_checkpoint
"""Short name for callers: `loader.open`."""


def _read(path: str | PathLike[str], load_tokenizer: bool) -> Checkpoint:
    directory = expand_user(path)
    if os.path.isdir(directory):
        return _read_directory(directory, path, load_tokenizer)
    if not os.path.exists(directory):
        require_target(directory)
        raise Error(
            f"{path}: no such file; a model is a file, a directory, or a name on the Hugging Face hub: owner/name"
        )
    file = map_file(path)
    try:
        return _read_file(file, load_tokenizer)
    except FormatError:
        if (piece := _PIECE.fullmatch(file.path.name)) is None:
            raise
    raise FormatError(
        f"a piece of {piece['whole']}, which was cut",
        path=path,
        expected=f"the whole file: join all pieces in their order, with cat, to {piece['whole']}",
    )


def _read_file(file: MappedFile, load_tokenizer: bool) -> Checkpoint:
    if file.data[: len(llama2c.MAGIC)] == llama2c.MAGIC:
        return llama2c.read(file)
    if file.data[: len(GGUF_MAGIC)] == GGUF_MAGIC:
        return gguf.read(file, load_tokenizer)
    if safetensors.looks_like(file):
        return hf.read(file.path.parent, load_tokenizer, file)
    if torch_zip.looks_like(file):
        folder = file.path.parent
        if (folder / hf.CONFIG).exists() and not (folder / meta.PARAMS).exists():
            return hf.read(folder, load_tokenizer, file)
        return meta.read_file(file, load_tokenizer)
    if file.path.suffix == ".json" and weight_files.has_weights(file.path.parent):
        raise FormatError(
            "a file beside the weights of a model", path=file.path, expected=f"its directory, {file.path.parent}"
        )
    if kind := _unsupported_kind(file):
        raise UnsupportedError(f"{file.path}: {kind}, which is not read; supported are {SUPPORTED}")
    if expected := _CONTENTS.get(file.path.suffix.lower()):
        head = file.data[:_TEXT_BYTES]
        raise FormatError(
            f"not a {file.path.suffix[1:].lower()} file",
            path=file.path,
            where=0,
            expected=expected,
            found=head[:8] if any(head) else "zeros: was a download interrupted?",
        )
    return kuiper.read(file)


def _read_directory(directory: Path, path: str | PathLike[str], load_tokenizer: bool) -> Checkpoint:
    """Weights of Hugging Face first, then Meta's, then the only GGUF of the directory, split or not."""
    require_targets(directory, (*hub.MODEL_FILES, meta.PARAMS, "consolidated.*.pth", "*.gguf"))
    if weight_files.has_weights(directory):
        return hf.read(directory, load_tokenizer)
    if meta.is_directory_of(directory):
        return meta.read(directory, load_tokenizer)
    files = [directory / name for name in weight_files.visible(directory, ".gguf")]
    if models := split.first_parts(files):
        models = [file for file in models if not any(word in file.name.lower() for word in hub.NO_MODEL)] or models
        if len(models) == 1:
            return gguf.read(map_file(models[0]), load_tokenizer)
        names = ", ".join(file.name for file in models[:8])
        raise FormatError(f"a directory of {len(models)} GGUF models; give the path of one: {names}", path=path)
    if hf.is_directory_of(directory):
        return hf.read(directory, load_tokenizer)
    if copies := sorted(directory.glob("snapshots/*/")) or (
        directory.name == "snapshots" and sorted(directory.glob("*/"))
    ):
        raise FormatError(
            "is a folder of the hub's cache; give the model's name, owner/name, or the folder of a copy",
            path=path,
            expected=", ".join(map(str, copies[:3])),
        )
    if found := unfinished(directory):
        raise FormatError("is a directory without a model", path=path, found=found)
    raise FormatError(f"is a directory without a model; supported are {SUPPORTED}", path=path)


def _unsupported_kind(file: MappedFile) -> str | None:
    """Name of a known format that is not supported; None for other files."""
    head = file.data[:_TEXT_BYTES]
    for magic, kind in _UNSUPPORTED_MAGICS.items():
        if head.startswith(magic):
            return kind
    if file.data[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        return "a tar archive (unpack it)"
    return "a text file" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    """Whether a file that begins like this is UTF-8 text. A header has zeros; a magic alone may be letters."""
    if len(head) < _LEAST_TEXT_BYTES and not head.endswith(b"\n"):
        return False
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # otherwise a character that was cut
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character in "\t\r\n\ufeff" for character in text)


def _require_fit(opened: Checkpoint, tokenizer: Tokenizer, path: str | PathLike[str] | None) -> None:
    """Raise `Error` unless the tokenizer has the model's vocabulary, or one of them has a few tokens more.

    `path` is the tokenizer's; None means that it comes from the model's own files, so that any padding is accepted.
    Tokens beyond the embedding are accepted with a note. Such an id is never sampled, and a prompt that has one is an
    error.
    """
    embeddings, tokens = opened.config.vocab_size, tokenizer.vocab_size
    if embeddings == tokens:
        return
    few = 0 < tokens - embeddings <= 1 + embeddings * _MAX_BEYOND
    if tokens > embeddings and (path is None or (few and tokens - embeddings < _MAX_ADDED)):
        if not few:
            raise FormatError(
                "more tokens than embeddings",
                path=opened.path,
                expected=f"at most {embeddings:,} tokens",
                found=f"{tokens:,}",
            )
        first, last = (repr(tokenizer.piece(token)) for token in (embeddings, tokens - 1))
        which = first if tokens == embeddings + 1 else f"{first} to {last}"
        opened.notes.append(
            f"the tokenizer has {tokens:,} tokens, the embedding {embeddings:,} rows: {which} cannot be used"
        )
        opened.stop_token_ids = tuple(token for token in opened.stop_token_ids if token < embeddings)
        return
    padded = embeddings % _PADDING_MULTIPLE == 0 and tokens < embeddings < tokens + _MAX_PADDING
    if path is not None and not padded:
        raise Error(
            f"{path}: a tokenizer of {tokens:,} tokens does not belong to a model of {embeddings:,}; "
            f"give the one that {opened.path} was made with"
        )
    opened.notes.append(
        f"the last {embeddings - tokens} of the model's {embeddings:,} tokens are padding, unknown to the tokenizer"
    )
