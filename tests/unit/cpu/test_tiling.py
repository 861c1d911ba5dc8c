"""Sizes of scratch arrays: a panel and what comes with it fit the buffer."""

from __future__ import annotations

import pytest

from numballama.cpu.tiling import (
    FILL_ELEMENTS,
    PANEL_COLUMNS,
    PANEL_ROWS,
    PANEL_TOKENS,
    TILE,
    dequant_buffer_size,
    panel_buffer_size,
)
from numballama.quantization.types import TYPE_TRAITS


@pytest.mark.parametrize("columns", [32, 64, 256, 4096])
def test_a_panel_fits_its_buffer(columns: int) -> None:
    """In bytes: int8 elements, a scale and a minimum for each 16 of them, and float32 products."""
    panel, factors = PANEL_ROWS * columns, 2 * 4 * PANEL_ROWS * (columns // 16)
    assert 4 * panel_buffer_size(columns) == panel + factors + 4 * PANEL_TOKENS * PANEL_ROWS


def test_whole_blocks_are_unpacked() -> None:
    assert all(FILL_ELEMENTS % traits.block_size == 0 for traits in TYPE_TRAITS.values())


@pytest.mark.parametrize("columns", [32, 256, 4096, 40960])
def test_rows_and_panels_of_float32_fit_their_buffer(columns: int) -> None:
    """TILE whole rows; or a panel, its elements before, and a scale and a minimum for each 16 of a row."""
    panels = 2 * PANEL_ROWS * PANEL_COLUMNS + 2 * PANEL_ROWS * (columns // 16)
    assert dequant_buffer_size(columns) == max(TILE * columns, panels)
    assert PANEL_COLUMNS <= FILL_ELEMENTS
