"""A model that several ranks of this process share: `ParallelBackend`, for the CPU and the reference.

It makes each rank's part of the weights and of every graph, and runs all ranks on the same inputs: the reference op by
op, the CPU in a thread for each rank. Every rank computes all logits; rank 0 samples.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from ..checkpoint import Weight
from ..config import ModelConfig
from ..cpu.fork import ForkSafeLock, mark_workers_started, refuse_forked
from ..errors import CLOSED, DeviceError, Error
from ..host import environment, interrupts
from ..ir import Graph
from ..ops import CELL
from ..plan import Plan
from ..progress import Report
from ..reference import ReferenceBackend, ReferenceProgram, run_ranks
from ..sampling import Sampled, SamplerTable
from .communication import Runnable, seconds_of_exchanges
from .rank_memory import stop
from .shard import Shard, shard, verify_ranks
from .shares import Shares
from .weights import divided

if TYPE_CHECKING:
    from ..backend import Program
    from ..cpu.backend import CpuBackend, CpuProgram
    from ..cuda.backend import CudaBackend

P = TypeVar("P", bound="CpuProgram | ReferenceProgram")


class ParallelProgram(ABC, Generic[P]):
    """The programs of all ranks. Implements `backend.Program`: `inputs` are rank 0's, and every rank gets a copy."""

    def __init__(self, shares: Shares, shards: Sequence[Shard], programs: Sequence[P]) -> None:
        self._shares, self._shards, self.programs = shares, shards, programs
        self.inputs = programs[0].inputs
        self.graph, self.prefill_end = programs[0].graph, programs[0].prefill_end

    @property
    def plan(self) -> Plan | None:
        """Rank 0's plan."""
        return self.programs[0].plan

    @property
    def entries(self) -> int:
        """Number of calls into compiled code, of all ranks."""
        return sum(program.entries for program in self.programs)

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """Names of rank 0's kernels."""
        return self.programs[0].kernel_names(tokens)

    def value(self, name: str) -> np.ndarray:
        """A value of the last run, whole, by its name in the graph that was sharded.

        What is split is put together, and the parts of a sum are added.
        """
        layout = self._shards[0].layouts.get(name, "whole")
        if layout == "whole":
            return self.programs[0].value(name)
        parts = [program.value(shard.names[name]) for shard, program in zip(self._shards, self.programs, strict=True)]
        if layout == "partial":
            return np.sum(parts, axis=0, dtype=np.float64).astype(parts[0].dtype)
        if layout == "kv":  # a head that several ranks have is taken once
            kv = self._shares.kv
            parts = [part for rank, part in enumerate(parts) if rank == 0 or kv[rank] != kv[rank - 1]]
        return np.concatenate(parts, axis=1)

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run steps [0, end) of all ranks, where `end` is None, 0 or `prefill_end`: other steps differ between ranks.

        Raises `Error` for other steps, and if a kernel fails on any rank.
        """
        if begin != 0 or end not in (None, 0, self.prefill_end):
            raise Error(f"ranks have different steps, so steps {begin} to {end} cannot be run by themselves")
        self._copy_inputs()
        self._run(tokens, [program.prefill_end if end else end for program in self.programs], rows)

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        """Run all ranks, and sample a token for each of `rows` rows on rank 0."""
        self._copy_inputs()
        return self._submit(tokens, rows, table)

    def collect(self, ticket: int) -> Sampled:
        """What the last run sampled."""
        return self.programs[0].collect(ticket)

    def _copy_inputs(self) -> None:
        for program in self.programs[1:]:
            for name, array in self.inputs.items():
                program.inputs[name][:] = array

    @abstractmethod
    def _run(self, tokens: int, ends: Sequence[int | None], rows: int) -> None: ...

    @abstractmethod
    def _submit(self, tokens: int, rows: int, table: SamplerTable) -> int: ...


class ReferenceRanks(ParallelProgram[ReferenceProgram]):
    """Ranks of the reference, in lock step."""

    def _run(self, tokens: int, ends: Sequence[int | None], rows: int) -> None:
        run_ranks(self.programs, tokens, 0, ends, rows)

    def _submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        self._run(tokens, [None] * len(self.programs), rows)
        return self.programs[0].sample(rows, table)


_one_model = ForkSafeLock()
"""Held while the ranks of a model run. They use the worker threads of their numbers (`cpu.executor.threads_of_rank`),
which all models share: if two models each had the threads of some ranks, both would wait for the others for ever.
"""


class RankThreads:
    """A thread for each rank but rank 0, which the caller's thread runs. `stop` ends the waits of all ranks."""

    def __init__(self, ranks: int, stop: Callable[[], None], reset: Callable[[], None]) -> None:
        mark_workers_started()
        self._pools = [ThreadPoolExecutor(1, f"numballama rank {rank}") for rank in range(1, ranks)]
        self._stop, self._reset = stop, reset
        self._lock = threading.Lock()
        self._closed = False

    def run(self, calls: Sequence[Callable[[], object]]) -> object:
        """Make the call of each rank at the same time; returns the result of rank 0's. Models take turns.

        Raises what a rank has raised first, when all have ended, and `Error` after `close`.
        """
        refuse_forked()
        if self._closed:
            raise Error(CLOSED)
        errors: list[BaseException] = []

        def guarded(call: Callable[[], object]) -> object:
            try:
                return call()
            except BaseException as error:
                with self._lock:
                    errors.append(error)
                self._stop()
                return None

        with interrupts.deferred(), _one_model:  # Ctrl-C between two calls would leave a rank waiting
            futures: list[Future[object]] = []

            def all_ranks() -> object:
                futures.extend(pool.submit(guarded, call) for pool, call in zip(self._pools, calls[1:], strict=True))
                return calls[0]()

            result = guarded(all_ranks)
            wait(futures)
        if errors:
            self._reset()
            raise errors[0]
        return result

    def close(self) -> None:
        self._closed = True
        for pool in self._pools:
            pool.shutdown()


