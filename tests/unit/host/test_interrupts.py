"""Ctrl-C while a compiler works: never lost, never another error, and the next start works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from numballama import kernel_cache
from numballama.host import interrupts
from tests.helpers.processes import PACKAGE

MOMENTS = 14
STORY = [sys.executable, "-m", "numballama", "story", "--max-tokens", "4", "--temperature", "0", "--device", "cpu"]
BEGINNING = "Once upon a time"


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def deferred(*actions: Callable[[], object]) -> None:
    """Do these in a block."""
    with interrupts.deferred():
        for action in actions:
            action()


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        deferred(interrupt, lambda: done.append("the block"))
    assert done == ["the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_block() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        deferred(interrupt, interrupt, lambda: done.append("the block"))
    assert done == []


def test_an_interrupt_that_became_another_error_is_an_interrupt() -> None:
    def fail() -> None:
        raise RuntimeError("LLVM")

    with pytest.raises(KeyboardInterrupt):
        deferred(interrupt, fail)
    with pytest.raises(RuntimeError, match="LLVM"):
        deferred(fail)


def test_of_nested_blocks_the_outermost_raises() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        deferred(lambda: deferred(interrupt), lambda: done.append("between"))
    assert done == ["between"]


def test_a_program_s_own_handler_and_other_threads_are_left_alone() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        for block in (interrupts.deferred, interrupts.ends_the_process):
            with block():
                interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT] * 2
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with interrupts.deferred():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failures == []


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "NUMBALLAMA_CACHE": str(cache)}


def start(cache: Path) -> subprocess.Popen[str]:
    """A start of the command line with this cache, in a process group of its own, as a terminal's shell makes it."""
    return subprocess.Popen(
        STORY,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def whole_entries(cache: Path) -> int:
    """Number of entries in a cache. Each is whole, and nothing else is there."""
    count = 0
    for path in cache.rglob("*"):
        if path.is_file() and path.name != kernel_cache._MARK:
            head, _, body = path.read_bytes().partition(b"\n")
            assert path.suffix == ".kernel" and head + b"\n" == kernel_cache._head(body), path
            count += 1
    return count


def try_moment(cache: Path, seconds: float, whole_group: bool, next_start: bool) -> tuple[str, float]:
    """Interrupt a start after some seconds; returns how it ended and the seconds from the signal to the end."""
    process = start(cache)
    time.sleep(seconds)
    sent = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    took = time.monotonic() - sent
    assert "Traceback" not in err and "ignored" not in err, err
    if process.returncode == 0:
        assert out.startswith(BEGINNING), out
        ended = "finished"
    else:
        assert (process.returncode, err) == (130, "interrupted\n"), (process.returncode, err)
        ended = f"interrupted with {whole_entries(cache)} kernels"
    if next_start:
        again = start(cache)
        out, err = again.communicate(timeout=600)
        assert again.returncode == 0 and out.startswith(BEGINNING) and err == "", (out, err)
    return ended, took


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_cold_start(tmp_path: Path) -> None:
    began = time.monotonic()
    out, err = start(tmp_path / "whole").communicate(timeout=600)
    whole = time.monotonic() - began
    assert out.startswith(BEGINNING) and err == ""

    def moment(index: int) -> tuple[str, float]:
        # from when Python has started, and before that nobody can catch it, to the end
        seconds = 0.3 + (whole - 0.3) * index / MOMENTS
        return try_moment(tmp_path / str(index), seconds, index % 2 == 1, index % 4 == 1)

    with ThreadPoolExecutor(min(MOMENTS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(moment, range(MOMENTS)))
    for index, (ended, took) in enumerate(found):
        print(f"moment {index} of {whole:.1f} s: {ended}, {took:.2f} s after the signal")
    assert sum(ended.startswith("interrupted") for ended, _ in found) > MOMENTS // 2, found
