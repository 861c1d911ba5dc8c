"""Numba's CUDA simulator with what it lacks, so that it runs this package's kernels, from the very same sources.

To be imported, before anything of `numballama` or `numba`, in a process with NUMBA_ENABLE_CUDASIM=1. It supplies:

- warp shuffles, and every function of `lowlevel_cuda.instructions`, which have no Python behind them (those of
  `lowlevel_cuda.tensor_cores` stay without: `ptx_emulator` runs their kernels);
- typed pointers as `Pointer`, which knows its bounds; integers come out of it as Python's, which do not overflow, as
  Numba computes with int64;
- a scheduler in the place of the simulator's, which polls its threads: of a block's threads one runs at a time, and
  hands on when it comes to a barrier or a shuffle. That is 20 times as fast, always the same, and notices threads of a
  warp that come to different places.

It is as unkind as the hardware may be. Shared memory begins as NaN; warps run in random order between barriers; an
asynchronous copy happens as late as its await allows; what a kernel reads before it waits for its predecessor is NaN
where that kernel writes it (they run at the same time then), and writing before it is an error; addresses must be
aligned, and lie in memory that was taken.
"""

# ruff: noqa: E402
from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import threading
import types as python_types
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

assert os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", "the simulator is chosen before Numba is imported"

from numba import cuda
from numba.cuda import extending
from numba.cuda.simulator import kernel as numba_simulator
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule, swapped_cuda_module

from tests.helpers.cuda_host import HostMemory

# What the simulator's decorator does not know


def _jit(function: Any = None, **options: Any) -> Any:
    """Device functions are functions: `Simulation` puts the simulated `cuda` into their modules as well."""
    if function is None:
        return lambda f: _jit(f, **options)
    return function if options.get("device") else numba_simulator.FakeCUDAKernel(function, device=False)


class _Unknown:
    """A function that only PTX has, until `_EMULATED` replaces it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        raise NotImplementedError(f"tests/cuda/simulator.py does not know lowlevel_cuda's {self.name}")


cuda.jit = _jit
extending.intrinsic = lambda function: _Unknown(function.__name__)


# Threads


class _Aborted(BaseException):
    """Ends the threads of a block in which another one failed."""


class Lane(threading.Thread):
    """A simulated thread; it serves one block after the other."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.number, self.threadIdx, self.warp = number, Dim3(number, 0, 0), number >> 5
        self.turn = threading.Lock()
        self.turn.acquire()
        self.start()

    def prepare(self, block: BlockManager, position: tuple[int, ...], function: Callable[[], None]) -> None:
        self.block, self.blockIdx, self.function = block, Dim3(*position), function
        self.waited = False
        self.copies: list[tuple[int, int, int, bool]] = []
        self.groups: deque[list[tuple[int, int, int, bool]]] = deque()
        self.state, self.value, self.apart = "ready", None, 0

    def run(self) -> None:
        np.seterr(all="ignore")  # of this thread; a kernel's infinities and NaNs are its own affair
        while True:
            self.turn.acquire()
            try:
                self.function()
                self.state = "done"
            except _Aborted:
                self.state = "done"
            except BaseException as error:
                self.state = "done"
                error.add_note(f"in thread {self.number} of block {self.blockIdx}") if hasattr(error, "add_note") else 0
                self.block.fail(error)
            self.block.hand_on(None)

    def syncthreads(self) -> None:
        self.state = "barrier"
        self.block.hand_on(self)

    def shuffle(self, value: Any, apart: int) -> Any:
        """The value of the lane whose number differs in the bits of `apart`."""
        self.state, self.value, self.apart = "shuffle", value, apart
        self.block.hand_on(self)
        return self.value


_lanes: list[Lane] = []


