"""The worker threads of this process: one set, whichever thread calls, and how a caller and its workers synchronise.

Why not `prange`: under OpenMP every calling thread gets worker threads of its own, so a server's 40 threads would start
40 sets, until no thread can be started and libgomp ends the process. Numba's workqueue ends it when two threads call.

The caller is worker 0. It writes a job, a range of steps, into the synchronisation array and counts up the `MAIL` of
each worker that takes part. A worker polls its own MAIL, about 50 µs long, and then sleeps on a condition variable of
its own. So workers that a smaller model does not need stay asleep.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..errors import DeviceError
from .compiler import device
from .fork import ForkSafeLock, mark_workers_started, refuse_forked
from .intrinsics import INT32, INT64, atomic_add, atomic_load, i64_at, pause, yield_core

BARRIER, ERRORS, JOB = 0, 8, 16
"""Elements of the int64 array by which workers synchronise, 64 bytes apart so that each has a cache line.

BARRIER counts workers that have finished a step. It only grows: a worker that leaves the last barrier late is not
disturbed by the next job. ERRORS is the number of kernel calls of the current job that have failed.
"""
N_WORKERS, BASE, STOPPED, FIELDS = 0, 1, 2, 3
"""Elements of a job, after JOB: the workers that take part, BARRIER before the job, whether workers are to end, and the
first of the executor's own fields."""
MAX_FIELDS = 8
"""Number of fields that the executor may use."""
FIRST_WORKER, WORKER_SIZE, MAX_WORKERS = 32, 24, 1024
"""Where the part of the first worker begins, the elements of each part, and how many parts there are."""
MAIL, ASLEEP, MUTEX, CONDITION = 0, 1, 8, 16
"""Elements of a worker's part: the number of jobs it was given, whether it sleeps, and what it sleeps on.

A mutex and a condition variable take up to 64 bytes each.
"""
SYNC_SIZE = FIRST_WORKER + WORKER_SIZE * MAX_WORKERS
SPIN_LIMIT = 2000
"""Number of polls, about 50 µs, after which a worker that waits for a job sleeps, and one at a barrier yields the core
between polls."""
EXIT_S = 1.0
"""Seconds that the end of the process waits for the workers."""


_C = ctypes.CDLL(None)


def _c_function(name: str, n_pointers: int) -> Any:
    """An intrinsic that calls a C function of pointers, passed as int64, and returns its int32."""

    def call(typingctx: Any, arguments: tuple[Any, ...]) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(INT32, [INT64] * n_pointers)
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            return builder.call(function, args)

        return types.int32(*[types.int64] * n_pointers), codegen

    if n_pointers == 1:
        return intrinsic(lambda typingctx, a: call(typingctx, (a,)))
    return intrinsic(lambda typingctx, a, b: call(typingctx, (a, b)))


_lock, _unlock = _c_function("pthread_mutex_lock", 1), _c_function("pthread_mutex_unlock", 1)
_wait, _signal = _c_function("pthread_cond_wait", 2), _c_function("pthread_cond_signal", 1)


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
def begin_job(sync, n_workers):
    """Prepare a job, before its fields are written. The caller holds the region's lock."""
    sync[ERRORS] = 0
    sync[JOB + N_WORKERS] = n_workers
    sync[JOB + BASE] = sync[BARRIER]


@device
def start_job(sync_address, n_workers):
    """Give the job to workers 1 … n_workers - 1, and wake those that sleep. Worker 0 is the caller."""
    sync = i64_at(sync_address, SYNC_SIZE)
    for worker in range(1, n_workers):
        part = FIRST_WORKER + worker * WORKER_SIZE
        atomic_add(sync, part + MAIL, 1)
        # read by an atomic addition: in the order of all of them, either this sees ASLEEP or the worker sees its MAIL
        if atomic_add(sync, part + ASLEEP, 0) != 0:
            _lock(sync_address + 8 * (part + MUTEX))
            _signal(sync_address + 8 * (part + CONDITION))
            _unlock(sync_address + 8 * (part + MUTEX))


