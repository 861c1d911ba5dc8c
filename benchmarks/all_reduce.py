"""Time all-reduces of float32 between GPUs by size: our exchanges, as words and with flags, and NCCL's.

python benchmarks/all_reduce.py [--gpus 2] [--sizes 4096,…] [--json FILE.json]

Each GPU has a process. Many all-reduces, one after the other, are a CUDA graph, as in a run of a model; the figure is
the median time of a replay, by all-reduce. Between two replays all ranks meet. Sums are compared with the host's, and
their bits between ranks. Without peer access, or without NCCL, only the others are measured. 15 sizes take half a
minute on two cards, kernels that are not in the cache some seconds more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from gpu import commit

from numballama import backend
from numballama.bench.benchmark import machine
from numballama.errors import DeviceError
from numballama.files import atomic_write, require_folder
from numballama.parallel.rank_memory import RankMemory, Sizes

if TYPE_CHECKING:
    from numballama.cuda.launch import Peers

OURS, NCCL = ("words", "flags"), "nccl"
SIZES = [4096 << step for step in range(15)]
"""Bytes of a rank's numbers: 4 KB to 64 MB."""
COLUMNS = 1024
ROUNDS = 9
TOGETHER_BYTES, MOST_TOGETHER, LEAST_TOGETHER = 64 << 20, 64, 4
"""All-reduces in a CUDA graph: as many as add up to this number of bytes, but at most and at least these counts."""
WAIT_S = 60.0
MEETINGS, SUMS = 0, 1
"""Elements of a rank's row of `RankMemory.done`."""


class Meeting:
    """Where ranks wait for each other. `alive` says whether the other processes are there."""

    def __init__(self, memory: RankMemory, rank: int, alive: Callable[[], bool]) -> None:
        self.memory, self.rank, self._alive = memory, rank, alive

    def __call__(self) -> None:
        """Return when all ranks have come."""
        done = self.memory.done
        done[self.rank, MEETINGS] += 1
        end = time.monotonic() + WAIT_S

        def waiting() -> bool:
            return bool((done[:, MEETINGS] < done[self.rank, MEETINGS]).any())

        while waiting():
            # one that has come to the last meeting may have ended since
            if (self.memory.stopped or not self._alive() or time.monotonic() > end) and waiting():
                self.memory.stop()
                raise DeviceError(f"rank {self.rank}: another rank has ended")
            time.sleep(0)


