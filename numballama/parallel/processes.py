"""A model that ranks in several processes share, each on a GPU or all on the CPU: `ProcessBackend`. This process has
rank 0.

Each other rank has a process of its own, which maps the model file, takes its part of the weights and waits for
commands. Rank 0 schedules: before a run it writes the inputs to the shared memory and wakes the others, then runs its
own part; all meet in the kernels of `all_reduce` and `all_gather`. Messages are fixed structures, and graphs as JSON.
On GPUs a run is only put into the stream, and `submit` may be ahead of the tokens on all ranks.

A rank that ends, however that was, ends the run of all others within milliseconds: a thread waits for each process.
After a failure the group is gone; every further run raises the same error.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..checkpoint import Weight
from ..config import ModelConfig
from ..cpu.fork import mark_workers_started, refuse_forked
from ..errors import CLOSED, COMPILE_AGAIN, DeviceError, Error, UnsupportedError
from ..fusion import FUSIONS
from ..host import interrupts
from ..host.child import can_start_python, how_it_ended, python_environment
from ..ir import Graph
from ..plan import Plan
from ..progress import Report, progress_bar
from ..quantization.policy import Dtype
from ..sampling import Sampled, SamplerTable
from ..visualize.parts import is_exchange
from .backend import RanksBackend
from .communication import REPEATS, RUNS
from .graph_json import dump_graph
from .hangs import LOOK_S, HangWatch, Task
from .rank_device import CpuRank, GpuRank, RankProgram, exchange_on_gpus, open_rank, way_of_exchange
from .rank_memory import DONE, FAILED, FREE, ROWS, Kind, RankMemory, Sizes, Until
from .rank_process import COMMAND, GRAPH, INPUTS, Settings
from .shard import Layout, Shard
from .shares import Shares
from .weights import divided

if TYPE_CHECKING:
    from ..backend import Program

T = TypeVar("T")

RANK_PROCESS = f"{__package__}.rank_process"
"""The module that another rank's process runs."""
POLL_S = 0.001
"""Seconds between two looks at a rank that loads or compiles."""
SHORT_WAIT = 100
"""Looks before that, at once."""
END_S = 1.0
"""Seconds that a process has to end when its input has ended, before it is killed."""
NOTICE_S = 0.3
"""Seconds in which the end of a process is noticed: what fails on rank 0 meanwhile may be a consequence."""


