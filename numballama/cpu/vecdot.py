"""Rows of GGUF blocks on a CPU: their product with float32 numbers, and the numbers themselves.

A weight of blocks is an array [rows, blocks of a row] of records, one record type for each block type: `TYPE_TRAITS`
says what lies where, and it is how compiled code tells the types apart. Each block type has one small decoder, which
writes the vector instructions that make 16 consecutive numbers at a time; what happens to those numbers, a product or
a store, is written once for all types. Written as vectors, because of such loops LLVM makes scalar code.

A number is computed as `quantization.blocks` computes it, to the bit: products of a block's factors are exact, so fused
multiply-adds round once as well.
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
from .intrinsics import FLOAT, INT16, INT32, INT64, add_lanes, cpu_features, element, half_to_float

KINDS = {name: from_dtype(TYPE_TRAITS[name].record) for name in LINEAR_TYPES if name in BLOCKS}
"""Block type → Numba's type of its record."""
NAMES_OF_KINDS = {kind: name for name, kind in KINDS.items()}

INT8 = ir.IntType(8)
LANES = 16
"""Numbers of a vector: a register of AVX-512, or several of narrower ones."""
SUMS = 4
"""Vectors that products are added to in turn: one alone would wait for each sum before the next."""
AHEAD = 4096
"""Bytes before their use that blocks are asked for from memory: the machine's own prefetching alone comes too late."""


def _vector(kind: Any, count: int = LANES) -> Any:
    return ir.VectorType(kind, count)


def _int(kind: Any, number: int) -> Any:
    return ir.Constant(kind, number)


def _all(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * kind.count)