class Bench:
    """One rank's device and what it exchanges with."""

    def __init__(self, meet: Meeting, ranks: int, ways: Sequence[str], largest: int) -> None:
        from numballama.cuda.driver import Device, Memory, Stopwatch
        from numballama.cuda.peers import NcclPeers, PeerMemory

        self.meet, self.rank, self.ranks = meet, meet.rank, ranks
        self.device = Device(f"cuda:{self.rank}")
        self.watch, memory, shares = Stopwatch(self.device), meet.memory, (range(0, 1),) * ranks
        self.peers: dict[str, Peers] = {}
        numbers = largest // 4
        self.values = [np.random.default_rng(rank).standard_normal(numbers, np.float32) for rank in range(ranks)]
        self.x, self.out = Memory(self.device, largest, "numbers"), Memory(self.device, largest, "sums")
        self.tokens = Memory(self.device, 4, "the number of rows")
        self.device.write(self.x.address, self.values[self.rank].ctypes.data, largest)
        self.device.synchronize()
        self.owned: list[Any] = []
        by_nccl = NcclPeers(self.device, self.rank, ranks) if NCCL in ways else None
        by_peers = PeerMemory(self.device, self.rank, ranks, COLUMNS) if {*ways} & {*OURS} else None
        if by_peers is not None:
            memory.handles[self.rank] = list(by_peers.handle)
        if by_nccl is not None and self.rank == 0:
            memory.unique_id[:] = list(by_nccl.unique_id)
        meet()
        if by_peers is not None:
            handles = [bytes(handle) for handle in memory.handles]
            ours = by_peers.connect(handles, shares, memory.bytes, memory.stop_at)
            self.peers |= dict.fromkeys(OURS, ours)
            self.owned.append(by_peers)
        if by_nccl is not None:
            self.peers[NCCL] = by_nccl.connect(bytes(memory.unique_id), shares, lambda: memory.stopped)
            self.owned.append(by_nccl)
        self.loaded: dict[object, Any] = {}
        meet()

    def prepared(self, way: str, nbytes: int) -> Callable[[], None]:
        """An all-reduce of this many bytes."""
        from numballama.cuda.compiler import compile_kernel
        from numballama.cuda.driver import LoadedKernel, PreparedLaunch
        from numballama.cuda.launch import Array, Launch, LaunchContext
        from numballama.cuda.nccl import PreparedCollective
        from numballama.cuda.ops import collectives
        from numballama.kernel_cache import cuda_cache_directory

        device, peers = self.device, self.peers[way]
        rows = nbytes // 4 // COLUMNS
        count = np.array([rows], np.int32)
        device.write(self.tokens.address, count.ctypes.data, 4)
        device.synchronize()
        tokens, tiles = self.tokens.array(0, (1,), "i32"), Array(0, (1, 2), "i32")

        def no_zeros(wanted: int) -> Array:
            raise AssertionError("an all-reduce needs no counters")

        ctx = LaunchContext(device.n_sms, device.shared_limit, tokens, tiles, no_zeros, peers=peers)
        x, out = self.x.array(0, (rows, COLUMNS), "f32"), self.out.array(0, (rows, COLUMNS), "f32")
        with mock.patch.object(collectives, "WORDS_UP_TO", 1 << 40 if way == "words" else 0):
            (work,) = collectives.all_reduce(ctx, x, peers.exchange, peers.arrivals, out, self.rank)
        if not isinstance(work, Launch):
            assert peers.communicator is not None
            return PreparedCollective(device, peers.communicator, work, rows)
        key = work.specialization
        if key not in self.loaded:
            code = compile_kernel(key, device.capability, cuda_cache_directory())
            self.loaded[key] = LoadedKernel(device, code)
        return PreparedLaunch(device, self.loaded[key], work)

    def seconds(self, way: str, nbytes: int) -> float:
        """Median seconds of an all-reduce. Raises `DeviceError` for a wrong sum."""
        from numballama.cuda.driver import CudaGraph

        device = self.device
        device.make_current()
        one = self.prepared(way, nbytes)
        device.fill(self.out.address, 0xFF, nbytes)  # NaN
        device.synchronize()
        self.meet()
        one()
        self.check(way, nbytes)
        together = max(LEAST_TOGETHER, min(MOST_TOGETHER, TOGETHER_BYTES // nbytes))
        self.meet()
        graph, found = CudaGraph(device, [one] * together), []
        for _ in range(ROUNDS + 1):
            self.meet()
            found.append(self.watch.measure(graph.replay) / together)
        self.check(way, nbytes)
        return statistics.median(found[1:])  # the first warms up

    def check(self, way: str, nbytes: int) -> None:
        """Compare sums with the host's, and bits between ranks."""
        found = np.empty(nbytes // 4, np.float32)
        self.device.read(self.out.address, found)
        want = np.sum([each[: found.size] for each in self.values], axis=0, dtype=np.float32)
        right = np.allclose(found, want, rtol=1e-5, atol=1e-5)
        self.meet.memory.done[self.rank, SUMS] = zlib.crc32(found.tobytes())
        self.meet()
        alike = len({*self.meet.memory.done[:, SUMS].tolist()}) == 1
        self.meet()
        if not (right and alike):
            raise DeviceError(f"{way}, {nbytes:,} bytes: {'bits differ between ranks' if right else 'wrong sums'}")

    def close(self) -> None:
        """Free what was made for the exchanges."""
        from numballama.cuda.peers import NcclPeers

        self.meet.memory.stop()
        for each in self.owned:
            if isinstance(each, NcclPeers):
                each.stop()
        self.device.synchronize()
        for each in self.owned:
            each.free()


def measure(meet: Meeting, ranks: int, ways: Sequence[str], sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Bytes → way → seconds. All ranks call this."""
    bench = Bench(meet, ranks, ways, max(sizes))
    try:
        return {str(nbytes): {way: bench.seconds(way, nbytes) for way in ways} for nbytes in sizes}
    finally:
        bench.close()


def possible_ways(ranks: int) -> tuple[list[str], dict[str, str], str | None]:
    """What can be measured, why the others cannot, and NCCL's version."""
    from numballama.cuda import driver, nccl

    ways, missing, version = list(OURS), dict[str, str](), None
    if apart := driver.pairs_without_access([f"cuda:{rank}" for rank in range(ranks)]):
        ways, missing["ours"] = [], f"no peer access: {', '.join(' and '.join(pair) for pair in apart)}"
    try:
        version = nccl.load().version
        ways.append(NCCL)
    except DeviceError as error:
        missing[NCCL] = str(error)
    if not ways:
        raise SystemExit("; ".join(missing.values()))
    return ways, missing, version


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"


def border(found: Mapping[str, Mapping[str, float]]) -> str:
    """From which size on NCCL is always faster than the faster of ours."""
    smallest = None
    for nbytes, times in sorted(found.items(), key=lambda item: -int(item[0])):
        ours = [seconds for way, seconds in times.items() if way != NCCL]
        if NCCL not in times or not ours:
            return ""
        if times[NCCL] >= min(ours):
            break
        smallest = int(nbytes)
    return "NCCL is faster from no size on" if smallest is None else f"NCCL is faster from {_size(smallest)} on"


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown: µs, and GB/s of a rank's numbers in brackets."""
    found, ways = result["seconds"], result["ways"]
    gpu = result["machine"].get("gpu") or {}
    lines = [
        f"{result['gpus']} × {gpu.get('name')}, driver {gpu.get('driver')}, NCCL {result['nccl']}, "
        f"NCCL_NVLS_ENABLE={result['nvls']}, {result['machine']['date']}, commit {result['commit']}",
        "",
        f"| bytes | {' | '.join(f'{way}, µs (GB/s)' for way in ways)} | fastest |",
        "|---" * (len(ways) + 2) + "|",
    ]
    for nbytes, times in found.items():
        cells = [f"{times[way] * 1e6:,.1f} ({int(nbytes) / times[way] / 1e9:,.0f})" for way in ways]
        lines.append(f"| {_size(int(nbytes))} | {' | '.join(cells)} | {min(times, key=times.__getitem__)} |")
    said = [border(found), *(f"{way} not measured: {why}" for way, why in result["missing"].items())]
    return "\n".join([*lines, "", *filter(None, said)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="how many (default 2)")
    parser.add_argument("--sizes", metavar="BYTES[,BYTES]", help=f"multiples of {4 * COLUMNS}; default 4 KB to 64 MB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # another rank's process: its rank, file and ways
    options = parser.parse_args(arguments)
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else SIZES
    if wrong := [size for size in sizes if size <= 0 or size % (4 * COLUMNS)]:
        raise SystemExit(f"sizes are multiples of {4 * COLUMNS} bytes, found {wrong[0]}")
    if options.rank:
        rank, file, *ways = options.rank.split(",")
        parent = os.getppid()
        memory = RankMemory(int(file), Sizes(options.gpus, 1, 0))
        measure(Meeting(memory, int(rank), lambda: os.getppid() == parent), options.gpus, ways, sizes)
        return
    if options.gpus < 2:
        raise SystemExit("one GPU has nobody to exchange with: pass --gpus 2")
    if options.json is not None:
        require_folder(options.json)
    try:
        backend.choose_device("cuda", options.gpus)
    except DeviceError as error:
        raise SystemExit(str(error)) from None
    ways, missing, version = possible_ways(options.gpus)
    memory = RankMemory.create(Sizes(options.gpus, 1, 0))
    processes = [
        subprocess.Popen(
            [
                sys.executable, __file__, "--gpus", str(options.gpus), "--sizes", ",".join(map(str, sizes)),
                "--rank", ",".join([str(rank), str(memory.file), *ways]),
            ],
            pass_fds=[memory.file],
        )
        for rank in range(1, options.gpus)
    ]  # fmt: skip
    try:
        meet = Meeting(memory, 0, lambda: all(process.poll() is None for process in processes))
        found = measure(meet, options.gpus, ways, sizes)
    finally:
        memory.stop()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    from numballama.cuda.bandwidth import describe
    from numballama.cuda.driver import Device

    result = {
        "what": "all-reduces of float32 between GPUs", "commit": commit(), "gpus": options.gpus, "nccl": version,
        "nvls": os.environ.get("NCCL_NVLS_ENABLE"), "machine": machine() | {"gpu": describe(Device("cuda:0"))},
        "ways": ways, "missing": missing, "seconds": found,
    }  # fmt: skip
    if options.json is not None:
        with atomic_write(options.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    print(table(result))


if __name__ == "__main__":
    main()