@device
def wait_for_job(sync_address, worker, seen):
    """Wait until the worker's MAIL is no longer `seen`; returns it. The job's fields stay as they are until the worker
    has passed the barrier of the job's last step."""
    sync = i64_at(sync_address, SYNC_SIZE)
    part = FIRST_WORKER + worker * WORKER_SIZE
    for _ in range(SPIN_LIMIT):
        mail = atomic_load(sync, part + MAIL)
        if mail != seen:
            return mail
        pause()
    _lock(sync_address + 8 * (part + MUTEX))
    atomic_add(sync, part + ASLEEP, 1)
    mail = atomic_add(sync, part + MAIL, 0)
    while mail == seen:
        _wait(sync_address + 8 * (part + CONDITION), sync_address + 8 * (part + MUTEX))
        mail = atomic_load(sync, part + MAIL)
    atomic_add(sync, part + ASLEEP, -1)
    _unlock(sync_address + 8 * (part + MUTEX))
    return mail


class WorkerThreads:
    """The worker threads of this process. They start when a caller first needs them, and end with the process.

    `serve(sync_address, worker)` is compiled and releases the GIL; it runs jobs until one says that workers are to end.
    """

    def __init__(self, serve: Any) -> None:
        self._serve = serve
        self._region = ForkSafeLock()
        self._threads: list[threading.Thread] = []
        self._memory = np.zeros(SYNC_SIZE + 8, np.int64)
        start = -self._memory.ctypes.data % 64 // 8
        self._sync = self._memory[start : start + SYNC_SIZE]
        self.address: int = self._sync.ctypes.data
        """Address of the synchronisation array."""

    def start(self, workers: int) -> int:
        """Start threads so that `workers` can share a job, the caller included; returns how many can.

        They are fewer where the system starts no more threads. Raises `DeviceError` in a child that was forked after
        workers had started.
        """
        refuse_forked()
        with self._region:
            workers = min(workers, MAX_WORKERS)
            if len(self._threads) + 1 < workers:
                self._serve.compile((types.int64, types.int64))
                if not self._threads:
                    atexit.register(self._stop, os.getpid())
            while len(self._threads) + 1 < workers:
                worker = len(self._threads) + 1
                mutex, condition = self._sleeping_place(worker)
                _C.pthread_mutex_init(mutex, None)
                _C.pthread_cond_init(condition, None)
                thread = threading.Thread(
                    target=self._serve, args=(self.address, worker), name=f"numballama worker {worker}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # a limit of the system or the container
                    return worker
                mark_workers_started()
                self._threads.append(thread)
            return workers

    @contextlib.contextmanager
    def region(self, workers: int) -> Iterator[None]:
        """Keep other callers out while a job runs. Raises `DeviceError` as `start` does, and for missing threads."""
        refuse_forked()
        with self._region:
            if len(self._threads) + 1 < workers and (found := self.start(workers)) < workers:
                raise DeviceError(f"{workers} workers are needed, the system starts only {found}: pass threads={found}")
            yield

    def _sleeping_place(self, worker: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """Addresses of the mutex and of the condition variable on which a worker sleeps."""
        part = self.address + 8 * (FIRST_WORKER + worker * WORKER_SIZE)
        return ctypes.c_void_p(part + 8 * MUTEX), ctypes.c_void_p(part + 8 * CONDITION)

    def _stop(self, pid: int) -> None:
        """End the threads before Python frees their code. A thread that is busy is left to the end of the process."""
        if os.getpid() != pid or not self._region.acquire(timeout=EXIT_S):
            return
        try:
            self._sync[JOB + STOPPED] = 1
            for worker in range(1, len(self._threads) + 1):
                mutex, condition = self._sleeping_place(worker)
                self._sync[FIRST_WORKER + worker * WORKER_SIZE + MAIL] += 1
                _C.pthread_mutex_lock(mutex)
                _C.pthread_cond_signal(condition)
                _C.pthread_mutex_unlock(mutex)
            end = time.monotonic() + EXIT_S
            with contextlib.suppress(KeyboardInterrupt):  # the process ends in any case
                for thread in self._threads:
                    thread.join(max(end - time.monotonic(), 0))
        finally:
            self._region.release()
