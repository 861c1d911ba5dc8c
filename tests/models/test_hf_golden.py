"""Logits of Hugging Face transformers for small random models of every architecture (golden/make_hf.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numballama
from numballama.config import INTERLEAVED, ModelConfig, RopeScaling
from numballama.loader import open_checkpoint
from numballama.rope import rope_frequencies
from tests.helpers.random_models import reference_logits

HF = Path(__file__).parents[1] / "golden" / "hf"
FOLDERS = sorted(path for path in HF.iterdir() if path.is_dir() and not path.name.startswith("olmo2"))
"""OLMo 2 is added by docs/architecture.md, whose test has its own."""
CLOSE = 2e-4
"""In float32 on both sides; logits here are of size 1 to 4."""


def expected(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.load(folder / "expected.npz")
    return arrays["ids"], arrays["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_logits_are_those_of_transformers(folder: Path) -> None:
    ids, logits = expected(folder)
    assert np.abs(logits).max() > 1
    for device in ("reference", "cpu"):
        # dynamic scaling is that of a text that fills the cache: as long as the one transformers saw
        with numballama.compile(folder, device=device, context=len(ids), threads=1) as model:
            difference = np.abs(model.logits(ids) - logits).max()
        assert difference <= CLOSE, f"{device}: {difference}"


def test_every_architecture_is_there_twice() -> None:
    kinds = {name for path in FOLDERS for name in [path.name[:-2]]}
    assert len(FOLDERS) == 2 * len(kinds) == 40
    assert {
        "llama-yarn",
        "llama-yarn-mscale",
        "qwen3-yarn-attention",
        "llama-longrope",
        "llama-longrope-short",
    } <= kinds
    assert {"llama", "llama3", "llama-linear", "llama-dynamic", "mistral", "qwen2", "qwen3", "smollm2"} <= kinds


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("llama-0", {"rope_pairing": INTERLEAVED}),
    ("llama-0", {"norm_eps": 1e-2}),
    ("smollm2-0", {"rope_theta": 1e4}),
    ("mistral-0", {"window": 0}),
    ("mistral-0", {"window": 7}),
    ("mistral-0", {"window": 9}),
    ("qwen2-tied-window-0", {"window": 4}),
    ("llama3-0", {"rope_scaling": None}),
    ("llama3-0", {"rope_scaling": RopeScaling("llama3", 8.0, original_context=40)}),
    ("llama3-0", {"rope_scaling": RopeScaling("llama3", 8.0, high_freq_factor=5.0, original_context=32)}),
    ("llama-linear-0", {"rope_scaling": None}),
    ("llama-dynamic-0", {"rope_scaling": None}),
    ("llama-yarn-0", {"rope_scaling": None}),
    ("llama-yarn-0", {"rope_scaling": RopeScaling("yarn", 4.0, original_context=32)}),
    ("llama-yarn-0", {"rope_scaling": RopeScaling("linear", 4.0, attention_factor=0.1 * np.log(4) + 1)}),
    ("llama-longrope-0", {"rope_scaling": None}),
    ("qwen3-0", {"qk_norm": False}),
    ("llama-biases-0", {"o_bias": False}),
    ("llama-biases-0", {"mlp_bias": False}),
    ("llama-biases-0", {"qkv_bias": False}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_the_comparison_notices(name: str, change: dict[str, Any]) -> None:
    """With any one value of the configuration wrong, the logits differ by far more than the tolerance."""
    ids, logits = expected(HF / name)
    opened = open_checkpoint(HF / name)
    config = replace(opened.config, **change)
    weights = {key: opened.weights[key] for key in config.weight_shapes()}
    assert np.abs(reference_logits(config, weights, ids) - logits).max() > 20 * CLOSE


# ---- frequencies ----

BASE = ModelConfig(16, 24, 1, 2, 2, 40, 64)


def test_dynamic_scaling_begins_where_the_models_context_ends() -> None:
    config = replace(BASE, rope_scaling=RopeScaling("dynamic", 2.0))
    plain = rope_frequencies(BASE)
    assert rope_frequencies(config) == rope_frequencies(config, 64) == rope_frequencies(config, 10) == plain
    # Bloc97's formula: theta · (factor · length / context - (factor - 1)) ^ (d / (d - 2))
    theta = 10000 * (2 * 96 / 64 - 1) ** (8 / 6)
    np.testing.assert_allclose(rope_frequencies(config, 96), [theta ** (-i / 4) for i in range(4)], rtol=1e-12)


def test_llama3_keeps_divides_and_interpolates() -> None:
    config = replace(
        BASE, head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), context=131072
    )
    plain, scaled = np.array(rope_frequencies(replace(config, rope_scaling=None))), np.array(rope_frequencies(config))
    waves = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[waves < 2048], plain[waves < 2048])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 32, rtol=1e-12)
    between = (waves > 2048) & (waves < 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 32))[between].all()
