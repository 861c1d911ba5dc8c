"""Writes GGUF version 3 for llama.cpp: weights in their own type, tokenizer, chat template and further metadata."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike

import numpy as np

from ...checkpoint import Weight, require_types, require_weights
from ...config import HALF_SPLIT, ModelConfig, RopeScaling
from ...errors import Error, UnsupportedError
from ...files import atomic_write
from ...quantization.convert import convert
from ...quantization.types import BLOCKS, F32, TYPE_TRAITS
from ...rope import rope_divisors
from ...tokenizers.base import PieceType, Tokenizer, Vocabulary
from ..rope_permute import row_order
from .header import DEFAULT_ALIGNMENT, MAGIC, ValueType
from .reader import ARCHITECTURES, LONGROPE_FACTORS, ROPE_FACTORS, TENSOR_NAMES, yarn_attention_factor

_VERSION = 3
_TYPES = {name: traits.gguf_id for name, traits in TYPE_TRAITS.items() if traits.gguf_id is not None}
_FILE_TYPES = {name: traits.ftype for name, traits in TYPE_TRAITS.items() if traits.ftype is not None}
_QUANTIZATION_VERSION = 2
_PAD_SCORE = -1000.0
"""Score of a padding token, as llama.cpp's converter writes it."""
_CODES = {ValueType.UINT32: "I", ValueType.FLOAT32: "f", ValueType.BOOL: "?"}

MetadataValue = str | bool | int | float
"""Type of the values in the `metadata` argument of `write_gguf`."""
Entry = tuple[str, ValueType, MetadataValue | Sequence[bytes] | np.ndarray]


def write_gguf(
    path: str | PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Weight],
    tokenizer: Tokenizer | Vocabulary | None = None,
    name: str | None = None,
    chat_template: str | Mapping[str, str] | None = None,
    metadata: Mapping[str, MetadataValue] | None = None,
) -> list[str]:
    """Write GGUF, completely or not at all. Returns notes on what the format cannot hold.

    Matrices keep their type (`convert` makes them f16, bf16, q8_0, q4_0 or q4_1). Norms and biases are written as f32.
    The architecture is "qwen3" for models with q/k norms, "qwen2" for half-split models with q/k/v biases, no other
    biases and heads of dim / n_heads, otherwise "llama". Rows of q and k are permuted to the RoPE pairing of the
    architecture. A vocabulary of fewer tokens than the model's is padded with unused ones, because llama.cpp wants one
    for each row. `name` becomes `general.name`. `chat_template` is a template, or name → template for several of
    which "default" is the usual one. `metadata` has additional keys, such as `{"general.license": "mit"}` (int: uint32,
    float: float32).

    Raises `UnsupportedError` for other weight types or a tokenizer that GGUF cannot express, `Error` when weights,
    config and tokenizer do not belong together.
    """
    if type(config) is not ModelConfig:
        raise UnsupportedError(f"writing GGUF of a {type(config).__name__} is not supported")
    require_weights(config, weights)
    require_types(weights, _TYPES, "GGUF")
    expected = config.weight_shapes()
    architecture = _architecture(config)
    tensors = [_Tensor(config, architecture, weight_name, weights[weight_name]) for weight_name in expected]
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("llama3", "factors"):
        tensors.append(_factors(config, architecture, ROPE_FACTORS, rope_divisors(config)))
    if scaling is not None and scaling.kind == "longrope":
        for name_of_factors, factors in zip(LONGROPE_FACTORS, (scaling.factors, scaling.long_factors), strict=True):
            tensors.append(_factors(config, architecture, name_of_factors, factors))
    vocabulary = tokenizer.vocabulary() if isinstance(tokenizer, Tokenizer) else tokenizer
    if vocabulary is not None:
        vocabulary = _padded(vocabulary, config.vocab_size)
    templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
    entries = _entries(config, architecture, tensors, vocabulary, name, templates)
    entries += [(key, _type_of(key, value), value) for key, value in (metadata or {}).items()]
    if len({key for key, *_ in entries}) < len(entries):
        raise Error(f"metadata repeats a key that is written anyway: {', '.join(metadata or {})}")
    with atomic_write(path) as file:
        head = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(entries)))
        for entry in entries:
            head += _pack(*entry)
        offset = 0
        for tensor in tensors:
            head += tensor.directory_entry(offset)
            offset += tensor.nbytes + -tensor.nbytes % DEFAULT_ALIGNMENT
        file.write(head + bytes(-len(head) % DEFAULT_ALIGNMENT))
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.data()).data)
            file.write(bytes(-tensor.nbytes % DEFAULT_ALIGNMENT))
    return _lost(config, architecture) + (list(vocabulary.notes) if vocabulary is not None else [])


