"""A model's weights in device memory, in the layout that kernels read. `upload` brings them there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .. import progress
from ..checkpoint import Weight
from ..memory import round_up
from ..quantization.convert import convert
from ..quantization.types import F16, TYPE_TRAITS
from .driver import Device, Memory
from .launch import ITEM_BYTES, PAYLOAD_TYPE, Array, Matrix
from .repack import LAYOUTS
from .upload import STAGING, Upload

ALIGNMENT = 256
"""Alignment of every array in bytes: a thread may read 16 bytes at once, and a warp reads whole cache lines."""


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
    def is_repacked(self) -> bool:
        """Whether the weight is blocks of a GGUF file, which the device repacks."""
        return self.weight.type.name in LAYOUTS

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
        """(offset, bytes) of parts of the weight's memory, which together are all of it: a contiguous array each, some
        `STAGING` bytes. Not for a type of `LAYOUTS`, whose blocks are repacked on the device.
        """
        rows_per_part = max(1, STAGING // max(self.row_bytes, self.scale_stride * 4, 1))
        for first in range(0, self.rows, rows_per_part):
            last = min(self.rows, first + rows_per_part)
            payload, scales = self._rows(first, last)
            yield first * self.row_bytes, _padded(payload, self.row_bytes).reshape(-1)
            if self.scales:
                stride = self.scale_stride * ITEM_BYTES[self.scales]
                yield self.scales_offset + first * stride, _padded(scales, stride).reshape(-1)

    def _rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Payload and scales of rows [first, last), as bytes [rows, …]."""
        weight, kind = self.weight, self.weight.type.name
        columns = weight.shape[-1]
        rows = weight.data.reshape(self.rows, -1)[first:last]
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
    if kind in LAYOUTS:
        payload, scales = PAYLOAD_TYPE[kind], LAYOUTS[kind]
        width = columns * ITEM_BYTES[payload] if payload == "int8" else columns // 2
        group = TYPE_TRAITS[kind].scale_group
        return WeightLayout(weight, payload, width, scales.scales, scales.stride(columns), group)
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
        address = self.memory.address
        for name, layout in layouts.items():
            self.operands[name] = layout.operand(address)
            address += layout.nbytes
        try:
            self._upload(device, layouts)
        except BaseException:
            self.free()  # now: a traceback may keep this object alive for long
            raise

    def _upload(self, device: Device, layouts: Mapping[str, WeightLayout]) -> None:
        """Upload in the order of the file, which a disk reads fastest."""
        done, total = 0, sum(layout.weight.nbytes for layout in layouts.values())
        with progress.progress_bar("uploading weights") as report, Upload(device, self.nbytes) as upload:
            for name in sorted(layouts, key=lambda name: layouts[name].weight.data.ctypes.data):
                layout, operand = layouts[name], self.operands[name]
                report(name, done, total)
                if layout.is_repacked and isinstance(operand, Matrix):
                    upload.repack(layout.weight, operand)
                else:
                    start = operand.address if isinstance(operand, Array) else operand.payload.address
                    for offset, part in layout.parts():
                        upload.copy(start + offset, part)
                done += layout.weight.nbytes

    def free(self) -> None:
        self.memory.free()
