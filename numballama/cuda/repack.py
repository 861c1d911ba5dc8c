"""Repacks rows of GGUF blocks for the GPU, which reads aligned words. The quants' lower four bits go to one matrix (the
payload), everything else to another (the scales).

Payload: 16 bytes for 32 quants, in the order of q4_0: byte j has quant j in its low half and j + 16 in its high half.

Scales, type by type:

- q4_1: for each block a word of two float16, d and m.
- q4_k: a record of 80 bytes for 1024 elements, with the payload 4.625 bits per element. For each 32 elements two bytes,
  their scale and min; then for each 256 a word of two float16, d and dmin. The last record of a row is padded with
  zeros.
- q6_k: a record of 168 bytes for 512 elements, with the payload 6.625 bits per element. For each 32 elements 8 bytes
  with the quants' upper two bits; then for each 16 a signed byte, their scale; then for each 256 a word, whose low half
  is the float16 d. The upper bits of quants j, j + 4, j + 8 and j + 12 are in byte j, lowest first; those of j + 16 …
  are in byte j + 4. The last record of a row is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..memory import ceil_div
from ..quantization.blocks import Bytes
from ..quantization.types import BLOCKS

CHUNK_ELEMENTS = 1 << 17
"""Number of elements to repack at a time. They and their results stay in the CPU's cache."""
LOW, FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)
SIXTEEN = np.dtype(np.complex128)
"""A NumPy type of 16 bytes, which copies them at once and unchanged."""


@dataclass(frozen=True)
class Layout:
    """The layout of a block type in device memory."""

    scales: str
    """Type of an element of the scales' matrix."""
    record: tuple[int, int]
    """(elements of the scales' matrix, elements of the weight) per record. A row's last one may be partly padding."""
    split: Callable[[Bytes], tuple[Bytes, ...]]
    """Splits blocks [blocks, bytes of a block] into their payload and their parts of a record, each [blocks, bytes]."""

    def stride(self, columns: int) -> int:
        """Elements of a row of the scales' matrix, for rows of `columns` elements."""
        elements, covered = self.record
        return ceil_div(columns, covered) * elements


def split_rows(kind: str, rows: Bytes) -> tuple[Bytes, Bytes]:
    """Rows of blocks [rows, bytes] → rows of the payload and rows of the scales' matrix, as bytes."""
    block_size, nbytes = BLOCKS[kind]
    layout, blocks = LAYOUTS[kind], rows.reshape(-1, nbytes)
    whole = [np.empty((len(blocks), part.shape[1]), np.uint8) for part in layout.split(blocks[:1])]
    step = CHUNK_ELEMENTS // block_size
    for start in range(0, len(blocks), step):
        for out, part in zip(whole, layout.split(blocks[start : start + step]), strict=True):
            out[start : start + step] = part
    payload, *parts = (part.reshape(len(rows), -1) for part in whole)
    together = layout.record[1] // block_size
    if together == 1:
        (part,) = parts
        return payload, part
    count = rows.shape[1] // nbytes
    records = []
    for part in parts:  # in a record, the same part of its blocks lies together
        size = part.shape[1] // count
        filled = np.pad(part, ((0, 0), (0, -count % together * size)))
        records.append(filled.reshape(len(rows), -1, together * size))
    return payload, np.concatenate(records, axis=2).reshape(len(rows), -1)


def _halves(packed: Bytes, out: Bytes) -> None:
    """Runs of 32 bytes [..., runs, 32], each byte two quants, → out [..., 2, runs, 16].

    The first 16 bytes of a run's result have the quants of the low halves, the next 16 those of the high halves.
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
    """Exchange bit fields of two arrays of words: those of b under `mask` with those of a that are `bits` higher."""
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
    payload = np.empty((count, 4, 2, 1, 16), np.uint8)
    _halves(blocks[:, 16:].reshape(count, 4, 1, 32), payload)
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    both = np.empty((count, 8, 2), np.uint8)
    both[:, :4, 0], both[:, 4:, 0] = first & 63, third & 15 | (first >> 2) & 48
    both[:, :4, 1], both[:, 4:, 1] = second & 63, third >> 4 | (second >> 2) & 48
    return payload.reshape(count, -1), both.reshape(count, -1), blocks[:, :4]


def _q6_k(blocks: Bytes) -> tuple[Bytes, ...]:
    count = len(blocks)
    payload = np.empty((count, 2, 2, 2, 16), np.uint8)
    _halves(blocks[:, :128].reshape(count, 2, 2, 32), payload)
    # 128 elements have 32 bytes, whose bits 2 p and 2 p + 1 belong to the p-th 32 elements. Word w has elements from 4
    # w on, word w + 4 those 16 further. The result has words p with fields w: a transposition of 4 × 4 fields.
    words = np.ascontiguousarray(blocks[:, 128:192]).view(np.uint32).reshape(-1, 2, 4)
    fields = np.ascontiguousarray(words.transpose(2, 0, 1)).reshape(4, -1).view(np.uint64)
    for a, b in ((0, 2), (1, 3)):
        _exchange(fields[a], fields[b], 4, 0x0F)
    for a, b in ((0, 1), (2, 3)):
        _exchange(fields[a], fields[b], 2, 0x33)
    upper = np.ascontiguousarray(fields.T)
    factor = np.zeros((count, 4), np.uint8)
    factor[:, :2] = blocks[:, 208:]
    return payload.reshape(count, -1), upper.view(np.uint8).reshape(count, -1), blocks[:, 192:208], factor


LAYOUTS = {
    "q4_1": Layout("u32", (1, 32), _q4_1),
    "q4_k": Layout("u8", (80, 1024), _q4_k),
    "q6_k": Layout("u8", (168, 512), _q6_k),
}