class BlockManager:
    """Runs a block, one thread at a time: the interface of the simulator's own class."""

    def __init__(self, function: Any, grid: Any, block: Any, debug: bool) -> None:
        self._function, (self._count, *rest) = function, block
        assert self._count % 32 == 0 and set(rest) <= {1}, "blocks are whole warps in one dimension"

    def run(self, position: tuple[int, ...], *arguments: Any) -> None:
        while len(_lanes) < self._count:
            _lanes.append(Lane(len(_lanes)))
        simulation.begin_block()
        self._lanes, self.error = _lanes[: self._count], None
        for lane in self._lanes:
            lane.prepare(self, position, lambda: self._function(*arguments))
        warps = [self._lanes[first : first + 32] for first in range(0, self._count, 32)]
        self._warps = deque((warp, deque(warp)) for warp in simulation.order.sample(warps, len(warps)))
        self._finished = threading.Lock()
        self._finished.acquire()
        self.hand_on(None)
        self._finished.acquire()
        if self.error is not None:
            raise self.error

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error

    def hand_on(self, lane: Lane | None) -> None:
        """Let the next thread run, and come back when it is this one's turn again."""
        following = self._next()
        if following is None:
            self._finished.release()
        elif following is not lane:
            following.turn.release()
        if lane is not None:
            if following is not lane:
                lane.turn.acquire()
            if self.error is not None:
                raise _Aborted

    def _next(self) -> Lane | None:
        """The thread whose turn it is; None when all are done."""
        if self.error is not None:
            return next((lane for lane in self._lanes if lane.state != "done"), None)
        for _ in range(len(self._warps)):
            warp, ready = self._warps[0]
            if ready or self._exchange(warp, ready):
                return ready.popleft()
            self._warps.rotate(-1)
        states = {lane.state for lane in self._lanes}
        if states == {"done"}:
            return None
        if states != {"barrier"}:
            self.fail(AssertionError(f"threads of a block wait at different places: {sorted(states)}"))
            return self._next()
        for lane in self._lanes:
            lane.state = "ready"
        self._warps = deque((warp, deque(warp)) for warp, _ in simulation.order.sample(self._warps, len(self._warps)))
        return self._next()

    def _exchange(self, warp: list[Lane], ready: deque[Lane]) -> bool:
        """Do a shuffle that all lanes of a warp have come to."""
        if not any(lane.state == "shuffle" for lane in warp):
            return False
        if len({(lane.state, lane.apart) for lane in warp}) > 1:
            found = sorted({f"{lane.state} {lane.apart}" for lane in warp})
            self.fail(AssertionError(f"lanes of a warp are not at the same shuffle: {found}"))
            return False
        values = [lane.value for lane in warp]
        for number, lane in enumerate(warp):
            lane.value, lane.state = values[number ^ lane.apart], "ready"
        ready.extend(warp)
        return True


def lane() -> Any:
    """The simulated thread that runs."""
    return threading.current_thread()


