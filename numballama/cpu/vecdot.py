"""Dot products of float32 activations with rows of GGUF blocks, and dequantisation of blocks.

A weight of a block type is an array [rows, blocks of a row] of records. The record type (`TYPE_TRAITS`) has a block's
fields, and tells block types apart in compiled code. Each block type has one small decoder here. It emits vector
instructions that give 16 consecutive elements as float32. The loops around it, for a dot product or for storing the
elements, are written once for all types. Everything uses vectors, because LLVM does not vectorise such loops.

An element has the same bits as in `quantization.blocks`: a block's factors multiply exactly, so a fused multiply-add
rounds once, as separate operations do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import BLOCKS, LINEAR_TYPES, TYPE_TRAITS
from .intrinsics import FLOAT, INT16, INT32, INT64, add_lanes, cpu_features, element, half_to_float, prefetch, unknown

RECORD_TYPES = {name: from_dtype(TYPE_TRAITS[name].record) for name in LINEAR_TYPES if name in BLOCKS}
"""Block type → Numba's type of its record."""
TYPE_NAMES = {kind: name for name, kind in RECORD_TYPES.items()}
"""Numba's type of a record → the block type's name."""

INT8 = ir.IntType(8)
LANES = 16
"""Elements of a vector: one AVX-512 register, or several narrower ones."""
ACCUMULATORS = 4
"""Vectors to which products are added in turn. With one, every addition would wait for the one before."""
PREFETCH_BYTES = 4096
"""Distance at which blocks are prefetched. The hardware's own prefetching comes too late."""


def _vector(kind: Any, count: int = LANES) -> Any:
    return ir.VectorType(kind, count)


def _int(kind: Any, number: int) -> Any:
    return ir.Constant(kind, number)


def _all(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * kind.count)


