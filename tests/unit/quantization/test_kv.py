"""Types of the KV cache: what is written, what is read, and what the memory holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from numballama.checkpoint import Weight
from numballama.ir import Value, nbytes_of
from numballama.quantization.convert import convert, dequantize, to_f16
from numballama.quantization.kv import has_largest_f16, round_to, split_q8_0, stored
from numballama.quantization.types import F32, KV_TYPES, KVType, WeightType
from tests.helpers.paging import in_cache

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 6, 32, 40, 64, 96]))


@given(SHAPES, st.sampled_from(KV_TYPES), st.integers(0, 99))
def test_what_is_stored_is_what_was_rounded(shape: tuple[int, ...], dtype: KVType, seed: int) -> None:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(10.0 ** (seed % 9 - 4))
    rounded = round_to(numbers, dtype)
    memory = in_cache(numbers, dtype)
    assert memory.nbytes == nbytes_of(shape, dtype) == Value("cache", shape, dtype, "state").nbytes
    np.testing.assert_array_equal(stored(memory, shape, dtype), rounded)
    np.testing.assert_array_equal(round_to(rounded, "f32"), rounded)


@pytest.mark.parametrize(("dtype", "largest"), [("f16", 65504.0), ("bf16", 3.3895313892515355e38), ("q8_0", 8319008.0)])
def test_what_is_too_large_becomes_the_largest_number(dtype: KVType, largest: float) -> None:
    """Infinity stays infinity, except in q8_0, where a block with it or with NaN becomes NaN."""
    x = np.zeros((4, 32), np.float32)
    x[0, 3], x[1, 31], x[2, 0], x[3, 9] = 3.4e38, -3.4e38, np.inf, np.nan
    got = round_to(x, dtype)
    assert got[0, 3] == np.float32(largest) and got[1, 31] == -np.float32(largest)
    assert np.isnan(got[3, 9]) and np.isfinite(got[:2]).all()
    assert np.isnan(got[2]).all() if dtype == "q8_0" else got[2, 0] == np.inf


def test_blocks_of_q8_0_are_ggmls() -> None:
    """To the bit, as a weight of q8_0 that has no ties; zeros and small numbers become zeros."""
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    np.testing.assert_array_equal(round_to(x, "q8_0"), dequantize(convert(Weight(x.shape, F32, x), WeightType("q8_0"))))
    assert not round_to(np.full((1, 32), 1e-38, np.float32), "q8_0").any()


def test_a_head_has_its_scales_behind_all_quants() -> None:
    shape = (2, 3, 4, 40)
    quants, scales = split_q8_0(np.arange(nbytes_of(shape, "q8_0"), dtype=np.int64).astype(np.uint8), shape)
    assert quants.shape == shape and scales.shape == (2, 3, 4, 2)
    assert quants[0, 0, 0, 1] == 1 and scales.ctypes.data == quants.ctypes.data + 2 * 3 * 4 * 40


@given(arrays(np.float32, 7, elements=st.floats(-1e5, 1e5, width=32)))
def test_the_largest_float16_is_found_in_bits_and_in_floats(x: np.ndarray) -> None:
    """Where a float16 cache has made it of what is beyond."""
    expected = bool((np.abs(x) > 65504 - 16).any())  # what rounds to it; half way goes to the even one below
    assert has_largest_f16(to_f16(x)) == has_largest_f16(round_to(x, "f16")) == expected
