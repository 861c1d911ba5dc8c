"""`os.fork` and the CPU backend: in a forked child, locks are free and worker threads do not exist."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from ..errors import FORKED, DeviceError


class ForkSafeLock:
    """A reentrant lock for `with`. It is free in a forked child, where the thread that held it does not exist."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.RLock()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock, within `timeout` seconds if that is not negative; returns whether it was taken."""
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_started_in: set[int] = set()
"""Ids of processes that have started workers: this process and those that it was forked from."""


def mark_workers_started() -> None:
    """Remember that this process has worker threads."""
    _started_in.add(os.getpid())


def refuse_forked() -> None:
    """Raise `DeviceError` in a child that was forked after workers had started: they do not run in the child."""
    if _started_in - {os.getpid()}:
        raise DeviceError(FORKED)
