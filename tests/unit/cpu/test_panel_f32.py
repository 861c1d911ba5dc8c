"""Panels of float32: they hold the dequantised elements to the bit, and a token's results do not depend on others."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from numballama.cpu.matmul import fill_panel, multiply_panels
from numballama.cpu.tiling import LONG_PANEL, MANY_TOKENS, PANEL_COLUMNS, PANEL_ROWS, dequant_buffer_size
from numballama.quantization.convert import dequantize
from numballama.quantization.types import BLOCKS, TYPE_TRAITS
from tests.helpers.bounds import as_weight

ROWS = PANEL_ROWS + 3
COLUMNS = {"f32": PANEL_COLUMNS + 29, "q4_0": PANEL_COLUMNS + 32}


def operand(kind: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight as kernels get it, and its elements."""
    weight = as_weight(np.random.default_rng(0).standard_normal((ROWS, columns)).astype(np.float32), kind)
    data = weight.data.reshape(ROWS, -1)
    return (data.view(TYPE_TRAITS[kind].record) if kind in BLOCKS else data), dequantize(weight)


@pytest.mark.parametrize(
    "kind", ["f32", "q6_k", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("f16", "q8_0", "q4_1", "q4_k"))]
)
def test_a_panel_has_the_elements_to_the_bit(kind: str) -> None:
    columns = 2 * PANEL_COLUMNS if kind.endswith("_k") else COLUMNS.get(kind, PANEL_COLUMNS + 32)
    weight, elements = operand(kind, columns)
    if kind == "f16":
        weight = weight.view(np.uint16)
    panel, buffer = np.empty(PANEL_ROWS * PANEL_COLUMNS, np.float32), np.empty(dequant_buffer_size(columns), np.float32)
    buffer = buffer[panel.size :]

    @numba.njit(fastmath={"contract"})
    def fill(weight, row, end, first, columns, panel, buffer):  # type: ignore[no-untyped-def]
        fill_panel(weight, row, end, first, columns, panel, buffer)

    for row, first in ((0, 0), (0, PANEL_COLUMNS), (PANEL_ROWS, PANEL_COLUMNS)):
        n, rows = min(PANEL_COLUMNS, columns - first), min(PANEL_ROWS, ROWS - row)
        panel[:] = np.nan
        fill(weight, row, ROWS, first, n, panel, buffer)
        got = panel.reshape(PANEL_COLUMNS, PANEL_ROWS)[:n, :rows].T
        np.testing.assert_array_equal(got, elements[row : row + rows, first : first + n])


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_tokens_results_have_the_same_bits_whatever_the_number_of_tokens(kind: str) -> None:
    """4 to 13 tokens: tiles of six and of four, and some that the last token fills. From MANY_TOKENS on panels are
    long: a row has more columns than one of these, too."""
    columns = COLUMNS[kind] + LONG_PANEL * PANEL_COLUMNS
    weight, elements = operand(kind, columns)
    numbers = [*range(4, 14), MANY_TOKENS - 1, MANY_TOKENS, MANY_TOKENS + 1]
    x = np.random.default_rng(1).standard_normal((numbers[-1], columns)).astype(np.float32)
    buffer, results = np.empty(dequant_buffer_size(columns), np.float32), []

    multiply = numba.njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")(multiply_panels)
    for tokens in numbers:
        out = np.full((len(x), ROWS), np.nan, np.float32)
        multiply(weight, x, out, 0, ROWS, tokens, buffer)
        assert np.isnan(out[tokens:]).all(), "rows past the last token are not written"
        results.append(out[:tokens])
    for result in results:
        np.testing.assert_array_equal(result, results[-1][: len(result)])
    wanted, size = x.astype(np.float64) @ elements.T, np.abs(x).astype(np.float64) @ np.abs(elements.T)
    assert (np.abs(results[-1] - wanted) <= columns * 2.0**-24 * size).all()
