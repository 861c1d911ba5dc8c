"""A model's weights in device memory: the layout that kernels read, and the upload through pinned buffers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .. import progress
from ..checkpoint import Weight
from ..memory import round_up
from ..quantization.convert import convert
from ..quantization.types import BLOCKS, F16, TYPE_TRAITS
from . import repack
from .driver import Device, Memory, Pinned
from .launch import ITEM_BYTES, PAYLOAD_TYPE, Array, Matrix

ALIGNMENT = 256
"""Alignment of every array in bytes: a thread may read 16 bytes at once, and a warp reads whole cache lines."""
STAGING = 32 << 20
"""Bytes of each of the two pinned buffers that the upload uses."""


def aligned(nbytes: int) -> int:
    """Bytes, rounded up to a multiple of `ALIGNMENT`."""
    return round_up(nbytes, ALIGNMENT)


@dataclass(frozen=True)
class WeightLayout:
    """How a weight is stored in device memory: all rows of the payload, then all rows of the scales."""

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
    def scales_offset(self) -> int:
        return aligned(self.rows * self.row_bytes)

    @property
    def nbytes(self) -> int:
        scales = self.rows * self.scale_stride * ITEM_BYTES[self.scales] if self.scales else 0
        return self.scales_offset + aligned(scales)

    def operand(self, address: int) -> Array | Matrix:
        """The weight at `address`, as an operand of kernels."""
        shape = self.weight.shape
        payload = Array(address, shape, self.payload)
        if len(shape) == 1:
            return payload
        if not self.scales:
            return Matrix(shape, payload, self.row_bytes, payload)
        scales = Array(address + self.scales_offset, (self.rows, self.scale_stride), self.scales)
        shift = self.group.bit_length() - 1
        return Matrix(shape, payload, self.row_bytes, scales, self.scale_stride, shift)

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, bytes [rows, …]) of parts of the weight's memory: whole rows, some `STAGING` bytes at a time."""
        rows_per_part = max(1, STAGING // max(self.row_bytes, self.scale_stride * 4, 1))
        for first in range(0, self.rows, rows_per_part):
            last = min(self.rows, first + rows_per_part)
            payload, scales = self._rows(first, last)
            yield first * self.row_bytes, _padded(payload, self.row_bytes)
            if self.scales:
                stride = self.scale_stride * ITEM_BYTES[self.scales]
                yield self.scales_offset + first * stride, _padded(scales, stride)

    def _rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Payload and scales of rows [first, last), as bytes [rows, …]."""
        weight, kind = self.weight, self.weight.type.name
        columns = weight.shape[-1]
        rows = weight.data.reshape(self.rows, -1)[first:last]
        if kind in repack.LAYOUTS:
            return repack.split_rows(kind, rows)
        if kind in ("q8_0", "q4_0"):
            blocks = rows.reshape(last - first, -1, BLOCKS[kind][1])
            return blocks[:, :, 2:].reshape(last - first, -1), blocks[:, :, :2].reshape(last - first, -1)
        if kind != "int8":
            return _bytes_of(rows), rows
        assert weight.scales is not None
        starts = np.arange(first, last)[:, None] * columns
        if not self.scales:  # no kernel reads such groups: the dequantised elements
            index = (starts + np.arange(columns)) // weight.type.group
            return _bytes_of(rows * weight.scales[index]), rows
        index = (starts + np.arange(0, columns, self.group)) // weight.type.group
        return _bytes_of(rows), _bytes_of(weight.scales[index])


def _bytes_of(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def _padded(rows: np.ndarray, stride: int) -> np.ndarray:
    """Rows of bytes, each padded with zeros to `stride`."""
    if rows.shape[1] == stride:
        return rows
    out = np.zeros((len(rows), stride), np.uint8)
    out[:, : rows.shape[1]] = rows
    return out


def layout_of(weight: Weight) -> WeightLayout:
    """The layout for a weight. Int8 groups that cross rows are divided into smaller ones, or dequantised to float32."""
    kind, columns = weight.type.name, weight.shape[-1]
    if kind in ("f32", "f16", "bf16"):
        width = columns * ITEM_BYTES[kind]
        return WeightLayout(weight, kind, width if len(weight.shape) == 1 else round_up(width, 16))
    if kind in ("q8_0", "q4_0"):
        elements, nbytes = BLOCKS[kind]
        count = columns // elements
        return WeightLayout(weight, PAYLOAD_TYPE[kind], count * (nbytes - 2), "f16", round_up(count, 2), elements)
    if kind in repack.LAYOUTS:
        blocks = repack.LAYOUTS[kind]
        return WeightLayout(
            weight, kind, columns // 2, blocks.scales, blocks.stride(columns), TYPE_TRAITS[kind].scale_group
        )
    if kind == "int8":
        common = math.gcd(columns, weight.type.group)
        group = common & -common  # the largest power of two that divides both
        if weight.type.group % columns == 0 and columns % 16 == 0 and not columns & (columns - 1):
            group = columns
        group = min(group, 512)  # a chunk: 16 bytes for each lane of a warp; no group spans two
        if group >= 16:
            return WeightLayout(weight, "int8", columns, "f32", columns // group, group)
        return WeightLayout(weight, "f32", round_up(columns * 4, 16))
    return layout_of(convert(weight, F16))  # block types that no kernel reads


class Weights:
    """All weights of a model, in one allocation of device memory."""

    def __init__(self, device: Device, weights: Mapping[str, Weight]) -> None:
        layouts = {name: layout_of(weight) for name, weight in weights.items()}
        self.nbytes = sum(layout.nbytes for layout in layouts.values())
        self.memory = Memory(device, self.nbytes, "the model's weights")
        self.operands: dict[str, Array | Matrix] = {}
        try:
            self._upload(device, layouts)
        except BaseException:
            self.free()  # now: a traceback may keep this object alive for long
            raise

    def _upload(self, device: Device, layouts: Mapping[str, WeightLayout]) -> None:
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
                            device.synchronize()  # the copy from the other buffer, which ran while this one was filled
                            device.write(address + at + start, buffer.address, piece.size)
                        done += flat.size
                    offset += layout.nbytes
                device.synchronize()
        finally:
            for buffer in staging:
                buffer.free()

    def free(self) -> None:
        self.memory.free()
