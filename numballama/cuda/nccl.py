"""NCCL by ctypes: exchanges between ranks on GPUs that do not reach each other's memory.

Only what ranks need: no package of NVIDIA's is imported, and the library is loaded when it is first used. A call puts
work into a stream, and may be captured into a CUDA graph. All ranks must make the same calls in the same order. After
an all-reduce all ranks have the same bits: each sum is computed once and copied (ring, tree, NVLS).

Nothing here sets one of NCCL's environment variables.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError

if TYPE_CHECKING:
    from .driver import Device
    from .launch import Collective

LIBRARY = "libnccl.so.2"
PACKAGES = "pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 beside the extra cuda12)"
OLDEST = 20900
"""The first version whose calls can be captured into CUDA graphs, as `ncclGetVersion` has it."""
UNIQUE_ID_BYTES = 128
SUCCESS, INT32, FLOAT32, SUM = 0, 2, 7, 0
"""Values of nccl.h's enumerations."""
LOOK_S = 0.01
"""Seconds between two looks whether to give up."""
CALL_S, CLOSE_S = 0.2, 1.0
"""Seconds that an abort waits for a call that another thread is in, and that `close` waits for an abort."""


class UniqueId(ctypes.Structure):
    """What all ranks must have to find each other."""

    _fields_ = (("internal", ctypes.c_ubyte * UNIQUE_ID_BYTES),)


_COMM, _ADDRESS, _COUNT, _INT = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(_INT),),
    "ncclGetUniqueId": (ctypes.POINTER(UniqueId),),
    "ncclCommInitRank": (ctypes.POINTER(_COMM), _INT, UniqueId, _INT),
    "ncclCommAbort": (_COMM,),
    "ncclAllReduce": (_ADDRESS, _ADDRESS, _COUNT, _INT, _INT, _COMM, ctypes.c_void_p),
    "ncclAllGather": (_ADDRESS, _ADDRESS, _COUNT, _INT, _COMM, ctypes.c_void_p),
    "ncclBroadcast": (_ADDRESS, _ADDRESS, _COUNT, _INT, _INT, _COMM, ctypes.c_void_p),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
}
"""Function → types of its arguments. Each returns a result code."""


def places() -> list[str]:
    """Where the library may be: in NVIDIA's wheel, then wherever the system's loader looks."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    return [*(str(Path(folder) / "nccl" / "lib" / LIBRARY) for folder in folders or ()), LIBRARY]


@lru_cache(maxsize=1)
def load() -> Library:
    """The library. Raises `DeviceError` if it is not found, cannot be loaded, or is too old."""
    tried: list[str] = []
    for place in places():
        if "/" in place and not Path(place).exists():
            tried.append(place)
            continue
        try:
            loaded = ctypes.CDLL(place)
        except OSError as error:
            tried.append(f"{place} ({error})")
            continue
        return Library(loaded, place)
    raise DeviceError(f"NCCL was not found; looked for {', '.join(tried)}: {PACKAGES}")


def version_text(code: int) -> str:
    """A version as NCCL codes it: 23203 is 2.32.3, 2804 is 2.8.4."""
    unit = 10000 if code >= 10000 else 1000
    return f"{code // unit}.{code % unit // 100}.{code % 100}"


class Library:
    """The loaded library. Raises `DeviceError` if it lacks a function or is too old."""

    def __init__(self, loaded: Any, place: str) -> None:
        self.place, self._loaded = place, loaded
        try:
            for name, types in FUNCTIONS.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = types, _INT
            for name, types in (("ncclGetErrorString", (_INT,)), ("ncclGetLastError", (_COMM,))):
                if function := getattr(loaded, name, None):  # the second is there since 2.13
                    function.argtypes, function.restype = types, ctypes.c_char_p
        except AttributeError as error:
            raise DeviceError(f"{place} is not NCCL, or too old ({error}): {PACKAGES}") from None
        code = _INT()
        self.call("ncclGetVersion", ctypes.byref(code))
        self.version = version_text(code.value)
        if code.value < OLDEST:
            raise DeviceError(f"{place} is NCCL {self.version}, {version_text(OLDEST)} or newer is needed: {PACKAGES}")

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises `DeviceError` with NCCL's words if it fails."""
        code = getattr(self._loaded, name)(*arguments)
        if code != SUCCESS:
            raise DeviceError(f"NCCL: {name}: {self._error(code)}")

    def _error(self, code: int) -> str:
        text = self._loaded.ncclGetErrorString(code)
        said = [text.decode(errors="replace") if text else f"error {code}"]
        last = getattr(self._loaded, "ncclGetLastError", None)
        if last is not None and (more := last(None)):
            said.append(more.decode(errors="replace").strip())
        return ": ".join(said)

    def unique_id(self) -> bytes:
        """128 bytes by which ranks find each other: rank 0 makes them, all need them."""
        made = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)


