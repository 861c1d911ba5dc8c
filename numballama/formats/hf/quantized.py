"""Weights that other tools quantised: MLX (affine), GPTQ and AWQ. They become q4_1 or float16.

Each stores unsigned integers of `bits` bits, several in a 32-bit word (MLX's of 3, 5 and 6 bits cross the ends of
words), and for every `group` inputs of an output a scale and an offset: w = scale · q + offset. GPTQ and AWQ store a
zero point z in place of the offset, -scale · z. Integers of 4 bits whose groups are whole blocks become q4_1, which is
the same formula. Its scale and offset are float16: exact for MLX's float16, rounded for others. All else is computed in
float32 and rounded to float16.

| tool | integers | shape | order in a word, lowest bits first | scale, offset or zeros |
|---|---|---|---|---|
| MLX | weight | [out, in · bits / 32] | in order | scales, biases [out, in / group] |
| GPTQ | qweight | [in · bits / 32, out] | in order, along in | scales [groups, out], qzeros [groups, out · bits / 32] |
| AWQ | qweight | [in, out · bits / 32] | 0 2 4 6 1 3 5 7, along out | as GPTQ, qzeros in AWQ's order |
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...checkpoint import LazyWeight, Weight
from ...errors import FormatError, UnsupportedError
from ...quantization.convert import convert
from ...quantization.types import F16, F32, Q4_1, TYPE_TRAITS, WeightType
from ..json_reader import Keys, read_object
from ..tensors import TensorInfo, view_weight
from .weight_files import TYPES

Method = Literal["mlx", "gptq", "awq"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in a word, in units of 4 bits, of each of eight neighbours."""
_WORDS = ("U32", "I32", "IntStorage")
_ROWS = 512
"""Rows that are unpacked at a time."""
_MLX_BITS = (2, 3, 4, 5, 6, 8)
_READABLE = "MLX (affine, 2 to 6 or 8 bits), GPTQ (4 or 8 bits) and AWQ (GEMM, 4 bits)"


@dataclass(frozen=True)
class Scheme:
    """How a directory's matrices are quantised. Matrices without scales are not."""

    method: Method
    bits: int
    """Bits of an integer. MLX's are taken from the shapes: layers may differ."""
    zero_add: int = 0
    """What is added to a stored zero point: 1 in GPTQ's first format."""

    @property
    def name(self) -> str:
        return {"mlx": "MLX", "gptq": "GPTQ", "awq": "AWQ"}[self.method]


def scheme_of(keys: Keys) -> Scheme | None:
    """The scheme that a `config.json` names; None for plain weights. Raises `UnsupportedError` for others."""
    for key in ("quantization_config", "quantization"):
        own = keys.inner(key) if isinstance(keys.values.get(key), dict | None) else None
        if own is None:
            if keys.values.get(key) is not None:
                raise _unsupported(keys, key)
            continue
        values = own.values
        bits = values.get("bits", values.get("w_bit"))
        match values.get("quant_method"):
            case None if "group_size" in values and values.get("mode", "affine") == "affine" and type(bits) is int:
                return Scheme("mlx", bits)
            case "gptq" if bits in (4, 8) and (layout := _gptq_layout(values)) in _GPTQ_ZERO_ADD:
                return Scheme("gptq", bits, _GPTQ_ZERO_ADD[layout])
            case "awq" if bits == 4 and str(values.get("version", "gemm")).lower() == "gemm":
                return Scheme("awq", 4)
        raise _unsupported(keys, key)
    return None


_GPTQ_ZERO_ADD = {"gptq": 1, "gptq_v2": 0}
"""Layout of a GPTQ checkpoint → what is added to a stored zero point."""


def _gptq_layout(values: Mapping[str, Any]) -> str:
    """ "gptq", or the layout of a kernel into which the matrices were repacked, such as "marlin"."""
    return "marlin" if values.get("is_marlin_format") is True else str(values.get("checkpoint_format") or "gptq")


_OLDER = ("quantize_config.json", "quant_config.json")
"""Files in which AutoGPTQ and AutoAWQ kept what is now `quantization_config` in `config.json`."""


def with_older_config(keys: Keys, directory: Path) -> Keys:
    """`keys`, with the `quantization_config` that an older tool wrote to a file of its own, if `keys` has none."""
    if keys.values.get("quantization_config") is not None:
        return keys
    for name, method in zip(_OLDER, ("gptq", "awq"), strict=True):
        if os.path.isfile(directory / name):
            own = {"quantization_config": {"quant_method": method, **read_object(directory / name).values}}
            scheme_of(Keys(own, directory / name, name))  # what is wrong with it is wrong in this file
            return Keys(keys.values | own, keys.path, keys.what)
    return keys


