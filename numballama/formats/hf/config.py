"""Hugging Face's `config.json` ↔ `ModelConfig`, for architectures of the Llama family.

Missing keys get the defaults of transformers' configuration classes. A feature that the graph does not support raises
`UnsupportedError` with key and value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ...config import HALF_SPLIT, ModelConfig, RopeScaling, RopeScalingKind
from ...errors import Error, FormatError, UnsupportedError
from ..json_reader import Keys
from ..limits import MAX_CONTEXT, MAX_LAYERS

ROPE_TYPES: dict[str, RopeScalingKind] = {
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # an earlier name
}
"""Hugging Face's `rope_type` → ours."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"context": 2048},
    "mistral": {"context": 131072, "kv_heads": 8},
    "qwen2": {"context": 32768, "kv_heads": 32},
    "qwen3": {"context": 32768, "kv_heads": 32, "head_dim": 128},
}
"""Supported `model_type` → transformers' defaults for missing keys."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "swish", "silu"),  # two names of one function
    "partial_rotary_factor": (None, 1, 1.0),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
"""Keys of unsupported features → values that turn them off."""


def config_of(keys: Keys) -> ModelConfig:
    """The `ModelConfig` of a `config.json`. Raises `FormatError` for impossible values, `UnsupportedError` for
    unsupported features.
    """
    kind = keys.text("model_type")
    if kind not in READERS:
        raise UnsupportedError(f"{keys.path}: model_type is {kind[:60]!r}; supported are {', '.join(READERS)}")
    return READERS[kind](keys)


def read_llama(keys: Keys, kind: str = "llama") -> ModelConfig:
    """The config of a model like those of type `kind`, a key of `DEFAULTS`; the file may have another `model_type`."""
    _require_neutral(keys)
    defaults = DEFAULTS[kind]
    dim, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    n_layers = keys.integer("num_hidden_layers", most=MAX_LAYERS)
    context = keys.integer("max_position_embeddings", defaults["context"], most=MAX_CONTEXT)
    theta, scaling = _rope(keys, context)
    attention_bias = kind != "mistral" and kind != "qwen2" and keys.flag("attention_bias", False)
    n_kv_heads = keys.integer("num_key_value_heads", n_heads if _is_null(keys) else defaults.get("kv_heads", n_heads))
    try:
        return ModelConfig(
            dim=dim,
            hidden_dim=keys.integer("intermediate_size"),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=keys.integer("vocab_size"),
            context=context,
            head_dim=keys.integer("head_dim", defaults.get("head_dim", dim // n_heads or None)),
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_pairing=HALF_SPLIT,
            tied_embeddings=keys.flag("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=kind == "llama" and keys.flag("mlp_bias", False),
            qk_norm=kind == "qwen3",
            window=_window(keys, kind, n_layers),
            rope_scaling=scaling,
        )
    except (FormatError, UnsupportedError):
        raise
    except Error as error:
        raise FormatError(f"an impossible model: {error}", path=keys.path) from None


READERS: dict[str, Callable[[Keys], ModelConfig]] = {kind: partial(read_llama, kind=kind) for kind in DEFAULTS}
"""`model_type` → function that reads the rest of the file."""


def _is_null(keys: Keys) -> bool:
    """Whether `num_key_value_heads` is null: that means as many as heads. A missing key means the class default."""
    return "num_key_value_heads" in keys.values and keys.values["num_key_value_heads"] is None


def _unsupported(keys: Keys, key: str, supported: str) -> UnsupportedError:
    value = repr(keys.values.get(key))
    value = value if len(value) <= 80 else f"{value[:77]}..."
    return UnsupportedError(f"{keys.path}: {key} is {value}, which is not supported; {supported} is")


def _require_neutral(keys: Keys) -> None:
    for key, values in _NEUTRAL.items():
        if keys.values.get(key) not in values:
            raise _unsupported(keys, key, "none" if values[-1] is None else repr(values[-1]))


def _rope(keys: Keys, context: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). transformers 5 writes both to `rope_parameters`, earlier versions write `rope_theta` and
    `rope_scaling`."""
    name = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    own = keys.inner(name)
    theta = keys.number("rope_theta", 10000.0)
    if own is None:
        return theta, None
    if any(isinstance(value, dict) for value in own.values.values()):
        raise _unsupported(keys, name, "one set for all layers")
    theta = own.number("rope_theta", theta)
    if own.number("partial_rotary_factor", 1.0) != 1:
        raise _unsupported(own, "partial_rotary_factor", "1.0")
    kind = own.text("rope_type", own.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"{keys.path}: rope_type of {name} is {kind[:60]!r}, which is not supported; supported are default, "
            f"{', '.join(ROPE_TYPES)}"
        )
    try:
        return theta, _scaling(keys, own, ROPE_TYPES[kind], context)
    except FormatError:
        raise
    except Error as error:
        raise FormatError(f"bad {name}: {error}", path=keys.path) from None


