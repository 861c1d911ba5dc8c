"""Forked processes: locks come out free, and a child whose parent had workers is refused."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from numballama.cpu import fork
from numballama.cpu.fork import ForkSafeLock
from numballama.errors import DeviceError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def exit_code_of_child(work: Callable[[], int]) -> int:
    """What `work` returns in a forked child; a child that hangs is killed by a signal."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_lock_that_another_thread_held_is_free_in_the_child() -> None:
    lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(30)

    def take() -> int:
        with lock, lock:  # twice: it is reentrant
            return 7

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    try:
        assert exit_code_of_child(take) == 7
    finally:
        done.set()
        thread.join()


def test_a_child_of_a_process_with_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "_started_in", set())

    def refused() -> int:
        try:
            fork.refuse_forked()
        except DeviceError as error:
            return 42 if "spawn" in str(error) else 43
        return 0

    assert exit_code_of_child(refused) == 0, "no worker has started yet"
    fork.mark_workers_started()
    fork.refuse_forked()
    assert exit_code_of_child(refused) == 42
