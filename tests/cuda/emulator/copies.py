"""Asynchronous copies, and the mbarriers that count what has arrived."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.cuda.emulator.program import BASE
from tests.cuda.emulator.threads import BOOL, Copies, Threads

BOX_COLUMNS = 64
"""Columns of 16 bits of a box that TMA copies."""


class AsynchronousCopies(Threads):
    """cp and mbarrier."""

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
