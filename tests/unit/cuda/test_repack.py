"""Blocks repacked for a GPU: read as `repack` describes them, their elements are unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.cuda import repack
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BLOCKS
from tests.helpers.gguf_files import random_blocks


def in_16_bytes(integers: np.ndarray) -> np.ndarray:
    """Byte j of 16 has quant j in its low half and j + 16 in its high half."""
    packed = integers.reshape(len(integers), -1, 16)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(integers), -1).astype(np.float32)


def halves(packed: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(packed).view(np.float16).astype(np.float32)


def q4_1(integers: np.ndarray, words: np.ndarray) -> np.ndarray:
    factors = np.repeat(halves(words).reshape(len(words), -1, 2), 32, axis=1)
    return factors[..., 0] * in_16_bytes(integers) + factors[..., 1]


def q4_k(integers: np.ndarray, records: np.ndarray) -> np.ndarray:
    rows, columns = len(integers), 2 * integers.shape[1]
    records = records.reshape(rows, -1, 80)
    own = records[..., :64].reshape(rows, -1, 2)[:, : columns // 32].astype(np.float32)
    both = halves(records[..., 64:]).reshape(rows, -1, 2)[:, : columns // 256]
    factors = np.repeat(own * np.repeat(both, 8, axis=1), 32, axis=1)
    return factors[..., 0] * in_16_bytes(integers) - factors[..., 1]


def q6_k(integers: np.ndarray, records: np.ndarray) -> np.ndarray:
    rows, columns = len(integers), 2 * integers.shape[1]
    records = records.reshape(rows, -1, 168)
    packed = records[..., :128].reshape(rows, -1, 2, 1, 4)
    upper = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(rows, -1)[:, :columns]
    scales = np.ascontiguousarray(records[..., 128:160]).reshape(rows, -1).view(np.int8)[:, : columns // 16]
    factors = halves(records[..., 160:]).reshape(rows, -1, 2)[:, : columns // 256, 0]
    numbers = in_16_bytes(integers) + 16 * upper.astype(np.float32) - 32
    return np.repeat(np.repeat(factors, 16, axis=1) * scales, 16, axis=1) * numbers


READERS = {"q4_1": q4_1, "q4_k": q4_k, "q6_k": q6_k}


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=25)
@given(rows=st.integers(1, 5), count=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), piece=st.integers(9, 17))
def test_the_numbers_are_those_of_the_blocks(kind: str, rows: int, count: int, seed: int, piece: int) -> None:
    weight = random_blocks(kind, rows, count, np.random.default_rng(seed), odd=bool(seed & 1))
    before, repack.CHUNK_ELEMENTS = repack.CHUNK_ELEMENTS, 1 << piece  # some rows are cut, others are laid out together
    try:
        integers, rest = repack.split_rows(kind, weight.data)
    finally:
        repack.CHUNK_ELEMENTS = before
    columns, layout = weight.shape[1], repack.LAYOUTS[kind]
    assert integers.shape == (rows, columns // 2)
    assert rest.shape == (rows, layout.stride(columns) * {"u8": 1, "u32": 4}[layout.scales])
    np.testing.assert_array_equal(READERS[kind](integers, rest), dequantize(weight))


@pytest.mark.parametrize(("kind", "most"), [("q4_1", 5.0), ("q4_k", 4.625), ("q6_k", 6.625)])
def test_bits_of_a_number(kind: str, most: float) -> None:
    """Of long rows; in a file it is 5, 4.5 and 6.5625. What a row's last record lacks is zeros."""
    numbers, nbytes = BLOCKS[kind]
    weight = random_blocks(kind, 1, 4096 // numbers, np.random.default_rng(0))
    integers, rest = repack.split_rows(kind, weight.data)
    assert (integers.nbytes + rest.nbytes) * 8 / 4096 == most
    integers, rest = repack.split_rows(kind, weight.data[:, :nbytes])
    assert integers.nbytes == numbers // 2
    assert np.count_nonzero(rest) <= nbytes
