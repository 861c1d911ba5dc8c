"""Rows of GGUF blocks as a panel of bytes, in which four elements of each row lie side by side.

`unpack_blocks` writes the unsigned quants of some blocks of a row to a stage, and the factors of their scale groups to
`scales` and `mins`. `interleave` turns the rows of a stage into columns of a panel. Then one instruction works on four
elements of several rows: `vecdot_int8` multiplies them, `panel_f32` makes float32 of them.

An element of a block is scale · (q - zero point) or scale · q + minimum, where the quant q is from 0 to 255. `stage`
[PANEL_ROWS, STAGE_ELEMENTS] and `panel` [K / 4, PANEL_ROWS, 4] hold bytes, in the memory of float32 arrays. `scales`
and `mins` are float32 [scale groups of a row, PANEL_ROWS].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import TYPE_TRAITS, VEC_DOT_TYPE
from .intrinsics import INT32, INT64, element
from .tiling import PANEL_ROWS, STAGE_ELEMENTS, UNPACK_ELEMENTS
from .vecdot import INT8, TYPE_NAMES, Block, five_bits, for_blocks, locator, six_bit_factors

ZERO_POINTS = {name: 128 if TYPE_TRAITS[name].bits == 8 else TYPE_TRAITS[name].zero_point for name in VEC_DOT_TYPE}
"""Block type → zero point, the unsigned quant that means 0. The decoders here add 128 to signed quants."""
SCALE_GROUPS = {name: TYPE_TRAITS[name].scale_group for name in VEC_DOT_TYPE}
"""Block type → elements that share a scale."""


@dataclass(frozen=True)
class Chunk:
    """UNPACK_ELEMENTS elements of a block, from index `first` on, as LLVM values.

    `quants` is <32 x i8>, unsigned; `scales` has a float32 for each of their scale groups; `minimum` is a float32.
    """

    first: int
    quants: Any
    scales: list[Any]
    minimum: Any = None


def vector_of(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def integer(number: int, kind: Any = INT64) -> Any:
    return ir.Constant(kind, number)


def splat(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count)


def lanes_of(lanes: Any) -> Any:
    return ir.Constant(vector_of(INT32, len(lanes)), list(lanes))


def concat(builder: Any, *vectors: Any) -> Any:
    """Concatenate two vectors of equal length."""
    return builder.shuffle_vector(*vectors, lanes_of(range(2 * vectors[0].type.count)))


def broadcast(builder: Any, number: Any, count: int) -> Any:
    """A vector with the same value in all lanes."""
    one = builder.insert_element(ir.Constant(vector_of(number.type, count), ir.Undefined), number, integer(0, INT32))
    return builder.shuffle_vector(one, one, lanes_of([0] * count))


# Decoders: each yields the chunks of a block


def _q8_0(block: Block) -> Iterator[Chunk]:
    quants = block.load("qs", vector_of(INT8, 32))
    yield Chunk(0, block.builder.xor(quants, splat(quants.type, -128)), [block.f16("d")])


def _nibbles(block: Block) -> Any:
    """The low 4 bits of 16 bytes, then their high 4 bits."""
    packed = block.load("qs", vector_of(INT8, 16))
    return concat(block.builder, block.bits(packed, 0, 15), block.builder.lshr(packed, splat(packed.type, 4)))


def _q4_0(block: Block) -> Iterator[Chunk]:
    yield Chunk(0, _nibbles(block), [block.f16("d")])


def _q4_1(block: Block) -> Iterator[Chunk]:
    yield Chunk(0, _nibbles(block), [block.f16("d")], block.f16("m"))


def _q4_k(block: Block) -> Iterator[Chunk]:
    scales, mins = six_bit_factors(block)
    for group in range(8):
        packed = block.load("qs", vector_of(INT8, 32), 32 * (group // 2))
        quants = block.builder.lshr(packed, splat(packed.type, 4)) if group % 2 else block.bits(packed, 0, 15)
        scale, minimum = (block.builder.extract_element(vector, integer(group, INT32)) for vector in (scales, mins))
        yield Chunk(32 * group, quants, [scale], minimum)


def _q5_k(block: Block) -> Iterator[Chunk]:
    scales, mins = six_bit_factors(block)
    for group in range(8):
        scale, minimum = (block.builder.extract_element(vector, integer(group, INT32)) for vector in (scales, mins))
        yield Chunk(32 * group, five_bits(block, group), [scale], minimum)


def _q6_k(block: Block) -> Iterator[Chunk]:
    builder, byte = block.builder, vector_of(INT8, 32)
    scales = block.times(block.floats(block.bytes_as_i32("scales", signed=True)), block.broadcast(block.f16("d")))
    for index in range(8):
        half, quarter = divmod(index, 4)
        low = block.bits(block.load("ql", byte, 64 * half + 32 * (quarter % 2)), 4 * (quarter // 2), 15)
        high = block.bits(block.load("qh", byte, 32 * half), 2 * quarter, 3)
        quants = builder.or_(low, builder.shl(high, splat(byte, 4)))
        two_scales = [builder.extract_element(scales, integer(2 * index + i, INT32)) for i in range(2)]
        yield Chunk(32 * index, quants, two_scales)


DECODERS: dict[str, Callable[[Block], Iterator[Chunk]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def blocks_of_a_row(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The second extent of an array of blocks."""
    shape = cgutils.create_struct_proxy(kind)(context, builder, array).shape
    return cgutils.unpack_tuple(builder, shape)[1]


