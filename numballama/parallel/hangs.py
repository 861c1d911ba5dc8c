"""Finds ranks that hang: `HangWatch` looks at the memory that all ranks share.

A rank that has something to do hangs if its process gives no sign of life, or if rank 0 waits for it, and it has made
no progress for longer than rank 0 needed for its own part. Progress is a command done, an exchange that its workers
have come to, or a page read from the disk. While a rank loads or compiles, only signs of life count: nobody knows how
long that takes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .rank_memory import BEATS, DONE, FAULTS, RankMemory

HANG_S, LOADING_HANG_S = 1.5, 60.0
"""Seconds without a sign of life after which a rank hangs, and one that loads or compiles: that may leave no time for
signs of life. One that a signal has stopped hangs after HANG_S in any case. Without progress it hangs after HANG_S and
the time of rank 0's part.
"""
LOOK_S = 0.1
"""Seconds between two looks. A look that comes much later says that this process had no time."""


@dataclass
class Task:
    """What the ranks have been sent last: message `number`, since `start`. `rank_0_done`: when rank 0 had done its part
    and began to wait for the others; None before that.
    """

    number: int
    loading: bool = True
    start: float = field(default_factory=time.monotonic)
    rank_0_done: float | None = None

    def end_of_rank_0(self) -> None:
        """Rank 0 has nothing more to do for it."""
        if self.rank_0_done is None:
            self.rank_0_done = time.monotonic()


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process, as far as the system tells."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


class HangWatch:
    """Looks at ranks 1 and up, whose processes are `pids`."""

    def __init__(self, memory: RankMemory, pids: Sequence[int]) -> None:
        self._memory, self._pids = memory, pids
        count = memory.sizes.ranks
        self._exchanges, self._exchanged = np.zeros(count, np.int64), np.zeros(count)
        self._beats, self._alive = np.zeros(count, np.int64), np.zeros(count)
        self._progress, self._got_on = np.zeros((count, 2), np.int64), np.zeros(count)
        self._last = -np.inf

    def look(self, now: float, task: Task) -> dict[int, str]:
        """Rank → what is wrong, for each rank that hangs. To be called each `LOOK_S` seconds."""
        memory = self._memory
        late, self._last = now - self._last > 3 * LOOK_S, now
        exchanges = np.array([memory.exchanges(rank) for rank in range(len(self._alive))])
        beats, progress = memory.done[:, BEATS].copy(), memory.done[:, (DONE, FAULTS)]
        idle = (memory.done[:, DONE] >= task.number) | late
        self._exchanged[(exchanges != self._exchanges) | late] = now
        self._alive[idle | (beats != self._beats)] = now
        self._got_on[idle | (progress != self._progress).any(1)] = now
        self._exchanges, self._beats, self._progress = exchanges, beats, progress
        found = {rank: self._trouble(rank, now, task) for rank in range(1, len(idle)) if not idle[rank]}
        return {rank: trouble for rank, trouble in found.items() if trouble}

    def _trouble(self, rank: int, now: float, task: Task) -> str:
        quiet_s, patience_s = now - self._alive[rank], LOADING_HANG_S if task.loading else HANG_S
        stopped = quiet_s > HANG_S and is_stopped(self._pids[rank - 1])
        if stopped or quiet_s > patience_s:
            patience_s = min(patience_s, HANG_S) if stopped else patience_s
            return f"has given no sign of life for {patience_s:g} seconds" + (": it is stopped" if stopped else "")
        if task.loading:
            return ""
        if task.rank_0_done is not None:
            waits_since = max(task.rank_0_done, self._exchanged[0])
        elif self._exchanges[rank] < self._exchanges[0]:
            waits_since = self._exchanged[0]
        else:
            return ""
        lag_s = now - max(waits_since, self._got_on[rank], self._exchanged[rank])
        patience_s = HANG_S + max(waits_since - task.start, 0)
        if lag_s <= patience_s:
            return ""
        return f"has made no progress for {patience_s:.1f} seconds, and rank 0 waits for it"
