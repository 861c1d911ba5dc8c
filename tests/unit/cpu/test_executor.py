"""The executor's parts: joining, the barrier and the step table. Whole runs with real threads: test_threads."""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import pytest

from numballama.cpu import executor
from numballama.cpu.executor import (
    ADDRESS,
    BARRIER,
    CLOSED,
    MAX_TOKENS,
    N_WORKERS,
    OPERANDS,
    SYNC_SIZE,
    TICKET,
    barrier_wait,
    join_workers,
    parallel_region,
)
from numballama.ir import Graph
from tests.helpers.bounds import compiled, cpu_backend


def test_elements_of_the_synchronisation_array_have_cache_lines_of_their_own() -> None:
    places = sorted([TICKET, BARRIER, N_WORKERS, executor.ERRORS, SYNC_SIZE])
    assert places[0] == 0 and all(8 * (b - a) >= 64 for a, b in pairwise(places))


@pytest.mark.slow
def test_a_worker_that_comes_alone_goes_on_alone() -> None:
    """One thread runs all iterations in turn: the first one stops waiting, the others come too late."""
    sync = np.zeros(SYNC_SIZE, np.int64)

    @numba.njit  # type: ignore[untyped-decorator]
    def join(index: int, requested: int, sync: np.ndarray) -> tuple[int, int]:
        return join_workers(index, requested, sync)

    assert join(2, 4, sync) == (0, 1), "numbered by arrival, not by iteration"
    assert sync[TICKET] >= CLOSED and sync[N_WORKERS] == 1
    assert join(0, 4, sync) == (-1, 0) == join(1, 4, sync)


def test_a_barrier_that_all_have_reached_does_not_wait() -> None:
    sync = np.zeros(SYNC_SIZE, np.int64)
    sync[BARRIER] = 6

    @numba.njit  # type: ignore[untyped-decorator]
    def pass_barrier(sync: np.ndarray) -> None:
        barrier_wait(sync, BARRIER, 6)

    pass_barrier(sync)


def test_a_row_of_the_step_table() -> None:
    graph = Graph("one")
    x = graph.input("x", (5, 8), "f32")
    graph.outputs = [graph.add("softmax", graph.input("s", (5, 2, 8), "f32"), out="p").name]
    graph.add("add", x, x, out="y")
    program = compiled(cpu_backend(), graph)
    row = program.table[1]
    assert row[ADDRESS] != 0 and row[MAX_TOKENS] == 5
    x_address, y_address = program.value("x").ctypes.data, program.value("y").ctypes.data
    assert row[OPERANDS:].tolist()[:9] == [x_address, 5, 8, x_address, 5, 8, y_address, 5, 8]
    assert not row[OPERANDS + 9 :].any() and program.table.dtype == np.int64


def test_numbas_number_of_threads_is_set_and_put_back() -> None:
    before = numba.get_num_threads()
    with parallel_region(1):
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before
