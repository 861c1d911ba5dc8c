"""How the CPU runs a plan: a table of steps, and one call into compiled code in which all workers run the table.

The step table is an int64 array with one row per step. Here the row of an `rmsnorm` of up to 64 tokens:

    column  0           1            2 …
            ADDRESS     MAX_TOKENS   OPERANDS
           ┌───────────┬────────────┬────────────────────┬─────────────────┬────────────────────┬──────┬───
           │ 0x7f31…40 │ 64         │ 0x7f30…00  64  288 │ 0x7f2f…00  288  │ 0x7f30…80  64  288 │ bits │ 0 …
           └───────────┴────────────┴────────────────────┴─────────────────┴────────────────────┴──────┴───
            the kernel   of this step  x: data, T, D        weight: data, D   out: data, T, D      eps    unused

A kernel is an ordinary function of arrays and scalars: `rmsnorm(worker, n_workers, tokens, x, weight, out, eps)`.
`compiler.compile_step` compiles it with a C wrapper, which any code can call by its address:

    int32_t kernel(int64_t *operands, int64_t worker, int64_t n_workers, int64_t tokens);

This function reads slots of `operands` in the order of the parameters. An array takes a slot for the address of its
data and one for each extent (it is in C order, so strides follow). A float takes a slot for its 64 bits, an integer one
for its value, and a tuple the slots of its members. The result is 0, or Numba's status code if the kernel raised.

Every worker runs every row and waits for the others at a barrier after it, 0.1 to 0.3 µs per step. Starting threads for
each step would take ten times as long. No Python runs between steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Make idle workers sleep soon: by default libgomp spins so long that other work, and our own workers, lack the core.
# Numba reads this when it starts its threads. A value that the user has set is kept.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
from numba import get_num_threads, prange, set_num_threads

from .compiler import device, jit
from .fork import ForkSafeLock, mark_workers_started, refuse_forked
from .intrinsics import atomic_add, atomic_load, call_step, i32_at, i64_at, pause, yield_core
from .sampling import sample_rows

ADDRESS, MAX_TOKENS, OPERANDS = 0, 1, 2
"""Columns of the step table: address of the kernel, most tokens that the step handles, first operand slot."""

TICKET, BARRIER, N_WORKERS, ERRORS, SYNC_SIZE = 0, 8, 16, 24, 32
"""Elements of the int64 array by which workers synchronise, 64 bytes apart so that each has a cache line.

TICKET counts workers that have arrived, BARRIER those that have finished a step. N_WORKERS is the number of workers
that take part, ERRORS the number of kernel calls that have failed.
"""
CLOSED = 1 << 32
"""Added to TICKET when no further worker may join."""
SPIN_LIMIT = 2000
"""Number of polls, about 50 µs, after which a waiting worker yields the core between polls."""
POLL_LIMIT = 20000
"""Number of polls with yielding, a few ms, after which the first worker stops waiting for others to join."""

KERNEL_FAILED = -2
"""Result of `run_and_sample`, in place of a token, when a kernel failed."""


@device
def barrier_wait(sync, index, count):
    """Wait until sync[index] >= count. Spins, then yields: more workers than cores still make progress."""
    rounds = 0
    while atomic_load(sync, index) < count:
        rounds += 1
        if rounds < SPIN_LIMIT:
            pause()
        else:
            yield_core()


@device
def join_workers(index, requested, sync):
    """(worker, n_workers) for iteration `index` of the parallel loop; (-1, 0) if it comes too late to take part.

    A threading layer may start fewer threads than requested (OMP_THREAD_LIMIT) and run the iterations one after the
    other. Waiting for all of them would never end. So the first worker stops waiting after a while, and the workers
    that have arrived by then share the work.
    """
    ticket = atomic_add(sync, TICKET, 1)
    if ticket >= CLOSED:
        return -1, 0
    if ticket == 0:
        rounds = 0
        while atomic_load(sync, TICKET) < requested and rounds < SPIN_LIMIT + POLL_LIMIT:
            rounds += 1
            if rounds < SPIN_LIMIT:
                pause()
            else:
                yield_core()
        atomic_add(sync, N_WORKERS, atomic_add(sync, TICKET, CLOSED))
    barrier_wait(sync, N_WORKERS, 1)
    n_workers = atomic_load(sync, N_WORKERS)
    return (index if n_workers == requested else ticket), n_workers


@device
def worker_loop(table, stride, begin, end, tokens, worker, n_workers, sync):
    """Run steps [begin, end) as one of `n_workers` workers."""
    for step in range(begin, end):
        row = i64_at(table + step * stride, OPERANDS)
        operands = table + step * stride + 8 * OPERANDS
        status = call_step(row[ADDRESS], operands, worker, n_workers, min(tokens, row[MAX_TOKENS]))
        if status != 0:
            atomic_add(sync, ERRORS, 1)
        if n_workers > 1:
            atomic_add(sync, BARRIER, 1)
            barrier_wait(sync, BARRIER, (step - begin + 1) * n_workers)


@jit(parallel=True)
def run_steps(table, stride, begin, end, tokens, requested, sync_address):
    """Run steps [begin, end) of a step table for `tokens` tokens; returns how many kernel calls failed.

    `table` and `sync_address` (of SYNC_SIZE int64) are addresses and `stride` is the bytes of a row: if arrays were
    passed, Numba would allocate a record for each in every call. `requested` is the number of workers to ask for.
    """
    sync = i64_at(sync_address, SYNC_SIZE)
    for i in range(sync.shape[0]):  # Numba makes a parallel region of an assignment to a slice
        sync[i] = 0
    if requested == 1:
        worker_loop(table, stride, begin, end, tokens, 0, 1, sync)
    else:
        for index in prange(requested):
            worker, n_workers = join_workers(np.int64(index), requested, sync)
            if worker >= 0:
                worker_loop(table, stride, begin, end, tokens, worker, n_workers, sync)
    return sync[ERRORS]


@jit
def run_and_sample(table, stride, begin, end, tokens, requested, sync_address, logits, slots, sampler, out):
    """`run_steps`, then the next token of one row by `sampling.sample_rows`, which explains the last four arguments.

    Returns the token; KERNEL_FAILED if a kernel failed, -1 for a NaN.
    """
    if run_steps(table, stride, begin, end, tokens, requested, sync_address) != 0:
        return np.int64(KERNEL_FAILED)
    sample_rows(0, 1, 1, logits, slots, sampler, out)
    return np.int64(i32_at(out[0], 1)[0])


_region = ForkSafeLock()
"""Held in a parallel region. Numba's workqueue layer aborts the process on two at once; OpenMP would start twice as
many threads as there are cores."""


@contextlib.contextmanager
def parallel_region(workers: int) -> Iterator[None]:
    """Enter the only parallel region of this process, with Numba's number of threads set to `workers` inside it.

    Raises `DeviceError` in a child that was forked after workers had started.
    """
    refuse_forked()
    with _region:
        mark_workers_started()
        before = get_num_threads()
        if before != workers:
            set_num_threads(workers)
        try:
            yield
        finally:
            if before != workers:
                set_num_threads(before)
