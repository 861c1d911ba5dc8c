"""Encoders that search: never worse than rounding to evenly spaced values, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.checkpoint import Weight
from numballama.errors import Error
from numballama.quantization.blocks import DECODERS, decode, pack
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.search import SEARCHING, encode
from numballama.quantization.types import BLOCKS, F32, TYPE_TRAITS, WeightType

TYPES = sorted(SEARCHING)
TAILS = st.sampled_from(["normal", "heavy", "uniform", "positive", "negative", "sparse", "constant"])


def drawn(tail: str, seed: int, columns: int, rows: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns))
    x = {
        "normal": x, "heavy": rng.standard_t(2, x.shape), "uniform": rng.uniform(-1, 1, x.shape), "positive": np.abs(x),
        "negative": -np.abs(x), "sparse": x * (rng.random(x.shape) < 0.1),
        "constant": np.broadcast_to(x[:, :1], x.shape),
    }[tail]  # fmt: skip
    return np.ascontiguousarray(x * 10.0 ** rng.uniform(-3, 3), np.float32)


def coded(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    return dequantize(convert(Weight(x.shape, F32, x), WeightType(name), importance))


def plain(name: str, x: np.ndarray) -> np.ndarray:
    """x with each group rounded to evenly spaced values from its least to its largest number, and scales in float16.

    Scales and minimums of K-quants are rounded to their six or eight bits.
    """
    traits = TYPE_TRAITS[name]
    groups = x.reshape(-1, traits.block_size // traits.scale_group, traits.scale_group).astype(np.float64)
    most = (1 << traits.bits) - 1
    if traits.has_min:
        low = groups.min(axis=2) if name == "q5_1" else np.minimum(groups.min(axis=2), 0)
        top = groups.max(axis=2) if name == "q5_1" else np.maximum(groups.max(axis=2), 0)
        scale = (top - low) / most
    else:
        scale, low = np.abs(groups).max(axis=2) / (most // 2), np.zeros(groups.shape[:2])
    if name.endswith("_k"):
        steps = 127 if name == "q6_k" else 63
        d = scale.max(axis=1, keepdims=True).astype(np.float32) / steps
        dmin = np.abs(low).max(axis=1, keepdims=True).astype(np.float32) / 63
        with np.errstate(invalid="ignore"):
            scale = np.nan_to_num(np.round(scale / d)) * d.astype(np.float16)
            low = -np.nan_to_num(np.round(-low / dmin)) * dmin.astype(np.float16)
    else:
        scale, low = scale.astype(np.float16).astype(np.float64), low.astype(np.float16).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        quants = np.nan_to_num(np.round((groups - low[..., None]) / scale[..., None]))
    least = 0 if traits.has_min else -(most // 2)
    quants = np.clip(quants, least, least + most - (not traits.has_min))
    return (quants * scale[..., None] + low[..., None]).reshape(x.shape)


def rms(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((x.astype(np.float64) - y) ** 2)))


@pytest.mark.parametrize("name", TYPES)
@given(tail=TAILS, seed=st.integers(0, 2**32), blocks=st.integers(1, 3))
@settings(max_examples=40)
def test_no_worse_than_evenly_spaced_values(name: str, tail: str, seed: int, blocks: int) -> None:
    x = drawn(tail, seed, blocks * BLOCKS[name][0])
    most = 1.1 if tail == "constant" else 1  # numbers that are alike can be exact by chance
    assert rms(x, coded(name, x)) <= most * rms(x, plain(name, x)) + 1e-3 * np.abs(x).max()


@pytest.mark.parametrize("name", TYPES)
def test_less_error_than_evenly_spaced_values(name: str) -> None:
    x = drawn("normal", 1, 2048, 16)
    assert rms(x, coded(name, x)) < 0.91 * rms(x, plain(name, x))


@pytest.mark.parametrize("name", TYPES)
def test_large_elements_count_a_little_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside plain least squares it costs next to nothing in RMS error. Where columns of large elements are multiplied
    with large inputs, the error of the output is less.
    """
    rng = np.random.default_rng(6)
    inputs = np.exp(0.5 * rng.standard_normal(1024))
    x = (rng.standard_normal((64, 1024)) * inputs).astype(np.float32)
    found = coded(name, x)
    monkeypatch.setattr("numballama.quantization.search._weights", lambda x, importance: np.ones_like(x))
    least = coded(name, x)
    assert rms(x, found) < 1.004 * rms(x, least)
    assert rms(x * inputs, found * inputs) < 0.99 * rms(x * inputs, least * inputs)