@intrinsic  # type: ignore[untyped-decorator]
def unpack_blocks(
    typingctx: Any, weights: Any, row: Any, begin: Any, count: Any, lane: Any, stage: Any, scales: Any, mins: Any
) -> Any:
    """Unpack blocks [begin, begin + count) of a row, at most STAGE_ELEMENTS elements, for one lane of a panel.

    Their quants go to stage[lane], and the factors of scale group i to scales[i, lane] and mins[i, lane].
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, r, first_block, number, at, *places = args
        name = TYPE_NAMES[sig.args[0].dtype]
        blocks = blocks_of_a_row(context, builder, sig.args[0], array)
        start = builder.add(builder.mul(r, blocks), first_block)
        zero = integer(0)
        bytes_, *factors = (
            element(context, builder, kind, place, zero) for kind, place in zip(sig.args[5:], places, strict=True)
        )
        bytes_ = builder.gep(builder.bitcast(bytes_, INT8.as_pointer()), [builder.mul(at, integer(STAGE_ELEMENTS))])
        group_of_block = builder.mul(first_block, integer(TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]))

        def body(index: Any, block: Block) -> None:
            base = builder.mul(index, integer(TYPE_TRAITS[name].block_size))
            groups = builder.add(
                group_of_block, builder.mul(index, integer(TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]))
            )
            for chunk in DECODERS[name](block):
                to = builder.gep(bytes_, [builder.add(base, integer(chunk.first))])
                builder.store(chunk.quants, builder.bitcast(to, chunk.quants.type.as_pointer()), align=1)
                for field, values in zip(factors, (chunk.scales, [chunk.minimum]), strict=True):
                    for i, value in enumerate(values if values != [None] else []):
                        group = builder.add(groups, integer(chunk.first // SCALE_GROUPS[name] + i))
                        place = builder.add(builder.mul(group, integer(PANEL_ROWS)), at)
                        builder.store(value, builder.gep(field, [place]))

        # the next panel, in the order of memory: this call is one of PANEL_ROWS for its columns
        row_of_next = builder.add(builder.sub(r, at), integer(PANEL_ROWS))
        done = builder.add(builder.mul(first_block, integer(PANEL_ROWS)), builder.mul(at, number))
        ahead = builder.add(builder.mul(row_of_next, blocks), done)
        locate, later = (locator(context, builder, sig.args[0], array, first) for first in (start, ahead))
        for_blocks(builder, name, number, locate, body, later)
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, index, index, index, index, stage, scales, mins), codegen


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """PANEL_ROWS vectors of eight → eight of PANEL_ROWS. Joins rows in pairs, then shuffles two vectors into two.

    `parts` has each vector with the (row, column) labels of its lanes.
    """
    parts = [
        (concat(builder, *rows[i : i + 2]), [(i + j, k) for j in (0, 1) for k in range(8)])
        for i in range(0, PANEL_ROWS, 2)
    ]
    width = 8
    while width > 1:
        width //= 2
        ordered = sorted(parts, key=lambda part: (min(k for _, k in part[1]), min(r for r, _ in part[1])))
        parts = []
        for (first, one), (second, other) in zip(ordered[::2], ordered[1::2], strict=True):
            labels = one + other
            low = min(k for _, k in labels)
            for start in (low, low + width):
                chosen = sorted(label for label in labels if start <= label[1] < start + width)
                lanes = lanes_of([labels.index(label) for label in chosen])
                parts.append((builder.shuffle_vector(first, second, lanes), chosen))
    return [vector for vector, labels in sorted(parts, key=lambda part: part[1][0][1])]


@intrinsic  # type: ignore[untyped-decorator]
def interleave(typingctx: Any, stage: Any, count: Any, panel: Any, begin: Any) -> Any:
    """Copy `count` times UNPACK_ELEMENTS elements of all rows of a stage into a panel, from its column `begin` on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, number, target, first = args
        eight, whole = vector_of(INT32, 8), vector_of(INT32, PANEL_ROWS)
        start, to = (
            builder.bitcast(element(context, builder, kind, array, integer(0)), INT8.as_pointer())
            for kind, array in ((sig.args[0], source), (sig.args[2], target))
        )
        to = builder.gep(to, [builder.mul(first, integer(PANEL_ROWS))])
        with cgutils.for_range(builder, number) as loop:
            at = builder.mul(loop.index, integer(UNPACK_ELEMENTS))
            rows = []
            for row in range(PANEL_ROWS):
                place = builder.gep(start, [builder.add(at, integer(row * STAGE_ELEMENTS))])
                rows.append(builder.load(builder.bitcast(place, eight.as_pointer()), align=4))
            for i, vector in enumerate(_transpose(builder, rows)):
                place = builder.gep(
                    to, [builder.add(builder.mul(at, integer(PANEL_ROWS)), integer(4 * PANEL_ROWS * i))]
                )
                builder.store(vector, builder.bitcast(place, whole.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(stage, types.int64, panel, types.int64), codegen
