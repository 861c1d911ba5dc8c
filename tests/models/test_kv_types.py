"""A real model with every type of KV cache: how far its predictions are from those with float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from numballama.quantization.types import KVType
from tests.helpers.bounds import story_model

pytestmark = pytest.mark.slow

POSITIONS = 200


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    result: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return result


@pytest.fixture(scope="module")
def story(models: Path) -> tuple[list[int], np.ndarray]:
    """Tokens that the model wrote itself, and its log probabilities after each, with a cache of float16."""
    model = story_model(models, "stories15M", device="cpu", kv_dtype="f16")
    ids = [1, *(piece.token for piece in model.stream(None, max_tokens=POSITIONS - 1, temperature=0.8, seed=1))]
    return ids, log_probabilities(model.logits(ids))


@pytest.mark.parametrize(("kv", "most"), [("f32", 2e-6), ("bf16", 5e-5), ("q8_0", 1e-3)])
def test_divergence_from_float16(models: Path, story: tuple[list[int], np.ndarray], kv: KVType, most: float) -> None:
    """The mean Kullback-Leibler divergence; heads have 48 elements, a block of 32 and one of 16."""
    ids, want = story
    got = log_probabilities(story_model(models, "stories15M", device="cpu", kv_dtype=kv).logits(ids))
    divergence = (np.exp(want) * (want - got)).sum(axis=1)
    assert len(ids) > 100
    assert 0 <= divergence.mean() < most, divergence.mean()
