"""GGUF, llama.cpp's format: metadata keys become a `ModelConfig`, tensors become `Weight`s that are views of the file.

RoPE pairs are interleaved in architecture "llama", which includes Mistral and SmolLM2: llama.cpp rotates neighbouring
dimensions, and its converters permute q and k to match. In "qwen2" and "qwen3" they stay half-split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...checkpoint import Checkpoint, Weight
from ...config import HALF_SPLIT, INTERLEAVED, ModelConfig, RopePairing, RopeScaling
from ...errors import Error, FormatError, UnsupportedError
from ...files import MappedFile
from ...memory import format_bytes
from ...quantization.convert import EXACT
from ...quantization.types import FALLBACK_TYPE, TYPE_TRAITS, WeightType
from ...rope import rope_divisors
from ..limits import MAX_CONTEXT, MAX_LAYERS
from ..tensor_names import TensorNames
from ..tensors import TensorInfo, view_weight
from .header import Header, require
from .split import open_header
from .tokenizer import chat_templates, read_gguf_tokenizer, template_tokens

ARCHITECTURES: dict[str, RopePairing] = {"llama": INTERLEAVED, "qwen2": HALF_SPLIT, "qwen3": HALF_SPLIT}
"""Supported architecture → its RoPE pairing."""

WEIGHT_TYPES = {
    name.upper(): (WeightType(name), traits.storage)
    for name, traits in TYPE_TRAITS.items()
    if traits.gguf_id is not None
}
"""Name of a tensor type → our type, and the elements of `Weight.data`."""

ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_ORIGINAL_CONTEXTS = (8192, *(1 << bits for bits in range(5, 18)))
"""Original contexts to try when recognising Llama 3.1's RoPE scaling; that of the published models first."""
TENSOR_NAMES = TensorNames(
    top={"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight"},
    layer={
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
        "bo": "attn_output.bias",
        "b1": "ffn_gate.bias",
        "b2": "ffn_down.bias",
        "b3": "ffn_up.bias",
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
    },
    prefix="blk",
)

_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
"""Keys of unsupported features → values that turn them off. llama.cpp treats 0 as "not given"."""

_KINDS = {
    "adapter": ": merge a LoRA adapter into its model first (llama.cpp's llama-export-lora)",
    "mmproj": ": this file projects images for a model, which is another file",
    "imatrix": ": this file weighs the columns of a model, which is another file",
}
"""`general.type` → what to do instead."""


def read(file: MappedFile, load_tokenizer: bool = True) -> Checkpoint:
    """Open a GGUF file, with its tokenizer unless `load_tokenizer` is False. A part of a split model opens all parts.

    Raises `FormatError` for damaged files, `UnsupportedError` for architectures, tensor types and metadata that this
    version does not support. An unsupported tokenizer is left out, with a note.
    """
    header, notes = open_header(file)
    _require_supported(header)
    templates = chat_templates(header, notes)
    config = _config(header)
    weights = {name: _weight(header, name, shape) for name, shape in config.weight_shapes().items()}
    known = {ROPE_FACTORS, *LONGROPE_FACTORS, *(TENSOR_NAMES[name] for name in weights)}
    if extra := [name for name in header.tensors if name not in known]:
        raise UnsupportedError(
            f"{file.path}: tensor {extra[0]} has no place in a {_architecture(header)} model of this version"
        )
    opened = Checkpoint(
        path=file.path,
        format=f"GGUF v{header.version}",
        config=config,
        weights=weights,
        stop_token_ids=_stop_token_ids(header, config.vocab_size),
        chat_templates=templates,
        notes=notes + _conversions(weights),
    )
    stated = header.integer(key := f"{_architecture(header)}.vocab_size", config.vocab_size)
    if stated != config.vocab_size:
        opened.notes.append(f"{key} is {stated:,}, the embedding has {config.vocab_size:,} rows: the rows count")
    if 0 < config.window < config.context:
        opened.notes.append(f"tokens see the last {config.window:,} only (attention.sliding_window)")
    if load_tokenizer:
        try:
            opened.tokenizer = read_gguf_tokenizer(header)
            if opened.tokenizer is not None:
                opened.template_tokens = template_tokens(header, opened.tokenizer)
        except UnsupportedError as error:
            opened.tokenizer_error = str(error)
            opened.notes.append(f"its tokenizer is left out: {error}")
    return opened


