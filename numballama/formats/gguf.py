"""GGUF, llama.cpp's format: architecture "llama", weights as they lie in the file, or in the files of a split model.

llama.cpp rotates neighbouring dimensions, and its converters permute q and k to that: RoPE pairs are interleaved.
`gguf_header` reads the container; here its keys become a `ModelConfig`, and its tensors `Weight`s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .. import quant
from ..checkpoint import Checkpoint, Weight
from ..config import BF16, BLOCKS, F16, F32, INTERLEAVED, RUNS_AS, ModelConfig, WeightType
from ..errors import Error, FormatError, UnsupportedError
from ..files import MappedFile
from ..gguf_header import Header, TensorInfo, require
from ..gguf_split import open_header
from ..memory import human
from ..tokenizer import from_gguf
from .layout import MAX_CONTEXT, MAX_LAYERS

ARCHITECTURES = ("llama",)

WEIGHT_TYPES: dict[str, tuple[WeightType, type[np.generic]]] = {
    "F32": (F32, np.float32),
    "F16": (F16, np.uint16),
    "BF16": (BF16, np.uint16),
}
WEIGHT_TYPES |= {name.upper(): (WeightType(name), np.uint8) for name in BLOCKS}
"""Name of a tensor type → our type, and the elements of `Weight.data`."""

_TOP = {"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight"}
_LAYER = {
    "attn_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "wo": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "w1": "ffn_gate.weight",
    "w2": "ffn_down.weight",
    "w3": "ffn_up.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
}

_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.scale": (0,),
}
"""Keys of what this version does not compute → the values that ask for nothing; llama.cpp takes 0 for "not given"."""


def tensor_name(name: str) -> str:
    """The name in a GGUF file of the weight that is `name` in `ModelConfig.weight_shapes`."""
    if name in _TOP:
        return _TOP[name]
    _, layer, short = name.split(".")
    return f"blk.{layer}.{_LAYER[short]}"


def read(file: MappedFile, own_tokenizer: bool = True) -> Checkpoint:
    """Open a GGUF file, with the tokenizer that it holds unless `own_tokenizer` is False. A part of a split model opens
    all of it.

    Raises `FormatError` for damaged files, `UnsupportedError` for architectures, tensor types and metadata that ask
    for what this version cannot do. A tokenizer of an unsupported kind is left out, with a note.
    """
    header, notes = open_header(file)
    _require_supported(header)
    config = _config(header)
    weights = {name: _weight(header, name, shape) for name, shape in config.weight_shapes().items()}
    known = {tensor_name(name) for name in weights}
    if extra := [name for name in header.tensors if name not in known]:
        raise UnsupportedError(
            f"{file.path}: tensor {extra[0]} has no place in a {ARCHITECTURES[0]} model of this version"
        )
    ends = (header.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    opened = Checkpoint(
        path=file.path,
        format=f"GGUF v{header.version}",
        config=config,
        weights=weights,
        stop_ids=tuple(token for token in ends if token is not None),
        chat_template=header.text("tokenizer.chat_template"),
        notes=notes + _conversions(weights),
    )
    if window := header.integer(f"{_architecture(header)}.attention.sliding_window", 0):
        opened.notes.append(
            f"the sliding window of {window:,} tokens is ignored, as llama.cpp does for this architecture"
        )
    if own_tokenizer:
        try:
            opened.tokenizer = from_gguf(header)
        except UnsupportedError as error:
            opened.notes.append(f"its tokenizer is left out: {error}")
    return opened


def _architecture(header: Header) -> str:
    return require(header.text("general.architecture"), header, "general.architecture")


def _require_supported(header: Header) -> None:
    path, architecture = header.path, _architecture(header)
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF of architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    if (kind := header.text("general.type", "model")) != "model":
        raise UnsupportedError(f"{path}: GGUF of type {kind!r}; supported is 'model'")
    scaling = header.text(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none", "linear"):
        raise UnsupportedError(f"{path}: rope.scaling.type is {scaling!r}, which is not supported yet; 'none' is")
    for key, values in _NEUTRAL.items():
        found = header.number(f"{architecture}.{key}", values[0])
        if found not in values and (scaling, key) != ("none", "rope.scaling.factor"):
            raise UnsupportedError(f"{path}: {key} is {found:g}, which is not supported yet; {values[-1]:g} is")
    if not header.flag(f"{architecture}.attention.causal", True):
        raise UnsupportedError(f"{path}: attention that is not causal is not supported")
    if "rope_freqs.weight" in header.tensors:
        raise UnsupportedError(
            f"{path}: tensor rope_freqs.weight scales RoPE's frequencies (Llama 3.1 and later), not supported yet"
        )


def _config(header: Header) -> ModelConfig:
    architecture = _architecture(header)

    def integer(key: str, default: int | None = None, most: int = 1 << 31) -> int:
        full = f"{architecture}.{key}"
        found = require(header.integer(full, default), header, full)
        if not 0 < found <= most:
            where = header.fields[full].offset if full in header.fields else full
            raise FormatError(
                f"bad {full}", path=header.path, where=where, expected=f"1 to {most:,}", found=f"{found:,}"
            )
        return found

    if (table := header.tensors.get("token_embd.weight")) is None:
        raise FormatError(
            "a model without a vocabulary's embeddings",
            path=header.path,
            expected="token_embd.weight",
            found=f"{len(header.tensors)} tensors",
        )
    dim, n_heads = integer("embedding_length"), integer("attention.head_count")
    try:
        config = ModelConfig(
            dim=dim,
            hidden_dim=integer("feed_forward_length"),
            n_layers=integer("block_count", most=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=integer("attention.head_count_kv", n_heads),
            vocab_size=integer("vocab_size", math.prod(table.shape[:1])),
            context=integer("context_length", most=MAX_CONTEXT),
            head_dim=integer("attention.key_length", dim // n_heads),
            norm_eps=require(header.number(key := f"{architecture}.attention.layer_norm_rms_epsilon"), header, key),
            rope_theta=header.number(f"{architecture}.rope.freq_base", 10000.0) or 0.0,
            rope_pairing=INTERLEAVED,
            tied_embeddings="output.weight" not in header.tensors,
            qkv_bias="blk.0.attn_q.bias" in header.tensors,
        )
    except FormatError:
        raise
    except Error as error:
        raise FormatError(f"a model that cannot be: {error}", path=header.path) from None
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := integer(key, config.head_dim)) != config.head_dim:
            raise UnsupportedError(
                f"{header.path}: {key} is {found:,} and heads have {config.head_dim:,} dimensions: not supported yet"
            )
    return config


def _weight(header: Header, name: str, shape: tuple[int, ...]) -> Weight:
    """A view of the tensor; norms and biases, which are small, become float32."""
    theirs = tensor_name(name)
    if (info := header.tensors.get(theirs)) is None:
        raise FormatError(
            "a tensor is missing", path=header.path, where=f"tensor {theirs}", expected=shape, found="none"
        )
    if _squeezed(info.shape, len(shape)) != shape:
        raise FormatError(
            "a tensor has the wrong shape",
            path=info.file.path,
            where=f"tensor {theirs}",
            expected=shape,
            found=info.shape,
        )
    return _view(info, shape)


def _squeezed(shape: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    """The shape without outer dimensions of 1 in excess of `n_dims`."""
    excess = max(len(shape) - n_dims, 0)
    return shape[excess:] if shape[:excess] == (1,) * excess else shape


def _view(info: TensorInfo, shape: tuple[int, ...]) -> Weight:
    supported = WEIGHT_TYPES if len(shape) == 2 else {name: WEIGHT_TYPES[name] for name in ("F32", "F16", "BF16")}
    if info.type not in supported:
        raise UnsupportedError(
            f"{info.file.path}: tensor {info.name} has type {info.type}; supported are {', '.join(supported)}"
        )
    kind, element = supported[info.type]
    data = np.frombuffer(info.file.data, element, info.nbytes // np.dtype(element).itemsize, info.offset)
    weight = Weight(shape, kind, data.reshape(shape[0], -1) if len(shape) == 2 else data)
    return weight if len(shape) == 2 else quant.convert(weight, F32)


def _conversions(weights: Mapping[str, Weight]) -> list[str]:
    """A note for each type of which backends have no kernels."""
    notes = []
    for kind, target in RUNS_AS.items():
        if names := [name for name, weight in weights.items() if weight.type.name == kind]:
            grows = sum(target.nbytes(math.prod(weights[name].shape)) for name in names)
            which = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            exactly = "with the same numbers" if (kind, target.name) in quant.EXACT else "rounded"
            notes.append(f"{kind.upper()} ({which}) runs as {target}, {exactly}: a copy of {human(grows)}")
    return notes
