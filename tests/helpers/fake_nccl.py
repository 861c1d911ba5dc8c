"""A stand-in for NCCL's library, over host memory: ranks exchange through files in a folder that the unique id names.

Each call of a communicator has a number; a rank writes what it sends to a file of that number and its rank, and waits
for those of the others. All sums are in the order of ranks. A call that is not the same on all ranks is an error, where
NCCL would hang.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 22805
SUCCESS, SYSTEM_ERROR, INVALID_USAGE = 0, 2, 5
TYPES = {2: np.int32, 7: np.float32}
WAIT_S = 60.0


class Function:
    """A function of the library: ctypes sets attributes on it."""

    argtypes: Any
    restype: Any

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class FakeNccl:
    """The library, with one communicator. `calls` has the name and the counts of each collective."""

    def __init__(self, version: int = VERSION) -> None:
        self.version, self.calls = version, list[tuple[Any, ...]]()
        self.aborted = False
        self.failing: dict[str, int] = {}
        """Name of a function → the code with which it fails."""
        self._grouped: list[tuple[Any, ...]] | None = None
        self._numbers = itertools.count()
        for name in dir(self):
            if name.startswith("_nccl"):
                setattr(self, name[1:], Function(self._guarded(name[1:], getattr(self, name))))
        self.ncclGetErrorString = Function(lambda code: f"fake error {code}".encode())
        self.ncclGetLastError = Function(lambda comm: b"what was last\n")

    def _guarded(self, name: str, call: Callable[..., int | None]) -> Callable[..., int]:
        def guarded(*arguments: Any) -> int:
            return self.failing.get(name) or call(*arguments) or SUCCESS

        return guarded

    def _ncclGetVersion(self, out: Any) -> None:
        out._obj.value = self.version

    def _ncclGetUniqueId(self, out: Any) -> None:
        folder = tempfile.mkdtemp(prefix="fake_nccl")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        ctypes.memmove(ctypes.addressof(out._obj), folder.encode().ljust(128, b"\0"), 128)

    def _ncclCommInitRank(self, out: Any, ranks: int, unique_id: Any, rank: int) -> int | None:
        self._folder = Path(bytes(unique_id).rstrip(b"\0").decode())
        self._ranks, self._rank = ranks, rank
        out._obj.value = 0x1234
        return SUCCESS if self._meet("init", b"") else SYSTEM_ERROR

    def _ncclCommAbort(self, comm: int) -> None:
        self.aborted = True

    def _ncclAllReduce(self, source: int, out: int, count: int, kind: int, op: int, comm: int, stream: int) -> None:
        self.calls.append(("all_reduce", count))
        parts = self._meet(f"reduce {count}", ctypes.string_at(source, 4 * count))
        if parts:
            numbers = [np.frombuffer(part, TYPES[kind]) for part in parts]
            with np.errstate(all="ignore"):  # rows beyond the run's have any values
                self._write(out, np.sum(numbers, axis=0, dtype=TYPES[kind]).tobytes())

    def _ncclAllGather(self, source: int, out: int, count: int, kind: int, comm: int, stream: int) -> None:
        self.calls.append(("all_gather", count))
        self._write(out, b"".join(self._meet(f"gather {count}", ctypes.string_at(source, 4 * count))))

    def _ncclBroadcast(self, source: int, out: int, count: int, kind: int, root: int, comm: int, stream: int) -> None:
        if self._grouped is not None:
            self._grouped.append((source, out, count, root))
            return
        self.calls.append(("broadcast", count))
        self._broadcast(source, out, count, root)

    def _ncclGroupStart(self) -> None:
        self._grouped = []

    def _ncclGroupEnd(self) -> None:
        grouped, self._grouped = self._grouped or [], None
        self.calls.append(("group", *(count for _, _, count, _ in grouped)))
        for each in grouped:
            self._broadcast(*each)

    def _broadcast(self, source: int, out: int, count: int, root: int) -> None:
        sent = ctypes.string_at(source, 4 * count) if root == self._rank else b""
        parts = self._meet(f"broadcast {count} {root}", sent)
        if parts:
            self._write(out, parts[root])

    @staticmethod
    def _write(out: int, data: bytes) -> None:
        ctypes.memmove(out, data, len(data))

    def _meet(self, what: str, data: bytes) -> list[bytes]:
        """What all ranks send; nothing after an abort."""
        number = next(self._numbers)
        own = self._folder / f"{number}.{self._rank}"
        part = own.with_suffix(".part" + str(self._rank))
        part.write_bytes(what.encode() + b"\n" + data)
        os.rename(part, own)
        found, end = list[bytes](), time.monotonic() + WAIT_S
        for rank in range(self._ranks):
            where = self._folder / f"{number}.{rank}"
            while not where.exists():
                if self.aborted or time.monotonic() > end:
                    return []
                time.sleep(0.0002)
            said, _, sent = where.read_bytes().partition(b"\n")
            assert said.decode() == what, f"rank {self._rank} calls {what}, rank {rank} {said.decode()}"
            found.append(sent)
        if number:  # all have read the one before: they are here
            (self._folder / f"{number - 1}.{self._rank}").unlink(missing_ok=True)
        return found
