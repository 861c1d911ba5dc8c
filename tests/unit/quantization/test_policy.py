"""Which weights change their type, and to which."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.errors import Error
from numballama.quantization import policy
from numballama.quantization.convert import DEFAULT_GROUP, convert
from numballama.quantization.types import F16, F32, FALLBACK_TYPE, Q8_0, TYPE_TRAITS, WeightType


def weights_of(config: ModelConfig, kind: WeightType = F32) -> dict[str, Weight]:
    """Zeros: matrices of type `kind`, float32 vectors."""
    weights = {}
    for name, shape in config.weight_shapes().items():
        weight = Weight(shape, F32, np.zeros(shape, np.float32))
        weights[name] = convert(weight, kind) if len(shape) == 2 else weight
    return weights


CONFIG = ModelConfig(64, 96, 1, 4, 2, 40, 16, tied_embeddings=False)
TIED = ModelConfig(64, 96, 1, 4, 2, 40, 16)
MATRICES = {f"layers.0.{name}" for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}


@pytest.mark.parametrize(
    ("config", "embeddings", "more"),
    [
        (CONFIG, False, {"output"}),
        (CONFIG, True, {"output", "tok_embeddings"}),
        (TIED, False, {"tok_embeddings"}),  # the classifier is the embedding table
        (TIED, True, {"tok_embeddings"}),
    ],
)
def test_matrices_of_linear_layers_change(config: ModelConfig, embeddings: bool, more: set[str]) -> None:
    types = policy.types_to_convert(config, weights_of(config), "q8_0", embeddings)
    assert types == dict.fromkeys(MATRICES | more, Q8_0)


def test_nothing_changes_without_a_dtype_or_to_the_same_one() -> None:
    assert policy.types_to_convert(CONFIG, weights_of(CONFIG), None) == {}
    assert policy.types_to_convert(CONFIG, weights_of(CONFIG, F16), "f16") == {}


@pytest.mark.parametrize(("columns", "group"), [(128, 64), (64, 64), (96, 32), (100, 64), (1, 64)])
def test_int8_groups_divide_rows_where_they_can(columns: int, group: int) -> None:
    assert policy.weight_type("int8", "w", columns) == WeightType("int8", group)
    assert DEFAULT_GROUP == 64


@pytest.mark.parametrize("dtype", policy.DTYPES)
def test_rows_are_whole_blocks(dtype: str) -> None:
    size = TYPE_TRAITS[dtype].block_size
    assert policy.weight_type(dtype, "w", 3 * size).name == dtype
    if size > 1:
        with pytest.raises(Error, match=rf"w cannot become {dtype}: its rows of {size + 1} elements .* of {size}"):
            policy.weight_type(dtype, "w", size + 1)


def test_types_without_kernels_fall_back() -> None:
    weights = {
        name: Weight((1, 256), WeightType(name), np.zeros((1, WeightType(name).nbytes(256)), np.uint8))
        for name in (*FALLBACK_TYPE, "q8_0", "q4_k")
    }
    assert policy.fallback_types(weights) == FALLBACK_TYPE


def test_weights_are_converted_where_they_must_be() -> None:
    """Others are the same objects; without a target the mapping itself comes back."""
    weights = weights_of(CONFIG)
    assert policy.convert_weights(CONFIG, weights, None) is weights
    converted = policy.convert_weights(CONFIG, weights, "q8_0")
    changed = {name for name, weight in converted.items() if weight is not weights[name]}
    assert changed == MATRICES | {"output"} and {converted[name].type for name in changed} == {Q8_0}


def test_a_copy_that_does_not_fit_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.memory, "available_bytes", lambda: 10)
    with pytest.raises(Error, match=r"a copy of the linear weights as f16 takes .*leave dtype= out"):
        policy.convert_weights(CONFIG, weights_of(CONFIG), "f16")
