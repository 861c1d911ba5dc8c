"""A rank's backend in its process, and the memory through which it exchanges values with other ranks: `open_rank`.

CPU ranks exchange them through the memory that their processes share. A rank on a GPU makes memory there, tells the
others its handle, and maps theirs. GPUs that do not reach each other's memory exchange by NCCL: see `way_of_exchange`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, cast

from ..checkpoint import Weight
from ..errors import DeviceError, Error
from ..host import environment, interrupts
from ..ir import Graph
from .rank_memory import FREE, GPU, RankMemory

if TYPE_CHECKING:
    from ..backend import Program
    from ..cpu.backend import CpuBackend, CpuProgram
    from ..cuda.backend import CudaBackend
    from ..cuda.program import CudaProgram, Prepared

RankProgram: TypeAlias = "CpuProgram | CudaProgram"
"""A rank's program."""


class RankDevice(ABC):
    """A backend with a rank's part of the weights."""

    rank: int
    backend: CpuBackend | CudaBackend

    @abstractmethod
    def publish(self, memory: RankMemory) -> None:
        """Tell the other ranks what they need before they can `connect`."""

    @abstractmethod
    def connect(self, memory: RankMemory, vocab: tuple[range, ...]) -> None:
        """Exchange values with the other ranks from now on. All must have published. `vocab` are the shares of it.

        Raises `DeviceError` where a GPU does not reach the memory of another.
        """

    def end_waits(self) -> None:  # noqa: B027 (most kernels look at a word in memory)
        """The ranks have been stopped: end waits that do not look at the memory of all. Any thread; returns at once."""

    def receive(self, program: RankProgram, tokens: int, rows: int) -> None:
        """Start a run whose tokens rank 0 samples and sends."""
        raise Error("ranks on the CPU get no tokens: their runs are done before rank 0 samples")

    @abstractmethod
    def time_steps(
        self, program: RankProgram, steps: Sequence[int], kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int
    ) -> list[float]:
        """Seconds of some steps of a program after a run for `tokens` tokens, without the other ranks: none of these
        steps is an exchange. `kinds` and `nbytes` are as in `backend.Backend.time_steps`, of these steps.
        """

    def close(self) -> None:
        """Free the memory of the device."""
        self.backend.close()


class CpuRank(RankDevice):
    """Raises `DeviceError` if the system starts fewer than `workers` threads; None: as many as this process may use."""

    backend: CpuBackend

    def __init__(self, rank: int, weights: Mapping[str, Weight], workers: int | None, batch_invariant: bool) -> None:
        with interrupts.deferred():
            environment.import_numba()
            from ..cpu.backend import CpuBackend

        self.rank, self.backend = rank, CpuBackend(weights, workers, batch_invariant)
        if workers is not None and self.backend.workers != workers:
            raise DeviceError(f"{workers} workers are needed, the system starts {self.backend.workers}")

    def publish(self, memory: RankMemory) -> None:
        """Does nothing: all that ranks exchange is in `memory`."""

    def connect(self, memory: RankMemory, vocab: tuple[range, ...]) -> None:
        self.backend.states |= {"exchange": memory.exchange, "arrivals": memory.arrivals}

    def time_steps(
        self, program: RankProgram, steps: Sequence[int], kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int
    ) -> list[float]:
        from ..cpu.timing import time_steps

        return time_steps(cast("Program", StepsAlone(program, steps)), tokens)[0]


