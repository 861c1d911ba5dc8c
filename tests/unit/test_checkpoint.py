"""Weights: a lazy one is computed when its data is read; `require_weights` compares names and shapes with a config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from numballama import load_tokenizer
from numballama.checkpoint import LazyWeight, Weight, require_weights
from numballama.config import ModelConfig
from numballama.errors import Error
from numballama.quantization.convert import convert
from numballama.quantization.types import F32, WeightType
from tests.helpers.random_models import random_checkpoint

INT8 = WeightType("int8", 4)


def lazy(cache: bool) -> tuple[LazyWeight, list[Weight]]:
    """A lazy int8 weight, and the list of what it has made."""
    made: list[Weight] = []

    def make() -> Weight:
        made.append(convert(Weight((2, 6), F32, np.arange(12, dtype=np.float32).reshape(2, 6)), INT8))
        return made[-1]

    return LazyWeight((2, 6), INT8, make, cache=cache), made


def test_a_lazy_weight_is_made_each_time_or_once() -> None:
    for cache, times in ((False, 2), (True, 1)):
        weight, made = lazy(cache)
        assert weight.nbytes == 12 + 3 * 4 and weight.shape == (2, 6) and weight.type == INT8
        assert not made, "size and shape need no data"
        first, second = weight.data, weight.data
        assert len(made) == times and (first is second) == cache
        np.testing.assert_array_equal(first, second)
        assert weight.scales is not None and len(weight.scales) == 3
        assert len(made) == times, "the scales were made with the data"


def test_scales_can_be_asked_for_first() -> None:
    weight, made = lazy(cache=False)
    assert weight.scales is made[0].scales
    assert weight.make() is made[1], "for the caller alone"


def test_a_weights_size_includes_its_scales() -> None:
    weight = Weight((2, 4), INT8, np.zeros((2, 4), np.int8), np.zeros(2, np.float32))
    assert weight.nbytes == 8 + 8
    assert repr(weight) == f"Weight(shape=(2, 4), type={INT8})"


def test_weights_must_be_those_of_the_config() -> None:
    config = ModelConfig(16, 24, 1, 2, 1, 40, 16)
    weights = random_checkpoint(config).weights
    require_weights(config, weights)
    with pytest.raises(Error, match="norm in one but not the other"):
        require_weights(config, {name: weight for name, weight in weights.items() if name != "norm"})
    with pytest.raises(Error, match=r"weight norm has shape \(1,\), its config says \(16,\)"):
        require_weights(config, weights | {"norm": Weight((1,), F32, np.ones(1, np.float32))})


def test_ids_that_end_a_text(tiny_tokenizer: Path) -> None:
    checkpoint = random_checkpoint(ModelConfig(8, 8, 1, 2, 2, 300, 8))
    with pytest.raises(Error, match=r"random carries no tokenizer: pass its file to compile\(…, tokenizer=…\)"):
        checkpoint.end_ids  # noqa: B018
    checkpoint.tokenizer_error = "it is damaged"
    with pytest.raises(Error, match="no tokenizer, because it is damaged: pass"):
        checkpoint.require_tokenizer()
    checkpoint.tokenizer = load_tokenizer(tiny_tokenizer)
    assert checkpoint.end_ids == {2}
    checkpoint.bos_is_stop_token, checkpoint.stop_token_ids = True, (7,)
    assert checkpoint.end_ids == {1, 2, 7} and checkpoint.require_tokenizer() is checkpoint.tokenizer
