"""Exchanges between ranks: every worker of every rank in a thread of its own, several exchanges one after the other."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numballama.cpu.ops  # noqa: F401 (registers the kernels)
from numballama import reference
from numballama.cpu.backend import CpuProgram, aligned_zeros
from numballama.cpu.executor import ADDRESS, OPERANDS
from numballama.ir import Graph
from numballama.ops import CELL
from numballama.parallel.rank_memory import stop
from tests.helpers.bounds import compiled, cpu_backend

_STEP = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)


class Ranks:
    """Programs of several ranks that run the same ops: a sum of `width` columns, then parts of `parts` columns."""

    def __init__(self, parts: Sequence[int], width: int, tokens: int, workers: int, room: int, rounds: int = 1) -> None:
        ranks, columns = len(parts), sum(parts)
        self.workers, self.tokens = workers, tokens
        self.exchange = np.full((2, max(ranks * width, columns) + room), np.nan, np.float32)
        self.arrivals = aligned_zeros(4 * ranks * workers * CELL).view(np.int32).reshape(ranks, workers, CELL)
        self.programs: list[CpuProgram] = []
        for rank, part in enumerate(parts):
            graph = Graph("exchanges")
            x, y = graph.input("x", (tokens, width), "f32"), graph.input("y", (tokens, part), "f32")
            shared = [
                graph.state(n, a.shape, t) for n, a, t in (("e", self.exchange, "f32"), ("a", self.arrivals, "i32"))
            ]
            for n in range(rounds):
                x, *shared = graph.add("all_reduce", x, *shared, out=(f"sum{n}", f"e{n}", f"a{n}"), rank=rank)
                where = {"rank": rank, "begin": sum(parts[:rank]), "columns": columns}
                _, *shared = graph.add("all_gather", y, *shared, out=(f"all{n}", f"e{n}'", f"a{n}'"), **where)
            graph.outputs = [name for op in graph.ops for name in op.outputs[:1]]
            backend = cpu_backend(workers=workers)
            backend.states |= {"e": self.exchange, "a": self.arrivals}
            self.programs.append(compiled(backend, graph))
        self.threads = ThreadPoolExecutor(ranks * workers)

    def step(self, step: int, of_rank: int, worker: int, tokens: int) -> int:
        row = self.programs[of_rank].table[step]
        status: int = _STEP(int(row[ADDRESS]))(row[OPERANDS:].ctypes.data, worker, self.workers, tokens)
        return status

    def __enter__(self) -> None:
        """For a `with` that ends although a rank waits."""

    def __exit__(self, *error: object) -> None:
        stop(self.arrivals)
        self.threads.shutdown()

    def run(self, step: int, tokens: int) -> set[int]:
        """Run a step on all workers of all ranks, as the barrier after each step has it; returns all statuses."""
        calls = [(rank, worker) for rank in range(len(self.programs)) for worker in range(self.workers)]
        return set(self.threads.map(lambda call: self.step(step, *call, tokens), calls))


def in_order(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of float32 parts, rounded after each addition."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 70), st.integers(1, 5), st.integers(1, 3),
    st.integers(0, 300), st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_sums_and_parts_of_all_ranks(
    parts: list[int], width: int, most: int, workers: int, room: int, data: st.DataObject
) -> None:
    """Sums have the bits of an addition in the order of ranks. Of tokens beyond the run's nothing is written."""
    ranks = Ranks(parts, width, most, workers, room)
    # counts go on from where they are, so that the halves change places
    ranks.arrivals.reshape(-1).view(np.int64)[:: CELL // 2] = data.draw(
        st.sampled_from([0, 1, 1 << 40]), "earlier exchanges"
    )
    rng = np.random.default_rng(width)
    with ranks:
        for _ in range(3):
            tokens = data.draw(st.integers(1, most))
            x = [rng.standard_normal((tokens, width), dtype=np.float32) for _ in parts]
            y = [rng.standard_normal((tokens, part), dtype=np.float32) for part in parts]
            for program, own_x, own_y in zip(ranks.programs, x, y, strict=True):
                program.arena[:] = 0xFF
                program.inputs["x"][:tokens], program.inputs["y"][:tokens] = own_x, own_y
            assert ranks.run(0, tokens) == {0} == ranks.run(1, tokens)
            meant, _, _ = reference.all_reduce(x, ranks.exchange, ranks.arrivals, 0)
            gathered, _, _ = reference.all_gather(y, ranks.exchange, ranks.arrivals, 0, 0, sum(parts))
            for program in ranks.programs:
                got = program.value("sum0")[:tokens]
                np.testing.assert_array_equal(got, in_order(x))
                np.testing.assert_allclose(got, meant, rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(program.value("all0")[:tokens], gathered)
                assert np.isnan(program.value("all0")[tokens:]).all()


def test_a_rank_that_has_been_faster_by_one_exchange_overwrites_nothing() -> None:
    """Rank 0 does its part of the second exchange while rank 1 has not read the first: that is in the other half."""
    ranks = Ranks([4, 4], 8, 1, 1, 0, rounds=2)
    for rank, program in enumerate(ranks.programs):
        program.inputs["x"][:], program.inputs["y"][:] = rank + 1, 10 * (rank + 1)
    with ranks:
        assert ranks.run(0, 1) == {0}  # sum0 = 3 on both
        fast = ranks.threads.submit(lambda: [ranks.step(step, 0, 0, 1) for step in (1, 2)])
        deadline = time.monotonic() + 10
        while ranks.arrivals[0, 0].view(np.int64)[0] < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not fast.done(), "it waits for rank 1 before it begins a third exchange"
        np.testing.assert_array_equal(ranks.exchange[0], [1] * 8 + [2] * 8, "rank 1 may still read these")
        assert [ranks.step(step, 1, 0, 1) for step in (1, 2)] == [0, 0] == fast.result(10)
    for program in ranks.programs:
        np.testing.assert_array_equal(program.value("all0"), [[10] * 4 + [20] * 4])
        assert (program.value("sum1") == 6).all()


@pytest.mark.parametrize("step", [0, 1])
def test_ranks_that_are_stopped_no_longer_wait(step: int) -> None:
    ranks = Ranks([3, 3], 4, 2, 2, 0)
    with ranks:
        waiting = [ranks.threads.submit(ranks.step, step, 0, worker, 2) for worker in range(2)]
        time.sleep(0.05)
        assert not any(future.done() for future in waiting), "rank 1 has not come"
        started = time.monotonic()
        stop(ranks.arrivals)
        assert all(future.result(10) != 0 for future in waiting), "the kernel reports it"
        assert time.monotonic() - started < 2
        assert ranks.step(step, 1, 0, 2) != 0, "a rank that comes later does not wait either"
