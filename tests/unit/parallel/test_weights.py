"""A rank's part of a weight: the same numbers as that part of the whole, views where they can be, for every type."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.checkpoint import LazyWeight, Weight
from numballama.errors import Error
from numballama.parallel import weights as parallel_weights
from numballama.parallel.shares import Part, Shares
from numballama.parallel.weights import converted, part_of, part_type, rank_weights
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.types import F32, LINEAR_TYPES, Q8_0, TYPE_TRAITS
from tests.helpers.bounds import as_weight
from tests.helpers.random_models import SMALL, random_checkpoint


def matrix(kind: str, rows: int, columns: int, group: int = 32, misaligned: bool = False) -> Weight:
    numbers = np.random.default_rng(rows).standard_normal((rows, columns), dtype=np.float32)
    return as_weight(numbers, kind, group if kind == "int8" else 0, misaligned)


@pytest.mark.parametrize("kind", LINEAR_TYPES)
@given(data=st.data())
def test_a_part_has_the_numbers_of_the_whole(kind: str, data: st.DataObject) -> None:
    block = TYPE_TRAITS[kind].block_size
    rows, columns = data.draw(st.integers(1, 9)), block * data.draw(st.integers(1, 40 if block == 1 else 3))
    weight = matrix(kind, rows, columns, data.draw(st.integers(1, 70)), data.draw(st.booleans()))
    axis = data.draw(st.integers(0, 1))
    unit = block if axis else 1
    begin, end = sorted(data.draw(st.lists(st.integers(0, weight.shape[axis] // unit), min_size=2, max_size=2)))
    part = Part(axis, begin * unit, end * unit)
    got = part_of(weight, part)
    expected = dequantize(weight)[(slice(None),) * axis + (slice(part.begin, part.end),)]
    assert got.shape == expected.shape and got.type == part_type(weight, part) and got.type.name == kind
    assert (
        got.nbytes
        == got.type.nbytes(expected.size)
        == got.data.nbytes + (0 if got.scales is None else got.scales.nbytes)
    )
    assert got.data.flags.c_contiguous
    np.testing.assert_array_equal(dequantize(Weight(got.shape, got.type, got.data, got.scales)), expected)


@pytest.mark.parametrize("kind", LINEAR_TYPES)
def test_rows_are_a_view_and_columns_a_copy_of_no_more(kind: str) -> None:
    block = max(TYPE_TRAITS[kind].block_size, 32)
    weight = matrix(kind, 6, 4 * block)
    rows = part_of(weight, Part(0, 2, 5))
    assert np.shares_memory(rows.data, weight.data) and not isinstance(rows, LazyWeight)
    columns = part_of(weight, Part(1, block, 3 * block))
    assert isinstance(columns, LazyWeight) and not np.shares_memory(columns.data, weight.data)
    assert columns.data is columns.data, "kernels keep its address"
    base = columns.data if columns.data.base is None else columns.data.base
    assert base.nbytes == weight.data.nbytes // 2, "no copy of the whole is kept"
    assert part_of(weight, Part(None)) is weight


def test_groups_that_are_cut_become_smaller() -> None:
    """A row of 24 with groups of 16: the second row begins inside of a group."""
    weight = matrix("int8", 4, 24, 16)
    assert part_type(weight, Part(0, 2, 4)).group == 16, "two rows are three groups"
    assert part_type(weight, Part(0, 1, 4)).group == 8
    assert part_type(weight, Part(1, 8, 16)).group == 8
    assert part_type(matrix("int8", 4, 48, 16), Part(1, 16, 48)).group == 16
    assert part_type(weight, Part(None)).group == 16


def test_columns_inside_of_a_block_are_refused() -> None:
    with pytest.raises(Error, match=r"columns 16 to 64 of .* are not whole blocks of 32"):
        part_of(matrix("q8_0", 2, 64), Part(1, 16, 64))
    with pytest.raises(Error, match=r"columns 0 to 128 of .* are not whole blocks of 256"):
        part_of(matrix("q4_k", 2, 512), Part(1, 0, 128))


def test_a_weight_that_is_computed_stays_so() -> None:
    """Nothing is computed before a rank reads its part."""
    made: list[int] = []

    def make() -> Weight:
        made.append(1)
        return Weight((4, 8), F32, np.arange(32, dtype=np.float32).reshape(4, 8))

    part = part_of(LazyWeight((4, 8), F32, make), Part(0, 1, 3))
    assert part.shape == (2, 8) and part.nbytes == 64 and not made
    assert part.data[0, 0] == 8 and made == [1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_converts_its_part(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """The same bytes as those of the converted whole; a whole matrix is kept only where the rank needs all of it."""
    config = replace(
        SMALL, dim=64, hidden_dim=96, head_dim=32, n_heads=2, n_kv_heads=2, vocab_size=64, tied_embeddings=tied
    )
    weights = random_checkpoint(config).weights
    targets = {name: Q8_0 for name, weight in weights.items() if len(weight.shape) == 2}
    shares = Shares.of(config, {name: targets.get(name, F32) for name in weights}, 2)
    made: list[str] = []
    monkeypatch.setattr(
        parallel_weights, "convert", lambda weight, target: (made.append("one"), convert(weight, target))[1]
    )
    later = converted(weights, targets, shares)
    ranks = [rank_weights(later, shares, rank) for rank in range(2)]
    assert not made, "nothing is converted before it is read"
    for rank, own in enumerate(ranks):
        for name, part in own.items():
            source = "tok_embeddings" if name == "output" and tied else name
            whole = convert(weights[source], targets.get(source, F32))
            expected = part_of(whole, shares.part(name, rank))
            assert part.type == expected.type and part.shape == expected.shape
            np.testing.assert_array_equal(part.data, expected.data)
            assert part.data is part.data, "kernels keep its address"
    wo, embedding = later["layers.0.wo"], later["tok_embeddings"]
    assert wo.data is not wo.data and embedding.data is embedding.data


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_have_every_weight_once(tied: bool) -> None:
    """Rows or columns of all ranks side by side are the weight; every rank has norms and the embedding table."""
    config = replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tied_embeddings=tied)
    weights = random_checkpoint(config).weights
    shares = Shares.of(config, {name: weight.type for name, weight in weights.items()}, 2)
    ranks = [rank_weights(weights, shares, rank) for rank in range(2)]
    assert ranks[0].keys() == {*weights, "output"}
    for name, parts in {name: [rank[name] for rank in ranks] for name in ranks[0]}.items():
        whole = weights["tok_embeddings" if name == "output" and tied else name]
        axis = shares.part(name, 0).axis
        if axis is None:
            assert parts == [whole, whole]
        else:
            np.testing.assert_array_equal(np.concatenate([part.data for part in parts], axis=axis), whole.data)
    if tied:
        assert np.shares_memory(ranks[1]["output"].data, weights["tok_embeddings"].data), (
            "a tied classifier takes no memory"
        )
