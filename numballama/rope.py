"""How fast RoPE turns each pair of dimensions, and how that is scaled for more context than was first meant."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .config import ModelConfig


def rope_frequencies(config: ModelConfig, context: int = 0) -> list[float]:
    """Radians a position that each pair of dimensions turns: theta^(-2i / head_dim) (Su et al., RoFormer, 2021), scaled
    as `config.rope_scaling` says.

    "dynamic" depends on how long a text is: transformers computes it anew for each length beyond `config.context`.
    Here one vector serves all positions: that of a text as long as the KV cache, `context` tokens. Up to the model's
    own context that is no scaling at all.
    """
    theta, scaling, pairs = config.rope_theta, config.rope_scaling, config.head_dim // 2
    if scaling and scaling.kind == "dynamic":
        stretch = scaling.factor * max(context, config.context) / config.context - (scaling.factor - 1)
        theta *= stretch ** (pairs / (pairs - 1))
    return [theta ** (-i / pairs) / by for i, by in enumerate(rope_divisors(config))]


def rope_divisors(config: ModelConfig) -> Sequence[float]:
    """What "linear", "llama3" and "factors" scaling divide each frequency by.

    "llama3": waves shorter than original_context / high_freq_factor tokens stay, longer ones than
    original_context / low_freq_factor turn `factor` times slower, and between them the speed changes linearly with
    the number of turns in the original context (Llama 3.1's reference code).
    """
    scaling, pairs = config.rope_scaling, config.head_dim // 2
    if scaling is None or scaling.kind == "dynamic":
        return [1.0] * pairs
    if scaling.kind == "factors":
        return scaling.factors
    if scaling.kind == "linear":
        return [scaling.factor] * pairs
    frequencies = (config.rope_theta ** (-i / pairs) for i in range(pairs))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = (scaling.original_context * frequency / (2 * math.pi) for frequency in frequencies)
    kept = (min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns)
    return [1 / ((1 - share) / scaling.factor + share) for share in kept]