class Communicator:
    """This rank's side of the exchanges of `ranks` ranks.

    Made on all ranks at the same time, with the device current that exchanges; `start` runs in the thread that connects
    and makes it current there. Raises `DeviceError` if NCCL fails, or once `given_up` is true: then a thread of NCCL's
    may wait on for ranks that are gone.
    """

    def __init__(
        self, library: Library, ranks: int, rank: int, unique_id: bytes, start: Callable[[], None],
        given_up: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.library, self.ranks, self.rank = library, ranks, rank
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._aborting: threading.Thread | None = None
        handle, failed = _COMM(), list[BaseException]()
        name = UniqueId.from_buffer_copy(unique_id)

        def connect() -> None:
            try:
                start()
                library.call("ncclCommInitRank", ctypes.byref(handle), ranks, name, rank)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=connect, name="numballama NCCL", daemon=True)
        thread.start()
        while thread.is_alive():  # a rank that ends before it connects is noticed by others, not by NCCL
            thread.join(LOOK_S)
            if given_up() and thread.is_alive():
                raise DeviceError("NCCL: the ranks were stopped while they connected")
        if failed:
            raise failed[0]
        self._handle: int | None = handle.value

    def _call(self, name: str, *arguments: Any) -> None:
        if self._handle is None:
            raise DeviceError("NCCL: the exchanges between ranks have been ended")
        self.library.call(name, *arguments)

    def all_reduce(self, source: int, out: int, count: int, stream: int) -> None:
        """Enqueue: out = the sum of `source` over ranks, `count` float32."""
        with self._lock:
            self._call("ncclAllReduce", source, out, count, FLOAT32, SUM, self._handle, stream)

    def all_gather(self, source: int, out: int, count: int, stream: int) -> None:
        """Enqueue: out = `count` float32 of each rank, one after the other."""
        with self._lock:
            self._call("ncclAllGather", source, out, count, FLOAT32, self._handle, stream)

    def gather_parts(self, source: int, parts: Sequence[tuple[int, int]], stream: int) -> None:
        """Enqueue: `parts` has where the float32 of each rank come to, and how many; `source` are this rank's."""
        with self._lock:
            self._call("ncclGroupStart")
            try:
                for root, (out, count) in enumerate(parts):
                    self._call("ncclBroadcast", source, out, count, FLOAT32, root, self._handle, stream)
            finally:
                self.library.call("ncclGroupEnd")  # also after an abort: the thread's later calls would be put into it

    def broadcast(self, where: int, count: int, stream: int) -> None:
        """Enqueue: `count` int32 of rank 0 come to the others."""
        with self._lock:
            self._call("ncclBroadcast", where, where, count, INT32, 0, self._handle, stream)

    def abort(self) -> None:
        """End kernels that wait for other ranks, now and in later replays of graphs: their results are worth nothing.

        Returns at once. NCCL's sources free what graphs need when the last of them is destroyed, and not before, so
        that it can still be replayed. Not tried on a GPU.
        """
        with self._ending:
            if self._aborting is None:
                self._aborting = threading.Thread(target=self._abort, name="numballama NCCL abort", daemon=True)
                self._aborting.start()

    def _abort(self) -> None:
        # a call takes microseconds, unless it waits for a rank that is gone: then NCCL ends it
        held = self._lock.acquire(timeout=CALL_S)
        handle, self._handle = self._handle, None
        if held:
            self._lock.release()
        if handle is not None:
            self.library._loaded.ncclCommAbort(handle)

    def close(self) -> None:
        """Free what NCCL has, without the other ranks, which may have ended; what graphs need, after the last one."""
        self.abort()
        assert self._aborting is not None
        self._aborting.join(CLOSE_S)


@dataclass(frozen=True)
class PreparedCollective:
    """A collective whose calls are ready to be made. `rows` are those that it exchanges."""

    device: Device
    communicator: Communicator
    collective: Collective
    rows: int
    only_for = None

    @property
    def name(self) -> str:
        """The collective's name."""
        return self.collective.name

    def __call__(self) -> None:
        """Enqueue the calls in the stream."""
        what, stream = self.collective, int(self.device.stream)
        source, out, count, link = what.source.address, what.out.address, self.rows * what.numbers, self.communicator
        if what.kind == "all_reduce":
            link.all_reduce(source, out, count, stream)
        elif what.kind == "all_gather":
            link.all_gather(source, out, count, stream)
        elif what.kind == "gather_parts":
            link.gather_parts(source, [(place, self.rows * width) for place, width in what.parts], stream)
        else:
            link.broadcast(out, count, stream)
