"""Int8 activations against their definition, value by value. Golden files of ggml's own are in tests/kernels/cpu."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numballama.quantization.activations import quantize_activations
from numballama.quantization.types import ACTIVATION_QUANT

rows_of_groups = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.just(512)),
    elements=st.one_of(st.floats(2.0**-60, 2.0**14, width=32), st.floats(-(2.0**14), -(2.0**-60), width=32)),
)


@pytest.mark.parametrize("kind", ACTIVATION_QUANT)
@given(rows=rows_of_groups)
def test_values_come_back_within_half_a_step(kind: str, rows: np.ndarray) -> None:
    way = ACTIVATION_QUANT[kind]
    quants, scales, sums = quantize_activations(kind, rows)
    assert (quants.dtype, scales.dtype) == (np.int8, np.float32)
    assert sums.dtype == {"i32": np.int32, "f32": np.float32}[way.sum_dtype]
    assert quants.shape == rows.shape
    assert scales.shape == (len(rows), 512 // way.group)
    assert sums.shape == (len(rows), 512 // way.sum_group)
    groups = rows.reshape(-1, way.group).astype(np.float64)
    step = np.abs(groups).max(axis=1) / 127
    back = quants.reshape(-1, way.group) * scales.reshape(-1, 1).astype(np.float64)
    # half a step, and 127 times what rounding a scale to float16 changes
    slack = 127 * (step * 2.0**-11 + 2.0**-25)
    assert np.all(np.abs(back - groups) <= (step * 0.501 + slack)[:, None])


@pytest.mark.parametrize("kind", ACTIVATION_QUANT)
@given(rows=rows_of_groups)
def test_sums_are_the_quants(kind: str, rows: np.ndarray) -> None:
    way = ACTIVATION_QUANT[kind]
    quants, scales, sums = quantize_activations(kind, rows)
    exact = quants.reshape(len(rows), -1, way.sum_group).sum(axis=2, dtype=np.int64)
    if way.sum_dtype == "i32":
        np.testing.assert_array_equal(sums, exact)
    else:  # times the scale before it is rounded to float16, and rounded itself
        np.testing.assert_allclose(sums, exact * scales.astype(np.float64), rtol=2.0**-9, atol=2.0**-12)


@pytest.mark.parametrize("kind", ACTIVATION_QUANT)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_scale(kind: str, bad: float) -> None:
    group = ACTIVATION_QUANT[kind].group
    rows = np.ones((1, 2 * group), np.float32)
    rows[0, 3] = bad
    quants, scales, _ = quantize_activations(kind, rows)
    assert np.isnan(scales[0, 0])
    assert not quants[0, :group].any()
    assert np.isfinite(scales[0, 1])
    assert (np.abs(quants[0, group:]) == 127).all()


@pytest.mark.parametrize("kind", ACTIVATION_QUANT)
def test_the_smallest_groups_are_zeros(kind: str) -> None:
    rows = np.full((1, ACTIVATION_QUANT[kind].group), 2.0**-121, np.float32)
    quants, _, sums = quantize_activations(kind, rows)
    assert not quants.any()
    assert not sums.any()
