"""Ctrl-C while a compiler works: never lost, never another error, and the next start works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from numballama import kernel_cache
from numballama.host import interrupts
from tests.helpers.processes import PACKAGE

MOMENTS = 60
"""More starts than it takes until all kernels are compiled, one at least in each."""
STORY = [sys.executable, "-m", "numballama", "story", "--max-tokens", "4", "--temperature", "0", "--device", "cpu"]
STORY_TOLD = "Once upon a time\n"


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


AT_THE_END = """
import atexit, signal, sys, types
from numballama import __main__
command_line = types.ModuleType("numballama.cli.main")
def main():
    atexit.register(lambda: signal.raise_signal(signal.SIGINT))
    sys.stdout.write("the text")
    sys.stdout.flush()
    ENDING
command_line.main = main
sys.modules["numballama.cli.main"] = command_line
sys.exit(__main__.main())
"""
"""A program with a Ctrl-C that comes when it has ended, and Python has not."""


@pytest.mark.parametrize(
    ("ending", "says"), [("return 0", ""), ("sys.exit(2)", ""), ("raise MemoryError", "numballama: memory is short")]
)
def test_ctrl_c_while_python_ends_is_no_traceback(ending: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END.replace("ENDING", ending)],
        env=environment(Path("none")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "the text"), done.stderr
    assert done.stderr.startswith(says) and done.stderr.count("\n") == bool(says)


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


def interrupted(cache: Path, moment: Callable[[subprocess.Popen[str]], None], whole_group: bool) -> str | None:
    """Interrupt a start at a moment; returns how far it was. None if it had ended, with its story.

    Where only Python itself was left to end, the system ended it, without a word and after the whole story.
    """
    process = start(cache)
    moment(process)
    sent = time.monotonic()
    if process.poll() is None:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    took = time.monotonic() - sent
    assert "Traceback" not in err and "ignored" not in err, err
    if process.returncode == 0 or ((process.returncode, err) == (-signal.SIGINT, "") and out):
        assert out == STORY_TOLD, out
        return None
    assert (process.returncode, err) == (130, "interrupted\n"), (process.returncode, err)
    return f"interrupted with {whole_entries(cache)} kernels, {took:.2f} s after the signal"


def after(seconds: float) -> Callable[[subprocess.Popen[str]], None]:
    """When a start has used so much of a processor, which on a busy machine is later."""

    def wait(process: subprocess.Popen[str]) -> None:
        times = Path(f"/proc/{process.pid}/stat")
        if not times.exists():
            time.sleep(seconds)
            return
        while process.poll() is None and used(times.read_text()) < seconds:
            time.sleep(0.005)

    return wait


def used(stat: str) -> float:
    """Seconds of a processor, of the text of /proc/PID/stat."""
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def after_kernels(cache: Path, more: int, seconds: float) -> Callable[[subprocess.Popen[str]], None]:
    """When a start has kept some more kernels, and then some seconds later, which is in the midst of another one."""

    def wait(process: subprocess.Popen[str]) -> None:
        wanted = len(list(cache.rglob("*.kernel"))) + more
        while process.poll() is None and len(list(cache.rglob("*.kernel"))) < wanted:
            time.sleep(0.02)
        time.sleep(seconds)

    return wait


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_cold_start(tmp_path: Path) -> None:
    """While Python imports, and then all along the compilation: each start goes on with the cache that the one before,
    which was interrupted, has left, until one ends by itself. So a kernel is compiled once, not for every moment.
    """
    cache = tmp_path / "chain"
    # Python itself has started after 0.2 s, and before nobody can catch it
    moments = [after(0.2 + 0.4 * index) for index in range(4)]
    moments += [after_kernels(cache, 1, 0.1 * (index % 4)) for index in range(MOMENTS)]
    found: list[str] = []
    for index, moment in enumerate(moments):
        how = interrupted(cache, moment, index % 2 == 1)
        print(f"moment {index}: {how}")
        if how is not None:
            found.append(how)
        elif index >= 4:
            break
    assert len(found) >= 5, found  # of a dozen kernels a start keeps up to three
    # other moments: the start that goes on with some kernels is interrupted later than those that found as many
    kept = sorted(cache.rglob("*.kernel"), key=lambda path: path.stat().st_mtime)
    for count in (3, 8):
        part = tmp_path / str(count)
        for path in kept[:count]:
            (part / path.relative_to(cache)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, part / path.relative_to(cache))
        how = interrupted(part, after_kernels(part, 1, 0.3), count == 3)
        print(f"of a cache with {count} kernels: {how}")
        assert how is not None
    out, err = start(cache).communicate(timeout=600)
    assert (out, err) == (STORY_TOLD, "")
