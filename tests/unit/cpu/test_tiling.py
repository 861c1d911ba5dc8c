"""Sizes of scratch arrays: a panel and what comes with it fit the buffer."""

from __future__ import annotations

import pytest

from numballama.cpu.tiling import (
    BYTES_COLUMNS,
    LONG_PANEL,
    PANEL_COLUMNS,
    PANEL_ROWS,
    PANEL_TOKENS,
    TILE,
    dequant_buffer_size,
    panel_buffer_size,
)
from numballama.quantization.types import TYPE_TRAITS


def test_a_panel_of_bytes_fits_its_buffer() -> None:
    """In bytes: int8 elements, a scale and a minimum for each 16 of them, and float32 products."""
    panel, factors = PANEL_ROWS * BYTES_COLUMNS, 2 * 4 * PANEL_ROWS * (BYTES_COLUMNS // 16)
    assert 4 * panel_buffer_size() == panel + factors + 4 * PANEL_TOKENS * PANEL_ROWS


@pytest.mark.parametrize("columns", [BYTES_COLUMNS, PANEL_COLUMNS])
def test_panels_have_whole_blocks(columns: int) -> None:
    assert all(columns % traits.block_size == 0 for traits in TYPE_TRAITS.values())


@pytest.mark.parametrize("columns", [32, 256, 4096, 40960])
def test_rows_and_panels_of_float32_fit_their_buffer(columns: int) -> None:
    """TILE whole rows; or a long panel and elements of a short one before, which take more than bytes and factors."""
    short = PANEL_ROWS * PANEL_COLUMNS
    assert dequant_buffer_size(columns) == max(TILE * columns, LONG_PANEL * short + short)
    assert short >= short * (1 / 4 + 2 / 16)
    assert short >= 6 * PANEL_ROWS, "sums of a pass, where rows fill no panel"
