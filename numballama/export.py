"""From any reader to any writer that can hold the model: `numballama export`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from . import loader, progress
from .checkpoint import Checkpoint, Weight
from .errors import UnsupportedError
from .files import expand_user
from .formats.gguf.writer import write_gguf
from .formats.hf.writer import write_safetensors
from .formats.llama2c.kuiper import write_fp32, write_int8
from .formats.llama2c.reader import write_v0, write_v1, write_v2
from .memory import format_bytes
from .quantization import policy
from .quantization.convert import DEFAULT_GROUP, relative_error
from .quantization.types import BLOCKS, F32, WeightType
from .tokenizers.base import Tokenizer
from .tokenizers.bpe import BPETokenizer
from .tokenizers.huggingface import text_files

WRITERS: dict[str, Callable[..., list[str]]] = {
    "llama2c-v0": write_v0,
    "llama2c-v1": write_v1,
    "llama2c-v2": write_v2,
    "kuiper": write_fp32,
    "kuiper-int8": write_int8,
    "gguf": write_gguf,
    "safetensors": write_safetensors,
}
"""Name → `write(path, config, weights)`. The int8 formats also take `group_size`, GGUF a `tokenizer` and more.
safetensors writes a directory. Each returns notes on what the format cannot hold."""

FLOAT_ONLY = ("llama2c-v0", "llama2c-v1", "kuiper")
INT8_ONLY = ("llama2c-v2", "kuiper-int8")
QUANTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FLOAT_ONLY, ("f32",)),
    **dict.fromkeys(INT8_ONLY, ("int8",)),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0"),
    "safetensors": ("f32", "f16", "bf16"),
}
"""Format → the types that `quantize` may be. GGUF also holds its other block types, as they come."""

_GROUPS = (64, 32, 16, 8, 4)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_COMPANIONS = (
    *_TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Row:
    """A matrix that was written: its types before and after, its bytes, and how far its numbers moved: the root of
    the mean squared error over that of the mean square. 0.0 is exact."""

    name: str
    before: WeightType
    after: WeightType
    nbytes: int
    error: float


@dataclass(frozen=True)
class Exported:
    """What an export did; prints as a table."""

    path: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        changed = [row for row in self.rows if row.before != row.after]
        width = max([len(row.name) for row in changed] + [6])
        lines = [f"{'tensor':{width}}  {'from':8} {'to':8} {'bytes':>13}  relative RMS error"] if changed else []
        for row in changed:
            error = f"{row.error:.2e}" if row.error else "0"
            lines.append(f"{row.name:{width}}  {row.before!s:8} {row.after!s:8} {row.nbytes:13,}  {error:>18}")
        kept = len(self.rows) - len(changed)
        size = format_bytes(sum(row.nbytes for row in self.rows))
        total = f"{len(changed)} matrices converted, {kept} as they were, {size}"
        return "\n".join([*lines, f"{self.path}: {total}"])


def export_model(
    source: str | PathLike[str] | None,
    path: str | PathLike[str],
    to: str,
    quantize: str | None = None,
    tokenizer: str | PathLike[str] | None = None,
    rope_pairing: str | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
) -> Exported:
    """Write the model at `source` (None: the story model) to `path` in format `to`, a name of `WRITERS`.

    `quantize` is one of `QUANTS[to]`; None keeps the types of the source where the format can hold them. The target is
    there whole or not at all. Matrices are converted one at a time, as they are written. Raises `UnsupportedError` for
    what the format cannot hold, `FormatError` for a damaged source, `Error` for arguments that make no sense.
    """
    if to not in WRITERS:
        raise UnsupportedError(f"unknown format {to!r}; there are {', '.join(WRITERS)}")
    if quantize is not None and quantize not in QUANTS[to]:
        raise UnsupportedError(f"{to} cannot hold {quantize!r}; it holds {', '.join(QUANTS[to])}")
    opened = loader.open_checkpoint(
        source, tokenizer, rope_pairing=rope_pairing, rope_theta=rope_theta, norm_eps=norm_eps
    )
    notes = list(opened.notes)
    name = Path(opened.path if source is None else source)  # a hub id's own name, not that of a folder in a cache
    options = _options(opened, to, name.stem if opened.path.is_file() else name.name, tokenizer, notes)
    types = _types(opened, to, quantize, options)
    matrices = [name for name, weight in opened.weights.items() if len(weight.shape) == 2]
    rows: dict[str, Row] = {}
    with progress.progress_bar(f"writing {to}") as report:

        def done(name: str, before: Weight, after: Weight) -> None:
            error = 0.0 if before.type == after.type else relative_error(before, after)
            rows[name] = Row(name, before.type, after.type, after.nbytes, error)
            report(name, len(rows), len(matrices))

        weights = policy.Converting(opened.weights, types, done)
        notes += WRITERS[to](path, opened.config, weights, **options)
    return Exported(expand_user(path), tuple(rows[name] for name in matrices if name in rows), tuple(notes))


def _types(opened: Checkpoint, to: str, quantize: str | None, options: dict[str, Any]) -> dict[str, WeightType]:
    """Name → type of the matrices that change."""
    if to in FLOAT_ONLY:
        return {name: F32 for name, weight in opened.weights.items() if len(weight.shape) == 2}
    if to in INT8_ONLY:
        kept = ("tok_embeddings",) if to == "kuiper-int8" else ()
        kind = WeightType("int8", options["group_size"])
        return {n: F32 if n in kept else kind for n, weight in opened.weights.items() if len(weight.shape) == 2}
    if quantize is None:
        held = (*QUANTS[to], *(BLOCKS if to == "gguf" else ()))
        if unknown := [w.type for w in opened.weights.values() if w.type.name not in held]:
            raise UnsupportedError(
                f"{to} cannot hold weights of type {unknown[0]}: choose one of {', '.join(QUANTS[to])}"
            )
    return policy.types_to_convert(opened.config, opened.weights, quantize, embeddings=True)


def _options(
    opened: Checkpoint, to: str, name: str, tokenizer: str | PathLike[str] | None, notes: list[str]
) -> dict[str, Any]:
    """What the writer takes beside config and weights."""
    own = opened.tokenizer
    if to == "gguf":
        options: dict[str, Any] = {"name": name, "chat_template": opened.chat_template}
        if own is not None:
            try:
                own.vocabulary()
            except UnsupportedError as error:
                notes.append(f"the tokenizer is left out: {error}")
                own = None
        enders = [token for token in opened.stop_token_ids if own is not None and token != own.eos_id]
        if enders:  # beside EOS there is place for one
            options["metadata"] = {"tokenizer.ggml.eot_token_id": enders[0]}
        if enders[1:]:
            notes.append(f"GGUF has no place for more ids that end a text: {', '.join(map(str, enders[1:]))} are lost")
        return options | {"tokenizer": own}
    if to == "safetensors":
        ids = dict.fromkeys(
            [*opened.stop_token_ids, *([own.eos_id] if own is not None and own.eos_id is not None else [])]
        )
        files = _files(opened, tokenizer)
        texts = {} if own is None or files else _texts(own, opened, notes)
        return {"bos_id": None if own is None else own.bos_id, "eos_ids": tuple(ids), "files": files, "texts": texts}
    if own is not None and tokenizer is None:
        notes.append(f"{to} files hold no tokenizer: give the one of {opened.path} when opening the copy")
    if to in INT8_ONLY:
        return {"group_size": _group(opened)}
    return {}


def _group(opened: Checkpoint) -> int:
    """The group size of int8 weights: the source's, if it has one, else the largest that fills all rows."""
    groups = {weight.type.group for weight in opened.weights.values() if weight.type.group}
    if len(groups) == 1:
        return groups.pop()
    widths = (opened.config.dim, opened.config.hidden_dim)
    return next((g for g in _GROUPS if not any(width % g for width in widths)), DEFAULT_GROUP)


