"""How the CPU runs a plan: a table of steps, and one call into compiled code in which all workers run the table.

The step table is an int64 array with one row per step. Here the row of an `rmsnorm` of up to 64 tokens:

    column  0           1            2         3 …
            ADDRESS     MAX_TOKENS   OF_ROWS   OPERANDS
           ┌───────────┬────────────┬─────────┬────────────────────┬─────────────────┬────────────────────┬──────┬───
           │ 0x7f31…40 │ 64         │ 0       │ 0x7f30…00  64  288 │ 0x7f2f…00  288  │ 0x7f30…80  64  288 │ bits │ 0 …
           └───────────┴────────────┴─────────┴────────────────────┴─────────────────┴────────────────────┴──────┴───
            the kernel   of this step  all       x: data, T, D        weight: data, D   out: data, T, D      eps  unused

A kernel is an ordinary function of arrays and scalars: `rmsnorm(worker, n_workers, tokens, x, weight, out, eps)`.
`compiler.compile_step` compiles it with a C wrapper, which any code can call by its address:

    int32_t kernel(int64_t *operands, int64_t worker, int64_t n_workers, int64_t tokens);

This function reads slots of `operands` in the order of the parameters. An array takes a slot for the address of its
data and one for each extent (it is in C order, so strides follow). A float takes a slot for its 64 bits, an integer one
for its value, and a tuple the slots of its members. The result is 0, or Numba's status code if the kernel raised.

Every worker runs every row and waits for the others at a barrier after it, 0.1 to 0.3 µs per step. `workers` has the
threads and how they wait. No Python runs between steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .compiler import device, jit
from .intrinsics import atomic_add, call_step, i64_at
from .sampling import sample_rows
from .workers import (
    BARRIER,
    BASE,
    ERRORS,
    FIELDS,
    JOB,
    N_WORKERS,
    STOPPED,
    SYNC_SIZE,
    WorkerThreads,
    barrier_wait,
    begin_job,
    start_job,
    wait_for_job,
)

ADDRESS, MAX_TOKENS, OF_ROWS, OPERANDS = 0, 1, 2, 3
"""Columns of the step table: address of the kernel, most tokens that the step handles, 1 if it handles only the run's
rows with logits, first operand slot."""

TABLE, STRIDE, BEGIN, END, TOKENS, ROWS = range(6)
"""Elements of a run, int64[RUN_SIZE]: address and bytes of a row of the step table, the steps [BEGIN, END) to run, and
how many tokens and rows with logits the run has."""
LOGITS, SLOTS, SAMPLER, OUT = 6, 7, 8, 9
"""More elements, for a run that samples: the arguments of `sampling.sample_rows`; SAMPLER is 0 if none is sampled. OUT
is the first of five."""
RUN_SIZE = 14

RUN = JOB + FIELDS
"""Element of the synchronisation array that holds the address of the job's run."""


@device
def worker_loop(address, worker, n_workers, sync):
    """Run the steps of a run, then sample, as one of `n_workers` workers."""
    # all that is read after a barrier is read here: the caller may write its next run once it has passed the last one
    run, base = i64_at(address, RUN_SIZE), sync[JOB + BASE]
    table, stride, begin, end = run[TABLE], run[STRIDE], run[BEGIN], run[END]
    tokens, rows, sampler = run[TOKENS], run[ROWS], run[SAMPLER]
    for step in range(begin, end):
        row = i64_at(table + step * stride, OPERANDS)
        operands = table + step * stride + 8 * OPERANDS
        count = rows if row[OF_ROWS] != 0 else tokens
        status = call_step(row[ADDRESS], operands, worker, n_workers, min(count, row[MAX_TOKENS]))
        if status != 0:
            atomic_add(sync, ERRORS, 1)
        if n_workers > 1:
            atomic_add(sync, BARRIER, 1)
            barrier_wait(sync, BARRIER, base + (step - begin + 1) * n_workers)
    if sampler != 0:
        out = (run[OUT], run[OUT + 1], run[OUT + 2], run[OUT + 3], run[OUT + 4])
        sample_rows(worker, n_workers, rows, run[LOGITS], run[SLOTS], sampler, out)
        if n_workers > 1:
            atomic_add(sync, BARRIER, 1)
            barrier_wait(sync, BARRIER, base + (end - begin + 1) * n_workers)


@jit
def run_steps(run, requested, sync_address):
    """Run the steps of a run, then sample if it says so; returns how many kernel calls failed.

    `run` and `sync_address` (of `workers`) are addresses: if arrays were passed, Numba would allocate a record for each
    in every call. `requested` is the number of workers, which have been started.
    """
    sync, record = i64_at(sync_address, SYNC_SIZE), i64_at(run, RUN_SIZE)
    begin_job(sync, requested)
    # a job without a barrier would be over before the workers have read it
    if requested > 1 and (record[BEGIN] < record[END] or record[SAMPLER] != 0):
        sync[RUN] = run
        start_job(sync_address, requested)
    worker_loop(run, np.int64(0), requested, sync)  # as a literal, Numba would compile it for 0 and for other workers
    return sync[ERRORS]


@jit
def serve(sync_address, worker):
    """Run jobs as this worker until workers are to end. The body of a worker thread."""
    sync = i64_at(sync_address, SYNC_SIZE)
    mail = 0
    while True:
        mail = wait_for_job(sync_address, worker, mail)
        if sync[JOB + STOPPED] != 0:
            return
        worker_loop(sync[RUN], worker, sync[JOB + N_WORKERS], sync)


def describe_run(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """A run of no steps of this step table that samples nothing, int64[RUN_SIZE]."""
    run = np.zeros(RUN_SIZE, np.int64)
    run[TABLE], run[STRIDE] = table.ctypes.data, table.strides[0]
    return run


worker_threads = WorkerThreads(serve)
"""The worker threads of this process."""

_threads_of_ranks = [worker_threads]


def threads_of_rank(rank: int) -> WorkerThreads:
    """The worker threads of a rank, of those that run in this process: ranks wait for each other during a run, so that
    each needs its own."""
    while len(_threads_of_ranks) <= rank:
        _threads_of_ranks.append(WorkerThreads(serve))
    return _threads_of_ranks[rank]
