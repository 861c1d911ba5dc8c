"""Rows of GGUF blocks as the GPU reads them: the integers' lower four bits in one matrix, all else in another, so that
both are read in aligned words.

Integers: 16 bytes for 32 numbers, in the order of q4_0: byte j holds number j in its low half, j + 16 in its high one.

The other matrix, type by type:

- q4_1: a word for each block: its scale and its least number, two float16.
- q4_k: 80 bytes for 1024 numbers, 4.625 bits a number with the integers: for each 32 two bytes, their scale and their
  least number; for each 256 a word, the two float16 that are factors of these. Zeros fill up the last 1024 numbers.
- q6_k: 168 bytes for 512 numbers, 6.625 bits a number with the integers: for each 32 numbers 8 bytes with the integers'
  upper two bits; for each 16 a signed byte, their scale; for each 256 a word, whose low half is the float16 that is the
  factor of their scales. The upper bits of numbers j, j + 4, j + 8 and j + 12 are byte j, lowest first; j + 16 … are
  byte j + 4. Zeros fill up the last 512 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .config import BLOCKS
from .quant_blocks import Bytes

PIECE = 1 << 18
"""Numbers that are laid out at a time: they and what is made of them stay in a processor's cache."""
LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
FOUR = np.uint64(4)


@dataclass(frozen=True)
class Layout:
    """How a block type lies in device memory."""

    scales: str
    """Type of an element of the second matrix."""
    group: int
    """Numbers that share a scale."""
    record: tuple[int, int]
    """(elements, numbers) of a record; the last one of a row may have fewer numbers."""
    split: Callable[[Bytes], tuple[Bytes, ...]]
    """[blocks, bytes of a block] to their integers, and to the parts of a record that they are, [blocks, bytes]."""

    def stride(self, columns: int) -> int:
        """Elements of a row of the second matrix."""
        elements, numbers = self.record
        return -(-columns // numbers) * elements


def split_rows(kind: str, rows: Bytes) -> tuple[Bytes, Bytes]:
    """Rows of blocks [rows, bytes] to rows of the integers and rows of all else, as bytes."""
    numbers, nbytes = BLOCKS[kind]
    layout, blocks = LAYOUTS[kind], rows.reshape(-1, nbytes)
    step = PIECE // numbers
    pieces = [layout.split(blocks[start : start + step]) for start in range(0, len(blocks), step)]
    integers, *parts = (np.concatenate(part).reshape(len(rows), -1) for part in zip(*pieces, strict=True))
    together = layout.record[1] // numbers
    if together == 1:
        (part,) = parts
        return integers, part
    count = rows.shape[1] // nbytes
    records = []
    for part in parts:  # those of a record's blocks are neighbours
        size = part.shape[1] // count
        filled = np.pad(part, ((0, 0), (0, -count % together * size)))
        records.append(filled.reshape(len(rows), -1, together * size))
    return integers, np.concatenate(records, axis=2).reshape(len(rows), -1)


def _halves(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Runs of 32 bytes [..., 32] with two numbers each to 16 bytes of the numbers in their low halves, 16 of the others'."""
    words = np.ascontiguousarray(packed).view(np.uint64)
    first, second = words[..., :2], words[..., 2:]
    low = first & LOW | (second & LOW) << FOUR
    high = first >> FOUR & LOW | second & ~LOW
    return low.view(np.uint8), high.view(np.uint8)


def _q4_1(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 4:], blocks[:, :4]


def _q4_k(blocks: Bytes) -> tuple[Bytes, ...]:
    count = len(blocks)
    integers = np.empty((count, 4, 2, 16), np.uint8)
    integers[:, :, 0], integers[:, :, 1] = _halves(blocks[:, 16:].reshape(count, 4, 32))
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    both = np.empty((count, 8, 2), np.uint8)
    both[:, :4, 0], both[:, 4:, 0] = first & 63, third & 15 | (first >> 2) & 48
    both[:, :4, 1], both[:, 4:, 1] = second & 63, third >> 4 | (second >> 2) & 48
    return integers.reshape(count, -1), both.reshape(count, -1), blocks[:, :4]


def _q6_k(blocks: Bytes) -> tuple[Bytes, ...]:
    count = len(blocks)
    integers = np.empty((count, 2, 2, 2, 16), np.uint8)  # of each 128 numbers those in low halves, then the others
    integers[:, :, 0], integers[:, :, 1] = _halves(blocks[:, :128].reshape(count, 2, 2, 32))
    # bits 2 p and 2 p + 1 of 32 bytes belong to the p-th 32 of 128 numbers
    words = np.ascontiguousarray(blocks[:, 128:192]).view(np.uint32).reshape(count, 2, 2, 4)
    upper = np.zeros((count, 2, 4, 2), np.uint32)
    for p in range(4):
        for w in range(4):
            upper[:, :, p] |= (words[..., w] >> np.uint32(2 * p) & np.uint32(0x03030303)) << np.uint32(2 * w)
    factor = np.zeros((count, 4), np.uint8)
    factor[:, :2] = blocks[:, 208:]
    return integers.reshape(count, -1), upper.reshape(count, -1).view(np.uint8), blocks[:, 192:208], factor


LAYOUTS = {
    "q4_1": Layout("u32", 32, (1, 32), _q4_1),
    "q4_k": Layout("u8", 32, (80, 1024), _q4_k),
    "q6_k": Layout("u8", 16, (168, 512), _q6_k),
}
