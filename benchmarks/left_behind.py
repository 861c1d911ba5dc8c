"""What a model leaves behind: processes, threads, shared memory, files, and memory of GPUs. Needs Linux."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

SLACK = 16 << 20
"""Bytes of device memory that the driver may keep: it allocates code and bookkeeping 2 MB at a time."""


def _processes() -> Iterator[tuple[int, str, int, int]]:
    """(process, its state, its parent, its session) of all."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            yield int(path.parent.name), state, int(parent), int(session)


def processes_of(parent: int) -> set[int]:
    """Processes that a process has started, and those of their sessions: a rank begins one. Zombies too."""
    found = [*_processes()]
    ours = {pid for pid, _, its_parent, _ in found if its_parent == parent}
    return ours | {pid for pid, _, _, session in found if session in ours}


def running(pids: Iterable[int]) -> set[int]:
    """Those that have not ended, and zombies of this process."""
    wanted, me = set(pids), os.getpid()
    return {pid for pid, state, parent, _ in _processes() if pid in wanted and (state != "Z" or parent == me)}


class LeftBehind:
    """What is there now that was not when this was made. `pids` are further processes that must not be there."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self._before, self._free = self._now(), self._free_bytes()

    def problems(self, pids: Iterable[int], seconds: float) -> list[str]:
        """What is still there after this time, in words."""
        end = time.monotonic() + seconds
        while True:
            gc.collect()
            left = {what: found - self._before[what] for what, found in self._now().items()}
            left["processes"] |= {str(pid) for pid in running(pids)}
            kept = [was - now for was, now in zip(self._free, self._free_bytes(), strict=True)]
            found = [f"{what} left: {', '.join(sorted(each))}" for what, each in left.items() if each]
            found += [f"GPU {gpu} keeps {nbytes / 1e6:,.0f} MB" for gpu, nbytes in enumerate(kept) if nbytes > SLACK]
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.02)

    def _free_bytes(self) -> list[int]:
        """Free memory of each GPU."""
        if not self.gpus:
            return []
        from numballama.cuda.driver import Device

        return [Device(f"cuda:{gpu}").free_bytes for gpu in range(self.gpus)]

    @staticmethod
    def _now() -> dict[str, set[str]]:
        opened = {f"{fd.name}: {os.readlink(fd)}" for fd in Path("/proc/self/fd").iterdir() if os.path.islink(fd)}
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {
            "processes": {str(pid) for pid in processes_of(os.getpid())},
            "threads": {f"{each.name} {each.ident}" for each in threading.enumerate()},
            "shared memory": {*os.listdir("/dev/shm"), *(line.split()[0] for line in maps if "memfd:" in line)},
            "files": {name for name in opened if "memfd:" in name or "pipe:" in name},
        }
