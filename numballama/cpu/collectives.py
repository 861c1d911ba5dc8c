"""Operators on the CPU in which ranks exchange values, through memory that all ranks share: threads or processes.

A rank writes its part to one half of `exchange`, counts that in `arrivals`, waits until all ranks have counted, and
reads every part. The next exchange uses the other half. A rank that writes there has seen all others arrive at the
exchange before, so they have read what was there: two halves need no second wait. Ranks must have the same number of
workers.

When a rank fails, the host sets an element of `arrivals`: the others no longer wait, and their kernels fail.
Conventions are those of `kernels_cpu`.
"""

from __future__ import annotations

import numpy as np

from .compiler import device
from .intrinsics import atomic_add, atomic_load, pause, yield_core
from .matmul import partition
from .workers import SPIN_LIMIT

STOPPED = 1
"""`ops.STOPPED`, which kernels cannot import: code is cached by the files that they import."""


@device
def place_of_count(arrivals, rank, worker):
    """The int64 element of `arrivals` in which a worker counts its exchanges."""
    return (rank * arrivals.shape[1] + worker) * arrivals.shape[2] // 2


@device
def meet(arrivals, rank, worker, first, last):
    """Say that this worker has written its part, and wait until workers [first, last) of all ranks have.

    False if the ranks have been stopped.
    """
    counts = arrivals.reshape(arrivals.size).view(np.int64)
    own = atomic_add(counts, place_of_count(arrivals, rank, worker), 1) + 1
    for other in range(arrivals.shape[0] * (last - first)):
        place = place_of_count(arrivals, other // (last - first), first + other % (last - first))
        rounds = 0
        while atomic_load(counts, place) < own:
            if atomic_load(counts, STOPPED) != 0:
                return False
            rounds += 1
            if rounds < SPIN_LIMIT:
                pause()
            else:
                yield_core()
    return True


@device
def next_half(exchange, arrivals, rank, worker):
    """The half of `exchange` that this worker's next exchange uses."""
    counts = arrivals.reshape(arrivals.size).view(np.int64)
    return exchange[counts[place_of_count(arrivals, rank, worker)] & 1]


def all_reduce(worker, n_workers, tokens, x, exchange, arrivals, out, rank):
    """Parts are added in the order of ranks, so that all ranks get the same bits.

    A worker writes, reads and adds some of the columns, so it waits for the worker of its number on each rank.
    """
    ranks, width = arrivals.shape[0], x.shape[1]
    begin, end = partition(width, worker, n_workers, 16)
    capacity = exchange.shape[1] // (ranks * width)
    for first in range(0, tokens, capacity):
        count = min(capacity, tokens - first)
        half = next_half(exchange, arrivals, rank, worker)
        for t in range(count):
            at = (rank * capacity + t) * width
            half[at + begin : at + end] = x[first + t, begin:end]
        if not meet(arrivals, rank, worker, worker, worker + 1):
            raise RuntimeError("ranks have been stopped")
        for t in range(count):
            total = out[first + t, begin:end]
            total[:] = half[t * width + begin : t * width + end]
            for other in range(1, ranks):
                at = (other * capacity + t) * width
                part = half[at + begin : at + end]
                for k in range(total.shape[0]):
                    total[k] += part[k]


def all_gather(worker, n_workers, tokens, x, exchange, arrivals, out, rank, begin, columns):
    """Workers share the rank's columns for writing and all columns for reading: they wait for every worker."""
    own, own_end = partition(x.shape[1], worker, n_workers, 16)
    read, read_end = partition(columns, worker, n_workers, 16)
    capacity = exchange.shape[1] // columns
    for first in range(0, tokens, capacity):
        count = min(capacity, tokens - first)
        half = next_half(exchange, arrivals, rank, worker)
        for t in range(count):
            at = t * columns + begin
            half[at + own : at + own_end] = x[first + t, own:own_end]
        if not meet(arrivals, rank, worker, 0, n_workers):
            raise RuntimeError("ranks have been stopped")
        for t in range(count):
            out[first + t, read:read_end] = half[t * columns + read : t * columns + read_end]
