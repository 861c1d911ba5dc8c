"""`ModelConfig` and `RopeScaling` refuse values that contradict each other, and name the shapes of weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from numballama.config import HALF_SPLIT, INTERLEAVED, NAMED_SHAPES, ModelConfig, RopeScaling
from numballama.errors import Error

CONFIG = ModelConfig(64, 96, 2, 4, 2, 40, 16)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("dim", 0, "dim must be positive"),
        ("n_layers", -1, "n_layers must be positive"),
        ("n_kv_heads", 3, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ("head_dim", 7, "head_dim must be even"),
        ("rope_pairing", "thirds", "rope_pairing must be one of"),
        ("rope_theta", math.inf, "rope_theta must be positive and finite"),
        ("rope_theta", 0.0, "rope_theta must be positive and finite"),
        ("norm_eps", -1e-6, "norm_eps must be finite and not negative"),
        ("norm_eps", math.nan, "norm_eps must be finite and not negative"),
        ("window", -1, "window must be from 0"),
        ("rope_scaling", RopeScaling("factors", factors=(1.0,)), "8 pairs per head, found 1 factors"),
    ],
)
def test_contradictions_are_refused(field: str, value: Any, match: str) -> None:
    with pytest.raises(Error, match=match):
        replace(CONFIG, **{field: value})


def test_heads_divide_the_width_unless_their_own_is_given() -> None:
    with pytest.raises(Error, match="dim 66 is not a multiple of n_heads 4"):
        replace(CONFIG, dim=66, head_dim=0)
    config = replace(CONFIG, dim=66, head_dim=16)
    assert (config.q_dim, config.kv_dim) == (64, 32)


@pytest.mark.parametrize("name", ["half", "half-split", "half_split", "neox"])
def test_spellings_of_the_pairing(name: str) -> None:
    assert replace(CONFIG, rope_pairing=name).rope_pairing == HALF_SPLIT
    assert CONFIG.rope_pairing == replace(CONFIG, rope_pairing="normal").rope_pairing == INTERLEAVED


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("cubic",), "kind must be one of linear, dynamic, llama3, factors, yarn, longrope"),
        (("linear", 0.5), "factor must be at least 1"),
        (("linear", math.inf), "factor must be at least 1 and finite"),
        (("llama3", 8.0, 4.0, 1.0), "0 < low_freq_factor < high_freq_factor"),
        (("llama3", 8.0, 1.0, 4.0, 0), "positive original_context"),
        (("factors",), "factors must be positive and finite"),
    ],
)
def test_bad_rope_scaling_is_refused(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(Error, match=match):
        RopeScaling(*arguments)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "longrope", "factors": (1.0,)}, "long_factors must be positive"),
        ({"kind": "longrope", "long_factors": (1.0,)}, "RopeScaling.factors must be positive"),
        ({"kind": "longrope", "factors": (1.0,), "long_factors": (math.inf,)}, "long_factors must be positive"),
        ({"kind": "yarn", "beta_fast": 0.5}, "0 < beta_slow <= beta_fast, found 1 and 0.5"),
        ({"kind": "yarn", "beta_slow": 0.0}, "0 < beta_slow"),
        ({"kind": "yarn", "original_context": 0}, "original_context must be positive"),
        ({"kind": "linear", "attention_factor": 0.0}, "attention_factor must be positive"),
        ({"kind": "linear", "attention_factor": math.inf}, "attention_factor must be positive"),
    ],
)
def test_bad_yarn_and_longrope_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(Error, match=match):
        RopeScaling(**fields)


def test_a_scaling_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(Error, match="8 pairs per head, found 2 factors"):
        replace(CONFIG, rope_scaling=RopeScaling("longrope", factors=(1.0,) * 8, long_factors=(1.0, 2.0)))
    with pytest.raises(Error, match="YaRN needs a rope_theta above 1, found 1"):
        replace(CONFIG, rope_theta=1.0, rope_scaling=RopeScaling("yarn", 2.0))


def test_shapes_of_weights() -> None:
    shapes = CONFIG.weight_shapes()
    assert next(iter(shapes)) == "tok_embeddings" and list(shapes)[-1] == "norm"
    assert shapes["layers.1.wk"] == (32, 64)
    assert shapes["layers.0.w2"] == (64, 96)
    assert not {"layers.0.bq", "layers.0.q_norm", "output"} & shapes.keys()
    more = replace(CONFIG, tied_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    assert more.weight_shapes()["output"] == (40, 64)
    assert more.layer_shapes().keys() - CONFIG.layer_shapes().keys() == {
        "bq", "bk", "bv", "bo", "b1", "b2", "b3", "q_norm", "k_norm",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_the_default_context_is_limited(name: str) -> None:
    config = NAMED_SHAPES[name]
    assert config.default_context == min(config.context, 4096)


def test_overrides_replace_what_is_not_none() -> None:
    assert CONFIG.with_overrides() == CONFIG
    changed = CONFIG.with_overrides(rope_pairing="half", rope_theta=5e5)
    assert changed == replace(CONFIG, rope_pairing=HALF_SPLIT, rope_theta=5e5)
    with pytest.raises(Error, match="rope_theta"):
        CONFIG.with_overrides(rope_theta=-1.0)