def _scaling(keys: Keys, own: Keys, kind: RopeScalingKind, context: int) -> RopeScaling:
    """The scaling of a kind; `own` are its parameters, `keys` the whole file."""
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, own.number("factor"))
    inner = own.integer("original_max_position_embeddings", context, most=MAX_CONTEXT)
    original = keys.integer("original_max_position_embeddings", inner, most=MAX_CONTEXT)  # the outer one first
    if kind == "llama3":
        low, high = own.number("low_freq_factor"), own.number("high_freq_factor")
        return RopeScaling(kind, own.number("factor"), low, high, original)
    factor = own.number("factor", context / original)
    if kind == "yarn":
        return RopeScaling(
            kind,
            factor,
            original_context=original,
            beta_fast=own.number("beta_fast", 32.0),
            beta_slow=own.number("beta_slow", 1.0),
            truncate=own.flag("truncate", True),
            attention_factor=own.number("attention_factor", _yarn_attention_factor(own, factor)),
        )
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    short, long = (own.floats(name) for name in ("short_factor", "long_factor"))
    attention_factor = own.number("attention_factor", usual)
    return RopeScaling(
        kind, original_context=original, factors=short, long_factors=long, attention_factor=attention_factor
    )


def _yarn_attention_factor(own: Keys, factor: float) -> float:
    """transformers' choice for a file that gives none."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    own_scale, all_dims = own.number("mscale", 0.0), own.number("mscale_all_dim", 0.0)
    if own_scale and all_dims and not (mscale(own_scale) > 0 and mscale(all_dims) > 0):
        raise own.fault("mscale_all_dim", "a scale, as that of mscale, that is positive for the file's factor")
    return mscale(own_scale) / mscale(all_dims) if own_scale and all_dims else mscale(1.0)


def _window(keys: Keys, kind: str, n_layers: int) -> int:
    """The sliding window of all layers. Raises `UnsupportedError` if only some layers have one."""
    if kind == "llama":
        return 0
    null = "sliding_window" in keys.values and keys.values["sliding_window"] is None
    window = 0 if null else keys.integer("sliding_window", 4096)
    if kind == "mistral":
        sliding = [window > 0] * n_layers
    else:
        window = window if keys.flag("use_sliding_window", False) else 0
        first = keys.integer("max_window_layers", 28, least=0)
        sliding = [window > 0 and layer >= first for layer in range(n_layers)]
    layers = keys.values.get("layer_types")
    if layers is not None:  # in a Mistral too: transformers' AutoModel makes a Ministral of it
        if not isinstance(layers, list) or len(layers) != n_layers:
            raise keys.fault("layer_types", f"a list of {n_layers}")
        if unknown := [layer for layer in layers if layer not in ("full_attention", "sliding_attention")]:
            raise UnsupportedError(f"{keys.path}: layer_types has {str(unknown[0])[:60]!r}, which is not supported")
        sliding = [layer == "sliding_attention" and window > 0 for layer in layers]
    if any(sliding) and not all(sliding):
        raise UnsupportedError(
            f"{keys.path}: {'layer_types' if layers is not None else 'max_window_layers'} gives {sum(sliding)} of "
            f"{n_layers} layers a sliding window of {window:,}, which is not supported; one for all layers is"
        )
    return window if all(sliding) else 0


def config_json(config: ModelConfig, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """Content of `config.json` for a model whose weights are stored as `dtype`; `ids` has bos_token_id and the like.

    Raises `UnsupportedError` when none of the architectures fits `config`.
    """
    kind, name = _kind(config)
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default", **_rope_keys(scaling)}
    found: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,  # read by transformers before 5
        "dtype": dtype,
        "torch_dtype": dtype,
        **ids,
    }
    if scaling is not None:
        found["rope_scaling"] = rope
    if kind == "llama":
        found |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if kind == "qwen3":
        found["attention_bias"] = config.qkv_bias
    if kind == "mistral":
        found["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        sliding = {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0}
        found |= sliding if config.window else {"use_sliding_window": False}
    return found


def _rope_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    original = {"original_max_position_embeddings": scaling.original_context}
    attention = {"attention_factor": scaling.attention_factor}
    match scaling.kind:
        case "llama3":
            own = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            return {"rope_type": "llama3", "factor": scaling.factor, **own, **original}
        case "yarn":
            own = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            return {"rope_type": "yarn", "factor": scaling.factor, **own, **original, **attention}
        case "longrope":
            lists = {"short_factor": list(scaling.factors), "long_factor": list(scaling.long_factors)}
            return {"rope_type": "longrope", **lists, **original, **attention}
    return {"rope_type": scaling.kind, "factor": scaling.factor}


def _kind(config: ModelConfig) -> tuple[str, str]:
    """(model_type, class) of the architecture that computes `config`. Raises `UnsupportedError` if there is none."""
    scaling = config.rope_scaling
    if type(config) is not ModelConfig:
        raise UnsupportedError(f"writing a Hugging Face directory of a {type(config).__name__} is not supported")
    if scaling is not None and scaling.kind == "factors":
        raise UnsupportedError("Hugging Face's config.json cannot express RoPE factors of one pair each")
    if scaling is not None and scaling.kind not in ("yarn", "longrope") and scaling.attention_factor != 1:
        raise UnsupportedError(f"Hugging Face's config.json has no attention factor for {scaling.kind} RoPE scaling")
    wants = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.window > 0)
    match wants:
        case (False, False, _, False, False) | (True, True, _, False, False):
            return "llama", "LlamaForCausalLM"
        case (False, False, False, False, True):
            return "mistral", "MistralForCausalLM"
        case (True, False, False, False, _):
            return "qwen2", "Qwen2ForCausalLM"
        case (False, False, False, True, _) | (True, True, False, True, _):
            return "qwen3", "Qwen3ForCausalLM"
    names = ("q/k/v biases", "an output bias", "feed-forward biases", "q/k norms", "a sliding window")
    found = ", ".join(name for name, there in zip(names, wants, strict=True) if there)
    raise UnsupportedError(f"no architecture of {', '.join(DEFAULTS)} has exactly {found}")