def _stop_token_ids(header: Header, count: int) -> tuple[int, ...]:
    """Ids that end a text: those of single keys, and those of the array that ollama writes."""
    found = [header.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if (more := header.numbers("tokenizer.ggml.eos_token_ids")) is not None:
        found += map(int, np.unique(more[(more >= 0) & (more < count)]).tolist())
    return tuple(dict.fromkeys(token for token in found if token is not None and 0 <= token < count))


def _architecture(header: Header) -> str:
    return require(header.text("general.architecture"), header, "general.architecture")


def _require_supported(header: Header) -> None:
    path, architecture = header.path, _architecture(header)
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF of architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    if (kind := header.text("general.type", "model")) != "model":
        raise UnsupportedError(f"{path}: GGUF of type {kind!r}; supported is 'model'{_KINDS.get(str(kind), '')}")
    for key, values in _NEUTRAL.items():
        found = header.number(f"{architecture}.{key}", values[0])
        if found not in values:
            raise UnsupportedError(f"{path}: {key} is {found:g}, which is not supported yet; {values[-1]:g} is")
    if not header.flag(f"{architecture}.attention.causal", True):
        raise UnsupportedError(f"{path}: attention that is not causal is not supported")


def _config(header: Header) -> ModelConfig:
    architecture = _architecture(header)

    def integer(key: str, default: int | None = None, most: int = 1 << 31, by_layer: bool = False) -> int:
        full = f"{architecture}.{key}"
        field = header.fields.get(full)
        given = _of_all_layers(header, full) if by_layer and field and field.array else header.integer(full, default)
        found = require(given, header, full)
        if not 0 < found <= most:
            where = header.fields[full].offset if full in header.fields else full
            raise FormatError(
                f"bad {full}", path=header.path, where=where, expected=f"1 to {most:,}", found=f"{found:,}"
            )
        return found

    if (table := header.tensors.get("token_embd.weight")) is None:
        raise FormatError(
            "a model without an embedding table",
            path=header.path,
            expected="token_embd.weight",
            found=f"{len(header.tensors)} tensors",
        )
    dim, n_heads = integer("embedding_length"), integer("attention.head_count", by_layer=True)
    first = {short for short in TENSOR_NAMES.layer if TENSOR_NAMES[f"layers.0.{short}"] in header.tensors}
    try:
        config = ModelConfig(
            dim=dim,
            hidden_dim=integer("feed_forward_length", by_layer=True),
            n_layers=integer("block_count", most=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=integer("attention.head_count_kv", n_heads, by_layer=True),
            vocab_size=math.prod(_squeezed(table.shape, 2)[:1]),  # whatever the key says
            context=integer("context_length", most=MAX_CONTEXT),
            head_dim=integer("attention.key_length", dim // n_heads),
            norm_eps=require(header.number(key := f"{architecture}.attention.layer_norm_rms_epsilon"), header, key),
            rope_theta=header.number(f"{architecture}.rope.freq_base", 10000.0) or 0.0,
            rope_pairing=ARCHITECTURES[architecture],
            tied_embeddings="output.weight" not in header.tensors,
            qkv_bias="bq" in first,
            o_bias="bo" in first,
            mlp_bias="b1" in first,
            qk_norm="q_norm" in first,
            window=header.integer(f"{architecture}.attention.sliding_window", 0) or 0,
        )
        config = replace(config, rope_scaling=_rope_scaling(header, config))
    except (FormatError, UnsupportedError):
        raise
    except Error as error:
        raise FormatError(f"an impossible model: {error}", path=header.path) from None
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := integer(key, config.head_dim)) != config.head_dim:
            raise UnsupportedError(
                f"{header.path}: {key} is {found:,} and heads have {config.head_dim:,} dimensions: not supported yet"
            )
    scale = header.number(key := f"{architecture}.attention.scale", 0.0) or 0.0
    if scale and not math.isclose(scale, config.head_dim**-0.5, rel_tol=1e-6):  # float32 in the file; 0 is "not given"
        raise UnsupportedError(
            f"{header.path}: {key} is {scale:g}, which is not supported yet; {config.head_dim**-0.5:g} is"
        )
    return config


def _of_all_layers(header: Header, key: str) -> int:
    """The value of a key that has an array, one number a layer. Raises `UnsupportedError` if layers differ."""
    values = sorted({int(number) for number in require(header.numbers(key), header, key).tolist()})
    if len(values) != 1:
        raise UnsupportedError(
            f"{header.path}: {key} is {', '.join(map(str, values[:8])) or 'empty'} by layer, which is not supported; "
            "one number for all layers is"
        )
    return values[0]


def _rope_scaling(header: Header, config: ModelConfig) -> RopeScaling | None:
    """RoPE scaling by one factor for all frequencies (type "linear", which is also the default), by "yarn", or by
    tensors with a factor for each pair. llama.cpp's converter writes such a tensor for Llama 3.1, whose parameters are
    recovered from the factors, and two for "longrope".
    """
    architecture = _architecture(header)

    def number(key: str, default: float) -> float:
        return header.number(f"{architecture}.rope.{key}", 0.0) or default  # 0 is "not given"

    kind = header.text(f"{architecture}.rope.scaling.type", "linear")
    factor, older = number("scaling.factor", 1.0), number("scale_linear", 1.0)
    factor = 1.0 if kind == "none" else factor if factor != 1 else older
    scaling = RopeScaling("linear", factor, attention_factor=number("scaling.attn_factor", 1.0))
    original = header.integer(f"{architecture}.rope.scaling.original_context_length", 0) or config.context
    tensors = [name for name in (ROPE_FACTORS, *LONGROPE_FACTORS) if name in header.tensors]
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"{header.path}: rope.scaling.type is {kind!r}, not supported; 'none', 'linear', 'yarn' and 'longrope' are"
        )
    if tensors and factor != 1:
        raise UnsupportedError(
            f"{header.path}: both {tensors[0]} and rope.scaling.factor {factor:g}; one of them is supported"
        )
    if kind == "longrope" or (tensors and tensors[0] in LONGROPE_FACTORS):
        short, long = (_rope_factors(header, config, name) for name in LONGROPE_FACTORS)
        return replace(scaling, kind="longrope", original_context=original, factors=short, long_factors=long)
    if kind == "yarn" and factor != 1:
        if (ext := header.number(key := f"{architecture}.rope.scaling.yarn_ext_factor", -1.0)) not in (-1, 1):
            raise UnsupportedError(f"{header.path}: {key} is {ext:g}, which is not supported; 1 is")
        return replace(
            scaling,
            kind="yarn",
            original_context=original,
            beta_fast=number("scaling.yarn_beta_fast", 32.0),
            beta_slow=number("scaling.yarn_beta_slow", 1.0),
            attention_factor=scaling.attention_factor * yarn_attention_factor(factor),
        )
    if tensors:
        scaling = _of_factors(scaling, _rope_factors(header, config, ROPE_FACTORS), config)
    return scaling if scaling != RopeScaling("linear") else None


def yarn_attention_factor(factor: float) -> float:
    """The attention factor with which llama.cpp runs YaRN; the file's `attn_factor` is times this one."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _rope_factors(header: Header, config: ModelConfig, name: str) -> tuple[float, ...]:
    """The positive numbers of such a tensor, one a pair, in their shortest spelling."""
    if (info := header.tensors.get(name)) is None:
        raise FormatError(
            "a tensor is missing", path=header.path, where=f"tensor {name}",
            expected=f"{config.head_dim // 2} factors for RoPE scaling of type longrope", found="none",
        )  # fmt: skip
    if _squeezed(info.shape, 1) != (pairs := config.head_dim // 2,):
        raise info.wrong_shape(pairs)
    factors = _view(info, (pairs,)).data
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise FormatError("a factor is not positive", path=header.path, where=f"tensor {name}")
    return tuple(float(str(factor)) for factor in factors)


def _of_factors(plain: RopeScaling, factors: tuple[float, ...], config: ModelConfig) -> RopeScaling:
    """The scaling that divides by these factors: Llama 3.1's where they are its own."""
    largest = max(factors)
    if largest == min(factors) == 1:
        return plain
    for original in _ORIGINAL_CONTEXTS if largest > 1 else ():
        llama3 = replace(plain, kind="llama3", factor=largest, original_context=original)
        if np.allclose(factors, rope_divisors(replace(config, rope_scaling=llama3)), rtol=1e-5, atol=0):
            return llama3
    return replace(plain, kind="factors", factors=factors)


def _weight(header: Header, name: str, shape: tuple[int, ...]) -> Weight:
    """The weight as a view of its tensor; norms and biases, which are small, become float32."""
    file_name = TENSOR_NAMES[name]
    if (info := header.tensors.get(file_name)) is None:
        raise FormatError(
            "a tensor is missing", path=header.path, where=f"tensor {file_name}", expected=shape, found="none"
        )
    if _squeezed(info.shape, len(shape)) != shape:
        raise info.wrong_shape(shape)
    return _view(info, shape)


def _squeezed(shape: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    """`shape` without outer dimensions of 1 beyond `n_dims`."""
    excess = max(len(shape) - n_dims, 0)
    return shape[excess:] if shape[:excess] == (1,) * excess else shape


def _view(info: TensorInfo, shape: tuple[int, ...]) -> Weight:
    types = WEIGHT_TYPES if len(shape) == 2 else {name: WEIGHT_TYPES[name] for name in ("F32", "F16", "BF16")}
    return view_weight(info, shape, types)


def _conversions(weights: Mapping[str, Weight]) -> list[str]:
    """A note for each type that no backend has kernels for."""
    notes = []
    for kind, target in FALLBACK_TYPE.items():
        if names := [name for name, weight in weights.items() if weight.type.name == kind]:
            grows = sum(target.nbytes(math.prod(weights[name].shape)) for name in names)
            which = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            exactly = "with the same values" if (kind, target.name) in EXACT else "rounded"
            notes.append(f"{kind.upper()} ({which}) runs as {target}, {exactly}: a copy of {format_bytes(grows)}")
    return notes
