"""Measures the bandwidth of main memory: all workers read an array that is larger than any cache."""

from __future__ import annotations

import statistics
import time

import numpy as np
from numba import prange

from ..memory import available_bytes
from .compiler import jit

READ_BYTES = 1 << 30
"""Bytes of the array that is read: more than any cache holds."""


@jit(parallel=True)
def read_all(x, workers, sums):
    """Sum x in `workers` parts in parallel. Loads every byte once and does nothing else."""
    size = (x.shape[0] + workers - 1) // workers
    for worker in prange(workers):
        total = np.float32(0)
        for i in range(worker * size, min((worker + 1) * size, x.shape[0])):
            total += x[i]
        sums[worker] = total


def measure_bandwidth(workers: int, repeats: int = 5) -> float:
    """Bytes per second that `workers` workers read together: the median of several passes.

    The caller has entered a parallel region for that many workers.
    """
    nbytes = min(READ_BYTES, (available_bytes() or READ_BYTES) // 4)
    x = np.ones(nbytes // 4, np.float32)  # not zeros: the kernel would map them all to one page, which a cache holds
    sums = np.zeros(workers, np.float32)
    read_all(x, workers, sums)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        read_all(x, workers, sums)
        times.append(time.perf_counter() - start)
    return nbytes / statistics.median(times)
