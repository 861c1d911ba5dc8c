"""Numba's CUDA simulator, completed so that it runs this package's kernels from their own sources. No GPU is needed.

Import this first, before anything of `numballama` or `numba`, in a process with NUMBA_ENABLE_CUDASIM=1.

What it emulates:

- Every function of `arithmetic.py`, `intrinsics.py`, `quant_traits.py` and `system_memory.py` of `numballama/cuda`, in
  Python (`instructions.py`), and warp shuffles. Those of `mma.py` are not emulated: `tests/cuda/emulator` runs the PTX
  of kernels that use tensor cores.
- Typed pointers, as `Pointer`, which knows its bounds. Integers that are read from it are Python's: like Numba's int64
  they do not overflow.
- A scheduler that replaces the simulator's, which polls its threads. One thread of a block runs at a time, until it
  comes to a barrier or a shuffle. That is 20 times as fast, deterministic, and notices threads of a warp that come to
  different places.

It is as strict as hardware may be. Shared memory begins as NaN. Warps run in random order between barriers. An
asynchronous copy happens as late as its wait allows. What a kernel reads before it waits for its predecessor is NaN
where that kernel writes it, since both run at the same time; writing before the wait is an error. Addresses must be
aligned and inside memory that was allocated.

To add an instruction: write a Python function in `instructions.py` and add it to `EMULATED` under the name that it has
in `intrinsics.py`. Load and store global memory by `simulation.load`, `simulation.check` and `simulation.note_write`,
shared memory after `simulation.shared.check`; a thread's own state belongs to `lane()`. A kernel that uses a function
without emulation fails with NotImplementedError, and `test_every_instruction_is_emulated` names it.
"""

