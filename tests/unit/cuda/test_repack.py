"""Blocks repacked for a GPU: read as `repack` describes them, their elements are unchanged.

The blocks are those of `helpers/repacked.py`, which tests/cuda/test_repack.py compares with what the kernel writes.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.cuda.launch import ITEM_BYTES, Array, Matrix
from numballama.cuda.ops.repack import repack
from numballama.cuda.repack import LAYOUTS
from numballama.cuda.weights import layout_of
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BLOCKS
from tests.helpers.gguf_files import random_blocks
from tests.helpers.repacked import memory_of, run_launch, split_rows


def in_16_bytes(integers: np.ndarray) -> np.ndarray:
    """Byte j of 16 has quant j in its low half and j + 16 in its high half."""
    packed = integers.reshape(len(integers), -1, 16)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(integers), -1).astype(np.float32)


def halves(packed: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(packed).view(np.float16).astype(np.float32)


def q8_0(integers: np.ndarray, factors: np.ndarray) -> np.ndarray:
    scales = np.repeat(halves(factors)[:, : integers.shape[1] // 32], 32, axis=1)
    return scales * np.ascontiguousarray(integers).view(np.int8)


def q4_0(integers: np.ndarray, factors: np.ndarray) -> np.ndarray:
    scales = np.repeat(halves(factors)[:, : integers.shape[1] // 16], 32, axis=1)
    return scales * (in_16_bytes(integers) - 8)


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


def q5_k(integers: np.ndarray, records: np.ndarray) -> np.ndarray:
    rows, columns = len(integers), 2 * integers.shape[1]
    records = records.reshape(rows, -1, 208)
    packed = records[..., 80:].reshape(rows, -1, 1, 4)
    fifth = (packed >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(rows, -1)[:, :columns]
    own = records[..., :64].reshape(rows, -1, 2)[:, : columns // 32].astype(np.float32)
    both = halves(records[..., 64:80]).reshape(rows, -1, 2)[:, : columns // 256]
    factors = np.repeat(own * np.repeat(both, 8, axis=1), 32, axis=1)
    return factors[..., 0] * (in_16_bytes(integers) + 16 * fifth.astype(np.float32)) - factors[..., 1]


def q6_k(integers: np.ndarray, records: np.ndarray) -> np.ndarray:
    rows, columns = len(integers), 2 * integers.shape[1]
    records = records.reshape(rows, -1, 168)
    packed = records[..., :128].reshape(rows, -1, 2, 1, 4)
    upper = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(rows, -1)[:, :columns]
    scales = np.ascontiguousarray(records[..., 128:160]).reshape(rows, -1).view(np.int8)[:, : columns // 16]
    factors = halves(records[..., 160:]).reshape(rows, -1, 2)[:, : columns // 256, 0]
    numbers = in_16_bytes(integers) + 16 * upper.astype(np.float32) - 32
    return np.repeat(np.repeat(factors, 16, axis=1) * scales, 16, axis=1) * numbers


READERS = {"q8_0": q8_0, "q4_0": q4_0, "q4_1": q4_1, "q4_k": q4_k, "q5_k": q5_k, "q6_k": q6_k}


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 5), count=st.integers(1, 9), together=st.integers(1, 50), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_the_numbers_are_those_of_the_blocks(kind: str, rows: int, count: int, together: int, seed: int) -> None:
    """Of whole rows, and in launches of some blocks each, which cut rows."""
    weight = random_blocks(kind, rows, count, np.random.default_rng(seed), odd=bool(seed & 1))
    integers, rest = split_rows(kind, weight.data)
    columns, layout = weight.shape[1], layout_of(weight)
    assert integers.shape == (rows, layout.row_bytes)
    assert rest.shape[1] >= columns // BLOCKS[kind][0] * ITEM_BYTES[layout.scales]
    padded = np.pad(rest, ((0, 0), (0, layout.scale_stride * ITEM_BYTES[layout.scales] - rest.shape[1])))
    np.testing.assert_array_equal(READERS[kind](integers, padded), dequantize(weight))

    memory = np.zeros(layout.nbytes + 16, np.uint8)
    target = layout.operand(memory.ctypes.data)
    assert isinstance(target, Matrix)
    blocks, runs = np.ascontiguousarray(weight.data).reshape(rows * count, -1), BLOCKS[kind][0] // 32
    for first in range(0, len(blocks), together):
        piece = blocks[first : first + together]
        source = Array(piece.ctypes.data, (piece.size // 2,), "f16")
        run_launch(repack(source, first * runs, len(piece) * runs, target))
    np.testing.assert_array_equal(memory[: layout.nbytes], memory_of(layout))


@pytest.mark.parametrize(
    ("kind", "most"), [("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5.0), ("q4_k", 4.625), ("q5_k", 5.625), ("q6_k", 6.625)]
)
def test_bits_of_a_number(kind: str, most: float) -> None:
    """Of long rows; in a file it is 5, 4.5 and 6.5625 for the last three. What a row's last record lacks is zeros."""
    numbers, nbytes = BLOCKS[kind]
    weight = random_blocks(kind, 1, 4096 // numbers, np.random.default_rng(0))
    integers, rest = split_rows(kind, weight.data)
    assert (integers.nbytes + rest.nbytes) * 8 / 4096 == most
    layout = layout_of(weight)
    assert (
        rest.nbytes
        == layout.scale_stride * ITEM_BYTES[layout.scales]
        == LAYOUTS[kind].stride(4096) * ITEM_BYTES[layout.scales]
    )
    integers, rest = split_rows(kind, weight.data[:, :nbytes])
    assert integers.nbytes == numbers * layout.row_bytes // 4096
    assert np.count_nonzero(rest) <= nbytes
