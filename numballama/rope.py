"""RoPE frequencies: how fast each pair of dimensions rotates, with the scaling for long contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, context: int = 0) -> list[float]:
    """Frequencies [head_dim / 2] in radians per position: theta^(-2i / head_dim) for pair i (Su et al., RoFormer,
    2021), scaled by `config.rope_scaling`.

    `context`: tokens of the KV cache. Only "dynamic" and "longrope" scaling depend on it. Transformers chooses the
    frequencies by each text's length: anew for each one above `config.context`, and the long factors above
    `original_context`. Here all positions use those for a text that fills the KV cache.
    """
    theta, scaling, pairs = config.rope_theta, config.rope_scaling, config.head_dim // 2
    if scaling and scaling.kind == "dynamic":
        growth = scaling.factor * max(context, config.context) / config.context - (scaling.factor - 1)
        theta *= growth ** (pairs / (pairs - 1))
    return [theta ** (-i / pairs) / divisor for i, divisor in enumerate(rope_divisors(config, context))]


def attention_factor(config: ModelConfig) -> float:
    """What rotated queries and keys are multiplied by: 1 without scaling."""
    return config.rope_scaling.attention_factor if config.rope_scaling else 1.0


def rope_divisors(config: ModelConfig, context: int = 0) -> Sequence[float]:
    """Divisors [head_dim / 2] of the frequencies, for all kinds of scaling but "dynamic", where they are 1.

    `context`: as for `rope_frequencies`.

    "llama3" (Llama 3.1's reference code): pairs with a wavelength below original_context / high_freq_factor tokens keep
    their frequency. Those with one above original_context / low_freq_factor are divided by `factor`. In between, the
    frequency changes linearly with the number of rotations in the original context; with "yarn" it changes linearly
    with the pair's number.
    """
    scaling, pairs = config.rope_scaling, config.head_dim // 2
    if scaling is None or scaling.kind == "dynamic":
        return [1.0] * pairs
    if scaling.kind == "factors":
        return scaling.factors
    if scaling.kind == "longrope":
        return scaling.long_factors if context > scaling.original_context else scaling.factors
    if scaling.kind == "linear":
        return [scaling.factor] * pairs
    ramp = _yarn_ramp(config, scaling) if scaling.kind == "yarn" else _llama3_ramp(config, scaling)
    return [1 / ((1 - kept) / scaling.factor + kept) for kept in ramp]


def _llama3_ramp(config: ModelConfig, scaling: RopeScaling) -> list[float]:
    """How much of its frequency each pair keeps: 1 is all, 0 is the frequency / factor."""
    pairs, low, high = config.head_dim // 2, scaling.low_freq_factor, scaling.high_freq_factor
    frequencies = (config.rope_theta ** (-i / pairs) for i in range(pairs))
    rotations = (scaling.original_context * frequency / (2 * math.pi) for frequency in frequencies)
    return [min(max((n - low) / (high - low), 0.0), 1.0) for n in rotations]


def _yarn_ramp(config: ModelConfig, scaling: RopeScaling) -> list[float]:
    """Like `_llama3_ramp`; between the pairs that rotate `beta_fast` and `beta_slow` times in the original context."""

    def pair(rotations: float) -> float:
        wavelengths = math.log(scaling.original_context) - math.log(rotations * 2 * math.pi)
        return config.head_dim * wavelengths / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    span = high - low or 0.001
    return [1 - min(max((i - low) / span, 0.0), 1.0) for i in range(config.head_dim // 2)]
