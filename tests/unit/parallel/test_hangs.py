"""Which ranks hang, by what they write to the memory that all share. Time is made up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from numballama.parallel import hangs
from numballama.parallel.hangs import HANG_S, LOADING_HANG_S, LOOK_S, HangWatch, Task, is_stopped
from numballama.parallel.rank_memory import BEATS, DONE, FAULTS, RankMemory, Sizes

SILENT = "has given no sign of life for"
LAGS = "has made no progress for"


class Ranks:
    """Three ranks: rank 1 is the one that is looked at, rank 2 is always well."""

    def __init__(self) -> None:
        self.memory, self.now = RankMemory.create(Sizes(3, 2, 8)), 1000.0
        self.watch, self.task = HangWatch(self.memory, [0, 0]), Task(2, False, self.now)
        self.counts = self.memory.arrivals.view("i8")[:, :, 0]
        self.memory.done[:, DONE] = 1

    def pass_time(self, seconds: float, each: Callable[[], object] = lambda: None) -> str:
        """Look until something is wrong with rank 1, at most for this long. `each` is called before each look."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_S
            self.memory.done[2, BEATS] += 1
            each()
            found = self.watch.look(self.now, self.task)
            assert not {*found} - {1}
            if found:
                return found[1]
        return ""

    def beat(self) -> None:
        self.memory.done[1, BEATS] += 1

    def done(self, rank: int) -> None:
        self.memory.done[rank, DONE] = self.task.number


@pytest.fixture
def ranks() -> Ranks:
    made = Ranks()
    made.done(2)
    return made


def test_no_sign_of_life(ranks: Ranks) -> None:
    assert ranks.pass_time(HANG_S) == ""
    assert ranks.pass_time(1) == f"{SILENT} {HANG_S:g} seconds"
    assert ranks.now < 1000 + HANG_S + 3 * LOOK_S
    ranks.beat()
    assert ranks.pass_time(HANG_S) == ""


def test_a_rank_that_has_nothing_to_do_gives_none(ranks: Ranks) -> None:
    ranks.done(1)
    assert ranks.pass_time(100) == ""
    ranks.task = Task(3, False, ranks.now)
    ranks.done(2)
    assert ranks.pass_time(HANG_S - LOOK_S) == "", "what was before does not count"
    assert SILENT in ranks.pass_time(1)


def test_loading_leaves_no_time_for_signs_of_life(ranks: Ranks) -> None:
    ranks.task = Task(2, True, ranks.now)
    assert ranks.pass_time(LOADING_HANG_S) == ""
    assert ranks.pass_time(1) == f"{SILENT} {LOADING_HANG_S:g} seconds"


def test_a_rank_that_loads_is_not_waited_for(ranks: Ranks) -> None:
    """Nobody knows how long it takes."""
    ranks.task = Task(2, True, ranks.now)
    ranks.task.end_of_rank_0()
    assert ranks.pass_time(10 * LOADING_HANG_S, ranks.beat) == ""


def test_this_process_had_no_time(ranks: Ranks) -> None:
    """Then the ranks may have had none."""
    for _ in range(20):
        ranks.now += 1
        assert ranks.watch.look(ranks.now, ranks.task) == {}


def test_a_rank_that_does_not_come_to_an_exchange(ranks: Ranks) -> None:
    """Rank 0 came there after half a second: it waits that much longer."""
    assert ranks.pass_time(20, ranks.beat) == "", "rank 0 is not further"
    ranks.task = Task(3, False, ranks.now)
    ranks.done(2)
    assert ranks.pass_time(0.5, ranks.beat) == ""
    ranks.counts[0] += 1
    began = ranks.now
    found = ranks.pass_time(20, ranks.beat)
    assert found.startswith(LAGS) and found.endswith("seconds, and rank 0 waits for it")
    assert HANG_S + 0.5 < ranks.now - began < HANG_S + 0.5 + 4 * LOOK_S


def test_a_rank_that_is_late_and_comes(ranks: Ranks) -> None:
    ranks.counts[0] += 1
    for _ in range(10):
        assert ranks.pass_time(1, ranks.beat) == ""
        ranks.counts[1, 0] += 1
        assert ranks.pass_time(1, ranks.beat) == "", "the other worker is late"
        ranks.counts[1, 1] += 1
        ranks.counts[0] += 1


def test_a_rank_that_reads_its_weights_from_the_disk(ranks: Ranks) -> None:
    def read() -> None:
        ranks.beat()
        ranks.memory.done[1, FAULTS] += 1

    ranks.counts[0] += 1
    assert ranks.pass_time(30, read) == ""
    assert LAGS in ranks.pass_time(3, ranks.beat)


def test_a_command_that_does_not_end(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has done its part, which took 3 seconds. On GPUs nothing else is known."""
    assert ranks.pass_time(3, ranks.beat) == ""
    monkeypatch.setattr(hangs.time, "monotonic", lambda: ranks.now)
    ranks.task.end_of_rank_0()
    began = ranks.now
    assert LAGS in ranks.pass_time(20, ranks.beat)
    assert HANG_S + 3 < ranks.now - began < HANG_S + 3 + 4 * LOOK_S


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not tell")
def test_a_rank_that_a_signal_has_stopped(ranks: Ranks, process: subprocess.Popen[bytes]) -> None:
    """It needs no time to load: that it gives no sign of life is no wonder, but it will not load."""
    assert not is_stopped(process.pid) and not is_stopped(-1)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_stopped(process.pid)
    ranks.watch = HangWatch(ranks.memory, [process.pid, 0])
    ranks.task = Task(2, True, ranks.now)
    assert ranks.pass_time(HANG_S) == ""
    assert ranks.pass_time(1) == f"{SILENT} {HANG_S:g} seconds: it is stopped"