class _Shared:
    """Shared memory of a block; an array is known by the line that asks for it."""

    def __init__(self, nbytes: int) -> None:
        self._arrays: dict[Any, Pointer] = {}
        self._regions: list[tuple[int, int]] = []
        self._keep: list[np.ndarray] = []
        self._dynamic = self._take(nbytes)
        self._nbytes = nbytes

    def _take(self, nbytes: int) -> int:
        memory = np.full(nbytes + 256, 0xFF, np.uint8)
        self._keep.append(memory)
        address = -(-memory.ctypes.data // 256) * 256
        self._regions.append((address, address + nbytes))
        return address

    def array(self, shape: int, dtype: Any) -> Pointer:
        size = np.dtype(dtype).itemsize
        if shape == 0:
            return Pointer(self._dynamic, self._nbytes // size, dtype, shared=True)
        frame = sys._getframe(1)
        key = frame.f_code, frame.f_lineno
        if key not in self._arrays:
            self._arrays[key] = Pointer(self._take(shape * size), shape, dtype, shared=True)
        return self._arrays[key]

    def check(self, address: int, nbytes: int) -> None:
        first, last = self._regions[0]  # mostly
        if address % nbytes == 0 and first <= address and address + nbytes <= last:
            return
        if address % nbytes or not any(a <= address and address + nbytes <= b for a, b in self._regions):
            raise IndexError(f"{nbytes} bytes of shared memory at {address - self._dynamic} of {self._nbytes}")


class _Module(FakeCUDAModule):  # type: ignore[misc]
    """What kernels find as `cuda`."""

    def __init__(self, grid: Any, block: Any, shared_bytes: int) -> None:
        super().__init__(grid, block, 0)
        self.shared_bytes = shared_bytes

    def syncwarp(self) -> None:
        lane().shuffle(None, 1)

    def shfl_xor_sync(self, mask: int, value: Any, apart: int) -> Any:
        assert mask == 0xFFFFFFFF, "lanes that take no part are not simulated"
        return lane().shuffle(value, int(apart))


numba_simulator.BlockManager = BlockManager


# Memory

_ELEMENTS = {
    "f32": np.float32, "f16": np.uint16, "bf16": np.int16, "int8": np.int8, "i8": np.int8, "i32": np.int32,
    "i64": np.int64, "f64": np.float64, "u64": np.uint64, "q4_0": np.uint8,
    "u8": np.uint8, "u32": np.uint32, "q4_1": np.uint8, "q4_k": np.uint8, "q6_k": np.uint8,
}  # fmt: skip
"""As `compiler.signature` has them."""
_PACKED = ("q4_1", "q4_k", "q6_k")
"""Types that kernels tell apart although NumPy's are the same."""


class Pointer:
    """A typed pointer, or a shared array, that knows its bounds."""

    def __init__(self, address: int, size: int, dtype: Any, shared: bool = False, kind: str = "") -> None:
        self.address, self.size, self.dtype, self.shared = address, size, np.dtype(dtype), shared
        self.kind = kind if kind in _PACKED else self.dtype.name
        self.bytes_each = self.dtype.itemsize
        buffer = (ctypes.c_uint8 * max(size * self.bytes_each, 1)).from_address(address)
        self._view = np.frombuffer(buffer, self.dtype, size)
        self._plain = self.dtype.kind == "i" or self.dtype in (np.uint8, np.uint16, np.float64)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise IndexError(f"element {index} of {self.size} {self.dtype}")

    def __getitem__(self, index: int) -> Any:
        self._check(index)
        if not self.shared and simulation.is_stale(self.address + index * self.bytes_each):
            return math.nan if self.dtype.kind == "f" else -1
        value = self._view[index]
        return value.item() if self._plain else value

    def __setitem__(self, index: int, value: Any) -> None:
        self._check(index)
        if not self.shared:
            simulation.note_write(self.address + int(index) * self.bytes_each, self.bytes_each)
        self._view[index] = value


class Simulation:
    """What the kernels of a run leave behind for each other."""

    def __init__(self) -> None:
        self.order = random.Random(0)
        self.asynchronous = True
        self.launches = 0
        self._writing: set[int] = set()
        self._written: set[int] = set()
        self._epoch = -1
        self._starts: list[int] = []
        self._regions: list[tuple[int, int, str]] = []

    def is_stale(self, address: int) -> bool:
        """Whether this is read before the wait although the predecessor may not have written it yet."""
        return address >> 2 in self._written and not lane().waited

    def note_write(self, address: int, nbytes: int) -> None:
        assert lane().waited, "a kernel writes before it waits for the one before"
        for word in range(address >> 2, (address + nbytes + 3) >> 2):
            self._writing.add(word)

    def check(self, address: int, nbytes: int) -> None:
        """Raises where so many bytes are not aligned, or not in memory that was taken."""
        found = bisect_right(self._starts, address) - 1
        start, size, what = self._regions[found] if found >= 0 else (0, 0, "nothing")
        if address % nbytes or not start <= address <= address + nbytes <= start + size:
            raise IndexError(f"{nbytes} bytes at {address - start} of {size} of {what}")

    def load(self, address: int, nbytes: int) -> bytes:
        self.check(address, nbytes)
        if any(self.is_stale(a) for a in range(address, address + nbytes, 4)):
            return b"\xff" * nbytes
        return ctypes.string_at(int(address), nbytes)

    def begin_block(self) -> None:
        module = numba_simulator._get_kernel_context()
        module._shared = self.shared = _Shared(module.shared_bytes)

    def run(self, launch: Any) -> None:
        """All blocks of a launch, one after the other."""
        self.launches += 1
        self._written, self._writing = self._writing, set()
        self._regions = list(HostMemory.live)  # others may be forgotten meanwhile
        self._starts = [start for start, _, _ in self._regions]
        if self._epoch != HostMemory.epoch:  # addresses may be others' now
            self._epoch, self._written = HostMemory.epoch, set()
        arguments = [
            Pointer(argument.address, argument.nbytes // np.dtype(_ELEMENTS[argument.dtype]).itemsize,
                    _ELEMENTS[argument.dtype], kind=argument.dtype)
            if hasattr(argument, "address") else np.float32(argument) if isinstance(argument, float) else argument
            for argument in launch.arguments.values()
        ]  # fmt: skip
        grid = (*launch.grid, 1, 1)[:3]
        context = _Module(grid, (launch.threads, 1, 1), launch.shared_bytes)
        function = launch.function  # before its file is looked for
        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if (
                    name.startswith(("numballama.cuda.", "numballama.kernels_cuda"))
                    and vars(module).get("cuda") is cuda
                ):
                    marker = python_types.FunctionType((lambda: None).__code__, vars(module))
                    stack.enter_context(swapped_cuda_module(marker, context))
            numba_simulator.FakeCUDAModule = lambda *shape: context
            function[grid, (launch.threads, 1, 1), 0, launch.shared_bytes](*arguments)


simulation = Simulation()


# The instructions


def _numbers(name: str, words: Any) -> np.ndarray:
    """Numbers in 16 bytes of a type without scales."""
    raw = np.array(words, np.uint32)
    if name == "float32":
        return raw.view(np.float32)
    if name == "uint16":
        return raw.view(np.float16).astype(np.float32)
    assert name == "int16"
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_PER_16 = {
    "float32": 4, "uint16": 8, "int16": 8, "int8": 16, "uint8": 32, "q4_1": 32, "q4_k": 32, "q6_k": 16,
}  # fmt: skip


def _address(memory: Pointer, index: int) -> int:
    return memory.address + int(index) * memory.bytes_each


def _shared_address(memory: Pointer, index: int) -> int:
    assert memory.shared
    return _address(memory, index)


def _floats4(memory: Pointer, index: int) -> tuple[Any, ...]:
    assert memory.dtype == np.float32
    assert _address(memory, index) % 16 == 0, f"floats4 at element {index}"
    return tuple(np.float32(memory[index + i]) for i in range(4))


def _store4(memory: Pointer, index: int, *numbers: Any) -> None:
    assert memory.dtype == np.float32
    assert _address(memory, index) % 16 == 0, f"store4 at element {index}"
    for i, number in enumerate(numbers):
        memory[index + i] = number


def _dot16(memory: Pointer, words: Any, x: Pointer, index: int, step: int) -> Any:
    if memory.dtype.name in ("int8", "uint8"):
        return np.float32(0)
    numbers, total = _numbers(memory.dtype.name, words), 0.0
    for four in range(len(numbers) // 4):
        others = _floats4(x, index + four * step)
        for i in range(4):
            total += float(numbers[4 * four + i]) * float(others[i])
    return np.float32(total)


def _unpack8(memory: Pointer, words: Any) -> tuple[Any, ...]:
    numbers = list(_numbers(memory.dtype.name, words))
    assert len(numbers) in (4, 8)
    return tuple((numbers + [np.float32(0)] * 4)[:8])


def _number(memory: Pointer, row: int, index: int) -> Any:
    name = memory.dtype.name
    if name == "uint8":
        byte = simulation.load(row + index // 32 * 16 + index % 16, 1)[0]
        return np.float32((byte >> (4 * (index % 32 // 16)) & 15) - 8)
    raw = simulation.load(row + index * memory.bytes_each, memory.bytes_each)
    if name == "int16":
        raw = b"\0\0" + raw
    kind = {"uint16": np.float16, "int8": np.int8}.get(name, np.float32)
    return np.float32(np.frombuffer(raw, kind)[0])


def _store_number(memory: Pointer, index: int, value: Any) -> None:
    name, value = memory.dtype.name, np.float32(value)
    if name == "float32":
        memory[index] = value
    elif name == "uint16":
        memory[index] = np.float16(value).view(np.uint16)
    else:
        bits = int(value.view(np.uint32))
        bits = bits | 0x400000 if np.isnan(value) else bits + 0x7FFF + (bits >> 16 & 1)
        memory[index] = np.uint16(bits >> 16 & 0xFFFF).view(np.int16)


def _scale_in(memory: Pointer, word: Any, index: int) -> Any:
    if memory.dtype == np.float32:
        return np.uint32(word).view(np.float32)
    return np.float32(np.uint16(int(word) >> (16 * (index & 1)) & 0xFFFF).view(np.float16))


def _copy(nbytes: int) -> Callable[[int, int, int], None]:
    def copy(to: int, source: int, count: int) -> None:
        assert count in (0, nbytes)
        assert to % nbytes == 0 and source % nbytes == 0, "a copy's addresses are aligned even if it copies nothing"
        simulation.shared.check(to, nbytes)
        if count:
            simulation.check(source, nbytes)
        own = lane()
        own.copies.append((to, source if count else 0, nbytes, own.waited))
        if not simulation.asynchronous:
            _finish(own.copies)

    return copy


def _finish(copies: list[tuple[int, int, int, bool]]) -> None:
    own = lane()
    for to, source, nbytes, waited in copies:
        now, own.waited = own.waited, waited  # it may have been read as early as it was asked for
        data = simulation.load(source, nbytes) if source else bytes(nbytes)
        own.waited = now
        ctypes.memmove(int(to), data, nbytes)
    copies.clear()


def _close_copies() -> None:
    own = lane()
    own.groups.append(own.copies)
    own.copies = []


def _await(pending: int) -> Callable[[], None]:
    def wait() -> None:
        groups = lane().groups
        while len(groups) > pending:
            _finish(groups.popleft())

    return wait


def _words(data: bytes) -> tuple[Any, ...]:
    return tuple(np.frombuffer(data, np.uint32))


def _shared_words(count: int) -> Callable[[int], Any]:
    def load(where: int) -> Any:
        simulation.shared.check(where, 4 * count)
        words = _words(ctypes.string_at(int(where), 4 * count))
        return words if count > 1 else words[0]

    return load


def _wait_for_predecessor() -> None:
    lane().waited = True


def _let_successor_start() -> None:
    assert lane().waited, "the successor would start before this kernel's predecessor has ended"


def _count_up(counter: int) -> int:
    simulation.check(counter, 4)
    simulation.note_write(counter, 4)
    cell = ctypes.c_int32.from_address(int(counter))
    cell.value += 1
    return cell.value - 1


def _publish(where: int, number: int) -> None:
    simulation.check(where, 8)
    simulation.note_write(where, 8)
    ctypes.c_int64.from_address(int(where)).value = int(number)


_UNSIGNED = list(range(256))
_SIGNED = [byte - 256 * (byte > 127) for byte in range(256)]


def _dp4a(first: list[int], second: list[int]) -> Callable[[Any, Any, Any], int]:
    def dp4a(a: Any, b: Any, total: Any) -> int:
        x, y = int(a), int(b)
        if not (x and y):
            return int(total)
        result = (
            int(total) + first[x & 255] * second[y & 255] + first[x >> 8 & 255] * second[y >> 8 & 255]
            + first[x >> 16 & 255] * second[y >> 16 & 255] + first[x >> 24] * second[y >> 24]
        )  # fmt: skip
        assert -(2**31) <= result < 2**31, "a sum of products overflows"
        return result

    return dp4a


def _nearest(x: Any) -> int:
    return 0 if np.isnan(x) else int(np.clip(np.rint(np.float64(x)), -(2**31), 2**31 - 1))


def _planes(*numbers: int) -> tuple[Any, ...]:
    rows = np.array(numbers, np.int64).astype(np.int32).view(np.uint8).reshape(4, 4)
    return tuple(np.ascontiguousarray(rows[:, which]).view(np.uint32)[0] for which in range(3))


_EMULATED: dict[str, Callable[..., Any]] = {
    "address": _address,
    "shared_address": _shared_address,
    "floats4": _floats4,
    "store4": _store4,
    "f32_of_bits": lambda bits: np.uint32(bits).view(np.float32),
    "bits_of_f32": lambda number: np.float32(number).view(np.uint32),
    "f32_of_half": lambda bits: np.float32(np.uint16(int(bits) & 0xFFFF).view(np.float16)),
    "dp4a": _dp4a(_SIGNED, _SIGNED),
    "dp4a_su": _dp4a(_SIGNED, _UNSIGNED),
    "dp4a_us": _dp4a(_UNSIGNED, _SIGNED),
    "dp4a_uu": _dp4a(_UNSIGNED, _UNSIGNED),
    "nearest": _nearest,
    "planes": _planes,
    "exp2": lambda x: np.exp2(np.float32(x)),
    "f32_of_signed_byte": lambda word: np.float32(np.uint8(int(word) & 255).view(np.int8)),
    "per_16_bytes": lambda memory: _PER_16[memory.kind],
    "has_scales": lambda memory: memory.kind in ("int8", "uint8", *_PACKED),
    "is_packed": lambda memory: memory.kind in _PACKED,
    "is_q4_1": lambda memory: memory.kind == "q4_1",
    "is_q4_k": lambda memory: memory.kind == "q4_k",
    "is_q6_k": lambda memory: memory.kind == "q6_k",
    "counts_from": lambda memory: np.float32({"uint8": 8, "q6_k": 32}.get(memory.kind, 1)),
    "dot16": _dot16,
    "unpack8": _unpack8,
    "number": _number,
    "store_number": _store_number,
    "scale_bytes": lambda memory: memory.bytes_each,
    "scale_word": lambda memory, index: _address(memory, index) & -4,
    "scale_in": _scale_in,
    "copy16": _copy(16),
    "copy8": _copy(8),
    "copy4": _copy(4),
    "close_copies": _close_copies,
    "await_all": _await(0),
    "await_all_but_1": _await(1),
    "await_all_but_2": _await(2),
    "await_all_but_3": _await(3),
    "shared_words4": _shared_words(4),
    "shared_words2": _shared_words(2),
    "shared_word": _shared_words(1),
    "word": lambda where: _words(simulation.load(where, 4))[0],
    "words4": lambda where: _words(simulation.load(where, 16)),
    "keep_loop": lambda: None,
    "wait_for_predecessor": _wait_for_predecessor,
    "let_successor_start": _let_successor_start,
    "count_up": _count_up,
    "publish": _publish,
}


def _emulate() -> list[str]:
    """Put Python in the place of the instructions, before a kernel imports them; returns those that have none."""
    assert not any(name.startswith("numballama.cuda.ops") for name in sys.modules)
    from numballama.cuda import intrinsics as instructions
    from numballama.cuda import mma as tensor_cores

    missing = []
    for module in (instructions, tensor_cores):
        for name, value in list(vars(module).items()):
            if isinstance(value, _Unknown):
                value.name = name
                if name in _EMULATED:
                    setattr(module, name, _EMULATED[name])
                else:
                    missing.append(name)
    return missing


missing = _emulate()
"""Instructions that have no emulation: a kernel that uses one fails. Those of tensor cores are for `ptx_emulator`."""