# ruff: noqa: E402
from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import time
import types as python_types
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

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
    """An intrinsic, until an entry of `EMULATED` replaces it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        raise NotImplementedError(f"tests/cuda/simulator/instructions.py does not emulate {self.name}")


KERNEL_MODULES = ("numballama.cuda.kernels", "numballama.kernels_cuda")
"""Prefixes of the modules whose `cuda` is replaced while a kernel runs."""

WHOLE_BLOCKS = os.environ.get("NUMBALLAMA_TEST_BLOCKS") == "whole"
"""Whether blocks have as many threads as on a GPU."""
SMALL_BLOCKS = {
    "ELEMENTWISE_THREADS": 64, "GEMV_THREADS": 64, "GEMV_WARPS": 2, "ATTENTION_THREADS": 64, "ATTENTION_WARPS": 2,
    "ATTENTION_STAGE_BYTES": 64 * 64, "PLAIN_ATTENTION_THREADS": 64, "SAMPLING_THREADS": 256, "EXCHANGE_THREADS": 64,
    "WORD_NUMBERS": 2 * 64, "FLAG_NUMBERS": 8 * 64,
}  # fmt: skip
"""Sizes of `kernels/params.py` that give blocks of two warps, or eight for sampling. Small models leave most threads
of larger blocks idle, and an idle thread takes as long to simulate as another.
"""

cuda.jit = _jit
extending.intrinsic = lambda function: _Unknown(function.__name__)


# Threads


class _Aborted(BaseException):
    """Ends the threads of a block in which another one failed."""


_INDICES = [Dim3(number, 0, 0) for number in range(1024)]


class Lane:
    """A simulated thread of a block, as a greenlet: it runs until it comes to a barrier or a shuffle."""

    __slots__ = (
        "apart", "begun", "block", "blockIdx", "copies", "function", "go_on", "groups", "looked", "number", "state",
        "threadIdx", "value", "waited",
    )  # fmt: skip

    def __init__(self, number: int, block: BlockManager, position: Dim3, function: Callable[[], None]) -> None:
        self.number, self.threadIdx, self.blockIdx = number, _INDICES[number], position
        self.block, self.function = block, function
        self.waited, self.looked = False, (0, b"")
        self.copies: list[tuple[int, int, int, bool]] = []
        self.groups: deque[list[tuple[int, int, int, bool]]] = deque()
        self.state, self.value, self.apart, self.begun = "ready", None, 0, False
        self.go_on = greenlet(self._run).switch
        """Run it on. Control comes back to the thread that runs the block when a lane ends."""

    def _run(self) -> None:
        self.begun = True
        np.seterr(all="ignore")  # of this greenlet; a kernel's infinities and NaNs are its own affair
        try:
            self.function()
        except _Aborted:
            pass
        except BaseException as error:
            error.add_note(f"in thread {self.number} of block {self.blockIdx}") if hasattr(error, "add_note") else 0
            self.block.fail(error)
        self.state = "done"

    def wait(self, state: str) -> None:
        """Let others run, directly: a way by the thread that runs the block would be a switch more."""
        self.state, block = state, self.block
        ready = block.warps[0][1]  # mostly the next one of the same warp
        following = ready.popleft() if ready and block.error is None else block.following()
        if following is not self:
            simulation.running = following
            if following.begun:
                following.go_on()
            else:
                block.root.switch(following)  # a greenlet that another one starts has a part of its stack
        if block.error is not None:
            raise _Aborted

    def pause(self) -> None:
        """Let all other threads that can run do so first."""
        self.block.put_back(self)
        self.wait("ready")


class BlockManager:
    """Runs a block, one thread at a time: the interface of the simulator's own class."""

    def __init__(self, function: Any, grid: Any, block: Any, debug: bool) -> None:
        self._function, (self._count, *rest) = function, block
        assert self._count % 32 == 0 and set(rest) <= {1}, "blocks are whole warps in one dimension"

    def run(self, position: tuple[int, ...], *arguments: Any) -> None:
        simulation.begin_block()
        self.root = getcurrent()
        self.error: BaseException | None = None
        place = Dim3(*position)
        function = partial(self._function, *arguments)
        self.lanes = [Lane(i, self, place, function) for i in range(self._count)]
        warps = [self.lanes[first : first + 32] for first in range(0, self._count, 32)]
        self.warps = deque((warp, deque(warp)) for warp in simulation.order.sample(warps, len(warps)))
        before, simulation.running = simulation.running, None
        try:
            following = self.following()
            while following is not None:
                simulation.running = following
                following = following.go_on() or self.following()  # what a lane asks for, or after its end
        finally:
            simulation.running = before
        if self.error is not None:
            raise self.error

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error

    def put_back(self, lane: Lane) -> None:
        """Run a thread again after all others."""
        for warp, ready in self.warps:
            if warp[0].number == lane.number // 32 * 32:
                ready.append(lane)
        self.warps.rotate(-1)

    def following(self) -> Lane | None:
        """The thread to run next; None when all are done."""
        if self.error is not None:
            return next((lane for lane in self.lanes if lane.state != "done"), None)
        for _ in range(len(self.warps)):
            warp, ready = self.warps[0]
            if ready or self._exchange(warp, ready):
                return ready.popleft()
            self.warps.rotate(-1)
        states = {lane.state for lane in self.lanes}
        if states == {"done"}:
            return None
        if states != {"barrier"}:
            self.fail(AssertionError(f"threads of a block wait at different places: {sorted(states)}"))
            return self.following()
        for lane in self.lanes:
            lane.state = "ready"
        self.warps = deque((warp, deque(warp)) for warp, _ in simulation.order.sample(self.warps, len(self.warps)))
        return self.following()

    def _exchange(self, warp: list[Lane], ready: deque[Lane]) -> bool:
        """Do a shuffle that all lanes of a warp have reached."""
        found = {(lane.state, lane.apart) for lane in warp}
        if not any(state == "shuffle" for state, _ in found):
            return False
        if len(found) > 1:
            places = sorted(f"{state} {apart}" for state, apart in found)
            self.fail(AssertionError(f"lanes of a warp are not at the same shuffle: {places}"))
            return False
        values = [lane.value for lane in warp]
        for number, lane in enumerate(warp):
            lane.value, lane.state = values[number ^ lane.apart], "ready"
        ready.extend(warp)
        return True


