"""Sizes of scratch arrays: a panel and what comes with it fit the buffer."""

from __future__ import annotations

import pytest

from numballama.cpu.tiling import (
    PANEL_COLUMNS,
    PANEL_ROWS,
    PANEL_TOKENS,
    STAGE_ELEMENTS,
    TILE,
    UNPACK_ELEMENTS,
    dequant_buffer_size,
    panel_buffer_size,
)


@pytest.mark.parametrize("columns", [32, 64, 256, 4096])
def test_a_panel_fits_its_buffer(columns: int) -> None:
    """In bytes: int8 elements, a scale and a minimum for each 16 of them, the stage, and float32 products."""
    panel, factors = PANEL_ROWS * columns, 2 * 4 * PANEL_ROWS * (columns // 16)
    stage, products = PANEL_ROWS * STAGE_ELEMENTS, 4 * PANEL_TOKENS * PANEL_ROWS
    assert 4 * panel_buffer_size(columns) == panel + factors + stage + products


def test_blocks_are_unpacked_in_whole_stages() -> None:
    assert STAGE_ELEMENTS % UNPACK_ELEMENTS == 0


@pytest.mark.parametrize("columns", [32, 256, 4096, 40960])
def test_rows_and_panels_of_float32_fit_their_buffer(columns: int) -> None:
    """TILE whole rows; or a panel, its elements before, and a scale and a minimum for each 16 of a row."""
    panels = 2 * PANEL_ROWS * PANEL_COLUMNS + 2 * PANEL_ROWS * (columns // 16)
    assert dequant_buffer_size(columns) == max(TILE * columns, panels)
    assert PANEL_COLUMNS <= STAGE_ELEMENTS
