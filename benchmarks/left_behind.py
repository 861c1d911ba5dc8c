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


def of_others() -> set[str]:
    """Names of shared memory that other processes on this machine use."""
    found = set[str]()
    for path in Path("/proc").glob("[0-9]*/maps"):
        if path.parent.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                found |= {Path(line.split()[5]).name for line in path.read_text().splitlines() if "/dev/shm/" in line}
    return found


class LeftBehind:
    """What is there now that was not when this was made. `pids` are further processes that must not be there."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self._free = self._free_bytes()  # first: it begins to use the GPUs
        self._before = self._now()

    def problems(self, pids: Iterable[int], seconds: float) -> list[str]:
        """What is still there after this time, in words."""
        end = time.monotonic() + seconds
        while True:
            gc.collect()
            left = {what: found - self._before[what] for what, found in self._now().items()}
            left["processes"] |= {str(pid) for pid in running(pids)}
            if left["shared memory"]:
                left["shared memory"] -= of_others()
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

    def _now(self) -> dict[str, set[str]]:
        opened = {f"{fd.name}: {os.readlink(fd)}" for fd in Path("/proc/self/fd").iterdir() if os.path.islink(fd)}
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {
            "processes": {str(pid) for pid in processes_of(os.getpid())},
            "threads": {f"{each.name} {each.ident}" for each in threading.enumerate()},
            "shared memory": {
                *(name for name in os.listdir("/dev/shm") if not name.startswith("cuda.")),  # these are the driver's
                *(line.split()[0] for line in maps if "memfd:numballama" in line),
            },
            "files": {
                name
                for name in opened
                if "memfd:numballama" in name or ("pipe:" in name and not self.gpus)  # the driver has pipes of its own
            },
        }
