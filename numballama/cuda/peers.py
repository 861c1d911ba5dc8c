"""`PeerMemory`: device memory of a rank that the ranks on other GPUs write to, and theirs as this device reaches it.
`NcclPeers`: NCCL in its place, where a device does not reach it.

Each rank has a process of its own. A handle of 64 bytes stands for memory of another process (CUDA's IPC). Writes to
memory of another GPU go over NVLink or PCIe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import DeviceError
from ..memory import round_up
from ..ops import CELL
from . import nccl
from .driver import Device, MappedMemory, Memory, RegisteredMemory
from .kernels.params import TOKEN_ROWS
from .launch import Array, Peers
from .ops.collectives import WORKERS, empty_parts, exchange_size

UNIT = 2 << 20
"""Memory that is shared is whole units of this: smaller allocations share one with others."""
TRIED = (16 << 10, 256 << 10, 4 << 20, 16 << 20)
"""Bytes that NCCL exchanges when ranks connect."""


def borders_of(shares: Sequence[range]) -> np.ndarray:
    """Where the columns of each rank begin, and the number of all."""
    return np.array([*(share.start for share in shares), shares[-1].stop], np.int64)


class PeerMemory:
    """This rank's memory: `exchange` for results of `columns` columns, `arrivals`, and `tokens` i64 [2, TOKEN_ROWS],
    one after the other.

    `handle` is for the other ranks, whose handles `connect` takes. The memory is ready then: no rank may write before
    all have made theirs. Raises `DeviceError` if too little memory is free.
    """

    def __init__(self, device: Device, rank: int, ranks: int, columns: int) -> None:
        self.rank, self._device = rank, device
        exchange, arrivals = (2, exchange_size(ranks, columns)), (ranks, WORKERS, CELL)
        nbytes = 4 * int(np.prod(exchange)) + 4 * int(np.prod(arrivals)) + 8 * 2 * TOKEN_ROWS
        self._memory = Memory(device, round_up(nbytes, UNIT), "the memory that ranks share")
        self._others: list[MappedMemory] = []
        self._registered: RegisteredMemory | None = None
        self._tables: Memory | None = None
        try:
            device.fill(self._memory.address, 0, self._memory.nbytes)
            for begin, end in empty_parts(ranks, columns):
                device.fill(self._memory.address + begin, 0xFF, end - begin)
            device.synchronize()
            self.handle = self._memory.handle()
        except BaseException:
            self.free()
            raise
        self.exchange = self._memory.array(0, exchange, "f32")
        self.arrivals = self._memory.array(self.exchange.nbytes, arrivals, "i32")

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._memory.nbytes + (self._tables.nbytes if self._tables else 0)

    def connect(self, handles: Sequence[bytes], shares: tuple[range, ...], shared: np.ndarray, stop_at: int) -> Peers:
        """Map the memory of all ranks, whose handles are in the order of ranks.

        `shared` is host memory that all processes share, whole pages; the word that ends waits is at byte `stop_at`.
        Raises `DeviceError` where another GPU's memory cannot be reached.
        """
        addresses = np.zeros(len(handles), np.int64)
        for rank, handle in enumerate(handles):
            if rank == self.rank:
                addresses[rank] = self._memory.address
                continue
            try:
                self._others.append(MappedMemory(self._device, handle))
            except DeviceError as error:
                raise DeviceError(
                    f"{self._device} does not reach the memory of rank {rank} ({error}): the GPUs of a model need peer "
                    "access; `numballama doctor` shows which have it; leave gpus= at 1"
                ) from None
            addresses[rank] = self._others[-1].address
        self._registered = RegisteredMemory(self._device, shared)
        borders = borders_of(shares)
        tables = np.concatenate([addresses, borders])
        self._tables = Memory(self._device, tables.nbytes, "addresses of ranks")
        self._device.write(self._tables.address, tables.ctypes.data, tables.nbytes)
        self._device.synchronize()
        places = Array(self._tables.address, addresses.shape, "i64")
        return Peers(
            self.rank, self.exchange, self.arrivals, places, shares,
            Array(places.address + places.nbytes, borders.shape, "i64"), self._registered.address + stop_at,
        )  # fmt: skip

    def free(self) -> None:
        """Free the memory, and unmap that of the others."""
        for memory in (*self._others, self._registered, self._tables, self._memory):
            if memory is not None:
                memory.free()


class NcclPeers:
    """This rank's exchanges by NCCL. `unique_id` is rank 0's, for all ranks; empty on the others.

    Raises `DeviceError` without NCCL.
    """

    def __init__(self, device: Device, rank: int, ranks: int) -> None:
        self.rank, self._device, self._ranks = rank, device, ranks
        self._library = nccl.load()
        self.unique_id = self._library.unique_id() if rank == 0 else b""
        self._communicator: nccl.Communicator | None = None
        self._tables: Memory | None = None

    def connect(self, unique_id: bytes, shares: tuple[range, ...], stopped: Callable[[], bool]) -> Peers:
        """Meet the other ranks, and exchange a number to see that it works. Once `stopped` is true, nobody waits.

        NCCL connects for an algorithm when that is first used, and which it uses depends on the size: it does so now,
        not while a graph is captured. Raises `DeviceError` if NCCL fails.
        """
        made = self._communicator = nccl.Communicator(
            self._library, self._ranks, self.rank, unique_id, self._device.make_current, stopped
        )
        if stopped():  # `stop` may have come too early to find it
            made.abort()
        borders = borders_of(shares)
        tables = np.concatenate([np.ones(1, np.float32).view(np.int32), np.zeros(1, np.int32), borders.view(np.int32)])
        self._tables = Memory(self._device, tables.nbytes, "borders of ranks")
        one = self._tables.address
        self._device.write(one, tables.ctypes.data, tables.nbytes)
        made.all_reduce(one, one, 1, int(self._device.stream))
        summed = np.zeros(1, np.float32)
        self._device.read(one, summed)
        if summed[0] != self._ranks and not stopped():
            raise DeviceError(f"NCCL: the sum of a 1 from each of {self._ranks} ranks is {summed[0]:g}")
        self._try_sizes(made)
        nothing = Array(one, (1,), "f32"), Array(one, (self._ranks, 1, 1), "i32"), Array(one, (1,), "i64")
        places = Array(one + 8, borders.shape, "i64")
        return Peers(self.rank, *nothing, shares, places, 0, communicator=made)

    def _try_sizes(self, made: nccl.Communicator) -> None:
        numbers, stream = Memory(self._device, max(TRIED), "numbers to try"), int(self._device.stream)
        try:
            self._device.fill(numbers.address, 0, numbers.nbytes)
            for nbytes in TRIED:
                part = nbytes // 4 // self._ranks
                made.all_reduce(numbers.address, numbers.address, nbytes // 4, stream)
                made.all_gather(numbers.address + 4 * part * self.rank, numbers.address, part, stream)
            places = [numbers.address + 16 * (1 + rank) for rank in range(self._ranks)]
            made.gather_parts(numbers.address, [(place, 1) for place in places], stream)
            made.broadcast(numbers.address, 1, stream)
            self._device.synchronize()
        finally:
            numbers.free()

    def stop(self) -> None:
        """End kernels that wait for other ranks."""
        if self._communicator is not None:
            self._communicator.abort()

    def free(self) -> None:
        """Free what NCCL has, without the other ranks."""
        if self._communicator is not None:
            self._communicator.close()
        if self._tables is not None:
            self._tables.free()