class CpuRanks(ParallelProgram["CpuProgram"]):
    """Ranks on the CPU, at the same time: they wait for each other in kernels."""

    def __init__(
        self, shares: Shares, shards: Sequence[Shard], programs: Sequence[CpuProgram], threads: RankThreads
    ) -> None:
        super().__init__(shares, shards, programs)
        self._threads = threads

    def _run(self, tokens: int, ends: Sequence[int | None], rows: int) -> None:
        self._threads.run(
            [partial(program.run, tokens, 0, end, rows) for program, end in zip(self.programs, ends, strict=True)]
        )

    def _submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        first, *others = self.programs
        ticket = self._threads.run(
            [partial(first.submit, tokens, rows, table), *(partial(each.run, tokens, 0, None, rows) for each in others)]
        )
        assert isinstance(ticket, int)
        return ticket


class RanksBackend(ABC):
    """What is common to the backends of several ranks. `ranks` are those of this process, rank 0 the first; `of_ranks`
    are the weights of each rank. `exchange` is how many workers of a rank exchange values, and how many numbers at
    once; on the CPU (None) its threads do.
    """

    def __init__(
        self,
        shares: Shares,
        of_ranks: Sequence[Mapping[str, Weight]],
        ranks: Sequence[CpuBackend | ReferenceBackend | CudaBackend],
        what: str,
        exchange: tuple[int, int] | None = None,
    ) -> None:
        self.shares, self.of_ranks, self.ranks = shares, of_ranks, ranks
        first = ranks[0]
        self.name, self.prefill_chunk, self.default_kv_dtype = first.name, first.prefill_chunk, first.default_kv_dtype
        self.activation_types, self.in_host_memory = first.activation_types, first.in_host_memory
        self.mixed_tokens, self.lookahead, self.decode_sizes = first.mixed_tokens, first.lookahead, first.decode_sizes
        self.most_sequences, self.workers, self.notes = first.most_sequences, first.workers, first.notes
        self.description = f"{first.description}, {shares.ranks} {what}"
        self.exchange = exchange or (first.workers, shares.exchange_size)
        self._exchange_seconds: dict[int, float] = {}

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of device memory that rank 0 takes. None if weights and KV cache are in host memory."""
        return self.ranks[0].memory_bytes

    @property
    def failure(self) -> DeviceError | None:
        """None: ranks of one process end with it."""
        return None

    def shards(self, graph: Graph) -> list[Shard]:
        """Each rank's part of a graph. Raises `UnsupportedError` for ops that cannot be split."""
        shards = [
            shard(graph, {name: weight.type for name, weight in own.items()}, self.shares, rank, *self.exchange)
            for rank, own in enumerate(self.of_ranks)
        ]
        verify_ranks([part.graph for part in shards])
        return shards

    def prepare(self, decode: Program, report: Report | None = None) -> None:
        """Compile or load what would delay the first token, on every rank."""
        decode.run(1, 0, 0)

    def cache_page(self, page: int) -> Iterator[np.ndarray]:
        """Views of the keys and values of each layer in a page of the KV cache: those of this process, by rank."""
        for rank in self.ranks:
            yield from rank.cache_page(page)

    def weight_nbytes(self, name: str) -> int:
        """Bytes of a weight, of all ranks together."""
        return sum(own[name].nbytes for own in self.of_ranks)

    def machine(self) -> dict[str, dict[str, Any]]:
        """Empty: a report describes the host anyway."""
        return {}

    def measure_bandwidth(self) -> float | None:
        """None: no run of several ranks is compared with it."""
        return None

    def time_steps(
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
    ) -> tuple[list[float], float]:
        """Raises `Error`: a step of one rank waits for the others."""
        raise Error("steps of several ranks cannot be timed by themselves: they wait for each other")

    def time_exchanges(self, graph: Graph, tokens: int = 1) -> float:
        """Seconds that the ranks need at least to exchange values in a run of a decode graph for `tokens` tokens.

        It is measured once for a number of tokens. Raises `DeviceError` if a rank fails.
        """
        if tokens not in self._exchange_seconds:
            self._exchange_seconds[tokens] = seconds_of_exchanges(self.shards(graph), tokens, self._program_of)
        return self._exchange_seconds[tokens]

    @abstractmethod
    def _program_of(
        self, shards: Sequence[Shard], fusions: bool | Sequence[str] = True, report: Report | None = None
    ) -> Runnable:
        """A program of each rank's part of a graph."""

    def free_bytes(self) -> int | None:
        """Bytes of host memory that are free."""
        return self.ranks[0].free_bytes()

    def discard_runs(self) -> None:  # noqa: B027 (ranks of threads do nothing)
        """Does nothing: a run is done when `submit` returns."""

    def synchronize(self) -> None:  # noqa: B027
        """Does nothing: a run returns when its work is done."""