class Block:
    """Emits code that reads the fields of one block. `name` is its type, `pointer` its address as an LLVM value."""

    def __init__(self, builder: Any, name: str, pointer: Any) -> None:
        self.builder, self.name, self.pointer = builder, name, pointer

    def load(self, field: str, kind: Any, offset: int = 0) -> Any:
        """A value of an LLVM type, loaded from `offset` bytes into a field."""
        at = _int(INT64, RECORD_TYPES[self.name].offset(field) + offset)
        return self.builder.load(self.builder.bitcast(self.builder.gep(self.pointer, [at]), kind.as_pointer()), align=1)

    def f16(self, field: str) -> Any:
        """A float16 field as float32."""
        return half_to_float(self.builder, self.load(field, INT16))

    def f16_in_all(self, field: str, count: int = LANES) -> Any:
        """A float16 field as float32, in all lanes of a vector.

        Its bits are copied to all lanes and then converted: to convert one, LLVM inserts it into a register whose old
        content it does not need, but waits for.
        """
        return half_to_float(self.builder, self.broadcast(self.load(field, INT16), count))

    def bytes_as_i32(self, field: str, offset: int = 0, signed: bool = False) -> Any:
        """LANES 8-bit integers of a field as a vector of int32."""
        elements = self.load(field, _vector(INT8), offset)
        return (self.builder.sext if signed else self.builder.zext)(elements, _vector(INT32))

    def broadcast(self, number: Any, count: int = LANES) -> Any:
        """A vector with the same value in all lanes."""
        one = self.builder.insert_element(
            ir.Constant(_vector(number.type, count), ir.Undefined), number, _int(INT32, 0)
        )
        return self.builder.shuffle_vector(one, one, _all(_vector(INT32, count), 0))

    def lane(self, vector: Any, lane: int) -> Any:
        """A vector with the value of one lane of `vector` in all lanes."""
        return self.builder.shuffle_vector(vector, vector, _all(_vector(INT32), lane))

    def floats(self, elements: Any) -> Any:
        return self.builder.sitofp(elements, _vector(FLOAT, elements.type.count))

    def bits(self, elements: Any, shift: int, mask: int) -> Any:
        """(elements >> shift) & mask."""
        if shift:
            elements = self.builder.lshr(elements, _all(elements.type, shift))
        return self.builder.and_(elements, _all(elements.type, mask))

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def plus(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def dequantize_4bit(self, packed: Any, shift: int, scale: Any, first: int = 0, minimum: Any = None) -> Any:
        """scale · (first + q) + minimum for LANES quants q: the 4 bits from `shift` on of the int32 lanes of `packed`.

        Lanes of `packed` are below 256. With AVX-512 the 16 possible results fit in one register, and one instruction
        looks LANES of them up by the low 4 bits of its indices. That is half the work of converting and multiplying.
        """
        if cpu_features().get("avx512f"):
            choices = self.times(scale, ir.Constant(_vector(FLOAT), [float(first + q) for q in range(16)]))
            choices = choices if minimum is None else self.plus(choices, minimum)
            indices = self.builder.lshr(packed, _all(packed.type, shift)) if shift else packed
            kind = ir.FunctionType(_vector(FLOAT), [_vector(FLOAT), _vector(INT32)])
            name = "llvm.x86.avx512.permvar.sf.512"
            function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
            return self.builder.call(function, [choices, indices])
        fields = self.bits(packed, shift, 15)
        elements = self.floats(self.builder.add(fields, _all(fields.type, first)) if first else fields)
        return self.times(scale, elements) if minimum is None else self.plus(self.times(scale, elements), minimum)


def f16_of_each(blocks: list[Block], field: str) -> Any:
    """A float16 field of each block, as a vector of float32."""
    builder, bits = blocks[0].builder, ir.Constant(_vector(INT16, len(blocks)), ir.Undefined)
    for i, block in enumerate(blocks):
        bits = builder.insert_element(bits, block.load(field, INT16), _int(INT32, i))
    return half_to_float(builder, bits)


# Decoders: each yields (index of the first, LANES elements as float32) until it has given the whole block.
# In a loop that it emits, the index is an LLVM value.


def _q8_0(block: Block) -> Iterator[tuple[int, Any]]:
    scale = block.f16_in_all("d")
    for start in (0, 16):
        yield start, block.times(block.floats(block.bytes_as_i32("qs", start, signed=True)), scale)


def _q4_0(block: Block) -> Iterator[tuple[int, Any]]:
    packed, scale = block.bytes_as_i32("qs"), block.f16_in_all("d")
    for start, shift in ((0, 0), (16, 4)):
        yield start, block.dequantize_4bit(packed, shift, scale, first=-8)


def _q4_1(block: Block) -> Iterator[tuple[int, Any]]:
    packed, scale, minimum = block.bytes_as_i32("qs"), block.f16_in_all("d"), block.f16_in_all("m")
    for start, shift in ((0, 0), (16, 4)):
        yield start, block.dequantize_4bit(packed, shift, scale, minimum=minimum)


def six_bit_integers(block: Block) -> tuple[Any, Any]:
    """The 6-bit scales and minimums of the eight groups of a q4_k or q5_k block, <8 x i8> each.

    Bytes 0-3 of `scales` hold the first four scales and bytes 4-7 the first four minimums, in their low 6 bits. The
    other four have their low 4 bits in bytes 8-11 (scales in the low half) and their high 2 bits on top of bytes 0-7.
    """
    builder, four = block.builder, _vector(INT8, 4)
    first, second, third = (block.load("scales", four, offset) for offset in (0, 4, 8))

    def integers(low6: Any, shift: int) -> Any:
        rest = builder.or_(block.bits(third, shift, 15), builder.shl(block.bits(low6, 6, 3), _all(four, 4)))
        order = ir.Constant(_vector(INT32, 8), list(range(8)))
        return builder.shuffle_vector(block.bits(low6, 0, 63), rest, order)

    return integers(first, 0), integers(second, 4)


def six_bit_factors(block: Block) -> tuple[Any, Any]:
    """(scales, minimums) of the eight groups of a q4_k or q5_k block: `six_bit_integers` times its `d` and -`dmin`."""
    builder = block.builder
    scales, minimums = (
        builder.fmul(block.floats(builder.zext(each, _vector(INT32, 8))), block.f16_in_all(field, 8))
        for each, field in zip(six_bit_integers(block), ("d", "dmin"), strict=True)
    )
    return scales, builder.fneg(minimums)


def _q4_k(block: Block) -> Iterator[tuple[Any, Any]]:
    """Eight groups of 32. Two of them share 32 bytes: the first has the low 4 bits, the second the high 4."""
    builder, factors = block.builder, six_bit_factors(block)
    if cpu_features().get("avx512f"):
        for pair in range(4):
            packed = [block.bytes_as_i32("qs", 32 * pair + start) for start in (0, 16)]
            for group, shift in ((2 * pair, 0), (2 * pair + 1, 4)):
                scale, minimum = (block.lane(each, group) for each in factors)
                for half in range(2):
                    first = _int(INT64, 32 * group + 16 * half)
                    yield first, block.dequantize_4bit(packed[half], shift, scale, minimum=minimum)
        return
    # A loop, because LLVM would decode much of a block before it multiplies, for which 16 registers are too few.
    places = [cgutils.alloca_once(builder, each.type) for each in factors]
    for place, each in zip(places, factors, strict=True):
        builder.store(each, place)
    starts = [builder.bitcast(place, FLOAT.as_pointer()) for place in places]
    with cgutils.for_range(builder, unknown(builder, _int(INT64, 4))) as loop:
        of_pair = Block(builder, block.name, builder.gep(block.pointer, [builder.mul(loop.index, _int(INT64, 32))]))
        packed = [of_pair.bytes_as_i32("qs", start) for start in (0, 16)]
        for which in range(2):
            group = builder.add(builder.mul(loop.index, _int(INT64, 2)), _int(INT64, which))
            scale, minimum = (block.broadcast(builder.load(builder.gep(start, [group]))) for start in starts)
            for half in range(2):
                first = builder.add(builder.mul(group, _int(INT64, 32)), _int(INT64, 16 * half))
                yield first, block.dequantize_4bit(packed[half], 4 * which, scale, minimum=minimum)


def five_bits(block: Block, group: int) -> Any:
    """The 32 quants of a group of a q5_k block, <32 x i8>: 4 bits as in q4_k, and a fifth one of `qh`, bit `group`."""
    byte = _vector(INT8, 32)
    low = block.bits(block.load("qs", byte, 32 * (group // 2)), 4 * (group % 2), 15)
    high = block.bits(block.load("qh", byte), group, 1)
    return block.builder.or_(low, block.builder.shl(high, _all(byte, 4)))


def _q5_k(block: Block) -> Iterator[tuple[int, Any]]:
    builder, (scales, minimums) = block.builder, six_bit_factors(block)
    halves = [ir.Constant(_vector(INT32), list(range(start, start + LANES))) for start in (0, 16)]
    for group in range(8):
        quants, scale, minimum = five_bits(block, group), block.lane(scales, group), block.lane(minimums, group)
        for half, lanes in enumerate(halves):
            elements = block.floats(builder.zext(builder.shuffle_vector(quants, quants, lanes), _vector(INT32)))
            yield 32 * group + 16 * half, block.plus(block.times(scale, elements), minimum)


def _q6_k(block: Block) -> Iterator[tuple[int, Any]]:
    """Sixteen groups of 16 with 8-bit scales, times the block's `d`. Quants have 6 bits and zero point 32.

    Each half of 128 elements has 64 bytes of `ql` with the low 4 bits (elements 0-63 in the low half of the bytes,
    64-127 in the high half) and 32 bytes of `qh` with the high 2 bits (elements 0-31 in the lowest two, and so on).
    """
    builder, byte = block.builder, _vector(INT8, 32)
    scales = block.times(block.floats(block.bytes_as_i32("scales", signed=True)), block.f16_in_all("d"))
    halves = [ir.Constant(_vector(INT32), list(range(start, start + LANES))) for start in (0, 16)]
    for half in range(2):
        high = block.load("qh", byte, 32 * half)
        for quarter in range(4):
            low = block.bits(block.load("ql", byte, 64 * half + 32 * (quarter % 2)), 4 * (quarter // 2), 15)
            top = builder.shl(block.bits(high, 2 * quarter, 3), _all(byte, 4))
            fields = builder.sub(builder.or_(low, top), _all(byte, 32))
            for which, lanes in enumerate(halves):
                quants = builder.sext(builder.shuffle_vector(fields, fields, lanes), _vector(INT32))
                group = 8 * half + 2 * quarter + which
                yield 16 * group, block.times(block.floats(quants), block.lane(scales, group))


_DECODERS: dict[str, Callable[[Block], Iterator[tuple[Any, Any]]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def blocks_of_a_round(name: str) -> int:
    """How many blocks a round has: 128 elements of small blocks, or one block."""
    return max(1, 128 // TYPE_TRAITS[name].block_size)


def for_rounds(
    builder: Any,
    name: str,
    blocks: Any,
    locators: list[Any],
    body: Callable[[Any, list[list[Block]]], None],
) -> None:
    """Emit a loop of body(index of the first, blocks of each row) over `blocks` blocks of each of some rows.

    A locator gives the address of a row's block from its index. A round has `blocks_of_a_round` of each row; the blocks
    that are left at the end have a round each. Prefetched is what a later round reads: in the same row, or if there are
    several, in the rows that follow them. It is prefetched in the order of memory.
    """
    together, rows = blocks_of_a_round(name), len(locators)
    whole = builder.mul(builder.udiv(blocks, _int(INT64, together)), _int(INT64, together))
    for begin, end, step in ((_int(INT64, 0), whole, together), (whole, blocks, 1)):
        with cgutils.for_range_slice(builder, begin, end, _int(INT64, step)) as (index, _):
            if rows > 1:
                ahead = locators[0](builder.mul(builder.add(blocks, index), _int(INT64, rows)))
            else:
                ahead = builder.gep(locators[0](index), [_int(INT64, PREFETCH_BYTES)])
            for line in range(0, rows * step * TYPE_TRAITS[name].block_bytes, 64):
                prefetch(builder, builder.gep(ahead, [_int(INT64, line)]))
            indices = [builder.add(index, _int(INT64, offset)) for offset in range(step)]
            body(index, [[Block(builder, name, locate(each)) for each in indices] for locate in locators])
        if step == 1:
            break


def for_blocks(builder: Any, name: str, blocks: Any, locate: Any, body: Callable[[Any, Block], None]) -> None:
    """Emit a loop of body(index, block) over `blocks` blocks at addresses locate(index), as `for_rounds` does."""

    def each(index: Any, found: list[list[Block]]) -> None:
        for offset, block in enumerate(found[0]):
            body(builder.add(index, _int(INT64, offset)), block)

    for_rounds(builder, name, blocks, [locate], each)


def _for_vectors(builder: Any, name: str, blocks: Any, locate: Any, use: Any) -> None:
    """Emit a loop of use(index of the first element, vector, which) over all vectors of `blocks` blocks.

    `which` counts the calls of `use`, so that it can alternate between accumulators.
    """
    which = count()

    def body(index: Any, block: Block) -> None:
        start = builder.mul(index, _int(INT64, TYPE_TRAITS[name].block_size))
        for first, vector in _DECODERS[name](block):
            first = _int(INT64, first) if isinstance(first, int) else first
            use(builder.add(start, first), vector, next(which))

    for_blocks(builder, name, blocks, locate, body)


def locator(context: Any, builder: Any, kind: Any, array: Any, first: Any) -> Any:
    """A function from the index of a block, counted from flat index `first` of an array, to its address."""

    def locate(block: Any) -> Any:
        pointer = element(context, builder, kind, array, builder.add(first, block))
        return builder.bitcast(pointer, INT8.as_pointer())

    return locate


@intrinsic  # type: ignore[untyped-decorator]
def dot_blocks(typingctx: Any, weights: Any, i: Any, x: Any, j: Any, blocks: Any) -> Any:
    """Dot product of `blocks` blocks from flat index i and float32 x from flat index j.

    The sums stay in vector registers to the end. Adding up their lanes after each block would cost more than the
    products.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first, other, start, number = args
        zero = _all(_vector(FLOAT), 0.0)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(ACCUMULATORS)]
        for place in sums:
            builder.store(zero, place)

        def use(index: Any, vector: Any, which: int) -> None:
            pointer = element(context, builder, sig.args[2], other, builder.add(start, index))
            elements = builder.load(builder.bitcast(pointer, vector.type.as_pointer()), align=4)
            place = sums[which % ACCUMULATORS]
            product = builder.fmul(vector, elements, flags=("contract",))
            builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)

        locate = locator(context, builder, sig.args[0], array, first)
        _for_vectors(builder, TYPE_NAMES[sig.args[0].dtype], number, locate, use)
        first_two, last_two = (builder.fadd(*map(builder.load, sums[at : at + 2])) for at in (0, 2))
        return add_lanes(builder, builder.fadd(first_two, last_two))

    return types.float32(weights, types.int64, x, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def dequantize_blocks(typingctx: Any, weights: Any, i: Any, out: Any, j: Any, blocks: Any) -> Any:
    """Write the elements of `blocks` blocks from flat index i to float32 out from flat index j."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first, other, start, number = args

        def use(index: Any, vector: Any, which: int) -> None:
            pointer = element(context, builder, sig.args[2], other, builder.add(start, index))
            builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)

        locate = locator(context, builder, sig.args[0], array, first)
        _for_vectors(builder, TYPE_NAMES[sig.args[0].dtype], number, locate, use)
        return context.get_dummy_value()

    return types.void(weights, types.int64, out, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def block_size(typingctx: Any, weights: Any) -> Any:
    """Number of elements of a block of an array of blocks."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _int(INT64, TYPE_TRAITS[TYPE_NAMES[sig.args[0].dtype]].block_size)

    return types.int64(weights), codegen
