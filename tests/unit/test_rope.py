"""RoPE frequencies and how each kind of scaling changes them. Against transformers: tests/models/test_hf_golden.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from numballama.config import ModelConfig, RopeScaling
from numballama.rope import attention_factor, rope_divisors, rope_frequencies

CONFIG = ModelConfig(64, 96, 1, 1, 1, 40, 32, head_dim=64)


def scaled(scaling: RopeScaling) -> ModelConfig:
    return replace(CONFIG, rope_scaling=scaling)


def test_frequencies_are_powers_of_theta() -> None:
    np.testing.assert_allclose(rope_frequencies(CONFIG), 10000.0 ** (-2 * np.arange(32) / 64), rtol=1e-12)
    assert rope_divisors(CONFIG) == [1.0] * 32


def test_linear_and_factors_divide() -> None:
    plain = np.array(rope_frequencies(CONFIG))
    np.testing.assert_allclose(rope_frequencies(scaled(RopeScaling("linear", 4.0))), plain / 4, rtol=1e-12)
    factors = tuple(1.0 + i for i in range(32))
    np.testing.assert_allclose(
        rope_frequencies(scaled(RopeScaling("factors", factors=factors))), plain / factors, rtol=1e-12
    )


def test_dynamic_scaling_begins_beyond_the_models_context() -> None:
    config = scaled(RopeScaling("dynamic", 2.0))
    assert rope_frequencies(config, 32) == rope_frequencies(config) == rope_frequencies(CONFIG)
    theta = 10000.0 * (2.0 * 128 / 32 - 1) ** (64 / 62)
    np.testing.assert_allclose(rope_frequencies(config, 128), theta ** (-2 * np.arange(32) / 64), rtol=1e-12)


def test_llama3_keeps_high_frequencies_and_divides_low_ones() -> None:
    config = scaled(RopeScaling("llama3", 8.0, 1.0, 4.0, 512))
    wavelengths = 2 * math.pi / np.array(rope_frequencies(CONFIG))
    divisors = np.array(rope_divisors(config))
    assert (divisors[wavelengths < 512 / 4] == 1).all()
    assert (divisors[wavelengths > 512] == 8).all()
    between = divisors[(wavelengths > 512 / 4) & (wavelengths < 512)]
    assert between.size and ((between > 1) & (between < 8)).all()
    assert (np.diff(divisors) >= 0).all()


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """Pairs that rotate more than 32 times in 4,096 tokens, and fewer than once; whole pairs unless told otherwise."""
    config = replace(CONFIG, rope_scaling=RopeScaling("yarn", 8.0, original_context=4096))
    rotations = 4096 * np.array(rope_frequencies(CONFIG)) / (2 * math.pi)
    divisors = np.array(rope_divisors(config))
    assert (np.diff(divisors) >= 0).all()
    low, high = int((rotations >= 32).sum()) - 1, int((rotations > 1).sum())
    assert (divisors[: low + 1] == 1).all() and divisors[low + 1] > 1
    np.testing.assert_allclose(divisors[high:], 8, rtol=1e-12)
    assert divisors[high - 1] < 8
    ramp = (1 / divisors - 1 / 8) / (1 - 1 / 8)
    np.testing.assert_allclose(np.diff(ramp[low : high + 1]), -1 / (high - low), rtol=1e-9)
    exact = np.array(
        rope_divisors(replace(config, rope_scaling=RopeScaling("yarn", 8.0, original_context=4096, truncate=False)))
    )
    assert (exact[low + 1 : high] != divisors[low + 1 : high]).all()


def test_no_beta_is_too_small_for_yarn() -> None:
    scaling = RopeScaling("yarn", 8.0, beta_slow=5e-324, original_context=1 << 31)
    assert all(1 <= divisor <= 8 for divisor in rope_divisors(scaled(scaling)))


def test_longrope_takes_its_long_factors_beyond_the_original_context() -> None:
    scaling = RopeScaling("longrope", original_context=32, factors=(1.5,) * 32, long_factors=(4.0,) * 32)
    plain = np.array(rope_frequencies(CONFIG))
    np.testing.assert_allclose(rope_frequencies(scaled(scaling), 32), plain / 1.5, rtol=1e-12)
    np.testing.assert_allclose(rope_frequencies(scaled(scaling), 33), plain / 4, rtol=1e-12)


def test_the_attention_factor_is_1_without_scaling() -> None:
    assert attention_factor(CONFIG) == 1 == attention_factor(scaled(RopeScaling("linear", 2.0)))
    assert attention_factor(scaled(RopeScaling("yarn", 2.0, attention_factor=1.25))) == 1.25
