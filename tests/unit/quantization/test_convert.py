"""Conversions between weight types against their definitions, value by value."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numballama.checkpoint import Weight
from numballama.errors import Error, UnsupportedError
from numballama.quantization.convert import convert, dequantize, from_bf16, from_f16, quantize_int8, to_bf16, to_f16
from numballama.quantization.types import BF16, BLOCKS, F16, F32, Q4_0, Q4_1, Q8_0, WeightType

BITS16 = np.arange(1 << 16, dtype=np.uint16)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(1, 70), elements=finite)


def round_half_away(value: float) -> int:
    """C's roundf."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))  # exact: a float32 plus 0.5 fits a float64


@given(arrays, st.integers(1, 80))
def test_int8_is_max_over_127_and_roundf(values: np.ndarray, group: int) -> None:
    payload, scales = quantize_int8(values, group)
    assert payload.dtype == np.int8
    assert scales.dtype == np.float32
    assert scales.shape == (-(-values.size // group),)
    for g, scale in enumerate(scales):
        numbers = values[g * group : (g + 1) * group]
        assert scale == np.abs(numbers).max() / np.float32(127)
        for number, got in zip(numbers, payload[g * group :], strict=False):
            with np.errstate(over="ignore"):
                expected = round_half_away(float(number / scale)) if scale else 0
            assert got == max(-127, min(127, expected))


def test_int8_rounds_ties_away_from_zero_and_just_below_ties_down() -> None:
    below = np.nextafter(np.float32(0.5), np.float32(0))
    payload, scales = quantize_int8(np.array([127, 0.5, -0.5, 1.5, -2.5, below, -below], np.float32), 7)
    assert scales == 1
    assert payload.tolist() == [127, 1, -1, 2, -3, 0, 0]


def test_int8_group_of_zeros_has_scale_zero() -> None:
    payload, scales = quantize_int8(np.array([0, -0.0, 0, 5], np.float32), 3)
    assert payload.tolist() == [0, 0, 0, 127]
    assert scales[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_refuses_nan_and_infinity(bad: float) -> None:
    with pytest.raises(Error, match="NaN or infinity"):
        quantize_int8(np.array([1, bad, 2], np.float32), 2)


@given(
    hnp.arrays(np.float32, st.integers(1, 70), elements=st.floats(-(2.0**126), 2.0**126, width=32)), st.integers(1, 80)
)
def test_int8_decodes_within_half_a_step(values: np.ndarray, group: int) -> None:
    weight = convert(Weight(values.shape, F32, values), WeightType("int8", group))
    back = dequantize(weight).astype(np.float64)
    assert weight.scales is not None
    steps = np.repeat(weight.scales.astype(np.float64), group)[: values.size]
    # Below the normal range a scale itself is off by up to half of the smallest subnormal, 127 times.
    assert np.all(np.abs(back - values) <= steps * 0.5001 + 127 * 2.0**-149)


def test_every_f16_and_bf16_pattern_survives_a_round_trip() -> None:
    halves = from_f16(BITS16)
    np.testing.assert_array_equal(halves, BITS16.view(np.float16).astype(np.float32))
    brains = from_bf16(BITS16)
    np.testing.assert_array_equal(brains.view(np.uint32), BITS16.astype(np.uint32) << 16)
    for values, back in ((halves, to_f16(halves)), (brains, to_bf16(brains))):
        numbers = ~np.isnan(values)
        np.testing.assert_array_equal(back[numbers], BITS16[numbers])
    assert np.isnan(from_f16(to_f16(halves))[np.isnan(halves)]).all()
    assert np.isnan(from_bf16(to_bf16(brains))[np.isnan(brains)]).all()


@given(hnp.arrays(np.uint16, 50), st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]))
@example(np.array([0x7F80, 0xFF80, 0x7FFF, 0xFFFF], np.uint16), 1)  # NaNs at both ends of their range
@np.errstate(invalid="ignore")  # signalling ones, on their way to float64
def test_bf16_rounds_to_nearest_even(high: np.ndarray, low: int) -> None:
    patterns = high.astype(np.uint32) << 16 | low
    values = patterns.view(np.float32)
    exact = values.astype(np.float64)
    for value, pattern, got in zip(exact, patterns.tolist(), to_bf16(values).tolist(), strict=True):
        if np.isnan(value):
            assert np.isnan(from_bf16(np.array([got], np.uint16)))[0]
            continue
        down = pattern >> 16
        up = down + 1
        lower, upper = from_bf16(np.array([down, up], np.uint16)).astype(np.float64)
        if not np.isfinite(upper):  # infinity itself, or a number beyond the largest: it stays finite
            assert got == down
        elif abs(value - lower) == abs(value - upper):
            assert got == (down if down % 2 == 0 else up)
        else:
            assert got == (down if abs(value - lower) < abs(value - upper) else up)


@given(hnp.arrays(np.float32, 50, elements=st.floats(width=32)))
def test_f16_is_numpys_but_saturates(values: np.ndarray) -> None:
    got = to_f16(values).view(np.float16)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    saturated = np.isinf(expected) & np.isfinite(values)
    expected[saturated] = np.copysign(np.float16(65504), values[saturated])
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=40)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-(2.0**126), 2.0**126, width=32),  # 127 · (max / 127) may be infinite at the very end
    ),
    source=st.sampled_from([F32, F16, BF16, WeightType("int8", 5), WeightType("int8", 64), Q8_0, Q4_1]),
    target=st.sampled_from([F32, F16, BF16, WeightType("int8", 3), WeightType("int8", 64), Q8_0, Q4_0, Q4_1]),
)
def test_chunk_size_does_not_change_the_result(values: np.ndarray, source: WeightType, target: WeightType) -> None:
    if {source.name, target.name} & BLOCKS.keys():
        values = np.tile(values, 32)
    weight = convert(Weight(values.shape, F32, values), source)
    whole = convert(weight, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numballama.quantization.convert._CHUNK", 7)
        pieces = convert(weight, target)
    assert whole.shape == pieces.shape == values.shape
    numbers, nbytes = BLOCKS.get(target.name, (1, 1))
    assert whole.data.shape == (len(values), values.shape[1] // numbers * nbytes)
    np.testing.assert_array_equal(whole.data, pieces.data)
    np.testing.assert_array_equal(whole.scales, pieces.scales)
    if source == target:
        assert whole is weight
    else:  # through float32, whatever the two types are
        direct = convert(Weight(values.shape, F32, dequantize(weight)), target)
        np.testing.assert_array_equal(whole.data, direct.data)
    assert whole.nbytes == target.nbytes(values.size)


def test_same_type_is_not_copied() -> None:
    weight = Weight((4,), F32, np.ones(4, np.float32))
    assert convert(weight, F32) is weight
    assert dequantize(weight) is weight.data


def test_readonly_unaligned_views_convert() -> None:
    raw = b"x" + np.arange(10, dtype="<f4").tobytes()
    values = np.frombuffer(raw, "<f4", 10, 1)
    for target in (F16, BF16, WeightType("int8", 4)):
        assert dequantize(convert(Weight((10,), F32, values), target))[9] == 9


@pytest.mark.parametrize("target", [F16, BF16, WeightType("int8", 64), Q8_0, Q4_1, F32])
def test_conversion_takes_a_few_megabytes_beside_the_result(target: WeightType) -> None:
    weight = Weight((2000, 2016), F32, np.ones((2000, 2016), np.float32))
    if target is F32:
        weight = convert(weight, WeightType("int8", 64))
    tracemalloc.start()
    result = convert(weight, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < result.nbytes + 8e6


def test_impossible_types_are_refused() -> None:
    weight = Weight((4,), F32, np.ones(4, np.float32))
    with pytest.raises(Error, match="group size of 0"):
        convert(weight, WeightType("int8", 0))
    with pytest.raises(UnsupportedError, match="'q9_9'"):
        convert(weight, WeightType("q9_9"))
    with pytest.raises(UnsupportedError, match="q9_9"):
        convert(Weight((4,), WeightType("q9_9"), np.ones(4, np.int8)), F32)
