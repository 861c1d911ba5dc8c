"""Rows of GGUF blocks as a panel of bytes, in which four elements of each row lie side by side.

One instruction then works on four elements of several rows: `vecdot_int8` multiplies them, `panel_f32` makes float32 of
them. `fill_panel_blocks` reads the same 16 bytes of eight rows, transposes them in units of four bytes while they are
packed, and decodes them then: a vector has four bytes of each row, and what it takes to decode it is the same.

A panel has some of the rows' columns, few enough for the first-level cache. An element of a block is
scale · (q - zero point) or scale · q + minimum, where the quant q is from 0 to 255. `panel` holds bytes
[columns / 4, PANEL_ROWS, 4], in the memory of a float32 array. `scales` and `mins` are float32
[scale groups of the columns, PANEL_ROWS].
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
from .intrinsics import INT32, INT64, element, prefetch
from .tiling import PANEL_ROWS, UNPACK_ELEMENTS
from .vecdot import INT8, TYPE_NAMES, Block, f16_of_each, five_bits, locator, six_bit_factors

ZERO_POINTS = {name: 128 if TYPE_TRAITS[name].bits == 8 else TYPE_TRAITS[name].zero_point for name in VEC_DOT_TYPE}
"""Block type → zero point, the unsigned quant that means 0. The decoders here add 128 to signed quants."""
SCALE_GROUPS = {name: TYPE_TRAITS[name].scale_group for name in VEC_DOT_TYPE}
"""Block type → elements that share a scale."""
ROWS = 8
"""Rows of a panel that are transposed together."""


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


def q6_k_scales(block: Block) -> Any:
    """The scales of the 16 groups of a q6_k block."""
    return block.times(block.floats(block.bytes_as_i32("scales", signed=True)), block.f16_in_all("d"))


def _q6_k(block: Block) -> Iterator[Chunk]:
    builder, byte = block.builder, vector_of(INT8, 32)
    scales = q6_k_scales(block)
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


# Panels


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight, transposed: pairs of elements, then of pairs, then of halves change places."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [_shuffle(builder, rows[i], rows[i + 1], lanes) for i in range(0, 8, 2) for lanes in (low, high)]
    first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = [
        _shuffle(builder, pairs[i + j], pairs[i + j + 2], lanes)
        for i in (0, 4)
        for j in (0, 1)
        for lanes in (first, second)
    ]
    halves = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [_shuffle(builder, fours[i], fours[i + 4], lanes) for lanes in halves for i in range(4)]


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, lanes_of(lanes))


@dataclass(frozen=True)
class _Rows:
    """Emits code that reads a block of each of ROWS rows."""

    blocks: list[Block]

    def words(self, field: str, offset: int) -> list[Any]:
        """Four vectors of 16 bytes from `offset` bytes into a field: word i of each row, as <ROWS · 4 x i8>."""
        builder, four = self.blocks[0].builder, vector_of(INT32, 4)
        loaded = [block.load(field, four, offset) for block in self.blocks]
        # rows i and i + 4 share a vector, of which AVX2 shuffles the halves alike
        a, b, c, d = (concat(builder, loaded[i], loaded[i + 4]) for i in range(4))
        low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
        first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        found = []
        for lanes in (low, high):
            ab, cd = _shuffle(builder, a, b, lanes), _shuffle(builder, c, d, lanes)
            found += [_shuffle(builder, ab, cd, first), _shuffle(builder, ab, cd, second)]
        return [builder.bitcast(each, vector_of(INT8, 4 * ROWS)) for each in found]

    def bits(self, word: Any, shift: int, mask: int) -> Any:
        return self.blocks[0].bits(word, shift, mask)


# Each yields (column of the block, <ROWS · 4 x i8>): four elements of each row, as unsigned quants.


def _columns_q8_0(rows: _Rows) -> Iterator[tuple[int, Any]]:
    for half in range(2):
        for i, word in enumerate(rows.words("qs", 16 * half)):
            yield 4 * half + i, rows.blocks[0].builder.xor(word, splat(word.type, -128))


def _columns_4bit(rows: _Rows) -> Iterator[tuple[int, Any]]:
    for i, word in enumerate(rows.words("qs", 0)):
        yield i, rows.bits(word, 0, 15)
        yield 4 + i, rows.bits(word, 4, 15)


def _columns_q4_k(rows: _Rows) -> Iterator[tuple[int, Any]]:
    for part in range(8):  # 16 bytes of two groups of 32 elements
        first = 16 * (part // 2) + 4 * (part % 2)
        for i, word in enumerate(rows.words("qs", 16 * part)):
            yield first + i, rows.bits(word, 0, 15)
            yield first + 8 + i, rows.bits(word, 4, 15)


def _columns_q5_k(rows: _Rows) -> Iterator[tuple[int, Any]]:
    builder = rows.blocks[0].builder
    for half in range(2):
        high = rows.words("qh", 16 * half)
        for group in range(0, 8, 2):
            for i, word in enumerate(rows.words("qs", 16 * group + 16 * half)):
                for j in range(2):
                    fifth = builder.shl(rows.bits(high[i], group + j, 1), splat(word.type, 4))
                    yield 8 * (group + j) + 4 * half + i, builder.or_(rows.bits(word, 4 * j, 15), fifth)


def _columns_q6_k(rows: _Rows) -> Iterator[tuple[int, Any]]:
    builder = rows.blocks[0].builder
    for part in range(4):  # of 32 bytes of `qh` in each half of 128 elements: 16 of them
        half, which = divmod(part, 2)
        high = rows.words("qh", 16 * part)
        for pair in range(2):  # 16 bytes of `ql` are two quarters of the half
            for i, word in enumerate(rows.words("ql", 64 * half + 32 * pair + 16 * which)):
                for j in range(2):
                    quarter = pair + 2 * j
                    top = builder.shl(rows.bits(high[i], 2 * quarter, 3), splat(word.type, 4))
                    yield 32 * half + 8 * quarter + 4 * which + i, builder.or_(rows.bits(word, 4 * j, 15), top)


_COLUMNS: dict[str, Callable[[_Rows], Iterator[tuple[int, Any]]]] = {
    "q8_0": _columns_q8_0,
    "q4_0": _columns_4bit,
    "q4_1": _columns_4bit,
    "q4_k": _columns_q4_k,
    "q5_k": _columns_q5_k,
    "q6_k": _columns_q6_k,
}


def _factors(name: str, rows: _Rows) -> list[list[Any]]:
    """[scale of each scale group of the block, minimum of each or none]; a vector has those of all rows."""
    builder = rows.blocks[0].builder
    if TYPE_TRAITS[name].block_size == UNPACK_ELEMENTS:
        return [[f16_of_each(rows.blocks, "d")], [f16_of_each(rows.blocks, "m")] if TYPE_TRAITS[name].has_min else []]
    if TYPE_TRAITS[name].has_min:
        scales, minimums = zip(*map(six_bit_factors, rows.blocks), strict=True)
        return [transpose(builder, list(each)) for each in (scales, minimums)]
    all_scales = [q6_k_scales(block) for block in rows.blocks]
    parts = ([builder.shuffle_vector(each, each, lanes_of(range(at, at + 8))) for each in all_scales] for at in (0, 8))
    return [[vector for part in parts for vector in transpose(builder, part)], []]


@intrinsic  # type: ignore[untyped-decorator]
def fill_panel_blocks(
    typingctx: Any,
    weights: Any,
    row: Any,
    last: Any,
    begin: Any,
    count: Any,
    panel: Any,
    scales: Any,
    mins: Any,
) -> Any:
    """Make a panel of blocks [begin, begin + count) of PANEL_ROWS rows from `row` on. Past row `last`: `last`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first_row, final, first_block, number, *places = args
        name = TYPE_NAMES[sig.args[0].dtype]
        per_row = blocks_of_a_row(context, builder, sig.args[0], array)
        bytes_, *factors = (
            element(context, builder, kind, place, integer(0)) for kind, place in zip(sig.args[5:], places, strict=True)
        )
        block_columns = integer(TYPE_TRAITS[name].block_size // 4)
        groups_of_block = TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]

        def store(start: Any, at: Any, part: int, vector: Any) -> None:
            """Write a vector to `part` of PANEL_ROWS elements at index `at`."""
            place = builder.gep(start, [builder.add(builder.mul(at, integer(PANEL_ROWS)), integer(part))])
            builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)

        for part in range(0, PANEL_ROWS, ROWS):
            locators = []
            for i in range(part, part + ROWS):
                own = builder.add(first_row, integer(i))
                own = builder.select(builder.icmp_signed("<", own, final), own, final)
                start = builder.add(builder.mul(own, per_row), first_block)
                locators.append(locator(context, builder, sig.args[0], array, start))
            with cgutils.for_range(builder, number) as loop:
                rows = _Rows([Block(builder, name, locate(loop.index)) for locate in locators])
                at = builder.mul(loop.index, block_columns)
                for index, quants in _COLUMNS[name](rows):
                    words = builder.bitcast(quants, vector_of(INT32, ROWS))
                    store(bytes_, builder.add(at, integer(index)), part, words)
                group = builder.mul(loop.index, integer(groups_of_block))
                for field, vectors in zip(factors, _factors(name, rows), strict=True):
                    for i, vector in enumerate(vectors):
                        store(field, builder.add(group, integer(i)), part, vector)
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, index, index, index, index, panel, scales, mins), codegen


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_blocks(typingctx: Any, weights: Any, first: Any, count: Any) -> Any:
    """Prefetch `count` blocks of a weight from flat index `first` on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, number = args
        begin = locator(context, builder, sig.args[0], array, start)(integer(0))
        nbytes = builder.mul(number, integer(TYPE_TRAITS[TYPE_NAMES[sig.args[0].dtype]].block_bytes))
        with cgutils.for_range_slice(builder, integer(0), nbytes, integer(64)) as (at, _):
            prefetch(builder, builder.gep(begin, [at]), 2)
        return context.get_dummy_value()

    return types.void(weights, types.int64, types.int64), codegen
