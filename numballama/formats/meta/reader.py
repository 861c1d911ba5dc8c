"""Meta's checkpoints: `params.json` and `consolidated.00.pth`, or several such parts, one for each GPU of the
training run. RoPE pairs are interleaved.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...checkpoint import Checkpoint, LazyWeight, Weight
from ...config import INTERLEAVED, ModelConfig, RopeScaling
from ...errors import Error, FormatError, UnsupportedError
from ...files import MappedFile, map_file
from ...memory import format_bytes
from ...quantization.types import WeightType
from .. import tokenizer_files
from ..json_reader import Keys, read_object
from ..limits import MAX_CONTEXT, MAX_LAYERS
from ..tensor_names import TensorNames, is_buffer
from .torch_zip import TorchFile

PARAMS = "params.json"
_PART = re.compile(r"consolidated\.(\d{2})\.pth")

TENSOR_NAMES = TensorNames(
    top={"tok_embeddings": "tok_embeddings.weight", "norm": "norm.weight", "output": "output.weight"},
    layer={
        "attn_norm": "attention_norm.weight",
        "wq": "attention.wq.weight",
        "wk": "attention.wk.weight",
        "wv": "attention.wv.weight",
        "wo": "attention.wo.weight",
        "ffn_norm": "ffn_norm.weight",
        "w1": "feed_forward.w1.weight",
        "w2": "feed_forward.w2.weight",
        "w3": "feed_forward.w3.weight",
    },
    prefix="layers",
)
_SPLIT_COLUMNS = ("wo", "w2")
"""Weights whose columns are split over the parts (row-parallel, in Megatron's terms). Other matrices are split by rows,
and vectors are in every part. The embedding is split by columns in Llama 1 and 2 and by rows in Llama 3; its shape
tells which."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "moe": (None,), "moe_args": (None,), "quantization_args": (None,), "quantization": (None,), "lora_args": (None,),
    "vision_chunk_size": (None, -1), "vision_encoder": (None,), "yarn": (None,),
}  # fmt: skip


def is_directory_of(directory: Path) -> bool:
    """Whether the directory holds a `params.json` and a part."""
    return (directory / PARAMS).exists() and any(_PART.fullmatch(path.name) for path in directory.glob("*.pth"))


def read(directory: Path, load_tokenizer: bool = True, single_file: MappedFile | None = None) -> Checkpoint:
    """Open a directory, with its `tokenizer.model` unless `load_tokenizer` is False. `single_file` is the checkpoint in
    it that the caller gave, if its name is not that of a part.

    Raises `FormatError` for damaged or missing files and for pickles that could run code, `UnsupportedError` for
    features that this version does not support.
    """
    if not (directory / PARAMS).exists():
        raise FormatError(
            "a PyTorch checkpoint without its params", path=directory, expected=PARAMS, found="no such file"
        )
    keys = read_object(directory / PARAMS)
    parts = [TorchFile(file, is_buffer) for file in ([single_file] if single_file else _files(directory))]
    notes: list[str] = []
    config = _config(keys, parts, notes)
    weights = {name: _weight(parts, name, shape) for name, shape in config.weight_shapes().items()}
    known = {TENSOR_NAMES[name] for name in weights}
    if extra := [name for part in parts for name in part.tensors if name not in known]:
        raise UnsupportedError(f"{directory}: tensor {extra[0][:100]} has no place in a model of this version")
    opened = Checkpoint(
        path=single_file.path if single_file else directory, format="Meta", config=config, weights=weights, notes=notes
    )
    if len(parts) > 1:
        size = sum(weight.nbytes for weight in weights.values() if isinstance(weight, LazyWeight))
        notes.append(f"{len(parts)} parts are merged in memory, {format_bytes(size)} of it")
    if load_tokenizer and (directory / "tokenizer.model").exists():
        try:
            opened.tokenizer = tokenizer_files.load_tokenizer(directory / "tokenizer.model")
        except UnsupportedError as error:
            opened.tokenizer_error = str(error)
            notes.append(f"its tokenizer is left out: {error}")
    return opened


def read_file(file: MappedFile, load_tokenizer: bool = True) -> Checkpoint:
    """Open a PyTorch file with the `params.json` beside it. One part of several opens all of them."""
    directory = file.path.parent
    if not (directory / PARAMS).exists():
        TorchFile(file)  # damage to the file itself is reported first
    return read(directory, load_tokenizer, None if _PART.fullmatch(file.path.name) else file)


def _files(directory: Path) -> list[MappedFile]:
    """consolidated.00.pth, 01 and so on. Raises `FormatError` where one of them is missing."""
    found = {path.name for path in directory.glob("consolidated.*.pth") if _PART.fullmatch(path.name)}
    wanted = [f"consolidated.{index:02}.pth" for index in range(len(found))]
    if missing := [name for name in wanted if name not in found]:
        raise FormatError("a part of the model is missing", path=directory, expected=missing[0], found="no such file")
    return [map_file(directory / name) for name in wanted]


