"""Tables and arithmetic of weights as fragments. The kernels with them run in `tests/cuda/skinny_cases.py`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(f"kernels are not compiled: {reason}", allow_module_level=True)

from numballama.cuda.fragments import PIECES
from numballama.cuda.launch import ELEMENTS_PER_16_BYTES, PAYLOAD_TYPE
from numballama.cuda.ops.skinny import step_columns
from numballama.cuda.quant_traits import ELEMENT_TYPES


def test_pieces_are_16_bytes() -> None:
    """A piece has 8 columns; 64 bytes of a row, four lanes' 16, are a step. q6_k's upper bits lie elsewhere."""
    for payload in set(PAYLOAD_TYPE.values()) - {"f32"}:
        elements = 32 if payload == "q6_k" else ELEMENTS_PER_16_BYTES[payload]
        assert 8 * PIECES[ELEMENT_TYPES[payload].name] == elements, payload
        assert step_columns(payload) == 4 * elements, payload


@pytest.mark.parametrize("zero", [0, 8])
def test_integers_in_a_mantissa_are_exact(zero: int) -> None:
    """Both ways from the bits of 1024 with a 4-bit integer in them to the integer minus its zero point."""
    integers = np.arange(16, dtype=np.uint16)
    low, high = ((0x6400 | integers << shift).view(np.float16) for shift in (np.uint16(0), np.uint16(4)))
    want = integers.astype(np.float64) - zero
    assert (low - np.float16(1024 + zero) == want).all()
    assert (high.astype(np.float64) / 16 - (64 + zero) == want).all()
    assert float(np.float16(-64 - zero)) == -64 - zero


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c, rounded once to float32: float64 holds these products and sums."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def test_integers_with_128_give_the_same_elements() -> None:
    """scale · (128 + n) + (min - 128 · scale) has the bits of scale · n + min if dmin is 2 to 1024 · d; of q6_k, whose
    min is -32 · scale, always.
    """
    rng = np.random.default_rng(4)
    n = np.arange(128, dtype=np.float32)
    biased = (0x43000000 | np.arange(128, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    assert (biased == 128 + n).all()
    for _ in range(2000):
        d = np.float16(np.exp(rng.uniform(-14, 4)) * rng.choice([-1, 1]))
        dmin = np.float16(d * np.exp2(rng.uniform(1.001, 9.99)))
        scale = np.float32(d) * np.float32(rng.integers(64))
        least = -np.float32(dmin) * np.float32(rng.integers(64))
        offset = fma(np.float32(-128), scale, least)
        assert np.float64(offset) == np.float64(least) - 128 * np.float64(scale), (d, dmin)
        assert (fma(biased[:32], scale, offset) == fma(n[:32], scale, least)).all()
        six = np.float32(d) * np.float32(rng.integers(-128, 128))
        assert (fma(biased[:64], six, np.float32(-160) * six) == (n[:64] - 32) * six).all()
