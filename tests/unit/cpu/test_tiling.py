"""Sizes of scratch arrays: a panel and what comes with it fit the buffer."""

from __future__ import annotations

import pytest

from numballama.cpu.tiling import PANEL_ROWS, PANEL_TOKENS, STAGE_ELEMENTS, UNPACK_ELEMENTS, panel_buffer_size


@pytest.mark.parametrize("columns", [32, 64, 256, 4096])
def test_a_panel_fits_its_buffer(columns: int) -> None:
    """In bytes: int8 elements, a scale and a minimum for each 16 of them, the stage, and float32 products."""
    panel, factors = PANEL_ROWS * columns, 2 * 4 * PANEL_ROWS * (columns // 16)
    stage, products = PANEL_ROWS * STAGE_ELEMENTS, 4 * PANEL_TOKENS * PANEL_ROWS
    assert 4 * panel_buffer_size(columns) == panel + factors + stage + products


def test_blocks_are_unpacked_in_whole_stages() -> None:
    assert STAGE_ELEMENTS % UNPACK_ELEMENTS == 0
