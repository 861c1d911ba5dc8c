"""Sizes of tiles and panels, for kernels and for the shapes of scratch arrays. Importing this does not import Numba."""

from __future__ import annotations

TILE = 4
"""Rows of a weight and number of tokens in a tile of `matmul`."""

PANEL_ROWS = 16
"""Rows of a weight in a panel: the 32-bit lanes of the widest register, or of two of AVX2."""
PANEL_TOKENS = 8
"""Number of tokens that a panel is multiplied with at a time. Their int32 and float32 sums fill half of the registers.
"""
UNPACK_ELEMENTS = 32
"""Number of elements of a block that are unpacked at a time."""
BYTES_COLUMNS = 1024
"""Columns of a panel of bytes. It has 16 KB, half of the first-level cache: activations need some, too."""
PANEL_COLUMNS = 256
"""Columns of a panel of float32. It has 16 KB, half of the first-level cache."""
LONG_PANEL = 4
"""How many times as many columns a panel has for many tokens. It has 64 KB, which the second-level cache holds."""
MANY_TOKENS = 24
"""Number of tokens from which panels are long. Fewer do not make up for writing a panel to the second-level cache."""
SCORE_ROWS = 3
"""Most heads that attention computes together: with four positions they have 12 sums, and AVX2 has 16 registers."""
SCORE_HEADS = 8
"""Most heads whose scores a worker holds, so that it reads their keys and values once."""
SCORES_BEYOND = 7
"""Elements past a row's scores that are written too, because attention takes up to eight positions at a time."""


def panel_buffer_size() -> int:
    """Number of float32 elements in a worker's buffer for a panel of bytes.

    Scales and minimums take one float each for at least 16 elements. Then follow products.
    """
    return PANEL_ROWS * BYTES_COLUMNS // 4 + 2 * (PANEL_ROWS * BYTES_COLUMNS // 16) + PANEL_TOKENS * PANEL_ROWS


def dequant_buffer_size(columns: int) -> int:
    """Number of float32 elements in a worker's buffer for rows of `columns` elements, as `matmul` uses it.

    That is TILE rows; or a long panel of float32, and room for PANEL_COLUMNS of its columns not yet transposed or as
    a panel of bytes.
    """
    return max(TILE * columns, (LONG_PANEL + 1) * PANEL_ROWS * PANEL_COLUMNS)