class Block:
    """One block at an address, while code for it is written."""

    def __init__(self, builder: Any, name: str, pointer: Any) -> None:
        self.builder, self.name, self.pointer = builder, name, pointer

    def load(self, field: str, kind: Any, offset: int = 0) -> Any:
        """What lies `offset` bytes into a field, as an LLVM type."""
        at = _int(INT64, KINDS[self.name].offset(field) + offset)
        return self.builder.load(self.builder.bitcast(self.builder.gep(self.pointer, [at]), kind.as_pointer()), align=1)

    def half(self, field: str) -> Any:
        """A float16 as float32."""
        return half_to_float(self.builder, self.load(field, INT16))

    def octets(self, field: str, offset: int = 0, signed: bool = False) -> Any:
        """LANES 8-bit integers as 32-bit ones."""
        numbers = self.load(field, _vector(INT8), offset)
        return (self.builder.sext if signed else self.builder.zext)(numbers, _vector(INT32))

    def spread(self, number: Any, count: int = LANES) -> Any:
        """A vector of one number."""
        one = self.builder.insert_element(
            ir.Constant(_vector(number.type, count), ir.Undefined), number, _int(INT32, 0)
        )
        return self.builder.shuffle_vector(one, one, _all(_vector(INT32, count), 0))

    def lane(self, vector: Any, lane: int) -> Any:
        """A vector of one lane of another."""
        return self.builder.shuffle_vector(vector, vector, _all(_vector(INT32), lane))

    def floats(self, numbers: Any) -> Any:
        return self.builder.sitofp(numbers, _vector(FLOAT, numbers.type.count))

    def bits(self, numbers: Any, shift: int, mask: int) -> Any:
        """(numbers >> shift) & mask."""
        if shift:
            numbers = self.builder.lshr(numbers, _all(numbers.type, shift))
        return self.builder.and_(numbers, _all(numbers.type, mask))

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def plus(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def steps(self, packed: Any, shift: int, scale: Any, first: int = 0, least: Any = None) -> Any:
        """scale · (first + q) + least of LANES numbers, q being 4 bits from `shift` on in 32-bit lanes below 256.

        With AVX-512 the 16 values that such numbers can have are a register, and one instruction looks LANES of them
        up by the low 4 bits of its indices: half the work of converting and multiplying each.
        """
        if cpu_features().get("avx512f"):
            choices = self.times(scale, ir.Constant(_vector(FLOAT), [float(first + q) for q in range(16)]))
            choices = choices if least is None else self.plus(choices, least)
            indices = self.builder.lshr(packed, _all(packed.type, shift)) if shift else packed
            kind = ir.FunctionType(_vector(FLOAT), [_vector(FLOAT), _vector(INT32)])
            name = "llvm.x86.avx512.permvar.sf.512"
            function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
            return self.builder.call(function, [choices, indices])
        fields = self.bits(packed, shift, 15)
        numbers = self.floats(self.builder.add(fields, _all(fields.type, first)) if first else fields)
        return self.times(scale, numbers) if least is None else self.plus(self.times(scale, numbers), least)


# Decoders: (index of the first, LANES numbers of a block as float32), for all numbers of the block.


def _q8_0(block: Block) -> Iterator[tuple[int, Any]]:
    scale = block.spread(block.half("d"))
    for start in (0, 16):
        yield start, block.times(block.floats(block.octets("qs", start, signed=True)), scale)


def _q4_0(block: Block) -> Iterator[tuple[int, Any]]:
    packed, scale = block.octets("qs"), block.spread(block.half("d"))
    for start, shift in ((0, 0), (16, 4)):
        yield start, block.steps(packed, shift, scale, first=-8)


def _q4_1(block: Block) -> Iterator[tuple[int, Any]]:
    packed, scale, least = block.octets("qs"), block.spread(block.half("d")), block.spread(block.half("m"))
    for start, shift in ((0, 0), (16, 4)):
        yield start, block.steps(packed, shift, scale, least=least)


def six_bit_factors(block: Block) -> tuple[Any, Any]:
    """Scales and least numbers of a q4_k block's eight runs, of 6 bits each, times the block's `d` and `dmin`.

    Bytes 0-3 of `scales` hold the first four scales, 4-7 the first four least numbers, in their low 6 bits; the others
    have their low 4 bits in bytes 8-11, scales below least numbers, and their high 2 bits on top of bytes 0-7.
    """
    builder, four = block.builder, _vector(INT8, 4)
    first, second, third = (block.load("scales", four, offset) for offset in (0, 4, 8))

    def factors(half: Any, shift: int, field: str) -> Any:
        rest = builder.or_(block.bits(third, shift, 15), builder.shl(block.bits(half, 6, 3), _all(four, 4)))
        order = ir.Constant(_vector(INT32, 8), list(range(8)))
        joined = builder.zext(builder.shuffle_vector(block.bits(half, 0, 63), rest, order), _vector(INT32, 8))
        return builder.fmul(block.floats(joined), block.spread(block.half(field), 8))

    return factors(first, 0, "d"), builder.fneg(factors(second, 4, "dmin"))


def _q4_k(block: Block) -> Iterator[tuple[int, Any]]:
    """Eight runs of 32, a pair of them in the low and the high 4 bits of 32 bytes."""
    scales, least = six_bit_factors(block)
    for pair in range(4):
        packed = [block.octets("qs", 32 * pair + start) for start in (0, 16)]
        for run, shift in ((2 * pair, 0), (2 * pair + 1, 4)):
            for half in range(2):
                numbers = block.steps(packed[half], shift, block.lane(scales, run), least=block.lane(least, run))
                yield 32 * run + 16 * half, numbers


def _q6_k(block: Block) -> Iterator[tuple[int, Any]]:
    """Sixteen runs of 16 with 8-bit scales, times the block's `d`; numbers of 6 bits, which count from -32.

    For each half of 128 numbers: 64 bytes with the low 4 bits, of numbers 0-63 below those of 64-127, and 32 bytes
    with the high 2 bits, of numbers 0-31 lowest.
    """
    builder, byte = block.builder, _vector(INT8, 32)
    scales = block.times(block.floats(block.octets("scales", signed=True)), block.spread(block.half("d")))
    halves = [ir.Constant(_vector(INT32), list(range(start, start + LANES))) for start in (0, 16)]
    for half in range(2):
        high = block.load("qh", byte, 32 * half)
        for part in range(4):
            low = block.bits(block.load("ql", byte, 64 * half + 32 * (part % 2)), 4 * (part // 2), 15)
            top = builder.shl(block.bits(high, 2 * part, 3), _all(byte, 4))
            fields = builder.sub(builder.or_(low, top), _all(byte, 32))
            for which, lanes in enumerate(halves):
                numbers = builder.sext(builder.shuffle_vector(fields, fields, lanes), _vector(INT32))
                run = 8 * half + 2 * part + which
                yield 16 * run, block.times(block.floats(numbers), block.lane(scales, run))


_DECODERS: dict[str, Callable[[Block], Iterator[tuple[int, Any]]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}


def for_blocks(builder: Any, name: str, blocks: Any, locate: Any, body: Callable[[Any, Block], None]) -> None:
    """Code that calls body(index, block) for `blocks` blocks, whose addresses `locate` gives, and asks for later ones.

    Small blocks are taken four a round.
    """
    kind = ir.FunctionType(ir.VoidType(), [INT8.as_pointer(), INT32, INT32, INT32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [INT8.as_pointer()], kind)
    a_round = max(1, 128 // TYPE_TRAITS[name].block_size)
    whole = builder.mul(builder.udiv(blocks, _int(INT64, a_round)), _int(INT64, a_round))
    for begin, end, step in ((_int(INT64, 0), whole, a_round), (whole, blocks, 1)):
        with cgutils.for_range_slice(builder, begin, end, _int(INT64, step)) as (index, _):
            for line in range(0, step * TYPE_TRAITS[name].block_bytes, 64):
                ahead = builder.gep(locate(index), [_int(INT64, line + AHEAD)])
                builder.call(prefetch, [ahead, *(_int(INT32, number) for number in (0, 3, 1))])
            for offset in range(step):
                block = builder.add(index, _int(INT64, offset))
                body(block, Block(builder, name, locate(block)))
        if step == 1:
            break


def _for_vectors(builder: Any, name: str, blocks: Any, locate: Any, use: Any) -> None:
    """Code that calls use(index of the first number, vector, which) for all LANES numbers of `blocks` blocks."""
    which = count()

    def body(index: Any, block: Block) -> None:
        start = builder.mul(index, _int(INT64, TYPE_TRAITS[name].block_size))
        for first, vector in _DECODERS[name](block):
            use(builder.add(start, _int(INT64, first)), vector, next(which))

    for_blocks(builder, name, blocks, locate, body)


def locator(context: Any, builder: Any, kind: Any, array: Any, first: Any) -> Any:
    def locate(block: Any) -> Any:
        pointer = element(context, builder, kind, array, builder.add(first, block))
        return builder.bitcast(pointer, INT8.as_pointer())

    return locate


@intrinsic  # type: ignore[untyped-decorator]
def dot_blocks(typingctx: Any, weights: Any, i: Any, x: Any, j: Any, blocks: Any) -> Any:
    """Product of `blocks` blocks from flat index i with float32 x from flat index j.

    The sums stay in vector registers to the end: adding up lanes after each block would cost more than the products.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first, other, start, number = args
        zero = _all(_vector(FLOAT), 0.0)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(SUMS)]
        for place in sums:
            builder.store(zero, place)

        def use(index: Any, vector: Any, which: int) -> None:
            pointer = element(context, builder, sig.args[2], other, builder.add(start, index))
            numbers = builder.load(builder.bitcast(pointer, vector.type.as_pointer()), align=4)
            place = sums[which % SUMS]
            product = builder.fmul(vector, numbers, flags=("contract",))
            builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)

        locate = locator(context, builder, sig.args[0], array, first)
        _for_vectors(builder, NAMES_OF_KINDS[sig.args[0].dtype], number, locate, use)
        first_two, last_two = (builder.fadd(*map(builder.load, sums[at : at + 2])) for at in (0, 2))
        return add_lanes(builder, builder.fadd(first_two, last_two))

    return types.float32(weights, types.int64, x, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def decode_blocks(typingctx: Any, weights: Any, i: Any, out: Any, j: Any, blocks: Any) -> Any:
    """Write the numbers of `blocks` blocks from flat index i to float32 out from flat index j."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first, other, start, number = args

        def use(index: Any, vector: Any, which: int) -> None:
            pointer = element(context, builder, sig.args[2], other, builder.add(start, index))
            builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)

        locate = locator(context, builder, sig.args[0], array, first)
        _for_vectors(builder, NAMES_OF_KINDS[sig.args[0].dtype], number, locate, use)
        return context.get_dummy_value()

    return types.void(weights, types.int64, out, types.int64, types.int64), codegen
