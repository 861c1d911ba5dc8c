"""Weights in device memory: how each type is laid out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.cuda.launch import Array, Matrix
from numballama.cuda.weights import ALIGNMENT, layout_of
from tests.helpers.bounds import as_weight
from tests.helpers.repacked import split_rows

TYPES = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")


@pytest.mark.parametrize("kind", TYPES)
def test_rows_begin_at_16_bytes(kind: str) -> None:
    """Parts together, or what is repacked, are the payload's rows and the scales' rows, without a gap or an overlap."""
    weight = as_weight(np.random.default_rng(0).standard_normal((5, 512), np.float32), kind, 32 * (kind == "int8"))
    layout = layout_of(weight)
    written = np.zeros(layout.nbytes, int)
    parts = layout.parts()
    if layout.is_repacked:
        payload, scales = split_rows(kind, weight.data)
        parts = iter([(0, payload.reshape(-1)), (layout.scales_offset, scales.reshape(-1))])
    for offset, part in parts:
        written[offset : offset + part.size] += 1
    operand = layout.operand(ALIGNMENT)
    assert isinstance(operand, Matrix) and operand.shape == (5, 512)
    assert operand.stride % 16 == 0 and layout.nbytes % ALIGNMENT == 0
    assert written.max() == 1
    assert written[: 5 * operand.stride].all()
    if operand.quantized:
        scales = operand.scales.address - ALIGNMENT
        assert scales >= 5 * operand.stride and scales % ALIGNMENT == 0
        assert written[scales : scales + operand.scales.nbytes].all()
    assert written.sum() == operand.nbytes


def test_a_vector_is_an_array() -> None:
    weight = as_weight(np.arange(7, dtype=np.float32), "f32")
    assert layout_of(weight).operand(512) == Array(512, (7,), "f32")


@pytest.mark.parametrize(
    ("columns", "group", "payload", "found"),
    [
        (64, 32, "int8", 32),
        (64, 1024, "int8", 64),  # a group of many rows: one for each row
        (96, 64, "int8", 32),  # groups that cross rows are divided
        (2048, 1024, "int8", 512),  # at most a chunk
        (36, 12, "f32", 0),  # no power of two of at least 16 divides it: the elements themselves
    ],
)
def test_groups_of_int8(columns: int, group: int, payload: str, found: int) -> None:
    weight = as_weight(np.random.default_rng(1).standard_normal((4, columns), np.float32), "int8", group)
    operand = layout_of(weight).operand(0)
    assert isinstance(operand, Matrix) and operand.payload.dtype == payload
    assert (1 << operand.shift if operand.quantized else 0) == found
