"""wgmma in the emulator: products that end no sooner than they are waited for, of tiles swizzled by 128 bytes.

It is strict: until a product has ended its sums are NaN, and neither its tiles in shared memory nor its words of A may
change. Not emulated: which writes `fence.proxy.async` and `wgmma.fence` make visible.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.cuda.emulator.program import from_16

LANES = 128
"""Threads of a warpgroup."""
LANE = np.arange(32)
ROW = (16 * np.arange(4)[:, None] + LANE // 4).reshape(-1)
COLUMN = np.tile(2 * (LANE % 4), 4)
"""Of a thread's first number in a fragment."""
NOT_YET = np.full(LANES, np.nan, np.float32)


class Read(NamedTuple):
    """Bytes of shared memory that a product reads."""

    indices: np.ndarray
    data: np.ndarray


@dataclass
class Products:
    """Products that were begun together, by one warpgroup."""

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    words: dict[str, np.ndarray] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)


class Warpgroup:
    """The products that a warpgroup has begun, of a block's registers and shared memory."""

    def __init__(self, block: Any, number: int) -> None:
        self.block, self.threads = block, slice(LANES * number, LANES * (number + 1))
        self.groups: list[Products] = [Products()]

    def begin(self, modifiers: list[str], operands: tuple[Any, ...]) -> None:
        """wgmma.mma_async: D = A · B + D, or A · B."""
        shape, kind = re.fullmatch(r"m64n(\d+)k16", modifiers[2]), modifiers[4]
        assert shape and modifiers[:2] == ["sync", "aligned"] and modifiers[3] == "f32" and modifiers[5] == kind
        width, (names, a, b, *how) = int(shape[1]), operands
        assert width % 8 == 0 and 8 <= width <= 256 and len(names) == width // 2, modifiers
        if isinstance(a, tuple):
            matrix = self._words(a, kind)
            scale, one_a, one_b, transposed_b = how
        else:
            scale, one_a, one_b, transposed_a, transposed_b = how
            matrix = self._tile(a, kind, 64, transposed_a == "1")
        assert (one_a, one_b) == ("1", "1")
        product = matrix @ self._tile(b, kind, width, transposed_b == "1").T
        i = np.arange(len(names))[:, None]
        values = product[ROW + 8 * (i // 2 % 2), COLUMN + 8 * (i // 4) + i % 2]
        if scale != "0":
            values += [self._sum(name) for name in names]
        for name, value in zip(names, values.astype(np.float32), strict=True):
            self.groups[-1].sums[name] = value
            self._set(name, NOT_YET)

    def wait(self, keep: int) -> None:
        """End all groups but the newest `keep` that are complete."""
        ended = max(0, len(self.groups) - 1 - keep)
        for number, group in enumerate(self.groups[:ended]):
            for indices, data in group.reads:
                assert (self.block.shared[indices] == data).all(), "shared memory changed while wgmma read it"
            for name, words in group.words.items():
                assert (self._value(name, "b32") == words).all(), "words of A changed while wgmma read them"
            for name, value in group.sums.items():
                if any(name in later.sums for later in self.groups[number + 1 :]):
                    continue  # these are the sums of later products
                assert np.isnan(self._value(name, "f32")).all(), "sums changed while wgmma computed them"
                self._set(name, value)
        self.groups = self.groups[ended:]

    def moved(self, to: str, source: str, mask: np.ndarray) -> None:
        """A register was copied: if its sums have not ended, the copy is these sums too. Both are one register then."""
        for group in reversed(self.groups):
            if source in group.sums:
                if mask[self.threads].all():
                    for other in self.groups:
                        other.sums.pop(to, None)
                    group.sums[to] = group.sums[source]
                return

    def _value(self, name: str, kind: str) -> np.ndarray:
        value: np.ndarray = self.block._value(name, kind)[self.threads]
        return value

    def _set(self, name: str, value: np.ndarray) -> None:
        held = self.block.registers.get(name)
        if held is None or held.dtype != np.uint32:
            held = self.block.registers[name] = np.full(self.block.threads, 0xA5, np.uint32)
        held[self.threads] = value.view(np.uint32)

    def _sum(self, name: str) -> np.ndarray:
        for group in reversed(self.groups):
            if name in group.sums:
                return group.sums[name].astype(np.float64)
        return self._value(name, "f32").astype(np.float64)

    def _words(self, names: tuple[str, ...], kind: str) -> np.ndarray:
        """A [64, 16] of four words a thread."""
        matrix = np.zeros((64, 16))
        for i, name in enumerate(names):
            words = self._value(name, "b32").copy()
            self.groups[-1].words[name] = words
            for half in range(2):
                row, column = ROW + 8 * (i % 2), COLUMN + 8 * (i // 2) + half
                matrix[row, column] = from_16((words >> np.uint32(16 * half)).astype(np.uint16), kind)
        return matrix

    def _tile(self, operand: str, kind: str, rows: int, transposed: bool) -> np.ndarray:
        """[rows, 16] of shared memory, by a descriptor; if `transposed`, rows of memory are columns."""
        descriptors = self._value(operand, "u64")
        assert (descriptors == descriptors[0]).all(), "a descriptor for each warpgroup"
        descriptor = int(descriptors[0])
        start, leading, stride = (16 * (descriptor >> shift & 0x3FFF) for shift in (0, 16, 32))
        assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0, "swizzled by 128 bytes, tiles at multiples of 1,024"
        n, k = np.arange(rows)[:, None], np.arange(16)[None]
        if transposed:
            at = start + n // 64 * leading + n % 64 * 2 + k // 8 * stride + k % 8 * 128
        else:
            at = start + n // 8 * stride + n % 8 * 128 + k * 2
        at ^= (at >> 7 & 7) << 4
        indices = at[..., None] + np.arange(2)
        data = self.block.shared[indices]
        self.groups[-1].reads.append(Read(indices, data.copy()))
        return from_16(np.ascontiguousarray(data).view(np.uint16)[..., 0], kind)