class RankGroup:
    """The processes of ranks 1 and up, and the memory that they share with this one."""

    def __init__(self, settings: Callable[[int, int], Settings], sizes: Sizes) -> None:
        if not can_start_python():
            raise DeviceError(f"ranks need processes of Python, and {sys.executable} is not Python")
        self.memory = RankMemory.create(sizes)
        self._pid, self._closing = os.getpid(), False
        self._failure: str | None = None
        self._end_waits: Callable[[], None] = lambda: None
        self._task = Task(1)
        """The last message; the start counts as the first."""
        mark_workers_started()
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, sizes.ranks):
                given = settings(rank, self.memory.file).as_json()
                command = [sys.executable, "-m", RANK_PROCESS, given]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=python_environment(),
                    pass_fds=[self.memory.file], start_new_session=True,  # Ctrl-C is for this process
                )  # fmt: skip
                self.processes.append(process)
                threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
            threading.Thread(target=self._look, daemon=True).start()
        except BaseException:
            self.close()
            raise

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a process, and stop all others if that is a failure."""
        code = process.wait()
        if self._closing:
            return
        why = self.memory.failure(rank)
        self._failure = self._failure or f"rank {rank} ended with {how_it_ended(code)}" + (f": {why}" if why else "")
        self._stop()

    def _stop(self) -> None:
        self.memory.stop()
        self._end_waits()

    def on_stop(self, end_waits: Callable[[], None]) -> None:
        """Call this when the ranks are stopped, or now if they have been: rank 0's device may wait for them."""
        self._end_waits = end_waits
        if self.memory.stopped:
            end_waits()

    def _look(self) -> None:
        """Kill a rank that hangs."""
        watch = HangWatch(self.memory, [process.pid for process in self.processes])
        while not self._closing:
            time.sleep(LOOK_S)
            for rank, trouble in watch.look(time.monotonic(), self._task).items():
                self._failure = self._failure or f"rank {rank} {trouble}"
                self.processes[rank - 1].kill()  # `_watch` stops the others

    @property
    def failure(self) -> DeviceError | None:
        """Why no run is possible any more, if a rank has failed."""
        return None if self._failure is None else DeviceError(self._failure + COMPILE_AGAIN)

    def check(self) -> None:
        """Raise `DeviceError` if a rank has failed, and end the others."""
        if (failure := self.failure) is not None:
            self.close()
            raise failure
        if self._closing:
            raise Error(CLOSED)

    def wait(self, report: Report | None = None) -> None:
        """Wait until all ranks have done what they were sent; `report` is told how many. Raises `DeviceError` if one
        fails.
        """
        looks = 0
        self._task.end_of_rank_0()
        while True:
            self.check()
            done = self.memory.done[1:, DONE] >= self._task.number
            if done.all():
                return
            if report is not None:
                report(f"rank {1 + int(done.argmin())}", int(done.sum()), len(done))
            time.sleep(0 if looks < SHORT_WAIT else POLL_S)  # after a run, the others end with this one
            looks += 1

    def send(self, messages: Sequence[bytes], loading: bool = True) -> None:
        """Send a message to each rank. `loading`: nobody knows how long what it asks for takes."""
        self._task = Task(self._task.number + 1, loading)
        for process, message in zip(self.processes, messages, strict=True):
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except OSError:  # it has ended; `_watch` says how
                process.wait()

    def command(self, kind: Kind, *arguments: int, data: Mapping[int, np.ndarray]) -> None:
        """Send a command with rows of `RankMemory.data`, when all ranks have done the one before."""
        self.wait()
        for row, numbers in data.items():
            self.memory.set_data(row, numbers)
        self.memory.set_command(kind, *arguments)
        self.send([COMMAND] * len(self.processes), kind == Kind.PREPARE)

    @contextlib.contextmanager
    def together(self, interruptible: bool = False) -> Iterator[None]:
        """For rank 0's part of a run. If it fails because another rank has, that is the error; else all are ended.

        `interruptible`: nobody waits for what the block does, so Ctrl-C in it leaves all ranks in step.
        """
        try:
            yield
            self._task.end_of_rank_0()
        except BaseException as error:
            if interruptible and isinstance(error, KeyboardInterrupt):
                raise
            if isinstance(error, Error):
                self._await_cause()
                self.check()
            self.close()
            raise

    def check_results(self) -> None:
        """Raise `DeviceError` if a run of the past may have been ended early: a rank has failed since."""
        if self.memory.stopped:
            self._await_cause()
            self.check()
            raise DeviceError("the ranks have been stopped" + COMPILE_AGAIN)

    def _await_cause(self) -> None:
        """A moment for `_watch`: a process may just have ended, or a rank that has stopped the others is about to. If
        that takes long, as where a GPU frees its memory, what the rank has written is the cause.
        """
        start = time.monotonic()
        while self._failure is None and time.monotonic() < start + NOTICE_S:
            time.sleep(POLL_S)
        end = start + END_S
        while self._failure is None and (failed := np.flatnonzero(self.memory.done[:, FAILED])).size:
            if time.monotonic() >= end:
                self._failure = f"rank {failed[0]} has failed: {self.memory.failure(int(failed[0]))}"
            time.sleep(POLL_S)

    def close(self) -> None:
        """End all processes: they end with their input. One that does not is killed. Nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        self._closing = True
        self._stop()
        for process in self.processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        end = time.monotonic() + END_S
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.memory.close()


class ProcessProgram:
    """Rank 0's program, which runs together with those of the other processes. Implements `backend.Program`."""

    def __init__(
        self,
        backend: ProcessBackend,
        number: int,
        program: RankProgram,
        layouts: Mapping[str, Layout],
        fusions: bool | Sequence[str] = True,
    ) -> None:
        self._layouts, self.fusions = layouts, fusions
        self._backend, self.number, self.first = backend, number, program  # the processes end with the backend
        self.inputs, self.graph, self.prefill_end = program.inputs, program.graph, program.prefill_end

    @property
    def plan(self) -> Plan:
        """Rank 0's plan."""
        return self.first.plan

    @property
    def entries(self) -> int:
        """Number of calls into compiled code, of rank 0."""
        return self.first.entries

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """Names of rank 0's kernels."""
        return self.first.kernel_names(tokens)

    def value(self, name: str) -> np.ndarray:
        """A value of the last run. Raises `UnsupportedError` for one that is split: rank 0 has a part of it."""
        if (layout := self._layouts.get(name, "whole")) != "whole":
            where = "GPUs" if self._backend.on_gpus else "processes"
            ranks = self._backend.shares.ranks
            raise UnsupportedError(f"{name} is split over {ranks} {where} ({layout}); compile with gpus=1 to read it")
        found = self.first.value(name)
        self._confirm()
        return found

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run steps [0, end) of all ranks, where `end` is None, 0 or `prefill_end`: other steps differ between ranks.

        Raises `Error` for other steps, `DeviceError` if a rank fails.
        """
        if begin != 0 or end not in (None, 0, self.prefill_end):
            raise Error(
                f"ranks have different steps, so steps {begin} to {end} cannot be run by themselves: compile with "
                "gpus=1 to look at values inside"
            )
        until = Until.END if end is None else Until.PREFILL_END if end else Until.NOTHING
        self._run(tokens, rows, until, lambda: self.first.run(tokens, 0, end, rows))

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        """Run all ranks, and sample a token for each of `rows` rows on rank 0. Returns a ticket."""
        kind = Kind.SUBMIT if self._backend.on_gpus else Kind.RUN
        return self._run(tokens, rows, Until.END, lambda: self.first.submit(tokens, rows, table), kind)

    def collect(self, ticket: int) -> Sampled:
        """Wait for a run and return what it sampled. Raises `DeviceError` if a rank has failed."""
        with self._backend.group.together(interruptible=True):
            sampled = self.first.collect(ticket)
        self._confirm()
        return sampled

    def _confirm(self) -> None:
        """Raise if a rank on a GPU has failed: kernels that waited for it have ended, with any result."""
        if self._backend.on_gpus:
            self._backend.group.check_results()

    def _run(self, tokens: int, rows: int, until: Until, own: Callable[[], T], kind: Kind = Kind.RUN) -> T:
        refuse_forked()
        counts = {name: rows if name == "rows" else tokens for name in INPUTS if name in self.inputs}
        data = {INPUTS.index(name): self.inputs[name][:count] for name, count in counts.items()}
        with interrupts.deferred():  # between the two it would leave the others waiting
            self._backend.group.command(kind, self.number, tokens, rows, until, data=data)
            with self._backend.group.together():
                return own()


class ProcessBackend(RanksBackend):
    """Ranks that share the model in a file, each in a process. Implements `backend.Backend`.

    `devices` has the device of each rank: GPUs, or the CPU for all. `weights` are those of the file at `path`,
    converted to `dtype` if that is not None. `threads` is the number of workers of each rank on the CPU, default an
    equal share of what one rank would have. Raises `UnsupportedError` for a model that cannot be split over this number
    of ranks, `DeviceError` if a process cannot load it.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        config: ModelConfig,
        weights: Mapping[str, Weight],
        devices: Sequence[str],
        threads: int | None = None,
        batch_invariant: bool = False,
        int8_activations: bool = False,
        dtype: Dtype | None = None,
    ) -> None:
        ranks = len(devices)
        shares, of_ranks = divided(config, weights, ranks, int8_activations)
        self.on_gpus = devices[0] != "cpu"
        by_nccl = way_of_exchange(devices) if self.on_gpus else ""

        def open_first() -> CpuRank | GpuRank:
            return open_rank(devices[0], 0, ranks, of_ranks[0], threads, batch_invariant, bool(by_nccl))

        first: CpuRank | GpuRank | None = None
        if self.on_gpus:
            exchange = exchange_on_gpus(ranks, config.dim)
            sizes = Sizes(ranks, exchange[0], 0)
        else:
            if threads is None:
                threads = max(CpuRank(0, {}, None, False).backend.workers // ranks, 1)
            first = open_first()
            exchange = first.backend.workers, shares.exchange_size
            sizes = Sizes(ranks, *exchange)

        def settings(rank: int, file: int) -> Settings:
            of_rank = os.fspath(path), devices[rank], dtype, rank, *sizes, file
            return Settings(*of_rank, batch_invariant, int8_activations, bool(by_nccl))

        self.group = RankGroup(settings, sizes)
        weakref.finalize(self, self.group.close)  # its threads keep the group, and so the processes
        try:
            first = first or open_first()  # a GPU's weights are copied while the other ranks copy theirs
            self.group.on_stop(first.end_waits)
            self._meet(first, shares)
        except BaseException:
            self.group.close()
            if first is not None:
                first.close()
            raise
        self._device = first
        super().__init__(shares, of_ranks, [first.backend], "ranks in processes" + ", NCCL" * bool(by_nccl), exchange)
        self.notes += [by_nccl] * bool(by_nccl)
        self._programs = 0

    def _meet(self, first: CpuRank | GpuRank, shares: Shares) -> None:
        """Wait until all ranks have loaded, and let them find each other's memory."""
        group = self.group
        with group.together():
            first.publish(group.memory)
            with progress_bar("loading on the other GPUs") as report:
                group.wait(report)
            group.command(Kind.CONNECT, data={})
            first.connect(group.memory, shares.vocab)
            group.wait()

    @property
    def failure(self) -> DeviceError | None:
        """Why no run is possible any more, if the process of a rank has ended, even while nothing ran."""
        return self.group.failure

    def free_bytes(self) -> int | None:
        """Bytes that the KV cache of the whole model may take, of which each rank has the heads of its share."""
        free = super().free_bytes()
        if free is None or not self.on_gpus:
            return free
        least = min(free, *self.group.memory.done[1:, FREE].tolist())
        return least * self.shares.config.n_kv_heads // max(map(len, self.shares.kv))

    def machine(self) -> dict[str, dict[str, Any]]:
        """Facts about rank 0's device for a benchmark's report."""
        return self._device.backend.machine()

    def measure_bandwidth(self) -> float | None:
        """Bytes per second of all GPUs, each as fast as the first. None on the CPU."""
        if not self.on_gpus:
            return None
        one = self._device.backend.measure_bandwidth()
        return one and one * self.shares.ranks

    def prepare(self, decode: Program, report: Report | None = None) -> None:
        """Compile or load what would delay the first token: here, then on the other ranks, for which it is cached."""
        if not isinstance(decode, ProcessProgram):
            raise Error("steps of several ranks cannot be printed one at a time: set NUMBALLAMA_DEBUG to 2 at most")
        self._device.backend.prepare(decode.first, report)
        self.group.command(Kind.PREPARE, decode.number, data={})
        self.group.wait()

    def time_steps(
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
    ) -> tuple[list[float], float]:
        """Seconds of each step of rank 0, without the others, and of a whole run of all ranks; medians. Exchanges have
        0, since they cannot be run alone: see `time_exchanges`. Afterwards the KV cache holds anything.
        """
        if not isinstance(program, ProcessProgram):
            raise Error("steps of several ranks are timed in a program of theirs")
        whole = self.seconds_of_run(program, tokens)
        steps = [index for index, op in enumerate(program.graph.ops) if not is_exchange(op)]
        of_steps = [kinds[index] for index in steps], [nbytes[index] for index in steps]
        with interrupts.deferred():
            alone = dict(zip(steps, self._device.time_steps(program.first, steps, *of_steps, tokens), strict=True))
        return [alone.get(index, 0.0) for index in range(len(kinds))], whole

    def seconds_of_run(self, program: Program, tokens: int = 1) -> float:
        """Seconds of a run of all steps of all ranks; a median."""
        found: list[float] = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            for _ in range(RUNS):
                program.run(tokens)
            self.synchronize()
            found.append((time.perf_counter() - start) / RUNS)
        return statistics.median(found[1:])

    def program_to_time(self, program: Program, graph: Graph) -> Program:
        """A program of the same graph in which each exchange is a step: `program`, unless it has them in fused steps,
        which cannot run alone.
        """
        if not isinstance(program, ProcessProgram) or not any(op.body and is_exchange(op) for op in program.graph.ops):
            return program
        fusions = program.fusions if not isinstance(program.fusions, bool) else FUSIONS
        return self.program(graph, [name for name in fusions if name != "all_reduce"])

    def synchronize(self) -> None:
        """Wait until the devices of all ranks have done all their work. Raises `DeviceError` if a rank has failed."""
        refuse_forked()
        with interrupts.deferred():  # a command that was sent must be done
            self.group.command(Kind.SYNCHRONIZE, data={})
            with self.group.together():
                self._device.backend.synchronize()
            self.group.wait()
        if self.on_gpus:
            self.group.check_results()

    def discard_runs(self) -> None:
        """Wait until rank 0's device is idle, and forget the tickets of runs in flight."""
        self._device.backend.discard_runs()

    def program(
        self, graph: Graph, fusions: bool | Sequence[str] = True, report: Report | None = None
    ) -> ProcessProgram:
        """Each rank's part of a graph, compiled in each process. Raises `DeviceError` if one fails."""
        return self._program_of(self.shards(graph), fusions, report)

    def _program_of(
        self, shards: Sequence[Shard], fusions: bool | Sequence[str] = True, report: Report | None = None
    ) -> ProcessProgram:
        refuse_forked()
        own = self._device.backend.program(shards[0].graph, fusions, report)
        with interrupts.deferred():  # a message that was sent must be counted
            self.group.wait()
            self.group.send([_graph_message(part.graph, fusions) for part in shards[1:]])
            with self.group.together():
                self.group.wait()
            self._programs += 1
        return ProcessProgram(self, self._programs - 1, own, shards[0].layouts, fusions)

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into a row of every rank's page table, from entry `first` on."""
        refuse_forked()
        self._device.backend.set_pages(slot, first, pages)
        for begin in range(0, len(pages), ROWS):
            numbers = np.array(pages[begin : begin + ROWS], np.int32)
            self.group.command(Kind.PAGES, slot, first + begin, len(numbers), data={0: numbers})

    def close(self) -> None:
        """End the processes, and free what rank 0 has on its device."""
        self.group.close()
        self._device.close()


def _graph_message(graph: Graph, fusions: bool | Sequence[str]) -> bytes:
    text = json.dumps(fusions if isinstance(fusions, bool) else list(fusions)).encode() + b"\n" + dump_graph(graph)
    return GRAPH + len(text).to_bytes(8, "little") + text
