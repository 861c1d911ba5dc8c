"""Worker threads: each takes part in each job once, whoever calls, and they end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from numballama.cpu import workers
from numballama.cpu.compiler import compile_step
from numballama.cpu.executor import (
    ADDRESS,
    BEGIN,
    MAX_TOKENS,
    OPERANDS,
    ROWS,
    RUN_SIZE,
    describe_run,
    run_steps,
    serve,
    worker_threads,
)
from numballama.cpu.workers import ASLEEP, BARRIER, ERRORS, FIRST_WORKER, JOB, MAIL, WORKER_SIZE, WorkerThreads
from numballama.errors import DeviceError
from tests.helpers.processes import run_python

pytestmark = pytest.mark.slow

MOST = 5
"""Workers of the largest job here, more than this machine may have cores."""


def follow(worker, n_workers, tokens, step, log):  # type: ignore[no-untyped-def]
    """Write how many of this job's workers have finished the step before: all of them, or the barrier failed."""
    finished = 0
    for other in range(n_workers):
        finished += log[other, step]
    log[worker, step + 1] = 1 if finished == n_workers else -1


_run = np.zeros(RUN_SIZE, np.int64)
_one_at_a_time = threading.Lock()


def run(n_workers: int, steps: int, on: WorkerThreads = worker_threads) -> list[list[int]]:
    """Run a job of `steps` steps; returns what its workers wrote, a list for each. As a program does, all jobs are
    described in one place; what is there after a job would crash a worker that still reads it."""
    log = np.zeros((MOST, steps + 1), np.int64)
    log[:, 0] = 1
    compiled = compile_step(follow, [types.int64, types.Array(types.int64, 2, "C")])
    table = np.zeros((max(steps, 1), OPERANDS + 4), np.int64)
    for step, row in enumerate(table[:steps]):
        row[ADDRESS], row[MAX_TOKENS] = compiled.address, 1
        row[OPERANDS:] = step, log.ctypes.data, *log.shape
    with _one_at_a_time, on.region(n_workers):
        _run[:] = describe_run(table)
        _run[BEGIN:ROWS] = 0, steps, 1
        failed = run_steps(_run.ctypes.data, n_workers, on.address)
        _run[:] = 1
    assert failed == 0
    return log[:, 1:].tolist()


def expected(n_workers: int, steps: int) -> list[list[int]]:
    return [[int(worker < n_workers)] * steps for worker in range(MOST)]


def test_what_one_worker_writes_has_a_cache_line_of_its_own() -> None:
    places = [BARRIER, ERRORS, JOB, *(FIRST_WORKER + worker * WORKER_SIZE for worker in range(3))]
    assert all(8 * (b - a) >= 64 for a, b in pairwise(places)) and worker_threads.address % 64 == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, MOST), st.integers(0, 9), st.sampled_from((0, 0, 0, 0.0001, 0.01))),
        min_size=1,
        max_size=12,
    )
)
def test_every_worker_of_a_job_runs_every_step_once_and_in_order(jobs: list[tuple[int, int, float]]) -> None:
    """Whatever the size of the job before: workers may still be at its barrier, or asleep after a pause."""
    for n_workers, steps, pause in jobs:
        assert run(n_workers, steps) == expected(n_workers, steps)
        time.sleep(pause)


def test_callers_of_many_threads_share_one_set_of_workers() -> None:
    def started() -> int:
        return sum(thread.name.startswith("numballama worker") for thread in threading.enumerate())

    others = started() - sum(thread.is_alive() for thread in worker_threads._threads)  # of ranks
    run(MOST, 1)
    before = threading.active_count()
    most = 0

    def call(index: int) -> bool:
        nonlocal most
        n_workers, steps = index % MOST + 1, index % 7
        most = max(most, started())
        return run(n_workers, steps) == expected(n_workers, steps)

    with ThreadPoolExecutor(40) as pool:
        assert all(pool.map(call, range(400)))
    assert most - others == MOST - 1 and threading.active_count() == before


def test_workers_sleep_when_there_is_nothing_to_do_and_wake_only_when_needed() -> None:
    run(MOST, 1)

    def asleep() -> list[int]:
        return [int(worker_threads._sync[FIRST_WORKER + w * WORKER_SIZE + ASLEEP]) for w in range(1, MOST)]

    end = time.monotonic() + 30
    while asleep() != [1] * (MOST - 1) and time.monotonic() < end:
        time.sleep(0.01)
    assert asleep() == [1] * (MOST - 1)
    mails = [int(worker_threads._sync[FIRST_WORKER + w * WORKER_SIZE + MAIL]) for w in range(1, MOST)]
    assert run(2, 3) == expected(2, 3)
    assert asleep()[1:] == [1] * (MOST - 2)
    after = [int(worker_threads._sync[FIRST_WORKER + w * WORKER_SIZE + MAIL]) for w in range(1, MOST)]
    assert after == [mails[0] + 1, *mails[1:]]


def test_a_system_that_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("numballama"):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    own = WorkerThreads(serve)
    assert own.start(MOST) == 3
    assert own.start(2) == 2
    assert run(3, 4, own) == expected(3, 4)
    with pytest.raises(DeviceError, match="only 3: pass threads=3"), own.region(MOST):
        pass
    own._stop(workers.os.getpid())
    for thread in started:
        assert not thread.is_alive()


@pytest.mark.parametrize("state", ["asleep", "polling"])
def test_workers_end_with_the_process(state: str) -> None:
    code = f"""
import json, time, numballama
model = numballama.compile(None, device="cpu", threads=1)
from numballama.cpu.executor import worker_threads
worker_threads.start(4)
time.sleep({0.3 if state == "asleep" else 0})
print(json.dumps(time.time()))
"""
    end_of_the_program = run_python(code, timeout=600)
    assert time.time() - end_of_the_program < 20


def test_a_forked_child_is_refused_once_workers_have_started() -> None:
    code = """
import json, os, numballama
from numballama.cpu.executor import worker_threads
def child():
    pid = os.fork()
    if pid == 0:
        try:
            with worker_threads.region(1):
                os._exit(0)
        except numballama.DeviceError:
            os._exit(42)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
before = child()
worker_threads.start(2)
print(json.dumps([before, child()]))
"""
    assert run_python(code) == [0, 42]