def undeclared(directory: Path, tensors: Mapping[str, TensorInfo], name: str) -> UnsupportedError | None:
    """The error for a matrix called `name` that is quantised although the config does not say so; None for others."""
    base = name.removesuffix("weight")
    tools = {f"{base}qweight": "GPTQ or AWQ", f"{name}.absmax": "bitsandbytes", f"{base}SCB": "bitsandbytes"}
    for part, tool in tools.items():
        if part in tensors:
            return UnsupportedError(
                f"{directory}: tensor {part[:100]} belongs to weights quantised by {tool}, but config.json has no "
                f"quantization_config; read are, with their config, {_READABLE}"
            )
    return None


def _unsupported(keys: Keys, key: str) -> UnsupportedError:
    value = keys.values[key]
    if isinstance(value, dict) and "quant_method" in value:  # first: the rest may be cut
        value = {"quant_method": value["quant_method"], **value}
    text = repr(value)
    return UnsupportedError(
        f"{keys.path}: {key} is {text if len(text) <= 80 else text[:77] + '...'}, which is not supported; weights "
        f"without quantisation are, those of {_READABLE}, and GGUF of every type that `inspect` lists"
    )


def take(scheme: Scheme, tensors: dict[str, TensorInfo], name: str, shape: tuple[int, ...]) -> Weight | None:
    """The quantised matrix called `name` ("….weight"), of `shape` (outputs, inputs); its tensors are removed from
    `tensors`. None if it is not quantised there. Raises `FormatError` for tensors that do not fit together.
    """
    base = name.removesuffix("weight")
    if len(shape) != 2 or f"{base}scales" not in tensors:
        return None
    shorts = ("weight", "scales", "biases") if scheme.method == "mlx" else ("qweight", "scales", "qzeros")
    parts = {short: tensors.pop(base + short, None) for short in shorts}
    found = [info for info in parts.values() if info is not None]
    if len(found) < len(parts):
        missing = next(short for short, info in parts.items() if info is None)
        raise FormatError(
            f"a tensor of a matrix by {scheme.name} is missing",
            path=found[0].file.path,
            where=f"tensor {base}{missing}",
        )
    packed, scales, third = found
    order = tensors.pop(f"{base}g_idx", None)
    if scheme.method == "mlx":
        return _mlx(packed, scales, third, shape)
    return _zero_points(scheme, packed, scales, third, order, shape)


