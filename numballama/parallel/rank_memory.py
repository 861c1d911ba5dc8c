"""`RankMemory`: the memory that the processes of all ranks share, and the fixed structures in it.

A file without a name, mapped by every process: it is gone when the last of them has ended, however that was. It holds

- the next command of rank 0, and the inputs of a run or the page numbers that belong to it;
- for each rank the number of the last command that it has done, and why it failed;
- on the CPU what ranks exchange in `all_reduce` and `all_gather`: see `ops`. Ranks on GPUs exchange it between these,
  and find each other's memory by handles.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from ..errors import Error
from ..memory import round_up
from ..ops import CELL, STOPPED

ROWS = 4096
"""Largest number of tokens of a run, and of page numbers in a command."""
MESSAGE = 1024
"""Bytes of the reason why a rank failed, UTF-8."""
HANDLE = 64
"""Bytes of the handle of a rank's device memory."""
UNIQUE_ID = 128
"""Bytes by which ranks find each other where NCCL exchanges values."""

DONE, FAILED, BEATS, FREE, FAULTS, GPU = range(6)
"""Elements of a rank's row of `done`."""


def stop(arrivals: np.ndarray) -> None:
    """End the waits of all ranks that share these `arrivals`, now and later: their runs fail."""
    arrivals.reshape(-1).view(np.int64)[STOPPED] = 1


class Kind(IntEnum):
    """What a command asks for. Its arguments are elements 2 to 5."""

    PAGES = 1
    """slot, first entry, number of entries, which are in `data[0]`"""
    RUN = 2
    """number of the program, tokens, rows with logits, and how far: see `Until`"""
    SUBMIT = 3
    """The same without how far: rank 0 samples tokens for these rows, and this rank receives them. For GPUs."""
    CONNECT = 4
    """no arguments: all ranks have loaded; map their memory"""
    PREPARE = 5
    """number of the decode program: compile what would delay the first token"""
    SYNCHRONIZE = 6
    """no arguments: wait until the device has done all its work"""


class Until(IntEnum):
    """How far a run goes: ranks have different steps."""

    NOTHING = 0
    PREFILL_END = 1
    END = 2


class Sizes(NamedTuple):
    """What the layout depends on. Every process must have the same."""

    ranks: int
    workers: int
    exchange_size: int
    """Numbers in a half of `exchange` on the CPU; 0 for ranks on GPUs."""


class RankMemory:
    """The shared memory as arrays. `create` makes it, `open` maps the one of another process by its file descriptor."""

    def __init__(self, file: int, sizes: Sizes) -> None:
        self.file, self.sizes = file, sizes
        ranks, workers, exchanged = sizes
        layout: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "command": ((8,), np.int64),
            "done": ((ranks, CELL // 2), np.int64),
            "messages": ((ranks, MESSAGE), np.uint8),
            "handles": ((ranks, HANDLE), np.uint8),
            "unique_id": ((UNIQUE_ID,), np.uint8),
            "data": ((4, ROWS), np.int32),
            "arrivals": ((ranks, workers, CELL), np.int32),
            "exchange": ((2, exchanged), np.float32),
        }
        offsets: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = end
            end += round_up(int(np.prod(shape)) * np.dtype(dtype).itemsize, 64)
        end = round_up(end, mmap.PAGESIZE)
        if os.fstat(file).st_size < end:
            os.ftruncate(file, end)
        self.bytes = np.frombuffer(mmap.mmap(file, end), np.uint8)
        """All of it: whole pages."""
        self.stop_at = offsets["arrivals"] + 8 * STOPPED
        """Byte of the word that `stop` sets."""

        def array(name: str) -> np.ndarray:
            shape, dtype = layout[name]
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return self.bytes[offsets[name] :][:nbytes].view(dtype).reshape(shape)

        self.command, self.done, self.data = array("command"), array("done"), array("data")
        """int64 [8]: number, kind and arguments. int64 [ranks, 8]: element DONE counts messages done, FAILED is not 0
        after a failure, BEATS counts while the process runs, FREE is bytes of device memory that were free after
        loading, FAULTS counts pages that were read from the disk, GPU stands for what kernels depend on of a rank's
        GPU. int32 [4, ROWS]: ids, positions, sequences and rows of a run."""
        self.handles, self.unique_id = array("handles"), array("unique_id")
        """uint8 [ranks, HANDLE]: of each rank's memory on a GPU. uint8 [UNIQUE_ID]: rank 0's, for NCCL."""
        self.arrivals, self.exchange, self._messages = array("arrivals"), array("exchange"), array("messages")

    @classmethod
    def create(cls, sizes: Sizes) -> RankMemory:
        """Memory of zeros. `file` is to be inherited by the other processes."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("numballama"), sizes)
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()), sizes)

    def exchanges(self, rank: int) -> int:
        """How often the workers of a rank on the CPU have come to an exchange, all together. 0 on GPUs."""
        return int(self.arrivals[rank].view(np.int64)[:, 0].sum())

    def fail(self, rank: int, message: str) -> None:
        """Say why a rank failed: rank 0 reads it."""
        text = message.encode()[: MESSAGE - 1]
        self._messages[rank, : len(text)] = np.frombuffer(text, np.uint8)
        self.done[rank, FAILED] = 1

    def failure(self, rank: int) -> str | None:
        """Why a rank failed; None if it has not."""
        if self.done[rank, FAILED] == 0:
            return None
        return bytes(self._messages[rank]).rstrip(b"\0").decode(errors="replace")

    def stop(self) -> None:
        """End the waits of all ranks."""
        stop(self.arrivals)

    @property
    def stopped(self) -> bool:
        """Whether that was done."""
        return bool(self.arrivals.reshape(-1).view(np.int64)[STOPPED])

    def set_command(self, kind: Kind, *arguments: int) -> int:
        """Write the next command and return its number."""
        number = int(self.command[0]) + 1
        self.command[1], self.command[2 : 2 + len(arguments)] = kind, arguments
        self.command[0] = number
        return number

    def set_data(self, row: int, numbers: np.ndarray) -> None:
        """Write a row of `data`. Raises `Error` for more numbers than it holds."""
        if len(numbers) > ROWS:
            raise Error(f"ranks in processes take at most {ROWS:,} tokens or pages at a time, found {len(numbers):,}")
        self.data[row, : len(numbers)] = numbers

    def close(self) -> None:
        """Close the file. The mapping goes with the last array."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