def _texts(own: Tokenizer, opened: Checkpoint, notes: list[str]) -> dict[str, str]:
    """Files of a tokenizer, made for a Hugging Face directory; none, and a note why, where it cannot hold this one."""
    try:
        texts = text_files(own, opened.chat_template, opened.config.context)
    except UnsupportedError as error:
        notes.append(f"the tokenizer is left out: {error}")
        return {}
    if isinstance(own, BPETokenizer) and (lost := own.unreachable):
        notes.append(f"tokens {', '.join(map(str, lost[:8]))} are spelled like others: the tokenizer is without them")
    return texts


def _files(opened: Checkpoint, tokenizer: str | PathLike[str] | None) -> tuple[Path, ...]:
    """The files of a tokenizer to copy: those of the source's directory, or the one that was given."""
    if tokenizer is None:
        if not opened.format.startswith(("Hugging Face", "Meta")):  # what lies beside other files is not theirs
            return ()
        directory = opened.path if opened.path.is_dir() else opened.path.parent
        return tuple(path for name in _COMPANIONS if (path := directory / name).is_file())
    given = expand_user(tokenizer)
    if given.is_dir():
        return tuple(path for name in _COMPANIONS if (path := given / name).is_file())
    return (given,) if given.name in _TOKENIZERS else ()