def _factors(config: ModelConfig, architecture: str, name: str, values: Sequence[float]) -> _Tensor:
    """A tensor that divides RoPE's frequencies."""
    factors = np.array(values, np.float32)
    return _Tensor(config, architecture, name, Weight(factors.shape, F32, factors))


def _rope_entries(prefix: str, scaling: RopeScaling | None) -> list[Entry]:
    u32, f32, text = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING
    if scaling is None:
        return []
    key, attention, entries = f"{prefix}.rope.scaling.", scaling.attention_factor, list[Entry]()
    if scaling.kind in ("linear", "yarn", "longrope"):
        entries.append((f"{key}type", text, scaling.kind))
    if scaling.kind in ("linear", "yarn"):
        entries.append((f"{key}factor", f32, scaling.factor))
    if scaling.kind in ("yarn", "longrope"):
        entries.append((f"{key}original_context_length", u32, scaling.original_context))
    if scaling.kind == "yarn":
        entries.append((f"{key}yarn_beta_fast", f32, scaling.beta_fast))
        entries.append((f"{key}yarn_beta_slow", f32, scaling.beta_slow))
        attention /= yarn_attention_factor(scaling.factor)
    if not math.isclose(attention, 1):
        entries.append((f"{key}attn_factor", f32, attention))
    return entries


def _padded(vocabulary: Vocabulary, size: int) -> Vocabulary:
    """The vocabulary with tokens [PADn] of type UNUSED, n their id, up to `size`. No two tokens have the same text."""
    count = len(vocabulary.pieces)
    if count > size:
        raise Error(f"a tokenizer of {count:,} tokens does not belong to a model of {size:,}")
    taken, pads = set(vocabulary.pieces), list[bytes]()
    for token in range(count, size):
        pad = b"[PAD%d]" % token
        while pad in taken:
            pad = b"[%s]" % pad
        pads.append(pad)
    return replace(
        vocabulary,
        pieces=[*vocabulary.pieces, *pads],
        scores=[*vocabulary.scores, *[_PAD_SCORE] * len(pads)] if vocabulary.model == "llama" else vocabulary.scores,
        types=[*vocabulary.types, *[PieceType.UNUSED] * len(pads)],
    )


def _architecture(config: ModelConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    whole = config.q_dim == config.dim  # llama.cpp's qwen2 knows no other width of heads; its llama does
    if config.qkv_bias and not (config.o_bias or config.mlp_bias) and config.rope_pairing == HALF_SPLIT and whole:
        return "qwen2"
    return "llama"


def _lost(config: ModelConfig, architecture: str) -> list[str]:
    """Notes on what the format cannot hold, and on what llama.cpp ignores."""
    notes = []
    if (scaling := config.rope_scaling) is not None:
        if scaling.kind == "dynamic":
            notes.append(
                f"GGUF cannot hold dynamic RoPE scaling: beyond {config.context:,} tokens the copy gives other logits"
            )
        if scaling.kind == "yarn" and not scaling.truncate:
            notes.append("GGUF cannot hold YaRN without truncation: the copy gives other logits")
        if scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32, 1):
            notes.append(f"llama.cpp ignores YaRN's beta_fast and beta_slow in models of architecture {architecture}")
        if scaling.kind == "longrope" and architecture != "llama":
            notes.append(f"llama.cpp knows no longrope in models of architecture {architecture} and loads no such file")
    if architecture == "qwen3" and (config.qkv_bias or config.o_bias or config.mlp_bias):
        notes.append("llama.cpp knows no biases in models of architecture qwen3 and does not load the file")
    if 0 < config.window < config.context:
        notes.append(
            f"llama.cpp ignores the sliding window of {config.window:,} tokens in models of architecture {architecture}"
        )
    return notes


class _Tensor:
    """A weight in the layout of the file. Its data is copied when it is written."""

    def __init__(self, config: ModelConfig, architecture: str, name: str, weight: Weight) -> None:
        self.name = name if name in (ROPE_FACTORS, *LONGROPE_FACTORS) else TENSOR_NAMES[name]
        self.matrix = len(weight.shape) == 2
        self._weight = weight
        self.type = weight.type.name if self.matrix else F32.name
        self.shape = weight.shape
        self.nbytes = weight.nbytes if self.matrix else 4 * weight.shape[0]
        self._order = row_order(config, name, ARCHITECTURES[architecture])

    def directory_entry(self, offset: int) -> bytes:
        dims = self.shape[::-1]
        return _string(self.name.encode()) + struct.pack(
            f"<I{len(dims)}QIQ", len(dims), *dims, _TYPES[self.type], offset
        )

    def data(self) -> np.ndarray:
        rows = (self._weight if self.matrix else convert(self._weight, F32)).data
        return rows if self._order is None else rows[self._order]