def _words(info: TensorInfo, shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """The packed integers: a view of the file."""
    if info.type not in _WORDS:
        raise UnsupportedError(
            f"{info.file.path}: tensor {info.name[:100]} has type {info.type}, expected 32-bit words"
        )
    if info.shape != shape:
        raise info.wrong_shape(shape)
    return np.frombuffer(info.file.data, "<u4", math.prod(shape), info.offset).reshape(shape)


def _floats(info: TensorInfo, shape: tuple[int, ...]) -> Weight:
    if info.shape != shape:
        raise info.wrong_shape(shape)
    return view_weight(info, shape, TYPES)


def _mlx(packed: TensorInfo, scales: TensorInfo, offsets: TensorInfo, shape: tuple[int, ...]) -> Weight:
    rows, columns = shape
    bits, group = _ratio(packed, 32, columns), _group(scales, columns)
    if bits not in _MLX_BITS:
        raise UnsupportedError(f"{packed.file.path}: tensor {packed.name[:100]} has {bits} bits; read are {_READABLE}")
    words = _words(packed, (rows, columns * bits // 32))
    scale, offset = (_floats(info, (rows, columns // group)) for info in (scales, offsets))

    def part(start: int, stop: int) -> _Part:
        q = _unpack(words[start:stop], bits).reshape(stop - start, columns)
        return q, _float32(scale, start, stop), _float32(offset, start, stop)

    return _lazy(shape, bits, group, part)


def _ratio(info: TensorInfo, factor: int, columns: int) -> int:
    """`factor` · the last dimension / `columns`, or 0 where that is no whole number."""
    bits, rest = divmod(factor * info.shape[-1] if info.shape else 0, columns)
    return 0 if rest else bits


def _group(scales: TensorInfo, columns: int) -> int:
    """Inputs that share a scale, by the last dimension of the scales."""
    count = scales.shape[-1] if scales.shape else 0
    if not count or columns % count:
        raise scales.wrong_shape(f"a divisor of {columns:,} as last dimension")
    return columns // count


_Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Of some rows: integers [rows, columns], scales and offsets [rows, columns / group]."""


def _zero_points(
    scheme: Scheme,
    packed: TensorInfo,
    scales: TensorInfo,
    zeros: TensorInfo,
    order: TensorInfo | None,
    shape: tuple[int, ...],
) -> Weight:
    """A matrix by GPTQ or AWQ. `order` gives the group of every input; without it they are in order."""
    rows, columns = shape
    bits, count = scheme.bits, scales.shape[0] if scales.shape else 0
    if not count or columns % count or rows * bits % 32 or columns * bits % 32:
        raise scales.wrong_shape(f"[a divisor of {columns:,}, {rows:,}]")
    group = columns // count
    packing = 32 // bits
    size = (columns, rows // packing) if scheme.method == "awq" else (columns // packing, rows)
    # added to whole words, as GPTQModel subtracts it: a zero point of 0 has borrowed from the one above it
    added = np.uint32(scheme.zero_add * sum(1 << at for at in range(0, 32, bits)))
    words, zero_words = _words(packed, size), _words(zeros, (count, rows // packing)) + added
    scale = _floats(scales, (count, rows))
    groups = np.arange(columns) // group
    if order is not None:
        given = _words(order, (columns,))
        if int(given.max()) >= count:
            raise FormatError(
                "a group is out of range", path=order.file.path, where=f"tensor {order.name[:100]}",
                expected=f"0 to {count - 1}", found=int(given.max()),
            )  # fmt: skip
        groups = given.astype(np.int64)
    regular = bool((groups == np.arange(columns) // group).all())
    positions = _AWQ_ORDER if scheme.method == "awq" else None

    def part(start: int, stop: int) -> _Part:
        inner = slice(start // packing, -(-stop // packing))
        if scheme.method == "awq":
            q = _unpack(words[:, inner], bits, positions).reshape(columns, -1).T
        else:
            q = _unpack(np.ascontiguousarray(words[:, start:stop].T), bits).reshape(stop - start, columns)
        zero = _unpack(zero_words[:, inner], bits, positions).reshape(count, -1).T.astype(np.float32)
        by_group = _float32(scale, 0, count)[:, start:stop].T
        offset = -by_group * zero
        if regular:
            return q, by_group, offset
        return q, by_group[:, groups], offset[:, groups]

    return _lazy(shape, bits, group if regular else 1, part)


def _unpack(
    words: npt.NDArray[np.uint32], bits: int, positions: tuple[int, ...] | None = None
) -> npt.NDArray[np.uint8]:
    """The integers of every word, in a new last dimension, lowest bits first or at the given positions.

    Those that cross the ends of words are in one dimension for each row, [rows, integers].
    """
    if 32 % bits:
        ones = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        return np.packbits(ones.reshape(len(words), -1, bits), axis=-1, bitorder="little")[..., 0]
    shifts = np.array(positions or range(32 // bits), np.uint32) * np.uint32(bits)
    return ((words[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)


def _float32(weight: Weight, start: int, stop: int) -> npt.NDArray[np.float32]:
    rows = Weight((stop - start, weight.shape[1]), weight.type, weight.data[start:stop])
    return convert(rows, F32).data.reshape(rows.shape)


def _lazy(shape: tuple[int, ...], bits: int, group: int, part: Callable[[int, int], _Part]) -> LazyWeight:
    rows, columns = shape
    kind = Q4_1 if bits == 4 and group % Q4_1.traits.block_size == 0 else F16

    def make() -> Weight:
        width = columns // kind.traits.block_size * kind.traits.block_bytes // kind.traits.storage.itemsize
        data = np.empty((rows, width), kind.traits.storage)
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            with np.errstate(over="ignore", invalid="ignore"):  # scales that are no numbers give such weights
                data[start:stop] = _encode(kind, group, *part(start, stop))
        return Weight(shape, kind, data)

    return LazyWeight(shape, kind, make, cache=True)


def _encode(
    kind: WeightType,
    group: int,
    q: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32],
) -> npt.NDArray[Any]:
    rows, columns = q.shape
    if kind == F16:
        values = np.repeat(scale, group, 1) * q + np.repeat(offset, group, 1)
        return convert(Weight(values.shape, F32, values), F16).data
    size = kind.traits.block_size
    blocks = np.empty((rows, columns // size), TYPE_TRAITS[kind.name].record)
    for name, values in (("d", scale), ("m", offset)):
        halves = convert(Weight(values.shape, F32, np.ascontiguousarray(values)), F16).data
        blocks[name] = np.repeat(halves, group // size, 1)
    nibbles = q.reshape(rows, -1, 2, size // 2)
    blocks["qs"] = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return blocks.view(np.uint8).reshape(rows, -1)