@pytest.mark.parametrize(("bits", "run"), [(4, 32), (4, 64), (4, 16), (2, 32), (1, 32), (1, 1)])
@given(data=st.data())
def test_pack_puts_quants_where_decoding_finds_them(bits: int, run: int, data: st.DataObject) -> None:
    from numballama.quantization.blocks import _unpack

    quants = np.array(data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=256, max_size=256)), np.uint8)
    assert (_unpack(pack(quants[None], bits, run), bits, run)[0] == quants).all()


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_tiny_weights_are_not_cut_off(name: str) -> None:
    """Where float16 has few bits for a block's factor, the largest elements are as close as elsewhere."""
    x = np.repeat(np.geomspace(2e-4, 2e-2, 64, dtype=np.float32)[:, None], 256, axis=1)
    error = np.abs(coded(name, x) / x - 1).max(axis=1)
    assert error.max() < 0.02


@pytest.mark.parametrize("name", TYPES)
def test_columns_that_count_more_are_closer(name: str) -> None:
    x = drawn("heavy", 2, 1024, 32)
    importance = np.where(np.arange(1024) % 8 == 0, 100, 1).astype(np.float32)
    many = importance > 1
    alike, weighted = coded(name, x), coded(name, x, importance)
    assert rms(x[:, many], weighted[:, many]) < 0.95 * rms(x[:, many], alike[:, many])
    assert (coded(name, x, np.ones(1024, np.float32)) == alike).all()


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_a_chunk_do_not_matter(name: str) -> None:
    """A large weight is encoded a chunk at a time: importance follows the columns."""
    x = drawn("normal", 3, 1280, 300)  # more than a chunk
    importance = np.random.default_rng(4).uniform(0.1, 10, 1280).astype(np.float32)
    assert (coded(name, x, importance)[-3:] == coded(name, np.ascontiguousarray(x[-3:]), importance)).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-8, 65504.0, 3e38, -3e38])
def test_numbers_at_the_ends(name: str, value: float) -> None:
    x = np.full((1, BLOCKS[name][0]), value, np.float32)
    x[0, 1::2] = 0
    found = coded(name, x)
    assert np.isfinite(found).all()
    if abs(value) < 1e-7:
        assert (found == 0).all()
    elif abs(value) == 65504:
        assert np.abs(found - x).max() <= 0.02 * 65504
    else:  # as large as the type can be
        assert np.sign(found[0, 0]) == np.sign(value) and abs(found[0, 0]) > 65503  # q5_1's minimum ends there


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(name: str, value: float) -> None:
    size, nbytes = BLOCKS[name]
    rows = np.zeros((2, size), np.float32)
    rows[1, 5] = value
    with pytest.raises(Error, match=f"NaN or infinity, which {name} cannot express"):
        encode(name, rows, np.zeros((2, nbytes), np.uint8))


@pytest.mark.parametrize("name", TYPES)
def test_every_field_is_written(name: str) -> None:
    """Blocks do not depend on the bytes that were there."""
    size, nbytes = BLOCKS[name]
    rows = drawn("normal", 5, size, 4)
    first, second = np.zeros((4, nbytes), np.uint8), np.full((4, nbytes), 255, np.uint8)
    encode(name, rows, first)
    encode(name, rows, second)
    assert (first == second).all() and name in DECODERS and decode(name, first).shape == rows.shape
