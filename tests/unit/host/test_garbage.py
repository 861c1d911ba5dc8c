"""The collector is left alone while kernels are compiled, and is as before afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from numballama.host import garbage
from numballama.host.garbage import AT_ONCE, seldom_collected


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Python's own threshold, whatever the tests have."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def collections_of(count: int) -> int:
    """Number of collections that start while `count` objects are made."""
    found: list[str] = []
    gc.callbacks.append(note := lambda phase, _: found.append(phase))
    kept = [[] for _ in range(count)]  # type: ignore[var-annotated]
    gc.callbacks.remove(note)
    assert len(kept) == count
    return found.count("start")


@contextlib.contextmanager
def another_thread_compiles() -> Iterator[None]:
    """A thread is in `seldom_collected` until this block ends."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with seldom_collected():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_few_collections_inside() -> None:
    assert collections_of(20_000) > 10
    with seldom_collected():
        assert collections_of(20_000) <= 1
    assert gc.get_threshold() == (700, 10, 10) and collections_of(20_000) > 10


def test_the_last_thread_brings_it_back() -> None:
    def fail() -> None:
        raise KeyError

    with another_thread_compiles():
        with pytest.raises(KeyError), seldom_collected():
            fail()
        assert gc.get_threshold() == (AT_ONCE, 10, 10)
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_has_it_back() -> None:
    """One forked while another thread compiles, which the child does not have; and one that ends a block itself."""
    with another_thread_compiles():
        with seldom_collected():
            child = os.fork()
            found = [gc.get_threshold()]
        if child == 0:
            try:
                signal.alarm(20)
                with seldom_collected():
                    found.append(gc.get_threshold())
                found.append(gc.get_threshold())
                os._exit(0 if found == [(700, 10, 10), (AT_ONCE, 10, 10), (700, 10, 10)] else 1)
            finally:
                os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("threshold", [(0, 10, 10), (2 * AT_ONCE, 5, 5)])
def test_a_rarer_collector_stays(threshold: tuple[int, int, int]) -> None:
    gc.set_threshold(*threshold)
    with seldom_collected():
        assert gc.get_threshold() == threshold
    assert gc.get_threshold() == threshold


def test_what_others_set_meanwhile_stays() -> None:
    with seldom_collected():
        gc.set_threshold(900, 10, 10)
    assert gc.get_threshold() == (900, 10, 10)


def test_kernels_are_compiled_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import types

    from numballama.cpu import compiler

    inside: list[int] = []
    make = compiler._CFunc

    def made(*arguments: Any, **options: Any) -> Any:
        inside.append(garbage._inside)
        return make(*arguments, **options)

    def nothing(worker: int, n_workers: int, tokens: int, x: int) -> None:
        """A kernel that does nothing."""

    monkeypatch.setattr(compiler, "_CFunc", made)
    compiler.compile_step(nothing, [types.int64])
    assert inside == [1] and garbage._inside == 0
