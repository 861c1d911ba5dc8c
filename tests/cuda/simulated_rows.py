"""Tests of runs with rows of many sequences in the simulator. Run by `test_simulator.py`, or by hand:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda/simulated_rows.py
"""

# ruff: noqa: E402
from __future__ import annotations

import pytest

from tests.cuda.simulator import simulation  # first: it replaces what kernels import
from tests.helpers.cuda_host import install

install(run=simulation.run, n_sms=2)

import numpy as np

from numballama import Error
from numballama.config import ModelConfig
from numballama.cuda.kernels import rows_attention
from numballama.cuda.ops import attention
from numballama.graph import PAGE_TABLE
from tests.cuda.checks import Pair, check_runs
from tests.cuda.row_checks import Step, check_alone, check_rows, check_whole_rows


@pytest.mark.parametrize(("heads", "kv_heads", "kv"), [(3, 1, "f16"), (1, 1, "f32"), (2, 1, "q8_0")])
def test_rows_of_many_sequences(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, kv: str) -> None:
    """Sequences of different lengths in one run, in splits of two keys, of which a block may compute two; a run's rows
    are chunks and single tokens, mixed.
    """
    for module in (attention, rows_attention):
        monkeypatch.setattr(module, "ROW_SPLIT_KEYS", 2)
    monkeypatch.setattr(attention, "ROW_BLOCKS", 8)
    pair = Pair(ModelConfig(8 * heads, 4, 1, heads, kv_heads, 9, 12, head_dim=8), "f32", kv, sequences=3)
    assert pair.programs(6)[0].variant_starts == [2]
    steps: list[Step] = [[(0, 1), (2, 5)], [(1, 1), (0, 1), (2, 1)], [(2, 2), (0, 1)]]
    check_rows(pair, steps, 6, ["attention", "rope_kv"])
    if heads == 1:
        check_whole_rows(pair, steps, 6)


@pytest.mark.parametrize("fusions", [False, True])
@pytest.mark.parametrize("head_dim", [6, 40])
def test_a_cache_of_q8_0(fusions: bool, head_dim: int) -> None:
    """Heads of one short block, and of a whole one and a short one."""
    pair = Pair(ModelConfig(8, 4, 1, 2, 1, 7, 6, head_dim=head_dim), "f32", "q8_0")
    check_runs(pair, [2, 1, 1], 2, fusions)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit; programs for two rows and for more are of one family."""
    pair = Pair(ModelConfig(16, 8, 1, 2, 1, 9, 10), "f32", "f16", sequences=3)
    check_alone(pair, [[(0, 1), (2, 3)], [(1, 1), (0, 1), (2, 1)]], [2, 3, 4])


def test_pages_are_written_where_they_belong() -> None:
    """Into any part of a row; entries that the table does not have are an error."""
    pair = Pair(ModelConfig(16, 8, 1, 2, 1, 9, 44), sequences=2)
    pair.programs(1)
    backend = pair.cuda
    want = np.zeros(pair.kv.table_shape, np.int32)
    want[:] = pair.table
    for slot, first, pages in ((0, 0, range(3, 14)), (1, 4, [7, 8]), (1, 10, [1]), (0, 9, [5, 6]), (1, 3, [])):
        backend.set_pages(slot, first, pages)
        want[slot, first : first + len(pages)] = pages
    table = np.empty(pair.kv.table_shape, np.int32)
    backend.device.read(backend.states[PAGE_TABLE].address, table)
    np.testing.assert_array_equal(table, want)
    for slot, first, pages in ((3, 0, [1]), (-1, 0, [1]), (0, 11, [1]), (0, -1, [1])):
        with pytest.raises(Error, match="page table is 3 by 11"):
            backend.set_pages(slot, first, pages)
