"""Rows of GGUF blocks on a CPU: their product with float32 numbers, and the numbers themselves.

A weight of blocks is an array [rows, blocks of a row] of records, one record type for each block type: `RECORDS` says
what lies where, and it is how compiled code tells the types apart. Of a block type there is one small decoder, which
writes the vector instructions that make 32 consecutive numbers at a time; what happens to those numbers, a product or
a store, is written once for all types. Written as vectors, because of such loops LLVM makes scalar code.

A number is computed as `quant_blocks` computes it, to the bit: products of a block's factors are exact, so fused
multiply-adds round once as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from .lowlevel_cpu import BLOCK, FLOAT, INT16, INT32, INT64, add_lanes, element, half_to_float, load_block

RECORDS = {
    "q8_0": np.dtype([("d", "<u2"), ("q", "i1", 32)]),
    "q4_0": np.dtype([("d", "<u2"), ("q", "u1", 16)]),
    "q4_1": np.dtype([("d", "<u2"), ("m", "<u2"), ("q", "u1", 16)]),
    "q4_k": np.dtype([("d", "<u2"), ("m", "<u2"), ("scales", "u1", 12), ("q", "u1", 128)]),
    "q6_k": np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<u2")]),
}
"""Type → its block: `d` and `m`, float16 bits, are factors of scales and of least numbers; `q` are the integers."""

KINDS = {name: from_dtype(record) for name, record in RECORDS.items()}
_NAMES = {kind: name for name, kind in KINDS.items()}
NUMBERS = {"q8_0": 32, "q4_0": 32, "q4_1": 32, "q4_k": 256, "q6_k": 256}
"""Numbers of a block."""

INT8 = ir.IntType(8)
SUMS = 2
"""Vectors that products are added to in turn: one alone would wait for each sum before the next."""


def _vector(kind: Any, count: int = BLOCK) -> Any:
    return ir.VectorType(kind, count)


class _Block:
    """One block at an address, while code for it is written."""

    def __init__(self, builder: Any, name: str, pointer: Any) -> None:
        self.builder, self.name, self.pointer = builder, name, pointer

    def load(self, field: str, kind: Any, offset: int = 0) -> Any:
        """What lies `offset` bytes into a field, as an LLVM type."""
        at = ir.Constant(INT64, KINDS[self.name].offset(field) + offset)
        return self.builder.load(self.builder.bitcast(self.builder.gep(self.pointer, [at]), kind.as_pointer()), align=1)

    def half(self, field: str) -> Any:
        """A float16 as float32."""
        return half_to_float(self.builder, self.load(field, INT16))

    def spread(self, number: Any, count: int = BLOCK) -> Any:
        """A vector of one number."""
        one = self.builder.insert_element(
            ir.Constant(_vector(number.type, count), ir.Undefined), number, _int(INT32, 0)
        )
        return self.builder.shuffle_vector(one, one, ir.Constant(_vector(INT32, count), [0] * count))

    def lanes(self, vector: Any, *which: int) -> Any:
        """Lanes of a vector, each for its equal share of a vector of BLOCK."""
        mask = [lane for lane in which for _ in range(BLOCK // len(which))]
        return self.builder.shuffle_vector(vector, vector, ir.Constant(_vector(INT32), mask))

    def floats(self, numbers: Any, signed: bool = False) -> Any:
        """A vector of 8-bit integers as float32."""
        wide, kind = _vector(INT32, numbers.type.count), _vector(FLOAT, numbers.type.count)
        extended = (self.builder.sext if signed else self.builder.zext)(numbers, wide)
        return self.builder.sitofp(extended, kind)

    def bits(self, numbers: Any, shift: int, mask: int) -> Any:
        """(numbers >> shift) & mask."""
        if shift:
            numbers = self.builder.lshr(numbers, _all(numbers.type, shift))
        if mask == (1 << (numbers.type.element.width - shift)) - 1:
            return numbers
        return self.builder.and_(numbers, _all(numbers.type, mask))

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def plus(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def nibbles(self, field: str) -> Any:
        """BLOCK 4-bit integers: those in the low bits of 16 bytes, then those in the high bits."""
        packed = self.load(field, _vector(INT8, 16))
        low, high = self.bits(packed, 0, 15), self.bits(packed, 4, 15)
        return self.builder.shuffle_vector(low, high, ir.Constant(_vector(INT32), list(range(BLOCK))))


def _int(kind: Any, number: int) -> Any:
    return ir.Constant(kind, number)


def _all(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * kind.count)


# Decoders: the numbers of a block, BLOCK at a time and in order, as float32 vectors.


def _q8_0(block: _Block) -> Iterator[Any]:
    scale = block.spread(block.half("d"))
    yield block.times(block.floats(block.load("q", _vector(INT8)), signed=True), scale)


def _q4_0(block: _Block) -> Iterator[Any]:
    numbers = block.builder.sub(block.nibbles("q"), _all(_vector(INT8), 8))
    yield block.times(block.floats(numbers, signed=True), block.spread(block.half("d")))


def _q4_1(block: _Block) -> Iterator[Any]:
    scaled = block.times(block.floats(block.nibbles("q")), block.spread(block.half("d")))
    yield block.plus(scaled, block.spread(block.half("m")))


def _q4_k(block: _Block) -> Iterator[Any]:
    """Eight runs of 32, each with a scale and a least number of 6 bits, times the block's `d` and `m`.

    Bytes 0-3 of `scales` hold the first four scales, 4-7 the first four least numbers, in their low 6 bits; the others
    have their low 4 bits in bytes 8-11, scales below least numbers, and their high 2 bits on top of bytes 0-7.
    """
    builder, four = block.builder, _vector(INT8, 4)
    first, second, third = (block.load("scales", four, offset) for offset in (0, 4, 8))

    def factors(half: Any, low: int, field: str) -> Any:
        high = builder.shl(block.bits(half, 6, 3), _all(four, 4))
        rest = builder.or_(block.bits(third, low, 15), high)
        joined = builder.shuffle_vector(block.bits(half, 0, 63), rest, ir.Constant(_vector(INT32, 8), list(range(8))))
        return builder.fmul(block.floats(joined), block.spread(block.half(field), 8))

    scales, least = factors(first, 0, "d"), builder.fneg(factors(second, 4, "m"))
    for pair in range(4):
        packed = block.load("q", _vector(INT8), BLOCK * pair)
        for shift, run in ((0, 2 * pair), (4, 2 * pair + 1)):
            numbers = block.floats(block.bits(packed, shift, 15))
            yield block.plus(block.times(numbers, block.lanes(scales, run)), block.lanes(least, run))


def _q6_k(block: _Block) -> Iterator[Any]:
    """Sixteen runs of 16 with 8-bit scales, times the block's `d`; numbers of 6 bits, which count from -32.

    For each half of 128 numbers: 64 bytes with the low 4 bits, of numbers 0-63 below those of 64-127, and 32 bytes
    with the high 2 bits, of numbers 0-31 lowest.
    """
    builder, byte = block.builder, _vector(INT8)
    scales = block.floats(block.load("scales", _vector(INT8, 16)), signed=True)
    scales = builder.fmul(scales, block.spread(block.half("d"), 16))
    for half in range(2):
        high = block.load("high", byte, BLOCK * half)
        for part in range(4):
            low = block.bits(block.load("low", byte, 64 * half + BLOCK * (part % 2)), 4 * (part // 2), 15)
            top = builder.shl(block.bits(high, 2 * part, 3), _all(byte, 4))
            numbers = builder.sub(builder.or_(low, top), _all(byte, 32))
            run = 8 * half + 2 * part
            yield block.times(block.floats(numbers, signed=True), block.lanes(scales, run, run + 1))


_DECODERS: dict[str, Callable[[_Block], Iterator[Any]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}


def _for_vectors(builder: Any, name: str, blocks: Any, locate: Any, use: Any) -> None:
    """Code that calls use(index of the first number, vector, which) for each BLOCK numbers of `blocks` blocks.

    `locate` gives a block's address; `which` counts the vectors of a loop's round. Small blocks are taken four a round.
    """
    numbers = NUMBERS[name]
    a_round = max(1, 128 // numbers)
    whole = builder.mul(builder.udiv(blocks, _int(INT64, a_round)), _int(INT64, a_round))
    for begin, end, step in ((_int(INT64, 0), whole, a_round), (whole, blocks, 1)):
        with cgutils.for_range_slice(builder, begin, end, _int(INT64, step)) as (index, _):
            which = 0
            for offset in range(step):
                block = builder.add(index, _int(INT64, offset))
                start = builder.mul(block, _int(INT64, numbers))
                for part, vector in enumerate(_DECODERS[name](_Block(builder, name, locate(block)))):
                    use(builder.add(start, _int(INT64, BLOCK * part)), vector, which)
                    which += 1
        if step == 1:
            break


def _locator(context: Any, builder: Any, kind: Any, array: Any, first: Any) -> Any:
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
        array, first, other, start, count = args
        zero = _all(_vector(FLOAT), 0.0)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(SUMS)]
        for place in sums:
            builder.store(zero, place)

        def use(index: Any, vector: Any, which: int) -> None:
            numbers = load_block(context, builder, sig.args[2], other, builder.add(start, index))
            place = sums[which % SUMS]
            product = builder.fmul(vector, numbers, flags=("contract",))
            builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)

        locate = _locator(context, builder, sig.args[0], array, first)
        _for_vectors(builder, _NAMES[sig.args[0].dtype], count, locate, use)
        total = builder.load(sums[0])
        for place in sums[1:]:
            total = builder.fadd(total, builder.load(place))
        return add_lanes(builder, total)

    return types.float32(weights, types.int64, x, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def decode_blocks(typingctx: Any, weights: Any, i: Any, out: Any, j: Any, blocks: Any) -> Any:
    """Write the numbers of `blocks` blocks from flat index i to float32 out from flat index j."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, first, other, start, count = args

        def use(index: Any, vector: Any, which: int) -> None:
            pointer = element(context, builder, sig.args[2], other, builder.add(start, index))
            builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)

        locate = _locator(context, builder, sig.args[0], array, first)
        _for_vectors(builder, _NAMES[sig.args[0].dtype], count, locate, use)
        return context.get_dummy_value()

    return types.void(weights, types.int64, out, types.int64, types.int64), codegen
