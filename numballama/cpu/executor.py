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

Every worker runs every row and waits for the others at a barrier after it, 0.1 to 0.3 µs per step. `workers` has the
threads and how they wait. No Python runs between steps.
"""

from __future__ import annotations

from ..sampling import REPEAT_WINDOW, SETTINGS
from .compiler import device, jit
from .intrinsics import atomic_add, call_step, f32_at, f64_at, i32_at, i64_at, u64_at
from .sampling import sample
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

ADDRESS, MAX_TOKENS, OPERANDS = 0, 1, 2
"""Columns of the step table: address of the kernel, most tokens that the step handles, first operand slot."""

TABLE, STRIDE, BEGIN, END, TOKENS = range(JOB + FIELDS, JOB + FIELDS + 5)
"""Elements of the synchronisation array that hold a job: the arguments of `run_steps`."""

KERNEL_FAILED = -2
"""Result of `run_and_sample`, in place of a token, when a kernel failed."""


@device
def worker_loop(table, stride, begin, end, tokens, worker, n_workers, sync):
    """Run steps [begin, end) as one of `n_workers` workers."""
    base = sync[JOB + BASE]
    for step in range(begin, end):
        row = i64_at(table + step * stride, OPERANDS)
        operands = table + step * stride + 8 * OPERANDS
        status = call_step(row[ADDRESS], operands, worker, n_workers, min(tokens, row[MAX_TOKENS]))
        if status != 0:
            atomic_add(sync, ERRORS, 1)
        if n_workers > 1:
            atomic_add(sync, BARRIER, 1)
            barrier_wait(sync, BARRIER, base + (step - begin + 1) * n_workers)


@jit
def run_steps(table, stride, begin, end, tokens, requested, sync_address):
    """Run steps [begin, end) of a step table for `tokens` tokens; returns how many kernel calls failed.

    `table` and `sync_address` (of `workers`) are addresses and `stride` is the bytes of a row: if arrays were passed,
    Numba would allocate a record for each in every call. `requested` is the number of workers, which have been started.
    """
    sync = i64_at(sync_address, SYNC_SIZE)
    begin_job(sync, requested)
    if requested > 1 and begin < end:
        sync[TABLE], sync[STRIDE], sync[BEGIN], sync[END], sync[TOKENS] = table, stride, begin, end, tokens
        start_job(sync_address, requested)
    worker_loop(table, stride, begin, end, tokens, 0, requested, sync)
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
        worker_loop(
            sync[TABLE], sync[STRIDE], sync[BEGIN], sync[END], sync[TOKENS], worker, sync[JOB + N_WORKERS], sync
        )


@jit
def run_and_sample(table, stride, begin, end, tokens, requested, sync_address, logits, sampler):
    """`run_steps`, then the next token by `sampling.sample`; KERNEL_FAILED if a kernel failed, -1 for a NaN.

    `logits` is (address, vocab_size). `sampler` is `SamplerState.addresses`: the addresses of settings, recent, counts,
    state and ids, then the number of ids.
    """
    if run_steps(table, stride, begin, end, tokens, requested, sync_address) != 0:
        return KERNEL_FAILED
    settings, recent, counts, state, ids, n_ids = sampler
    return sample(
        f32_at(logits[0], logits[1]),
        f64_at(settings, SETTINGS),
        i32_at(recent, REPEAT_WINDOW),
        i64_at(counts, 1),
        u64_at(state, 1),
        i32_at(ids, n_ids),
    )


worker_threads = WorkerThreads(serve)
"""The worker threads of this process."""
