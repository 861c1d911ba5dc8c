"""Loads and stores: global memory, the block's shared memory and that of other blocks of a cluster."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tests.cuda.emulator.cluster import CLUSTER_SHIFT
from tests.cuda.emulator.program import NUMPY, SHARED, WIDTHS
from tests.cuda.emulator.threads import Threads


class MemoryAccess(Threads):
    """ld, st, atom, and addresses of other spaces."""

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

    def _mapa(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        to, where, rank = operands
        self._set(to, self._value(where, "u32") | (self._value(rank, "u32") + 1) << CLUSTER_SHIFT, mask)

    def _cvta(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        value = self._value(operands[1], "u64").astype(np.int64)
        if "shared" in modifiers:
            value = value - SHARED if modifiers[0] == "to" else value + SHARED
        self._set(operands[0], value, mask)

    def _atom(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers == ["global", "add", "u32"], modifiers
        memory, indices = self._bytes(self._address(operands[1])[mask], 4, False, mask)
        whole, added = np.zeros(self.threads, np.uint32), self._value(operands[2], "u32")
        for thread, place in zip(np.flatnonzero(mask), indices, strict=True):  # one after the other
            whole[thread] = memory[place].view(np.uint32)[0]
            memory[place] = (whole[thread : thread + 1] + added[thread]).view(np.uint8)
        self._set(operands[0], whole, mask)

    def _prefetch(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        self._bytes(self._address(operands[0])[mask], 4, False, mask)  # it must be memory
