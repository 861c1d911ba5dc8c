"""Blocks of a cluster, which run at the same time and write to each other's shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Condition
from typing import Any

CLUSTER_SHIFT = 24
"""Where an address of a cluster's memory has the number of the block, plus 1."""
WAIT_S = 600.0
"""Seconds that a block waits for the others."""


class Cluster:
    """Blocks (`Block`), each run in a thread. `changed` is held by who uses an mbarrier or another block's memory."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        self.blocks, self._barrier, self.changed = blocks, Barrier(len(blocks)), Condition()
        self._running, self._waiting = 0, list[Callable[[], bool]]()
        self._failed = False
        for block in blocks:
            block.join(self)

    def meet(self) -> None:
        """Wait until all blocks are here."""
        self._barrier.wait(WAIT_S)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until other blocks have made `ready` true."""
        with self.changed:
            self._waiting.append(ready)
            while not ready():
                all_wait = len(self._waiting) == self._running
                # one of those that wait may be ready, and not have woken up yet
                assert not all_wait or any(other() for other in self._waiting), "blocks that wait for each other"
                assert not self._failed and self.changed.wait(WAIT_S), "no other block makes it ready"
            self._waiting.remove(ready)

    def block_at(self, address: int) -> tuple[Any, int]:
        """The block with an address of the cluster's memory, and its own address for it."""
        number = (address >> CLUSTER_SHIFT) - 1
        assert 0 <= number < len(self.blocks), "no such block in the cluster"
        assert not self.blocks[number].done.all(), "the block has ended"
        return self.blocks[number], address & ((1 << CLUSTER_SHIFT) - 1)

    def run(self) -> None:
        """Run all blocks. Raises what the first that fails raises."""
        self._running = len(self.blocks)
        if len(self.blocks) == 1:  # most launches: a thread takes longer than some blocks
            self.blocks[0].run()
            return
        with ThreadPoolExecutor(len(self.blocks)) as pool:
            pending = [pool.submit(self._run, block) for block in self.blocks]
        errors = [error for each in pending if (error := each.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])

    def _run(self, block: Any) -> None:
        try:
            block.run()
        except BaseException:
            self._failed = True
            self._barrier.abort()  # else the others would wait for it
            raise
        finally:
            with self.changed:
                self._running -= 1
                self.changed.notify_all()
