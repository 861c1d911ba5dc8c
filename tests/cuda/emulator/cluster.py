"""Blocks of a cluster, which run at the same time and read each other's shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

CLUSTER_SHIFT = 24
"""Where an address of a cluster's memory has the number of the block, plus 1."""
WAIT_S = 600.0
"""Seconds that a block waits for the others."""


class Cluster:
    """Blocks (`Block`), each run in a thread."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        self.blocks, self._barrier = blocks, Barrier(len(blocks))
        for block in blocks:
            block.cluster = self

    def meet(self) -> None:
        """Wait until all blocks are here."""
        self._barrier.wait(WAIT_S)

    def run(self) -> None:
        """Run all blocks. Raises what the first that fails raises."""
        with ThreadPoolExecutor(len(self.blocks)) as pool:
            pending = [pool.submit(self._run, block) for block in self.blocks]
        errors = [error for each in pending if (error := each.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])

    def _run(self, block: Any) -> None:
        try:
            block.run()
        except BaseException:
            self._barrier.abort()  # else the others would wait for it
            raise
