"""Blocks of threads that execute a program: registers are arrays with an element for each thread."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from tests.cuda.emulator.barriers import Barriers
from tests.cuda.emulator.cluster import CLUSTER_SHIFT, WAIT_S, Cluster
from tests.cuda.emulator.program import (
    BASE,
    NUMPY,
    SHARED,
    WIDTHS,
    Memory,
    Program,
    Statement,
    from_16,
    round_16,
)
from tests.cuda.emulator.wgmma import LANES, Products, Warpgroup

BOX_COLUMNS = 64
BOOL = np.dtype(bool)
RAW = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
"""The type of registers by their bytes."""
COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


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


class Block:
    """A running block, or several blocks of one size that execute instructions together.

    Several are as many times as fast: an instruction takes NumPy about as long for 100 threads as for 2,000. Their
    threads stand one block after the other, as does their shared memory. `Program.is_plain` says whether they may.
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

    @property
    def _ready(self) -> np.ndarray:
        """Threads that can go on."""
        return ~self.done & ~self.waiting & ~self.barriers.blocked

    def run(self) -> None:
        statements = self.program.statements
        with np.errstate(all="ignore"):
            while True:
                ready = self._ready
                if not ready.any():
                    if self.done.all():
                        return
                    if self.in_warp.any():  # who could come to it has come
                        self.waiting &= ~self.in_warp
                        self.in_warp[:] = False
                    elif self.barriers.blocked.any():
                        assert self.cluster is not None, "threads that wait for each other"
                        self.cluster.wait_for(lambda: bool(self._ready.any()))
                    else:
                        self.waiting[:] = False
                    continue
                at = int(self.counter[ready].min())
                mask = ready & (self.counter == at)
                self.everyone = mask if mask.all() else None
                others = self.counter[ready & ~mask]
                limit = int(others.min()) if others.size else len(statements)
                while at < limit:
                    after = self._step(statements[at], at, mask)
                    at += 1
                    if after:
                        break
                else:
                    self.counter[mask] = at

    def _step(self, statement: Statement, at: int, mask: np.ndarray) -> bool:
        """Execute one instruction. Returns whether threads may have diverged or stopped."""
        active, some = mask, True
        if statement.guard:
            guard = self.registers[statement.guard]
            active = mask & (~guard if statement.negated else guard)
            some = bool(active.any())
        name, *modifiers = statement.operation
        self.executed[name] = self.executed.get(name, 0) + 1
        if name == "bra":
            self.counter[mask] = at + 1
            self.counter[active] = self.program.labels[statement.operands[0]]
            return True
        if name in ("ret", "exit"):
            self.counter[mask] = at + 1
            self.done |= active
            return True
        if name == "barrier" and modifiers[0] == "cluster":
            self.counter[mask] = at + 1
            self._at_cluster_barrier(modifiers[1], active)
            return modifiers[1] == "wait"
        if name in ("bar", "barrier"):
            self.counter[mask] = at + 1
            if len(statement.operands) > 1:
                numbers, threads = (self._value(operand, "u32") for operand in statement.operands)
                self.barriers.named(numbers, threads, active, waits="sync" in modifiers)
            else:
                self.waiting |= active
                if "warp" in modifiers:
                    self.in_warp |= active
            return True
        if name == "mbarrier" and modifiers[0] == "try_wait":
            to, where, parity = statement.operands
            self.counter[mask] = at + 1
            self._set(to, self.barriers.ended(self._address(where), self._value(parity, "u32"), active), active)
            return True
        if some:
            try:
                self._execute(name, modifiers, statement.operands, active)
            except Exception as error:
                raise AssertionError(f"{statement.text}: {error}") from error
        return False

    def _at_cluster_barrier(self, how: str, mask: np.ndarray) -> None:
        """Threads arrive at the cluster's barrier, or wait there: all of a block arrive before one waits."""
        assert self.cluster is not None, "no cluster"
        if how == "arrive":
            assert not (self.arrived & mask).any(), "a thread arrives a second time"
            self.arrived |= mask
            return
        assert self.arrived.all(), "a cluster's barrier wants all threads of its blocks"
        if not self.gone.any():
            self.cluster.meet()
        self.gone |= mask
        if self.gone.all():
            self.arrived[:] = self.gone[:] = False

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

    # Instructions

    def _execute(self, name: str, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        function: Callable[..., None] | None = getattr(self, f"_{name}", None)
        if function is None:
            self._arithmetic(modifiers, operands, mask, name)
        else:
            function(modifiers, operands, mask)

    def _ld(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        kind = self._kind(modifiers)
        if "param" in modifiers:
            self._set(operands[0], np.full(self.threads, self.parameters[operands[1][1:-1]]), mask)
            return
        names = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        width = WIDTHS[kind]
        raw = self._load(self._address(operands[1])[mask], width * len(names), "shared" in modifiers, mask)
        if "sys" in modifiers:
            self._rest_after(operands[1], raw)
        for i, name in enumerate(names):
            part = np.ascontiguousarray(raw[:, i * width : (i + 1) * width]).view(NUMPY[kind]).reshape(-1)
            if width == 1:
                part = part.astype(np.int16 if kind == "s8" else np.uint16)
            whole = part
            if mask is not self.everyone:
                whole = np.zeros(self.threads, part.dtype)
                whole[mask] = part
            held = self.registers.get(name)
            if held is not None and held.dtype.itemsize > whole.dtype.itemsize:
                whole = whole.astype(f"{'i' if kind[0] == 's' else 'u'}{held.dtype.itemsize}")
            self._set(name, whole, mask)

    def _rest_after(self, operand: str, found: np.ndarray) -> None:
        """Let other ranks run, whose threads share Python's lock, where a load finds what it found before."""
        seen = found.tobytes()
        if self._looked.get(operand) == seen:
            time.sleep(0.0005)
        self._looked[operand] = seen

    def _mapa(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        to, where, rank = operands
        self._set(to, self._value(where, "u32") | (self._value(rank, "u32") + 1) << CLUSTER_SHIFT, mask)

    def _st_async(self, kind: str, operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """Words to another block's shared memory, whose mbarrier counts their bytes: at once."""
        assert self.cluster is not None, "no cluster"
        to, barrier = self._address(operands[0]), self._address(operands[2])
        names = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        values = np.stack([self._value(name, kind) for name in names], axis=1)
        with self.cluster.changed:
            for number in np.unique(to[mask] >> CLUSTER_SHIFT):
                here = mask & (to >> CLUSTER_SHIFT == number)
                assert (barrier[here] >> CLUSTER_SHIFT == number).all(), "an mbarrier of another block"
                block, _ = self.cluster.block_at(int(to[here][0]))
                at, counted = (each[here] & ((1 << CLUSTER_SHIFT) - 1) for each in (to, barrier))
                data = np.ascontiguousarray(values[here]).view(np.uint8)
                size = data.shape[1]
                assert not (at % size).any() and (at + size <= block.shared.size).all()
                block.shared[at[:, None] + np.arange(size)] = data
                for address, count in zip(*np.unique(counted, return_counts=True), strict=True):
                    block.barriers.copied(int(address), size * int(count))

    def _st(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        kind = self._kind(modifiers)
        if modifiers[0] == "async":
            self._st_async(kind, operands, mask)
            return
        names = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        width = WIDTHS[kind]
        addresses = self._address(operands[0])[mask]
        memory, indices = self._bytes(addresses, width * len(names), "shared" in modifiers, mask)
        parts = []
        for name in names:
            value = self._value(name, kind)[mask]
            parts.append(np.ascontiguousarray(value).view(np.uint8).reshape(-1, width))
        with self.memory.lock:
            memory[indices] = np.concatenate(parts, axis=1)

    def _mov(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        to, source = operands
        kind = modifiers[0]
        if isinstance(source, tuple):  # pack
            half = {"b32": "b16", "b64": "b32"}[kind]
            low, high = (self._value(name, half).astype(np.uint64) for name in source)
            self._set(to, (low | high << np.uint64(8 * WIDTHS[half])).astype(NUMPY[kind]), mask)
        elif isinstance(to, tuple):
            half = {"b32": "b16", "b64": "b32"}[kind]
            whole = self._value(source, kind).astype(np.uint64)
            for i, name in enumerate(to):
                self._set(name, (whole >> np.uint64(8 * WIDTHS[half] * i)).astype(NUMPY[half]), mask)
        else:
            self._set(to, self._value(source, kind), mask)
            for group in self.warpgroups:
                group.moved(to, source, mask)

    def _cvta(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        value = self._value(operands[1], "u64").astype(np.int64)
        if "shared" in modifiers:
            value = value - SHARED if modifiers[0] == "to" else value + SHARED
        self._set(operands[0], value, mask)

    def _cvt(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        to, source = self._kind(modifiers, 0), self._kind(modifiers, -1)
        if to in ("f16x2", "bf16x2"):
            high, low = (round_16(self._value(name, "f32"), to[:-2]) for name in operands[1:])
            self._set(operands[0], low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16), mask)
            return
        value = self._value(operands[1], source)
        if to[0] in "usb" and source[0] == "f":
            rounded = (
                np.trunc(value) if "rzi" in modifiers else np.floor(value) if "rmi" in modifiers else np.rint(value)
            )
            info = np.iinfo(NUMPY[to])
            value = np.clip(np.nan_to_num(rounded.astype(np.float64)), float(info.min), float(info.max))
        self._set(operands[0], value.astype(NUMPY[to]), mask)

    def _setp(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        kind = self._kind(modifiers)
        a, b = (self._value(name, kind) for name in operands[1:3])
        how = modifiers[0]
        if kind[0] != "f":
            self._set(operands[0], COMPARED[how](a, b), mask)
            return
        unordered = np.isnan(a) | np.isnan(b)
        if how == "nan":
            result = unordered
        elif how == "num":
            result = ~unordered
        elif how.endswith("u") and how[:-1] in COMPARED:
            result = COMPARED[how[:-1]](a, b) | unordered
        else:
            result = COMPARED[how](a, b) & ~unordered
        self._set(operands[0], result, mask)

    def _selp(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        kind = modifiers[0]
        chosen = np.where(self._value(operands[3], "pred"), *(self._value(name, kind) for name in operands[1:3]))
        self._set(operands[0], chosen, mask)

    def _shfl(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers[1] in ("bfly", "idx") and (self._value(operands[4], "u32")[mask] == 0xFFFFFFFF).all()
        self._whole_warps(mask)
        to = operands[0].split("|")[0]
        lanes = np.arange(self.threads)
        given = np.where(mask, self._value(operands[2], "u32").astype(np.int64), 0)  # others' registers hold anything
        inside = (lanes & 31) ^ given if modifiers[1] == "bfly" else given & 31
        other = (lanes & ~31) | inside
        self._set(to, self._value(operands[1], "b32")[other], mask)

    def _redux(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers == ["sync", "max", "s32"] and int(operands[2], 0) == 0xFFFFFFFF, modifiers
        self._whole_warps(mask)
        largest = self._value(operands[1], "s32").reshape(-1, 32).max(axis=1)
        self._set(operands[0], np.repeat(largest, 32), mask)

    def _whole_warps(self, mask: np.ndarray) -> None:
        warps = mask.reshape(-1, 32)
        assert (warps.all(axis=1) | ~warps.any(axis=1)).all(), "a warp that is not whole"

    def _ldmatrix(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """Lane l gives the address of row l mod 8 of matrix l / 8, and gets numbers 2 (l mod 4) and the next of row
        l / 4 of each; of its transposed with `trans`.
        """
        self._whole_warps(mask)
        count = len(operands[0])
        assert count == 4
        rows = np.zeros((self.threads, 8), np.uint16)
        rows[mask] = self._load(self._address(operands[1])[mask], 16, True, mask).view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)
        if "trans" in modifiers:
            matrices = matrices.transpose(0, 1, 3, 2)
        lane = np.arange(32)
        for i, name in enumerate(operands[0]):
            low = matrices[:, i, lane // 4, 2 * (lane % 4)].astype(np.uint32)
            high = matrices[:, i, lane // 4, 2 * (lane % 4) + 1].astype(np.uint32)
            self._set(name, (low | high << np.uint32(16)).reshape(-1), mask)

    def _mma(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        self._whole_warps(mask)
        shape, kind = modifiers[2], modifiers[6]
        assert modifiers[:2] == ["sync", "aligned"] and modifiers[3:6] == ["row", "col", "f32"], modifiers
        depth = {"m16n8k16": 16, "m16n8k8": 8}[shape]
        warps = self.threads // 32
        lane = np.arange(32)
        group, place = lane // 4, lane % 4

        def numbers(name: str) -> tuple[np.ndarray, np.ndarray]:
            words = self._value(name, "b32").reshape(warps, 32)
            return tuple(from_16((words >> np.uint32(s)).astype(np.uint16), kind) for s in (0, 16))  # type: ignore[return-value]

        a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        for i, name in enumerate(operands[1]):
            row, column = group + 8 * (i % 2), 2 * place + 8 * (i // 2)
            a[:, row, column], a[:, row, column + 1] = numbers(name)
        for i, name in enumerate(operands[2]):
            row = 2 * place + 8 * i
            b[:, row, group], b[:, row + 1, group] = numbers(name)
        product = a @ b
        for i, (to, name) in enumerate(zip(operands[0], operands[3], strict=True)):
            part = product[:, group + 8 * (i // 2), 2 * place + i % 2].reshape(-1)
            self._set(to, (part + self._value(name, "f32")).astype(np.float32), mask)

    def _cp(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        if "commit_group" in modifiers:
            self.committed[mask] += 1
        elif "wait_group" in modifiers:
            self._end_copies(mask, int(operands[0]))
        elif "mbarrier" in modifiers:
            assert modifiers[:4] == ["async", "mbarrier", "arrive", "noinc"], modifiers
            self._end_copies(mask, -1)  # those that are in no group yet too
            self.barriers.arrive(self._address(operands[0]), mask)
        elif "bulk" in modifiers and "tensor" in modifiers:
            self._copy_box(modifiers, operands, mask)
        elif "bulk" in modifiers:
            self._copy_bytes(modifiers, operands, mask)
        else:
            assert modifiers[0] == "async"
            width = int(operands[2])
            to, source = self._address(operands[0])[mask], self._address(operands[1])[mask]
            wanted = np.ones(mask.sum(), bool)
            if len(operands) > 3:  # a predicate, under which the source is ignored
                ignored = self.registers[operands[3]]
                assert ignored.dtype is BOOL, operands[3]
                wanted = ~ignored[mask]
            data = np.zeros((len(to), width), np.uint8)
            if wanted.any():
                data[wanted] = self._load(source[wanted], width, False, mask)
            _, indices = self._bytes(to, width, True, mask)
            self.shared[indices] = 0xFF  # what was there is gone, what comes is not yet there
            self.copies.append(Copies(np.flatnonzero(mask), indices, data, self.committed[mask]))

    def _end_copies(self, mask: np.ndarray, keep: int) -> None:
        """Copies of the threads of a mask arrive, but those of the newest `keep` groups of a thread."""
        pending = []
        for copies in self.copies:
            lanes = copies.lanes
            ended = mask[lanes] & (copies.group < self.committed[lanes] - keep)
            self.shared[copies.indices[ended]] = copies.data[ended]
            if not ended.all():
                pending.append(Copies(*(each[~ended] for each in copies)))
        self.copies = pending

    def _copy_bytes(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """Plain bytes from global to shared memory, at once."""
        assert modifiers[2:4] == ["shared::cluster", "global"], modifiers
        addresses, counts = [self._address(operands[i]) for i in (0, 1, 3)], self._value(operands[2], "u32")
        for thread in np.flatnonzero(mask):
            to, source, barrier = (int(each[thread]) for each in addresses)
            count = int(counts[thread])
            assert to % 16 == source % 16 == count % 16 == 0 < count, "bulk copies move multiples of 16 bytes"
            indices = source - BASE + np.arange(count)
            assert self.memory.allowed[indices].all(), "outside any allocation"
            self.shared[to : to + count] = self.memory.bytes[indices]
            self.barriers.copied(barrier, count)

    def _copy_box(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """A box of a matrix of 16 bits: at once, with zeros outside the matrix, swizzled by 128 bytes."""
        assert modifiers[:4] == ["async", "bulk", "tensor", "2d"] and mask.sum() == 1, modifiers
        (thread,) = np.flatnonzero(mask)
        match = re.fullmatch(r"\[(\S+), \{(\S+), (\S+)\}\]", operands[1])
        assert match, operands[1]
        matrix = self.memory.tensor_maps[int(self._value(match[1], "u64")[thread])]
        column, row = (int(self._value(match[i], "s32")[thread]) for i in (2, 3))
        assert matrix.stride % 16 == 0 and matrix.address % 16 == 0
        rows = min(matrix.box_rows, matrix.shape[0] - row)
        width = 2 * min(BOX_COLUMNS, matrix.shape[1] - column)
        assert rows > 0 and width > 0, "a box outside the matrix"
        box = np.zeros((matrix.box_rows, 2 * BOX_COLUMNS), np.uint8)
        begin = matrix.address + row * matrix.stride + 2 * column - BASE
        indices = begin + matrix.stride * np.arange(rows)[:, None] + np.arange(width)
        assert self.memory.allowed[indices].all(), "outside any allocation"
        box[:rows, :width] = self.memory.bytes[indices]
        to = int(self._address(operands[0])[thread])
        assert to % 1024 == 0, "swizzled boxes begin at multiples of 1,024"
        pieces = np.arange(8) ^ (np.arange(matrix.box_rows)[:, None] & 7)
        swizzled = np.take_along_axis(box.reshape(-1, 8, 16), pieces[:, :, None], axis=1)
        self.shared[to : to + box.size] = swizzled.reshape(-1)
        self.barriers.copied(int(self._address(operands[2])[thread]), box.size)

    def _mbarrier(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        if modifiers[0] == "init":
            self.barriers.make(self._address(operands[0]), self._value(operands[1], "u32"), mask)
        elif modifiers[0] == "inval":
            self.barriers.remove(self._address(operands[0]), mask)
        else:
            assert modifiers[0] == "arrive" and operands[0] == "_", modifiers
            if "shared::cluster" in modifiers:
                self._arrive_at(self._address(operands[1]), mask)
                return
            if modifiers[1] == "expect_tx":
                self.barriers.expect(self._address(operands[1]), self._value(operands[2], "u32"), mask)
            self.barriers.arrive(self._address(operands[1]), mask)

    def _arrive_at(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        """At mbarriers of blocks of the cluster."""
        assert self.cluster is not None, "no cluster"
        for thread in np.flatnonzero(mask):
            block, at = self.cluster.block_at(int(addresses[thread]))
            block.barriers.arrive(np.array([at]), np.array([True]))

    def _wgmma(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        groups = len(self.warpgroups)
        assert not mask[LANES * groups :].any(), "a warpgroup that is not whole"
        for number, whole in enumerate(mask[: LANES * groups].reshape(-1, LANES)):
            assert whole.all() or not whole.any(), "a warpgroup that is not whole"
            if whole.any() and modifiers[0] != "fence":
                group = self.warpgroups[number]
                if modifiers[0] == "mma_async":
                    group.begin(modifiers[1:], operands)
                elif modifiers[0] == "commit_group":
                    group.groups.append(Products())
                else:
                    assert modifiers[0] == "wait_group"
                    group.wait(int(operands[0]))

    def _atom(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers == ["global", "add", "u32"], modifiers
        memory, indices = self._bytes(self._address(operands[1])[mask], 4, False, mask)
        whole, added = np.zeros(self.threads, np.uint32), self._value(operands[2], "u32")
        for thread, place in zip(np.flatnonzero(mask), indices, strict=True):  # one after the other
            whole[thread] = memory[place].view(np.uint32)[0]
            memory[place] = (whole[thread : thread + 1] + added[thread]).view(np.uint8)
        self._set(operands[0], whole, mask)

    def _prmt(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers == ["b32"]
        a, b, selector = (self._value(name, "b32") for name in operands[1:])
        both = np.stack([a, b], axis=1).view(np.uint8)  # little endian: the bytes of a, then of b
        digits = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & np.uint32(15)
        assert (digits[mask] < 8).all(), "copies of a sign"
        chosen = np.take_along_axis(both, (digits & np.uint32(7)).astype(np.int64), axis=1)
        self._set(operands[0], chosen.view(np.uint32)[:, 0], mask)

    def _nanosleep(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        """Other blocks run meanwhile in any case."""

    def _prefetch(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        self._bytes(self._address(operands[0])[mask], 4, False, mask)  # it must be memory

    def _fence(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        pass

    def _griddepcontrol(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        if modifiers[0] == "wait" and self.preceding is not None:
            assert self.preceding.wait(WAIT_S), "the preceding kernel does not end"

    def _arithmetic(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray, name: str) -> None:
        kind = self._kind(modifiers) if name != "ex2" else "f32"
        to, *sources = operands
        if name in ("shl", "shr"):
            value, amount = self._value(sources[0], kind), self._value(sources[1], "u32")
            width = 8 * WIDTHS[kind]
            far = amount >= width
            amount = np.minimum(amount, width - 1).astype(value.dtype)
            result = np.left_shift(value, amount) if name == "shl" else np.right_shift(value, amount)
            if not (name == "shr" and kind[0] == "s"):
                result = np.where(far, 0, result).astype(value.dtype)
            self._set(to, result, mask)
            return
        if name in ("bfi", "bfe"):
            self._bits(name, kind, to, sources, mask)
            return
        if kind == "f16x2":  # exact in float64, rounded once
            halves = [
                self._value(source, "b32").view(np.float16).reshape(-1, 2).astype(np.float64) for source in sources
            ]
            self._set(to, OPERATIONS[name](*halves).astype(np.float16).reshape(-1).view(np.uint32), mask)
            return
        values = [self._value(source, kind) for source in sources]
        if name in ("mul", "mad") and kind[0] in "us":
            wide = np.int64 if kind[0] == "s" else np.uint64
            if "wide" in modifiers:
                result = values[0].astype(wide) * values[1].astype(wide)
                if name == "mad":
                    result = result + self._value(sources[2], {"s32": "s64", "u32": "u64"}[kind])
            elif "hi" in modifiers:
                exact = values[0].astype(object) * values[1].astype(object)
                result = np.array([int(n) >> (8 * WIDTHS[kind]) for n in exact], dtype=NUMPY[kind])
            else:
                result = values[0] * values[1] + (values[2] if name == "mad" else 0)
                result = result.astype(NUMPY[kind])
            self._set(to, result, mask)
            return
        self._set(to, np.asarray(OPERATIONS[name](*values)).astype(NUMPY[kind], copy=False), mask)

    def _bits(self, name: str, kind: str, to: str, sources: list[str], mask: np.ndarray) -> None:
        start, length = (int(s, 0) for s in sources[-2:])
        ones = (1 << length) - 1
        if name == "bfi":
            new, old = (self._value(s, kind).astype(np.uint64) for s in sources[:2])
            result = (old & np.uint64(~(ones << start) & (1 << 64) - 1)) | ((new & np.uint64(ones)) << np.uint64(start))
        else:
            result = (self._value(sources[0], kind).astype(np.uint64) >> np.uint64(start)) & np.uint64(ones)
            assert kind[0] == "u"
        self._set(to, result.astype(NUMPY[kind]), mask)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float64)


def _not(a: np.ndarray) -> np.ndarray:
    return ~a


def _rsqrt(a: np.ndarray) -> np.ndarray:
    return np.reciprocal(np.sqrt(a))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "div": _divide, "rem": _remainder,
    "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": _not,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rcp": np.reciprocal, "ex2": np.exp2,
    "rsqrt": _rsqrt,
}  # fmt: skip
