"""Blocks repacked for a GPU in NumPy, as `cuda/repack.py` describes it: what `repack_kernel` must write."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from numballama.cuda.launch import ITEM_BYTES, Launch
from numballama.cuda.repack import LAYOUTS
from numballama.cuda.weights import WeightLayout
from numballama.quantization.blocks import _scales_and_mins, _unpack, records
from numballama.quantization.types import BLOCKS


def _payload(quants: np.ndarray) -> np.ndarray:
    """4-bit quants, of each 32 the first 16 in the low halves."""
    both = quants.reshape(len(quants), -1, 2, 16)
    return (both[:, :, 0] | both[:, :, 1] << 4).reshape(len(quants), -1)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def parts_of(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Blocks [n, bytes] → their payload, and their parts of a record in its order, each [n, bytes]."""
    block = records(kind, blocks)
    if kind == "q8_0":
        return _as_bytes(block["qs"]), _as_bytes(block["d"])
    if kind == "q4_0":
        return block["qs"], _as_bytes(block["d"])
    if kind == "q4_1":
        return block["qs"], blocks[:, :4]
    if kind in ("q4_k", "q5_k"):
        both = np.stack(_scales_and_mins(block["scales"]), axis=2)
        parts = _payload(_unpack(block["qs"], 4, 32)), _as_bytes(both), blocks[:, :4]
        if kind == "q4_k":
            return parts
        fifth = _unpack(block["qh"], 1, 32).reshape(len(blocks), 8, 8, 4) << np.arange(8, dtype=np.uint8)[:, None]
        return *parts, _as_bytes(np.bitwise_or.reduce(fifth, axis=2))
    assert kind == "q6_k"
    upper = _unpack(block["qh"], 2, 32).reshape(len(blocks), 8, 2, 4, 4) << np.array([[0], [2], [4], [6]], np.uint8)
    d = np.stack([block["d"], np.zeros_like(block["d"])], axis=1)
    upper = np.bitwise_or.reduce(upper, axis=3)
    return _payload(_unpack(block["ql"], 4, 64)), _as_bytes(upper), _as_bytes(block["scales"]), _as_bytes(d)


def split_rows(kind: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of blocks [rows, bytes] → rows of the payload and rows of the scales' matrix, as bytes."""
    block_size, nbytes = BLOCKS[kind]
    payload, *parts = (part.reshape(len(rows), -1) for part in parts_of(kind, rows.reshape(-1, nbytes)))
    together, count = LAYOUTS[kind].record[1] // block_size, rows.shape[1] // nbytes
    of_records = []  # of types with blocks of 32, where a record has two for an aligned word, they lie in order anyway
    for part in parts:  # in a record, the same part of its blocks lies together
        size = part.shape[1] // count
        filled = np.pad(part, ((0, 0), (0, -count % together * size)))
        of_records.append(filled.reshape(len(rows), -1, together * size))
    return payload, np.concatenate(of_records, axis=2).reshape(len(rows), -1)


def memory_of(layout: WeightLayout) -> np.ndarray:
    """The bytes of a weight's memory, with zeros where nothing is written."""
    memory = np.zeros(layout.nbytes, np.uint8)
    if layout.is_repacked:
        rows = layout.weight.data.reshape(layout.rows, -1)
        for at, part in zip((0, layout.scales_offset), split_rows(layout.weight.type.name, rows), strict=True):
            memory[at : at + part.size] = part.reshape(-1)
    else:
        for at, part in layout.parts():
            memory[at : at + part.size] = part
    return memory


def run_launch(launch: Launch) -> None:
    """What a launch of `repack_kernel` does, in host memory and with NumPy. It repacks whole rows or parts of them."""
    found: dict[str, Any] = dict(launch.arguments)
    source, payload, scales = found["source"], found["payload"], found["scales"]
    kind = "q8_0" if payload.dtype == "int8" else payload.dtype
    block_size, nbytes = BLOCKS[kind]
    runs = block_size // 32
    count, columns = found["runs"] // runs, found["runs_of_row"] * 32

    def memory(address: int, size: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    blocks = memory(source.address, count * nbytes).reshape(count, nbytes)
    width = block_size if kind == "q8_0" else block_size // 2
    own = parts_of(kind, blocks)
    first = found["first"] // runs
    memory(payload.address + first * width, count * width)[:] = own[0].reshape(-1)
    stride = found["scale_stride"] * ITEM_BYTES[scales.dtype]
    together, of_row = LAYOUTS[kind].record[1] // block_size, columns // block_size
    record = LAYOUTS[kind].record[0] * ITEM_BYTES[scales.dtype]
    for i in range(count):
        row, column = divmod(first + i, of_row)
        at = scales.address + row * stride + column // together * record
        for part in own[1:]:
            size = part.shape[1]
            memory(at + column % together * size, size)[:] = part[i]
            at += together * size
