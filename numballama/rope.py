"""RoPE frequencies: how fast each pair of dimensions rotates, with the scaling for long contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .config import ModelConfig


def rope_frequencies(config: ModelConfig, context: int = 0) -> list[float]:
    """Frequencies [head_dim / 2] in radians per position: theta^(-2i / head_dim) for pair i (Su et al., RoFormer,
    2021), scaled by `config.rope_scaling`.

    `context`: tokens of the KV cache. Only "dynamic" scaling depends on it. Transformers recomputes the frequencies for
    each length of text beyond `config.context`. Here all positions use those for a text that fills the KV cache, which
    are unscaled for a `context` up to `config.context`.
    """
    theta, scaling, pairs = config.rope_theta, config.rope_scaling, config.head_dim // 2
    if scaling and scaling.kind == "dynamic":
        growth = scaling.factor * max(context, config.context) / config.context - (scaling.factor - 1)
        theta *= growth ** (pairs / (pairs - 1))
    return [theta ** (-i / pairs) / divisor for i, divisor in enumerate(rope_divisors(config))]


def rope_divisors(config: ModelConfig) -> Sequence[float]:
    """Divisors [head_dim / 2] of the frequencies, for "linear", "llama3" and "factors" scaling. 1 for others.

    "llama3" (Llama 3.1's reference code): pairs with a wavelength below original_context / high_freq_factor tokens keep
    their frequency. Those with one above original_context / low_freq_factor are divided by `factor`. In between, the
    frequency changes linearly with the number of rotations in the original context.
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
    rotations = (scaling.original_context * frequency / (2 * math.pi) for frequency in frequencies)
    ramp = (min(max((n - low) / (high - low), 0.0), 1.0) for n in rotations)
    return [1 / ((1 - smooth) / scaling.factor + smooth) for smooth in ramp]