def _entries(
    config: ModelConfig,
    prefix: str,
    tensors: Sequence[_Tensor],
    vocabulary: Vocabulary | None,
    name: str | None,
    templates: Mapping[str, str],
) -> list[Entry]:
    u32, f32, text = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING
    numbers = [tensor.type for tensor in tensors if tensor.matrix]
    most = max(dict.fromkeys(numbers), key=lambda kind: sum(t.nbytes for t in tensors if t.type == kind))
    entries: list[Entry] = [("general.architecture", text, prefix), ("general.type", text, "model")]
    if name is not None:
        entries.append(("general.name", text, name))
    entries.append(("general.file_type", u32, _FILE_TYPES[most]))
    if any(kind in BLOCKS for kind in numbers):
        entries.append(("general.quantization_version", u32, _QUANTIZATION_VERSION))
    entries += [
        (f"{prefix}.vocab_size", u32, config.vocab_size),
        (f"{prefix}.context_length", u32, config.context),
        (f"{prefix}.embedding_length", u32, config.dim),
        (f"{prefix}.block_count", u32, config.n_layers),
        (f"{prefix}.feed_forward_length", u32, config.hidden_dim),
        (f"{prefix}.rope.dimension_count", u32, config.head_dim),
        (f"{prefix}.rope.freq_base", f32, config.rope_theta),
        (f"{prefix}.attention.head_count", u32, config.n_heads),
        (f"{prefix}.attention.head_count_kv", u32, config.n_kv_heads),
        (f"{prefix}.attention.layer_norm_rms_epsilon", f32, config.norm_eps),
    ]
    if config.window:
        entries.append((f"{prefix}.attention.sliding_window", u32, config.window))
    entries += _rope_entries(prefix, config.rope_scaling)
    if config.q_dim != config.dim:
        entries += [(f"{prefix}.attention.{which}_length", u32, config.head_dim) for which in ("key", "value")]
    if vocabulary is None:
        entries.append(("tokenizer.ggml.model", text, "no_vocab"))
    else:
        entries += _vocabulary_entries(vocabulary)
    if named := [each for each in templates if each != "default"]:
        entries.append(("tokenizer.chat_templates", text, [each.encode() for each in named]))
    entries += [(f"tokenizer.chat_template.{each}", text, templates[each]) for each in named]
    if "default" in templates:
        entries.append(("tokenizer.chat_template", text, templates["default"]))
    return entries


def _vocabulary_entries(vocabulary: Vocabulary) -> list[Entry]:
    u32, flag, text = ValueType.UINT32, ValueType.BOOL, ValueType.STRING
    key = "tokenizer.ggml."
    entries: list[Entry] = [
        (f"{key}model", text, vocabulary.model),
        (f"{key}pre", text, vocabulary.pre or "default"),
        (f"{key}tokens", text, vocabulary.pieces),
    ]
    if vocabulary.model == "llama":
        entries.append((f"{key}scores", ValueType.FLOAT32, np.array(vocabulary.scores, "<f4")))
    entries.append((f"{key}token_type", ValueType.INT32, np.array(vocabulary.types, "<i4")))
    if vocabulary.model == "gpt2":
        entries.append((f"{key}merges", text, vocabulary.merges))
    for which, token in (
        ("bos", vocabulary.bos_id),
        ("eos", vocabulary.eos_id),
        ("unknown", vocabulary.unknown_id),
    ):
        if token is not None:
            entries.append((f"{key}{which}_token_id", u32, token))
    return [
        *entries,
        (f"{key}add_bos_token", flag, vocabulary.add_bos and vocabulary.bos_id is not None),
        (f"{key}add_eos_token", flag, vocabulary.add_eos),
        (f"{key}add_space_prefix", flag, vocabulary.add_space_prefix),
    ]


def _type_of(key: str, value: MetadataValue) -> ValueType:
    for python, kind in (
        (bool, ValueType.BOOL),
        (str, ValueType.STRING),
        (int, ValueType.UINT32),
        (float, ValueType.FLOAT32),
    ):
        if isinstance(value, python):
            return kind
    raise Error(f"metadata {key} must be a str, bool, int or float, found {type(value).__name__}")


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _pack(key: str, kind: ValueType, value: MetadataValue | Sequence[bytes] | np.ndarray) -> bytes:
    """The bytes of a metadata entry. `value` is a scalar, a str or an array."""
    head = _string(key.encode())
    if isinstance(value, str):
        return head + struct.pack("<I", kind) + _string(value.encode())
    if isinstance(value, (bool, int, float)):
        try:
            return head + struct.pack(f"<I{_CODES[kind]}", kind, value)
        except (struct.error, OverflowError):
            raise UnsupportedError(f"GGUF stores {key} as {kind.name}, too small for {value}") from None
    items = value.tobytes() if isinstance(value, np.ndarray) else b"".join(map(_string, value))
    return head + struct.pack("<IIQ", ValueType.ARRAY, kind, len(value)) + items
