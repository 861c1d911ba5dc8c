"""Panels of bytes, and what comes with them: every element of every block type, found again through its factors."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from numballama.cpu.panel_bytes import ZERO_POINTS, fill_panel_blocks
from numballama.cpu.tiling import PANEL_ROWS
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BLOCKS, TYPE_TRAITS
from tests.helpers.gguf_files import random_blocks

COLUMNS = 256
"""Columns of a panel, of which two are made of a row."""
ROWS = PANEL_ROWS - 3
"""Rows of the weight: the panel's others repeat the last."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO_POINTS)
def test_elements_are_found_again(name: str) -> None:
    size, some = BLOCKS[name][0], COLUMNS // BLOCKS[name][0]
    weight, group = random_blocks(name, ROWS, 2 * some, np.random.default_rng(0)), TYPE_TRAITS[name].scale_group
    blocks = weight.data.reshape(ROWS, -1).view(TYPE_TRAITS[name].record)
    panel = np.zeros((2, COLUMNS // 4, PANEL_ROWS), np.float32)
    scales, mins = np.zeros((2, 2, COLUMNS // group, PANEL_ROWS), np.float32)

    @numba.njit
    def pack(blocks, panel, scales, mins, some):  # type: ignore[no-untyped-def]
        for piece in range(2):
            fill_panel_blocks(
                blocks,
                0,
                ROWS - 1,
                piece * some,
                some,
                panel[piece].ravel(),
                scales[piece].ravel(),
                mins[piece].ravel(),
            )

    pack(blocks, panel, scales, mins, some)
    quants = panel.view(np.uint8).reshape(-1, PANEL_ROWS, 4).transpose(1, 0, 2).reshape(PANEL_ROWS, -1)
    factors = [np.repeat(values.reshape(-1, PANEL_ROWS).T, group, axis=1) for values in (scales, mins)]
    elements = (quants.astype(np.float32) - ZERO_POINTS[name]) * factors[0] + factors[1]
    assert weight.shape[1] == quants.shape[1] == 2 * some * size
    np.testing.assert_array_equal(elements, dequantize(weight)[np.minimum(np.arange(PANEL_ROWS), ROWS - 1)])
