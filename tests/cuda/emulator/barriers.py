"""Barriers in the emulator at which a part of a block waits: named barriers and mbarriers."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Condition

import numpy as np


@dataclass
class MBarrier:
    count: int
    missing: int
    phase: int = 0
    """Phases that have ended."""
    copying: int = 0
    """Bytes that are expected and have not been copied yet; less than 0 if more have been."""


class Barriers:
    """The barriers of a block of `threads`, and which threads wait at them."""

    def __init__(self, threads: int) -> None:
        self._named: dict[int, tuple[int, np.ndarray]] = {}  # number: threads that came, of which these wait
        self._mbarriers: dict[int, MBarrier] = {}
        self._at_named, self._at_mbarrier = np.zeros(threads, bool), np.zeros(threads, bool)
        self.changed = Condition()
        """Held while mbarriers are used; other blocks of a cluster share it."""

    @property
    def blocked(self) -> np.ndarray:
        """Threads that wait."""
        return self._at_named | self._at_mbarrier

    def named(self, numbers: np.ndarray, threads: np.ndarray, mask: np.ndarray, waits: bool) -> None:
        """The threads of `mask` come to named barriers."""
        for number in np.unique(numbers[mask]):
            here = mask & (numbers == number)
            (expected,) = np.unique(threads[here])
            came, waiting = self._named.get(int(number), (0, np.zeros(len(mask), bool)))
            came, waiting = came + int(here.sum()), waiting | here if waits else waiting
            assert came <= expected, f"{came} threads come to barrier {number} for {expected}"
            self._at_named |= waiting
            if came == expected:
                self._at_named &= ~waiting
                came, waiting = 0, np.zeros(len(mask), bool)
            self._named[int(number)] = came, waiting

    def make(self, addresses: np.ndarray, counts: np.ndarray, mask: np.ndarray) -> None:
        for thread in np.flatnonzero(mask):
            address, count = int(addresses[thread]), int(counts[thread])
            assert address % 8 == 0 and address not in self._mbarriers, "an mbarrier that is there already"
            self._mbarriers[address] = MBarrier(count, count)

    def remove(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        for thread in np.flatnonzero(mask):
            del self._mbarriers[int(addresses[thread])]

    def arrive(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        with self.changed:
            for address, count in zip(*np.unique(addresses[mask], return_counts=True), strict=True):
                barrier = self._mbarriers[int(address)]
                while count:
                    assert barrier.missing, "more threads arrive than the mbarrier was made for"
                    now = min(count, barrier.missing)
                    barrier.missing, count = barrier.missing - now, count - now
                    self._end_phase(barrier)

    def expect(self, addresses: np.ndarray, counts: np.ndarray, mask: np.ndarray) -> None:
        """Threads expect bytes of copies, before they arrive."""
        with self.changed:
            for thread in np.flatnonzero(mask):
                self._mbarriers[int(addresses[thread])].copying += int(counts[thread])

    def copied(self, address: int, count: int) -> None:
        """The copy engine reports bytes."""
        with self.changed:
            barrier = self._mbarriers[address]
            barrier.copying -= count
            self._end_phase(barrier)

    def _end_phase(self, barrier: MBarrier) -> None:
        if barrier.missing == 0 and barrier.copying == 0:
            barrier.missing, barrier.phase = barrier.count, barrier.phase + 1
            self._at_mbarrier[:] = False  # they look again
            self.changed.notify_all()

    def ended(self, addresses: np.ndarray, parities: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """For each thread whether the phase of its parity has ended. The others wait until any phase ends."""
        ended = np.zeros(len(mask), bool)
        with self.changed:
            for address in np.unique(addresses[mask]):
                here = mask & (addresses == address)
                ended |= here & (parities != (self._mbarriers[int(address)].phase & 1))
            self._at_mbarrier |= mask & ~ended
        return ended