class GpuRank(RankDevice):
    """`device` is "cuda:N"; `by_nccl`: it does not reach the others' memory. Raises `DeviceError` as `CudaBackend`
    does, and without NCCL where that is needed.
    """

    backend: CudaBackend

    def __init__(
        self, rank: int, weights: Mapping[str, Weight], device: str, ranks: int, batch_invariant: bool,
        by_nccl: bool = False,
    ) -> None:  # fmt: skip
        from ..cuda.backend import CudaBackend
        from ..cuda.ops.collectives import RESULT_TOKENS
        from ..cuda.peers import NcclPeers, PeerMemory

        self.rank, self.backend = rank, CudaBackend(weights, device, batch_invariant)
        if not (batch_invariant or by_nccl):  # in long runs results cross the link while others are computed
            self.backend.prefill_chunk = RESULT_TOKENS
        where = self.backend.device, rank, ranks
        self._peers: PeerMemory | NcclPeers
        try:
            if by_nccl:
                self._peers = NcclPeers(*where)
            else:
                self._peers = PeerMemory(*where, weights["tok_embeddings"].shape[1])
        except BaseException:
            self.backend.close()
            raise

    def publish(self, memory: RankMemory) -> None:
        from ..cuda.peers import PeerMemory

        if isinstance(self._peers, PeerMemory):
            memory.handles[self.rank] = list(self._peers.handle)
        elif self.rank == 0:
            memory.unique_id[:] = list(self._peers.unique_id)
        memory.done[self.rank, FREE] = self.backend.free_bytes() or 0
        (major, minor), n_sms = self.backend.device.capability, self.backend.device.n_sms
        memory.done[self.rank, GPU] = (n_sms * 100 + major) * 100 + minor

    def connect(self, memory: RankMemory, vocab: tuple[range, ...]) -> None:
        from ..cuda.peers import PeerMemory

        if isinstance(self._peers, PeerMemory):
            handles = [bytes(handle) for handle in memory.handles]
            peers = self._peers.connect(handles, vocab, memory.bytes, memory.stop_at)
        else:
            peers = self._peers.connect(bytes(memory.unique_id), vocab, lambda: memory.stopped)
            memory.done[self.rank, FREE] = self.backend.free_bytes() or 0  # NCCL has taken its own memory
        self.backend.join(replace(peers, alike=len({*memory.done[:, GPU].tolist()}) == 1))

    def end_waits(self) -> None:
        from ..cuda.peers import NcclPeers

        if isinstance(self._peers, NcclPeers):
            self._peers.stop()

    def receive(self, program: RankProgram, tokens: int, rows: int) -> None:
        from ..cuda.program import CudaProgram

        assert isinstance(program, CudaProgram)
        program.submit(tokens, rows, None)

    def time_steps(
        self, program: RankProgram, steps: Sequence[int], kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int
    ) -> list[float]:
        from ..cuda.timing import time_steps

        return time_steps(cast("CudaProgram", LaunchesAlone(program, steps)), kinds, nbytes, tokens)[0]

    def close(self) -> None:
        try:
            super().close()  # first: kernels may still poll or write what the ranks share
        finally:  # also where the device has failed
            self._peers.free()


class StepsAlone:
    """Some steps of a program on the CPU, as if they were all: what `cpu.timing` needs of a program."""

    def __init__(self, program: RankProgram, steps: Sequence[int]) -> None:
        self._program, self._steps = program, steps
        self.graph = Graph("steps of a rank")
        self.graph.ops = [program.graph.ops[step] for step in steps]

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Run steps [begin, end) of these, each by itself; none of them is an entry and no more."""
        for step in self._steps[begin:end]:
            self._program.run(tokens, step, step + 1, rows)
        if begin == end:
            self._program.run(tokens, 0, 0, rows)


class LaunchesAlone:
    """The same on a GPU, for `cuda.timing`. The inputs are on the device: a run was before."""

    def __init__(self, program: RankProgram, steps: Sequence[int]) -> None:
        self._program, self._steps, self.backend = program, steps, program.backend  # type: ignore[union-attr]

    def run(self, tokens: int) -> None:
        """Does nothing: a run would wait for the other ranks."""

    def launches_of_run(self, tokens: int) -> list[list[Prepared]]:
        """Those of these steps."""
        launches: list[list[Prepared]] = self._program.launches_of_run(tokens)  # type: ignore[union-attr]
        return [launches[step] for step in self._steps]


VARIABLE = "NUMBALLAMA_EXCHANGE"
"""Environment variable: "nccl" exchanges by NCCL also between GPUs that reach each other's memory, "peer" never."""


def way_of_exchange(devices: Sequence[str]) -> str:
    """A note that NCCL exchanges values; empty where ranks on these GPUs write into each other's memory.

    Raises `DeviceError` where NCCL is needed and not there, `Error` for a value that the variable does not have.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", "nccl", "peer"):
        raise Error(f"{VARIABLE} is {chosen!r}; choose from 'nccl' and 'peer', or unset it")
    if chosen == "peer":
        return ""
    from ..cuda import driver, nccl

    if chosen == "nccl":
        return f"{VARIABLE}=nccl: NCCL {nccl.load().version} exchanges values"
    apart = driver.pairs_without_access(devices)
    if not apart:
        return ""
    pairs = ", ".join(" and ".join(pair) for pair in apart)
    try:
        version = nccl.load().version
    except DeviceError as error:
        raise DeviceError(f"{pairs} do not reach each other's memory, so NCCL is needed; {error}") from None
    return f"{pairs} do not reach each other's memory: NCCL {version} exchanges values, which is slower"


def open_rank(
    device: str, rank: int, ranks: int, weights: Mapping[str, Weight], workers: int | None, batch_invariant: bool,
    by_nccl: bool = False,
) -> CpuRank | GpuRank:  # fmt: skip
    """A rank on "cpu", with this number of workers, or on "cuda:N". Raises `DeviceError` as these do."""
    if device == "cpu":
        return CpuRank(rank, weights, workers, batch_invariant)
    return GpuRank(rank, weights, device, ranks, batch_invariant, by_nccl)


def exchange_on_gpus(ranks: int, columns: int) -> tuple[int, int]:
    """Blocks of a rank on a GPU that exchange values at the same time, and numbers in a half of what they exchange, for
    values of `columns` columns.
    """
    from ..cuda.ops import collectives

    return collectives.WORKERS, collectives.exchange_size(ranks, columns)
