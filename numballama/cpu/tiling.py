"""Sizes that kernels are compiled with and scratch arrays are measured by; importing them takes no Numba."""

from __future__ import annotations

TILE = 4
"""Rows of a weight, and tokens, of a tile that `matmul` computes at once."""

PANEL_ROWS = 16
"""Rows of a weight in a panel of `vecdot_int8`: the 32-bit lanes of the widest register."""
PANEL_TOKENS = 8
"""Tokens that a panel is multiplied with at once: their sums, int32 and float32, fill half of the registers."""
UNPACK_ELEMENTS = 32
"""Elements of a block that are unpacked at once."""
STAGE_ELEMENTS = 256
"""Elements of a row that are unpacked before they are interleaved with those of the panel's other rows."""


def panel_buffer_size(columns: int) -> int:
    """float32 elements that a worker needs to multiply with a panel of rows of `columns` elements.

    The panel takes a byte an element. Scales and minimums take a float each for every 16 elements at least. Then come
    the stage, a byte an element, and the products.
    """
    panel, factors = PANEL_ROWS * columns // 4, 2 * (PANEL_ROWS * columns // 16)
    return panel + factors + PANEL_ROWS * STAGE_ELEMENTS // 4 + PANEL_TOKENS * PANEL_ROWS