def _shape(parts: list[TorchFile], name: str) -> tuple[int, ...]:
    if (info := parts[0].tensors.get(name)) is None:
        raise FormatError("a tensor is missing", path=parts[0].file.path, where=f"tensor {name}", found="none")
    if len(info.shape) != 2 or not all(info.shape):
        raise FormatError(
            "a tensor has the wrong shape", path=parts[0].file.path, where=f"tensor {name}", expected="a matrix",
            found=info.shape,
        )  # fmt: skip
    return info.shape


def _config(keys: Keys, parts: list[TorchFile], notes: list[str]) -> ModelConfig:
    for key, values in _NEUTRAL.items():
        if keys.values.get(key) not in values:
            raise UnsupportedError(f"{keys.path}: {key} is {str(keys.values[key])[:80]}, which is not supported")
    dim, n_heads = keys.integer("dim"), keys.integer("n_heads")
    rows, columns = _shape(parts, TENSOR_NAMES["tok_embeddings"])
    vocab_size = keys.integer("vocab_size", -1, least=-1)
    if vocab_size <= 0:  # Llama 1 and 2: use the tokenizer's size
        vocab_size = rows if columns * len(parts) == dim else rows * len(parts)
    hidden_dim = _shape(parts, TENSOR_NAMES["layers.0.w1"])[0] * len(parts)
    theta, eps, scaled = (
        keys.number("rope_theta", 10000.0),
        keys.number("norm_eps"),
        keys.flag("use_scaled_rope", False),
    )
    scaling = _scaling(keys, dim, notes) if scaled else None
    # no file states the context; these are the values of the published models
    context = 131072 if scaled else 8192 if theta == 500000 else 2048 if eps == 1e-6 else 4096
    context = keys.integer("max_seq_len", context, most=MAX_CONTEXT)
    if "max_seq_len" not in keys.values:
        notes.append(f"{PARAMS} does not say for how many tokens the model was made: {context:,} assumed")
    try:
        return ModelConfig(
            dim=dim,
            hidden_dim=hidden_dim,
            n_layers=keys.integer("n_layers", most=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=keys.integer("n_kv_heads", n_heads),
            vocab_size=vocab_size,
            context=context,
            head_dim=keys.integer("head_dim", dim // n_heads or None),
            norm_eps=eps,
            rope_theta=theta,
            rope_pairing=INTERLEAVED,
            tied_embeddings=TENSOR_NAMES["output"] not in parts[0].tensors,
            window=keys.integer("sliding_window", 0, least=0),
            rope_scaling=scaling,
        )
    except FormatError:
        raise
    except Error as error:
        raise FormatError(f"an impossible model: {error}", path=keys.path) from None


def _scaling(keys: Keys, dim: int, notes: list[str]) -> RopeScaling:
    """Llama 3.1's scaling. Its factor is 8, or 32 for the two small models of Llama 3.2. Early files omit it."""
    small = dim < 4096
    factor = keys.number("rope_scaling_factor", 32.0 if small else 8.0)
    if "rope_scaling_factor" not in keys.values:
        notes.append(f"{PARAMS} does not say by how much RoPE is scaled: {factor:g}, as in Llama 3.{2 if small else 1}")
    try:
        return RopeScaling("llama3", factor, 1.0, keys.number("rope_high_freq_factor", 4.0), 8192)
    except FormatError:
        raise
    except Error as error:
        raise FormatError(f"bad RoPE scaling: {error}", path=keys.path) from None


def _weight(parts: list[TorchFile], name: str, shape: tuple[int, ...]) -> Weight:
    """A view of the tensor, or its parts, concatenated on first use."""
    file_name, short, views, types = TENSOR_NAMES[name], name.rpartition(".")[2], list[Weight](), set[WeightType]()
    axis = 1 if short in _SPLIT_COLUMNS else 0
    for part in parts if len(shape) == 2 else parts[:1]:
        if file_name not in part.tensors:
            raise FormatError(
                "a tensor is missing", path=part.file.path, where=f"tensor {file_name}", expected=shape, found="none"
            )
        found = part.tensors[file_name].shape
        if short == "tok_embeddings" and len(found) == 2 and found[0] == shape[0]:
            axis = 1
        wanted = tuple(n // len(parts) if at == axis and len(shape) == 2 else n for at, n in enumerate(shape))
        if found != wanted or (len(shape) == 2 and shape[axis] % len(parts)):
            raise part.tensors[file_name].wrong_shape(wanted)
        views.append(part.view(file_name))
        types.add(views[-1].type)
    if len(types) > 1:
        raise UnsupportedError(f"{parts[0].file.path.parent}: the parts of {file_name} have different types")
    if len(views) == 1:
        return views[0]
    kind = views[0].type
    return LazyWeight(
        shape, kind, lambda: Weight(shape, kind, np.concatenate([v.data for v in views], axis)), cache=True
    )
