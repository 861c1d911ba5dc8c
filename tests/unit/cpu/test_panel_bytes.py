"""Panels of bytes, and what comes with them: every element of every block type, found again through its factors."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from numballama.cpu.panel_bytes import ZERO_POINTS, interleave, unpack_blocks
from numballama.cpu.tiling import PANEL_ROWS, STAGE_ELEMENTS
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BLOCKS, TYPE_TRAITS
from tests.helpers.gguf_files import random_blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO_POINTS)
def test_elements_are_found_again(name: str) -> None:
    size, per_row = BLOCKS[name][0], STAGE_ELEMENTS // BLOCKS[name][0]
    weight, group = (
        random_blocks(name, PANEL_ROWS, 2 * per_row, np.random.default_rng(0)),
        TYPE_TRAITS[name].scale_group,
    )
    blocks = weight.data.reshape(PANEL_ROWS, -1).view(TYPE_TRAITS[name].record)
    stage, panel = np.zeros(PANEL_ROWS * STAGE_ELEMENTS // 4, np.float32), np.zeros((2, 64, PANEL_ROWS), np.float32)
    scales, mins = np.zeros((2, 2 * STAGE_ELEMENTS // group, PANEL_ROWS), np.float32)

    @numba.njit
    def pack(blocks, stage, panel, scales, mins, per_row):  # type: ignore[no-untyped-def]
        for half in range(2):
            for lane in range(PANEL_ROWS):
                unpack_blocks(blocks, lane, half * per_row, per_row, lane, stage, scales, mins)
            interleave(stage, STAGE_ELEMENTS // 32, panel, half * STAGE_ELEMENTS)

    pack(blocks, stage, panel.ravel(), scales.ravel(), mins.ravel(), per_row)
    quants = panel.view(np.uint8).reshape(-1, PANEL_ROWS, 4).transpose(1, 0, 2).reshape(PANEL_ROWS, -1)
    factors = [np.repeat(values.T, group, axis=1) for values in (scales, mins)]
    elements = (quants.astype(np.float32) - ZERO_POINTS[name]) * factors[0] + factors[1]
    assert weight.shape[1] == quants.shape[1] == 2 * per_row * size
    np.testing.assert_array_equal(elements, dequantize(weight))