def lane() -> Any:
    """The simulated thread that runs."""
    return simulation.running


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
        frame = sys._getframe(1)
        key = dtype if shape == 0 else (frame.f_code, frame.f_lineno)
        if key not in self._arrays:
            size = np.dtype(dtype).itemsize
            if shape == 0:
                self._arrays[key] = Pointer(self._dynamic, self._nbytes // size, dtype, shared=True)
            else:
                self._arrays[key] = Pointer(self._take(shape * size), shape, dtype, shared=True)
        return self._arrays[key]

    def check(self, address: int, nbytes: int) -> None:
        first, last = self._regions[0]  # mostly
        if address % nbytes == 0 and first <= address and address + nbytes <= last:
            return
        if address % nbytes or not any(a <= address and address + nbytes <= b for a, b in self._regions):
            raise IndexError(f"{nbytes} bytes of shared memory at {address - self._dynamic} of {self._nbytes}")


class _Module(FakeCUDAModule):  # type: ignore[misc]
    """The `cuda` module that simulated kernels see."""

    def __init__(self, grid: Any, block: Any, shared_bytes: int) -> None:
        super().__init__(grid, block, 0)
        self.shared_bytes = shared_bytes

    @property
    def threadIdx(self) -> Dim3:
        return simulation.running.threadIdx

    @property
    def blockIdx(self) -> Dim3:
        return simulation.running.blockIdx

    def syncthreads(self) -> None:
        simulation.running.wait("barrier")

    def syncwarp(self) -> None:
        self.shfl_xor_sync(0xFFFFFFFF, None, 1)

    def shfl_xor_sync(self, mask: int, value: Any, apart: int) -> Any:
        """The value of the lane whose number differs in the bits of `apart`."""
        assert mask == 0xFFFFFFFF, "lanes that take no part are not simulated"
        own = simulation.running
        own.value, own.apart = value, int(apart)
        own.wait("shuffle")
        return own.value


numba_simulator.BlockManager = BlockManager


# Memory

_ELEMENTS = {
    "f32": np.float32, "f16": np.uint16, "bf16": np.int16, "int8": np.int8, "i8": np.int8, "i32": np.int32,
    "i64": np.int64, "f64": np.float64, "u64": np.uint64, "q4_0": np.uint8,
    "u8": np.uint8, "u32": np.uint32, "q8_0": np.int8, "q4_1": np.uint8, "q4_k": np.uint8, "q5_k": np.uint8,
    "q6_k": np.uint8,
}  # fmt: skip
"""As `compiler.signature` has them."""
PACKED = ("q4_1", "q4_k", "q5_k", "q6_k")
"""Types that kernels tell apart although NumPy's are the same."""


class Pointer:
    """A typed pointer, or a shared array, that knows its bounds."""

    def __init__(self, address: int, size: int, dtype: Any, shared: bool = False, kind: str = "") -> None:
        self.address, self.size, self.dtype, self.shared = address, size, np.dtype(dtype), shared
        self.name = self.dtype.name  # NumPy makes it anew each time
        self.kind = kind if kind in (*PACKED, "q8_0") else self.name
        self.bytes_each = self.dtype.itemsize
        buffer = (ctypes.c_uint8 * max(size * self.bytes_each, 1)).from_address(address)
        self._view = np.frombuffer(buffer, self.dtype, size)
        self._plain = self.dtype.kind == "i" or self.dtype in (np.uint8, np.uint16, np.float64)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(f"element {index} of {self.size} {self.dtype}")
        if not (self.shared or simulation.running.waited) and simulation.is_stale(
            self.address + index * self.bytes_each
        ):
            return math.nan if self.dtype.kind == "f" else -1
        return self._view.item(index) if self._plain else self._view[index]

    def four(self, index: int) -> list[Any]:
        """What `ld_v4_f32` loads: four float32, which are whole 16 bytes."""
        assert self.name == "float32"
        assert (self.address + index * self.bytes_each) % 16 == 0, f"ld_v4_f32 at element {index}"
        if not 0 <= index <= self.size - 4 or not (self.shared or simulation.running.waited):
            return [np.float32(self[index + i]) for i in range(4)]
        return list(self._view[index : index + 4])

    def __setitem__(self, index: int, value: Any) -> None:
        if not 0 <= index < self.size:
            raise IndexError(f"element {index} of {self.size} {self.dtype}")
        if not self.shared:
            simulation.note_write(self.address + int(index) * self.bytes_each, self.bytes_each)
        self._view[index] = value


class Simulation:
    """State that the kernels of a run share."""

    def __init__(self) -> None:
        self.order = random.Random(0)
        self.asynchronous = True
        self.launches = 0
        self.running: Any = None
        self._writing: set[int] = set()
        self._written: set[int] = set()
        self.starts_early = False
        """Whether the kernel lets the next one start before it waits for the one before."""
        self._epoch = -1
        self._starts: list[int] = []
        self._regions: list[tuple[int, int, str]] = []
        self._last = 0, 0
        """Begin and end of the allocation that was checked last: mostly the next one's."""
        self._looks = 0
        """How many times threads looked in vain, one after the other."""

    def is_stale(self, address: int) -> bool:
        """Whether this is read before the wait although the predecessor may not have written it yet."""
        return not self.running.waited and address >> 2 in self._written

    def note_write(self, address: int, nbytes: int) -> None:
        assert self.running.waited, "a kernel writes before it waits for the one before"
        self._writing.update(range(address >> 2, (address + nbytes + 3) >> 2))

    def check(self, address: int, nbytes: int) -> None:
        """Raises unless these bytes are aligned and inside an allocation."""
        start, end = self._last
        if start <= address and address + nbytes <= end and address % nbytes == 0:
            return
        found = bisect_right(self._starts, address) - 1
        start, size, what = self._regions[found] if found >= 0 else (0, 0, "nothing")
        if address % nbytes or not start <= address <= address + nbytes <= start + size:
            raise IndexError(f"{nbytes} bytes at {address - start} of {size} of {what}")
        self._last = start, start + size

    def load(self, address: int, nbytes: int) -> bytes:
        self.check(address, nbytes)
        if not self.running.waited and any(self.is_stale(a) for a in range(address, address + nbytes, 4)):
            return b"\xff" * nbytes
        return ctypes.string_at(int(address), nbytes)

    def rest_after(self, address: int, data: bytes) -> None:
        """Let other processes run where all threads look at what these write, and find what they found before."""
        own, seen = self.running, (address, data)
        self._looks = self._looks + 1 if own.looked == seen else 0
        own.looked = seen
        if self._looks > len(own.block.lanes):
            time.sleep(0.0005)

    def begin_block(self) -> None:
        module = numba_simulator._get_kernel_context()
        module._shared = self.shared = _Shared(module.shared_bytes)

    def run(self, launch: Any) -> None:
        """Run all blocks of a launch, one after the other."""
        self.launches += 1
        # of a kernel that starts the next one before it waits, the one before may still run then, too
        self._written = self._writing | (self._written if self.starts_early else set())
        self._writing, self.starts_early = set(), False
        self._regions = list(HostMemory.live)  # others may be forgotten meanwhile
        self._starts, self._last = [start for start, _, _ in self._regions], (0, 0)
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
                if name.startswith(KERNEL_MODULES) and vars(module).get("cuda") is cuda:
                    marker = python_types.FunctionType((lambda: None).__code__, vars(module))
                    stack.enter_context(swapped_cuda_module(marker, context))
            numba_simulator.FakeCUDAModule = lambda *shape: context
            function[grid, (launch.threads, 1, 1), 0, launch.shared_bytes](*arguments)


simulation = Simulation()


# The intrinsics


def _emulate() -> list[str]:
    """Replace the intrinsics by their emulation, before a kernel imports them. Returns the names that have none."""
    assert not any(name.startswith(KERNEL_MODULES) for name in sys.modules)
    from numballama.cuda import arithmetic, intrinsics, mma, quant_traits, system_memory
    from numballama.cuda.kernels import params

    for name, value in {} if WHOLE_BLOCKS else SMALL_BLOCKS.items():
        assert hasattr(params, name), name
        setattr(params, name, value)
    from tests.cuda.simulator.instructions import EMULATED

    missing = []
    for module in (arithmetic, intrinsics, quant_traits, mma, system_memory):
        for name, value in list(vars(module).items()):
            if isinstance(value, _Unknown):
                value.name = name
                if name in EMULATED:
                    setattr(module, name, EMULATED[name])
                else:
                    missing.append(name)
    return missing


missing = _emulate()
"""Names of intrinsics without emulation: those of tensor cores."""


def launch(function: Any, *arrays: np.ndarray, threads: int = 64, shared: int = 1024) -> list[np.ndarray]:
    """Run a kernel of a test with one block on copies of arrays. Returns what is in them afterwards."""
    from numballama.cuda.launch import Launch
    from tests.cuda.checks import Bench

    bench = Bench()
    arguments = tuple(bench.put(array) for array in arrays)
    named = {str(i): argument for i, argument in enumerate(arguments)}
    simulation.run(Launch(function, (1,), threads, named, shared))
    return [bench.get(argument) for argument in arguments]
