"""Measures the bandwidth of main memory: all workers read an array that is larger than any cache."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numba import types

from ..memory import available_bytes
from .compiler import compile_step
from .executor import ADDRESS, BEGIN, MAX_TOKENS, OPERANDS, ROWS, describe_run, run_steps, worker_threads

READ_BYTES = 1 << 30
"""Bytes of the array that is read: more than any cache holds."""
LEAST_BYTES = 1 << 24
"""Smallest array that is worth reading where memory is short."""


def read_all(worker, n_workers, tokens, x, sums):
    """Sum this worker's part of x. Loads every byte once and does nothing else."""
    size = (x.shape[0] + n_workers - 1) // n_workers
    total = np.float32(0)
    for i in range(worker * size, min((worker + 1) * size, x.shape[0])):
        total += x[i]
    sums[worker] = total


def measure_bandwidth(workers: int, repeats: int = 5) -> float | None:
    """Bytes per second that `workers` workers read together: the median of several passes.

    None where memory is too short for an array that caches do not hold.
    """
    free = available_bytes()
    nbytes = READ_BYTES if free is None else min(READ_BYTES, free // 4)
    if nbytes < LEAST_BYTES:
        return None
    x = np.ones(nbytes // 4, np.float32)  # not zeros: the kernel would map them all to one page, which a cache holds
    sums = np.zeros(workers, np.float32)
    floats = types.Array(types.float32, 1, "C")
    compiled: Any = compile_step(read_all, [floats, floats])
    table = np.zeros((1, OPERANDS + 4), np.int64)
    table[0, ADDRESS], table[0, MAX_TOKENS] = compiled.address, 1
    table[0, OPERANDS:] = x.ctypes.data, x.size, sums.ctypes.data, sums.size
    run = describe_run(table)
    run[BEGIN:ROWS] = 0, 1, 1
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with worker_threads.region(workers):
            run_steps(run.ctypes.data, workers, worker_threads.address)
        times.append(time.perf_counter() - start)
    return nbytes / statistics.median(times[1:])
