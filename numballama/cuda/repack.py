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

from ..quantization.blocks import Bytes
from ..quantization.types import BLOCKS

PIECE = 1 << 17
"""Numbers that are laid out at a time: they and what is made of them stay in a processor's cache."""
LOW, FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
SIXTEEN = np.dtype(np.complex128)
"""A type of 16 bytes: NumPy copies them as they are, and at once."""


@dataclass(frozen=True)
class Layout:
    """How a block type lies in device memory."""

    scales: str
    """Type of an element of the second matrix."""
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
    whole = [np.empty((len(blocks), part.shape[1]), np.uint8) for part in layout.split(blocks[:1])]
    step = PIECE // numbers
    for start in range(0, len(blocks), step):
        for out, part in zip(whole, layout.split(blocks[start : start + step]), strict=True):
            out[start : start + step] = part
    integers, *parts = (part.reshape(len(rows), -1) for part in whole)
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


def _halves(packed: Bytes, out: Bytes) -> None:
    """Runs of 32 bytes [..., runs, 32] with two numbers each → out [..., 2, runs, 16]: the numbers in the low halves of
    the bytes of each run, then those in the high ones.
    """
    runs = np.ascontiguousarray(packed).view(SIXTEEN)
    first, second = (np.ascontiguousarray(runs[..., i]).view(np.uint64) for i in range(2))
    low, high = second & LOW, first >> FOUR
    low <<= FOUR
    low |= first & LOW
    high &= LOW
    high |= second & ~LOW
    places = out.view(SIXTEEN)[..., 0]
    places[..., 0, :], places[..., 1, :] = low.view(SIXTEEN), high.view(SIXTEEN)


def _exchange(a: Bytes, b: Bytes, bits: int, mask: int) -> None:
    """Exchange fields of two arrays of words: those of b under `mask` with those of a that stand `bits` higher."""
    width, fields = np.uint64(bits), np.uint64(mask * 0x0101010101010101)
    moved = a >> width
    moved ^= b
    moved &= fields
    b ^= moved
    moved <<= width
    a ^= moved


def _q4_1(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 4:], blocks[:, :4]


def _q4_k(blocks: Bytes) -> tuple[Bytes, ...]:
    count = len(blocks)
    integers = np.empty((count, 4, 2, 1, 16), np.uint8)
    _halves(blocks[:, 16:].reshape(count, 4, 1, 32), integers)
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    both = np.empty((count, 8, 2), np.uint8)
    both[:, :4, 0], both[:, 4:, 0] = first & 63, third & 15 | (first >> 2) & 48
    both[:, :4, 1], both[:, 4:, 1] = second & 63, third >> 4 | (second >> 2) & 48
    return integers.reshape(count, -1), both.reshape(count, -1), blocks[:, :4]


def _q6_k(blocks: Bytes) -> tuple[Bytes, ...]:
    count = len(blocks)
    integers = np.empty((count, 2, 2, 2, 16), np.uint8)
    _halves(blocks[:, :128].reshape(count, 2, 2, 32), integers)
    # For each 128 numbers 32 bytes, whose bits 2 p and 2 p + 1 belong to the p-th 32 of them: word w has numbers from
    # 4 w on, w + 4 those 16 further. What is wanted are words of p with fields of w: 4 × 4 fields, turned.
    words = np.ascontiguousarray(blocks[:, 128:192]).view(np.uint32).reshape(-1, 2, 4)
    turned = np.ascontiguousarray(words.transpose(2, 0, 1)).reshape(4, -1).view(np.uint64)
    for a, b in ((0, 2), (1, 3)):
        _exchange(turned[a], turned[b], 4, 0x0F)
    for a, b in ((0, 1), (2, 3)):
        _exchange(turned[a], turned[b], 2, 0x33)
    upper = np.ascontiguousarray(turned.T)
    factor = np.zeros((count, 4), np.uint8)
    factor[:, :2] = blocks[:, 208:]
    return integers.reshape(count, -1), upper.view(np.uint8).reshape(count, -1), blocks[:, 192:208], factor


LAYOUTS = {
    "q4_1": Layout("u32", (1, 32), _q4_1),
    "q4_k": Layout("u8", (80, 1024), _q4_k),
    "q6_k": Layout("u8", (168, 512), _q6_k),
}
