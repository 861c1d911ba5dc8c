"""`os.fork` and the CPU backend: in a forked child, locks are free and worker threads do not exist."""

from __future__ import annotations

import os
import threading

from ..errors import FORKED, DeviceError


class ForkSafeLock:
    """A reentrant lock. It is free in a forked child, where the thread that held it does not exist.

    `with lock.now:` a method of this class would be interrupted between taking the lock and the block, by a signal's
    handler that raises, and the lock would stay taken.
    """

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.now = threading.RLock()
        """The lock of this process."""


_started_in: set[int] = set()
"""Ids of processes that have started workers: this process and those that it was forked from."""


def mark_workers_started() -> None:
    """Remember that this process has worker threads."""
    _started_in.add(os.getpid())


def refuse_forked() -> None:
    """Raise `DeviceError` in a child that was forked after workers had started: they do not run in the child."""
    if _started_in - {os.getpid()}:
        raise DeviceError(FORKED)