class ParallelBackend(RanksBackend):
    """`ranks` ranks that share a model. Implements `backend.Backend`, as far as its limits are one rank's.

    `device` is "cpu" or "reference". `threads` is the number of workers of each rank on the CPU, default an equal share
    of what one rank would have. `int8_activations`: graphs quantise the inputs of int8 weights. Raises
    `UnsupportedError` for a model that cannot be split over this number of ranks.
    """

    def __init__(
        self,
        device: Literal["cpu", "reference"],
        config: ModelConfig,
        weights: Mapping[str, Weight],
        ranks: int,
        threads: int | None = None,
        batch_invariant: bool = False,
        int8_activations: bool = False,
    ) -> None:
        shares, of_ranks = divided(config, weights, ranks, int8_activations)
        self._threads: RankThreads | None = None
        made: Sequence[CpuBackend | ReferenceBackend]
        if device == "reference":
            made = [ReferenceBackend(own) for own in of_ranks]
        else:
            made = self._cpu_ranks(shares, of_ranks, threads, batch_invariant)
        super().__init__(shares, of_ranks, made, "ranks")

    def _cpu_ranks(
        self, shares: Shares, of_ranks: Sequence[Mapping[str, Weight]], threads: int | None, batch_invariant: bool
    ) -> list[CpuBackend]:
        """The ranks' backends, each with as many workers, and the memory in which they exchange values."""
        with interrupts.deferred():
            environment.import_numba()
            from ..cpu.backend import CpuBackend, aligned_zeros

        count = shares.ranks
        if threads is None:
            threads = max(CpuBackend({}).workers // count, 1)
        ranks = [CpuBackend(own, threads, batch_invariant, rank) for rank, own in enumerate(of_ranks)]
        workers = {rank.workers for rank in ranks}
        if len(workers) > 1:
            raise DeviceError(
                f"ranks need the same number of workers, found {sorted(workers)}: the system starts no more threads; "
                f"pass threads={min(workers)}"
            )
        exchange = aligned_zeros(8 * shares.exchange_size).view(np.float32).reshape(2, -1)
        arrivals = aligned_zeros(4 * CELL * count * max(workers)).view(np.int32).reshape(count, -1, CELL)
        for rank in ranks:
            rank.states |= {"exchange": exchange, "arrivals": arrivals}
        self._threads = RankThreads(count, partial(stop, arrivals), partial(arrivals.fill, 0))
        return ranks

    def program(
        self, graph: Graph, fusions: bool | Sequence[str] = True, report: Report | None = None
    ) -> ParallelProgram[Any]:
        """Each rank's part of a graph, made ready to run. Raises `UnsupportedError` for ops that cannot be split."""
        return self._program_of(self.shards(graph), fusions, report)

    def _program_of(
        self, shards: Sequence[Shard], fusions: bool | Sequence[str] = True, report: Report | None = None
    ) -> ParallelProgram[Any]:
        programs: list[Any] = [
            rank.program(part.graph, fusions, report) for rank, part in zip(self.ranks, shards, strict=True)
        ]
        if self._threads is None:
            return ReferenceRanks(self.shares, shards, programs)
        return CpuRanks(self.shares, shards, programs, self._threads)

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into a row of every rank's page table, from entry `first` on."""
        for rank in self.ranks:
            rank.set_pages(slot, first, pages)

    def close(self) -> None:
        """End the threads of the ranks."""
        if self._threads is not None:
            self._threads.close()
