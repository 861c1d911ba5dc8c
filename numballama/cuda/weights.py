"""A model's weights in device memory: how each is laid out for kernels, and the way there, through pinned buffers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .. import progress
from ..checkpoint import Weight
from ..quantization.convert import convert
from ..quantization.types import BLOCKS, F16, TYPE_TRAITS
from . import repack as blocks_cuda
from .driver import Device, Memory, Pinned
from .launch import ITEM_BYTES, PAYLOAD_TYPE, Array, Matrix

ALIGNMENT = 256
"""Bytes; of every array, so that any kernel may read 16 at once and a warp meets whole cache lines."""
STAGING = 32 << 20
"""Bytes of one of two pinned buffers through which weights go."""


def aligned(nbytes: int) -> int:
    """So many bytes, filled up to whole `ALIGNMENT`s."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Layout:
    """How a weight lies in device memory: payload, then scales, row after row."""

    weight: Weight
    payload: str
    row_bytes: int
    scales: str = ""
    scale_stride: int = 0
    group: int = 0

    @property
    def rows(self) -> int:
        return self.weight.shape[0] if len(self.weight.shape) == 2 else 1

    @property
    def scales_at(self) -> int:
        return aligned(self.rows * self.row_bytes)

    @property
    def nbytes(self) -> int:
        scales = self.rows * self.scale_stride * ITEM_BYTES[self.scales] if self.scales else 0
        return self.scales_at + aligned(scales)

    def operand(self, address: int) -> Array | Matrix:
        """The weight as kernels take it, once it lies at `address`."""
        shape = self.weight.shape
        payload = Array(address, shape, self.payload)
        if len(shape) == 1:
            return payload
        if not self.scales:
            return Matrix(shape, payload, self.row_bytes, payload)
        scales = Array(address + self.scales_at, (self.rows, self.scale_stride), self.scales)
        shift = self.group.bit_length() - 1
        return Matrix(shape, payload, self.row_bytes, scales, self.scale_stride, shift)

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, bytes) of pieces of at most `STAGING` bytes, in order."""
        rows_at_once = max(1, STAGING // max(self.row_bytes, self.scale_stride * 4, 1))
        for first in range(0, self.rows, rows_at_once):
            last = min(self.rows, first + rows_at_once)
            payload, scales = self._rows(first, last)
            yield first * self.row_bytes, _filled(payload, self.row_bytes)
            if self.scales:
                stride = self.scale_stride * ITEM_BYTES[self.scales]
                yield self.scales_at + first * stride, _filled(scales, stride)

    def _rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Payload and scales of some rows, as bytes [rows, …]."""
        weight, kind = self.weight, self.weight.type.name
        columns = weight.shape[-1]
        rows = weight.data.reshape(self.rows, -1)[first:last]
        if kind in blocks_cuda.LAYOUTS:
            return blocks_cuda.split_rows(kind, rows)
        if kind in ("q8_0", "q4_0"):
            blocks = rows.reshape(last - first, -1, BLOCKS[kind][1])
            return blocks[:, :, 2:].reshape(last - first, -1), blocks[:, :, :2].reshape(last - first, -1)
        if kind != "int8":
            return _bytes_of(rows), rows
        assert weight.scales is not None
        starts = np.arange(first, last)[:, None] * columns
        if not self.scales:  # groups that no kernel wants: the numbers themselves
            index = (starts + np.arange(columns)) // weight.type.group
            return _bytes_of(rows * weight.scales[index]), rows
        index = (starts + np.arange(0, columns, self.group)) // weight.type.group
        return _bytes_of(rows), _bytes_of(weight.scales[index])


def _bytes_of(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def _filled(rows: np.ndarray, stride: int) -> np.ndarray:
    """Rows of bytes, each followed by zeros up to `stride`."""
    if rows.shape[1] == stride:
        return rows
    out = np.zeros((len(rows), stride), np.uint8)
    out[:, : rows.shape[1]] = rows
    return out


def _layout(weight: Weight) -> _Layout:
    """How a weight is stored. Int8 groups that do not lie in rows are cut to ones that do, or become float32."""
    kind, columns = weight.type.name, weight.shape[-1]
    if kind in ("f32", "f16", "bf16"):
        width = columns * ITEM_BYTES[kind]
        return _Layout(weight, kind, width if len(weight.shape) == 1 else -(-width // 16) * 16)
    if kind in ("q8_0", "q4_0"):
        numbers, nbytes = BLOCKS[kind]
        blocks = columns // numbers
        return _Layout(weight, PAYLOAD_TYPE[kind], blocks * (nbytes - 2), "f16", -(-blocks // 2) * 2, numbers)
    if kind in blocks_cuda.LAYOUTS:
        of_blocks = blocks_cuda.LAYOUTS[kind]
        group = TYPE_TRAITS[kind].scale_group
        return _Layout(weight, kind, columns // 2, of_blocks.scales, of_blocks.stride(columns), group)
    if kind == "int8":
        common = math.gcd(columns, weight.type.group)
        group = common & -common  # the largest power of two that divides both
        if weight.type.group % columns == 0 and columns % 16 == 0 and not columns & (columns - 1):
            group = columns
        group = min(group, 512)  # a warp's 16 bytes a lane: no group spans two chunks
        if group >= 16:
            return _Layout(weight, "int8", columns, "f32", columns // group, group)
        return _Layout(weight, "f32", -(-columns * 4 // 16) * 16)
    return _layout(convert(weight, F16))  # block types that no kernel streams


class Weights:
    """All weights in one piece of device memory."""

    def __init__(self, device: Device, weights: Mapping[str, Weight]) -> None:
        layouts = {name: _layout(weight) for name, weight in weights.items()}
        self.nbytes = sum(layout.nbytes for layout in layouts.values())
        self.memory = Memory(device, self.nbytes, "the model's weights")
        self.operands: dict[str, Array | Matrix] = {}
        try:
            self._upload(device, layouts)
        except BaseException:
            self.free()  # now: a traceback may keep this object for long
            raise

    def _upload(self, device: Device, layouts: Mapping[str, _Layout]) -> None:
        staging = [Pinned(device, min(STAGING, aligned(self.nbytes)) + ALIGNMENT) for _ in range(2)]
        try:
            buffers = itertools.cycle(staging)
            done, offset = 0, 0
            with progress.progress_bar("uploading weights") as report:
                for name, layout in layouts.items():
                    report(name, done, self.nbytes)
                    address = self.memory.address + offset
                    self.operands[name] = layout.operand(address)
                    for at, part in layout.parts():
                        flat = part.reshape(-1)
                        for start in range(0, flat.size, STAGING):
                            piece = flat[start : start + STAGING]
                            buffer = next(buffers)
                            buffer.bytes[: piece.size] = piece
                            device.synchronize()  # the other buffer's copy: this one was filled meanwhile
                            device.write(address + at + start, buffer.address, piece.size)
                        done += flat.size
                    offset += layout.nbytes
                device.synchronize()
        finally:
            for buffer in staging:
                buffer.free()

    def free(self) -> None:
        self.memory.free()
