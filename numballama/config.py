"""`ModelConfig`: sizes and options of a model of the Llama family, and those of well-known models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from .errors import Error
from .validation import real_number

RopePairing = Literal["interleaved", "half"]
RopeScalingKind = Literal["linear", "dynamic", "llama3", "factors", "yarn", "longrope"]

INTERLEAVED: Final = "interleaved"
HALF_SPLIT: Final = "half"
"""Which dimensions of a head RoPE rotates as a pair: (2i, 2i + 1), or (i, i + head_dim / 2)."""

_PAIRING_NAMES: dict[str, RopePairing] = {
    "interleaved": INTERLEAVED,
    "half": HALF_SPLIT,
    "half-split": HALF_SPLIT,
    "half_split": HALF_SPLIT,
    "neox": HALF_SPLIT,  # llama.cpp's names
    "normal": INTERLEAVED,
}

DEFAULT_CONTEXT = 4096
"""Upper limit of the default size of the KV cache, in tokens. `context=` may exceed it."""


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are scaled for a longer context than the model was first trained for.

    `kind` is one of:

    - "linear": all frequencies are divided by `factor`.
    - "dynamic" (NTK-aware): theta grows when the context is longer than `ModelConfig.context`.
    - "llama3" (Llama 3.1): low frequencies are divided by `factor`, high ones stay, with a ramp between them.
    - "factors": the frequency of pair i is divided by `factors[i]`.
    - "yarn" (Peng et al., YaRN, 2023): pairs that rotate more than `beta_fast` times in `original_context` tokens keep
      their frequency, those that rotate fewer than `beta_slow` times are divided by `factor`, with a ramp between them.
    - "longrope": "factors" with `long_factors` when the context is longer than `original_context`.

    `rope.rope_frequencies` computes them. Raises `Error` for values out of range.
    """

    kind: RopeScalingKind
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    """Tokens that a "llama3", "yarn" or "longrope" model was first trained for. Wavelengths are compared with it."""
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """The ends of YaRN's ramp are whole pairs."""
    attention_factor: float = 1.0
    """Rotated queries and keys are multiplied by it, so that scores are multiplied by its square. Any kind may have it;
    1 changes nothing."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeScalingKind):
            raise Error(f"RopeScaling.kind must be one of {', '.join(get_args(RopeScalingKind))}, found {self.kind!r}")
        if not 1 <= self.factor < float("inf"):
            raise Error(f"RopeScaling.factor must be at least 1 and finite, found {self.factor}")
        if self.kind == "llama3" and not (
            0 < self.low_freq_factor < self.high_freq_factor < float("inf") and self.original_context > 0
        ):
            raise Error(
                "RopeScaling needs 0 < low_freq_factor < high_freq_factor and a positive original_context, found "
                f"{self.low_freq_factor}, {self.high_freq_factor} and {self.original_context}"
            )
        lists = {"factors": self.factors, "long_factors": self.long_factors}
        for name in ("factors", "long_factors")[: {"factors": 1, "longrope": 2}.get(self.kind, 0)]:
            if not (lists[name] and all(0 < f < float("inf") for f in lists[name])):
                raise Error(f"RopeScaling.{name} must be positive and finite, found {lists[name]}")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast < float("inf"):
            raise Error(
                f"RopeScaling needs 0 < beta_slow <= beta_fast, found {self.beta_slow:g} and {self.beta_fast:g}"
            )
        if self.kind in ("yarn", "longrope") and self.original_context < 1:
            raise Error(f"RopeScaling.original_context must be positive, found {self.original_context}")
        if not 0 < self.attention_factor < float("inf"):
            raise Error(f"RopeScaling.attention_factor must be positive and finite, found {self.attention_factor}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model of the Llama family. Raises `Error` for values that contradict each other."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context: int
    """The longest sequence, in tokens, that the model was trained for (max_position_embeddings)."""
    head_dim: int = 0
    """0 means dim / n_heads."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_pairing: RopePairing = INTERLEAVED
    tied_embeddings: bool = True
    """The output layer uses the embedding table."""
    qkv_bias: bool = False
    o_bias: bool = False
    """Attention's output projection has a bias. Hugging Face's `attention_bias` sets it together with `qkv_bias`."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Each head of q and k goes through RMSNorm before RoPE (Qwen3)."""
    window: int = 0
    """Sliding window: positions that a token attends to, itself included. 0 means all."""
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "context"):
            if (value := getattr(self, name)) <= 0:
                raise Error(f"ModelConfig.{name} must be positive, found {value}")
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise Error(f"ModelConfig.dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim <= 0 or self.head_dim % 2:
            raise Error(f"ModelConfig.head_dim must be even and positive (RoPE rotates pairs), found {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise Error(f"ModelConfig.n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if not isinstance(self.rope_pairing, str) or self.rope_pairing not in _PAIRING_NAMES:
            raise Error(f"rope_pairing must be one of {sorted(_PAIRING_NAMES)}, found {self.rope_pairing!r}")
        object.__setattr__(self, "rope_pairing", _PAIRING_NAMES[self.rope_pairing])
        if not 0 < self.rope_theta < float("inf"):
            raise Error(f"rope_theta must be positive and finite, found {self.rope_theta}")
        if not 0 <= self.norm_eps < float("inf"):
            raise Error(f"norm_eps must be finite and not negative, found {self.norm_eps}")
        if not 0 <= self.window <= 1 << 31:
            raise Error(f"ModelConfig.window must be from 0 to 2^31, found {self.window}")
        scaling, pairs = self.rope_scaling, self.head_dim // 2
        for factors in (scaling.factors, scaling.long_factors) if scaling else ():
            if factors and len(factors) != pairs:
                raise Error(f"RoPE has {pairs} pairs per head, found {len(factors)} factors")
        if scaling and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise Error(f"YaRN needs a rope_theta above 1, found {self.rope_theta:g}")
        if scaling and scaling.kind == "dynamic" and self.head_dim == 2:
            raise Error("dynamic RoPE scaling needs heads of more than 2 dimensions")

    @property
    def default_context(self) -> int:
        """Default size of the KV cache, in tokens."""
        return min(self.context, DEFAULT_CONTEXT)

    @property
    def q_dim(self) -> int:
        """Width of the queries of all heads: n_heads · head_dim."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the keys (or values) of all key/value heads: n_kv_heads · head_dim."""
        return self.n_kv_heads * self.head_dim

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the weights of one layer: (rows, columns) or (length,). Optional ones come last."""
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (self.dim,),
            "wq": (self.q_dim, self.dim),
            "wk": (self.kv_dim, self.dim),
            "wv": (self.kv_dim, self.dim),
            "wo": (self.dim, self.q_dim),
            "ffn_norm": (self.dim,),
            "w1": (self.hidden_dim, self.dim),
            "w2": (self.dim, self.hidden_dim),
            "w3": (self.hidden_dim, self.dim),
        }
        if self.qkv_bias:
            shapes |= {"bq": (self.q_dim,), "bk": (self.kv_dim,), "bv": (self.kv_dim,)}
        if self.o_bias:
            shapes["bo"] = (self.dim,)
        if self.mlp_bias:
            shapes |= {"b1": (self.hidden_dim,), "b2": (self.dim,), "b3": (self.hidden_dim,)}
        if self.qk_norm:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        return shapes

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every weight, "tok_embeddings" first. "output" only if it is not tied."""
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self.layer_shapes().items()}
        shapes["norm"] = (self.dim,)
        if not self.tied_embeddings:
            shapes["output"] = (self.vocab_size, self.dim)
        return shapes

    def with_overrides(
        self, rope_pairing: RopePairing | None = None, rope_theta: float | None = None, norm_eps: float | None = None
    ) -> ModelConfig:
        """A copy with these values where they are not None. Raises `Error` for values out of range."""
        given = {"rope_pairing": rope_pairing, "rope_theta": rope_theta, "norm_eps": norm_eps}
        for name in ("rope_theta", "norm_eps"):
            if given[name] is not None:
                given[name] = real_number(name, given[name], 0, 1e30, "a number that is not negative")
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


NAMED_SHAPES: dict[str, ModelConfig] = {
    "stories260K": ModelConfig(64, 172, 5, 8, 4, 512, 512),
    "stories15M": ModelConfig(288, 768, 6, 6, 6, 32000, 256),
    "stories42M": ModelConfig(512, 1376, 8, 8, 8, 32000, 1024),
    "stories110M": ModelConfig(768, 2048, 12, 12, 12, 32000, 1024),
    "TinyLlama-1.1B": ModelConfig(2048, 5632, 22, 32, 4, 32000, 2048, tied_embeddings=False),
    "Llama-2-7B": ModelConfig(4096, 11008, 32, 32, 32, 32000, 4096, tied_embeddings=False),
    "Llama-3.2-1B": ModelConfig(
        2048,
        8192,
        16,
        32,
        8,
        128256,
        131072,
        rope_theta=500000.0,
        rope_pairing=HALF_SPLIT,
        rope_scaling=RopeScaling("llama3", 32.0),
    ),
}
"""Name → config, for benchmarks and tests that build random models."""
