"""Threads of a block, or of several: their registers, arrays with an element for each thread, and their memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from tests.cuda.emulator.barriers import Barriers
from tests.cuda.emulator.cluster import Cluster
from tests.cuda.emulator.program import BASE, NUMPY, SHARED, WIDTHS, Memory, Program
from tests.cuda.emulator.wgmma import LANES, Warpgroup

BOOL = np.dtype(bool)
RAW = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
"""The type of registers by their bytes."""


@cache
def address_parts(operand: str) -> tuple[str, int]:
    """(register or name, offset) of an operand in brackets."""
    match = re.match(r"\[([^\]+]+)(?:\+(-?\w+))?\]", operand)
    assert match, operand
    return match[1].strip(), int(match[2] or "0", 0)


class Copies(NamedTuple):
    """Asynchronous copies of some threads that have not arrived yet, each of the same number of bytes."""

    lanes: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    group: np.ndarray
    """How many groups the thread had committed before."""


class Threads:
    """The threads of blocks of one size that execute instructions together, and what they see.

    Threads stand one block after the other, as does their shared memory.
    """

    def __init__(
        self, program: Program, memory: Memory, arguments: Sequence[Any], threads: int, places: Sequence[Sequence[int]],
        grid: Sequence[int], shared_bytes: int,
    ) -> None:  # fmt: skip
        """`threads` of each block, whose places in the grid are `places`."""
        assert program.is_plain or len(places) == 1
        lanes, block = np.tile(np.arange(threads, dtype=np.uint32), len(places)), threads
        self.program, self.memory, self.threads = program, memory, (threads := len(lanes))
        self.parameters = {
            name: np.float32(value).view(np.uint32) if kind == "f32" else np.int64(value).view(np.uint64)
            for (kind, name), value in zip(program.parameters, arguments, strict=True)
        }
        self.shared_bytes = program.static_bytes + shared_bytes
        self.shared = np.full(self.shared_bytes * len(places), 0xFF, np.uint8)
        self._shared_begin = np.repeat(self.shared_bytes * np.arange(len(places)), block)
        """Where in `shared` the memory of each thread's block begins."""
        self.registers: dict[str, np.ndarray] = {}
        self.constants: dict[tuple[str, str], np.ndarray] = {}  # (operand, type) → its value in each thread

        def same(n: int) -> np.ndarray:
            return np.full(threads, n, np.uint32)

        for axis, at, size in zip("xyz", zip(*places, strict=True), grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.repeat(np.array(at, np.uint32), block)
            self.registers[f"%nctaid.{axis}"] = same(size)
            self.registers[f"%tid.{axis}"] = lanes if axis == "x" else same(0)
            self.registers[f"%ntid.{axis}"] = same(block if axis == "x" else 1)
        self.registers["%laneid"], self.registers["%dynamic_smem_size"] = lanes % 32, same(shared_bytes)
        self.counter = np.zeros(threads, np.int64)
        self.done, self.waiting = np.zeros(threads, bool), np.zeros(threads, bool)
        self.in_warp = np.zeros(threads, bool)
        """Threads that wait for others of their warp only."""
        self.copies: list[Copies] = []
        """Those that have not arrived yet."""
        self.committed = np.zeros(threads, np.int64)
        """How many groups of copies each thread has committed."""
        self.barriers = Barriers(threads)
        self.warpgroups = [Warpgroup(self, number) for number in range(threads // LANES)]
        self.everyone: np.ndarray | None = None  # the mask of the running threads, if these are all
        self.executed: dict[str, int] = {}
        self._looked: dict[str, bytes] = {}
        self.cluster: Cluster | None = None
        self.preceding: Event | None = None
        """Set when the preceding kernel has ended; None if it had ended before this one began."""
        self.arrived, self.gone = np.zeros(threads, bool), np.zeros(threads, bool)
        """Threads that have arrived at the cluster's barrier, and those that have waited there."""

    def join(self, cluster: Cluster) -> None:
        """Run as a block of a cluster."""
        self.cluster, self.barriers.changed = cluster, cluster.changed

    # Operands

    def _kind(self, modifiers: Sequence[str], which: int = -1) -> str:
        if which == -1:
            for modifier in reversed(modifiers):
                if modifier in WIDTHS:
                    return modifier
        return [m for m in modifiers if m in WIDTHS][which]

    def _value(self, operand: str, kind: str) -> np.ndarray:
        """A register or a constant, for each thread; not to be written to."""
        held = self.registers.get(operand)
        if held is None:
            if (operand, kind) not in self.constants:
                self.constants[operand, kind] = self._constant(operand, kind)
            return self.constants[operand, kind]
        own, dtype = held.dtype, NUMPY[kind]
        if own is BOOL or own is dtype:
            return held
        if own.itemsize != WIDTHS[kind]:
            held = held.astype(RAW[WIDTHS[kind]])
        return held.view(dtype)

    def _constant(self, operand: str, kind: str) -> np.ndarray:
        dtype = NUMPY[kind]
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.uint32).view(np.float32)
        if operand.startswith("0d"):
            return np.full(self.threads, int(operand[2:], 16), np.uint64).view(np.float64)
        if operand in self.program.shared:
            return np.full(self.threads, self.program.shared[operand], np.uint64).astype(dtype)
        number = int(operand, 0)
        width = 8 * np.dtype(dtype).itemsize
        if kind == "pred":
            return np.full(self.threads, bool(number))
        return np.full(self.threads, number % (1 << width), f"u{width // 8}").view(dtype)

    def _set(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        if name == "_":
            return
        value = np.asarray(value)
        raw = value if value.dtype is BOOL else value.view(RAW[value.dtype.itemsize])
        if mask is self.everyone:
            self.registers[name] = raw.copy()
            return
        held = self.registers.get(name)
        if held is None or (held.dtype != raw.dtype):
            held = self.registers[name] = (
                np.zeros(self.threads, bool) if raw.dtype is BOOL else np.full(self.threads, 0xA5, raw.dtype)
            )
        np.copyto(held, raw, where=mask)

    def _address(self, operand: str) -> np.ndarray:
        name, offset = address_parts(operand)
        return self._value(name, "u64").view(np.int64) + offset

    def _bytes(self, address: np.ndarray, width: int, shared: bool, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(memory, indices [n, width]) of addresses of the threads of a mask."""
        low, high = int(address.min()), int(address.max())
        generic = low >= SHARED
        assert generic or high < SHARED, "both spaces at once"
        assert not (address % width).any(), f"not aligned to {width}"
        if shared or generic:
            begin = 0 if shared else SHARED
            assert low >= begin and high - begin + width <= self.shared_bytes, "outside shared memory"
            return self.shared, (address - begin + self._shared_begin[mask])[:, None] + np.arange(width)
        assert low >= BASE and high - BASE + width <= self.memory.bytes.size, "outside global memory"
        indices = (address - BASE)[:, None] + np.arange(width)
        assert self.memory.allowed[indices].all(), "outside any allocation"
        return self.memory.bytes, indices

    def _load(self, address: np.ndarray, width: int, shared: bool, mask: np.ndarray) -> np.ndarray:
        memory, indices = self._bytes(address, width, shared, mask)
        with self.memory.lock:
            return memory[indices]
