"""Activations in int8: quantising them, and reading them for dot products.

Scales and sums come with them, of groups that the weight's type selects (`ACTIVATION_QUANT`).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import ACTIVATION_QUANT, TYPE_TRAITS, VEC_DOT_TYPE
from .intrinsics import FLOAT, INT32, add_lanes, element
from .panel_bytes import SCALE_GROUPS, blocks_of_a_row, broadcast, concat, integer, lanes_of, splat, vector_of
from .products_int8 import offset_word, zero_point
from .vecdot import INT8, TYPE_NAMES


class Activations:
    """Emits code that reads the int8 activations of one token, quantised for weights of type `name`.

    `arrays` are xq, xs and sums. Indices count elements of the token.
    """

    def __init__(
        self, context: Any, builder: Any, kinds: Any, arrays: Any, token: Any, columns: Any, name: str
    ) -> None:
        self.builder, self.name = builder, name
        group, sum_group, _ = ACTIVATION_QUANT[VEC_DOT_TYPE[name]]
        self.per_scale, self.per_sum = group, sum_group
        self._starts = [
            element(context, builder, kind, array, builder.mul(token, builder.udiv(columns, integer(every))))
            for kind, array, every in zip(kinds, arrays, (1, group, sum_group), strict=True)
        ]

    def _load(self, which: int, index: Any, kind: Any) -> Any:
        at = self.builder.gep(self._starts[which], [index])
        return self.builder.load(self.builder.bitcast(at, kind.as_pointer()), align=1)

    def quants(self, index: Any, kind: Any) -> Any:
        """A value of an LLVM type, loaded from element `index` on."""
        return self._load(0, index, kind)

    def runs(self, index: Any, starts: tuple[int, int]) -> Any:
        """<32 x i8>: 16 elements from each of two starts, counted from element `index`."""
        if starts[1] == starts[0] + 16:
            return self.quants(self.builder.add(index, integer(starts[0])), vector_of(INT8, 32))
        halves = (self.quants(self.builder.add(index, integer(start)), vector_of(INT8, 16)) for start in starts)
        return concat(self.builder, *halves)

    def scale(self, index: Any) -> Any:
        """The scale of element `index`."""
        return self._load(1, self.builder.udiv(index, integer(self.per_scale)), FLOAT)

    def scales(self, index: Any, count: int) -> Any:
        """`count` scales from that of element `index` on."""
        return self._load(1, self.builder.udiv(index, integer(self.per_scale)), vector_of(FLOAT, count))

    def zero_point_terms(self, index: Any, count: int) -> Any:
        """-(zero point) · sum of each of `count` scale groups from element `index` on."""
        totals = self._load(2, self.builder.udiv(index, integer(self.per_sum)), vector_of(INT32, count))
        return self.builder.mul(totals, splat(totals.type, -zero_point(self.name)))

    def group_sums(self, index: Any, count: int) -> Any:
        """Sum of the activations of each of `count` scale groups from element `index` on: int32, or float32 of q8_1,
        which has them scaled.
        """
        at = self.builder.udiv(index, integer(self.per_sum))
        if VEC_DOT_TYPE[self.name] == "q8_1":
            return self._load(2, at, vector_of(FLOAT, count))
        every = SCALE_GROUPS[self.name] // self.per_sum
        runs = self._load(2, at, vector_of(INT32, count * every))
        parts = [
            self.builder.shuffle_vector(runs, runs, lanes_of(range(start, count * every, every)))
            for start in range(every)
        ]
        return functools.reduce(self.builder.add, parts)

    def sum(self, index: Any) -> Any:
        """Sum of the scale group at element `index`, times its scale: the factor of a minimum."""
        total = self.builder.extract_element(self.group_sums(index, 1), integer(0, INT32))
        if VEC_DOT_TYPE[self.name] == "q8_1":
            return total
        return self.builder.fmul(self.builder.sitofp(total, FLOAT), self.scale(index), flags=("contract",))


@intrinsic  # type: ignore[untyped-decorator]
def fill_offsets(typingctx: Any, weights: Any, sums: Any, tokens: Any, offsets: Any) -> Any:
    """Write what the sums of each group of each token begin with, int32 in flat float32 `offsets` (`offset_word`).

    Made once for all panels: to make them in each pass would take the units that multiply. Types without a zero point
    have none.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, source, number, target = args
        name = TYPE_NAMES[sig.args[0].dtype]
        if zero_point(name):
            blocks = blocks_of_a_row(context, builder, sig.args[0], array)
            groups = builder.mul(blocks, integer(TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]))
            first = element(context, builder, sig.args[1], source, integer(0))
            start = builder.bitcast(element(context, builder, sig.args[3], target, integer(0)), INT32.as_pointer())
            with cgutils.for_range(builder, builder.mul(number, groups)) as loop:
                total = builder.load(builder.gep(first, [loop.index]))
                builder.store(offset_word(builder, name, total), builder.gep(start, [loop.index]))
        return context.get_dummy_value()

    return types.void(weights, sums, types.int64, offsets), codegen


# Quantising


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def round_to_int8(typingctx: Any, x: Any, i: Any, factor: Any, out: Any, j: Any, count: Any) -> Any:
    """Round x · factor to integers, ties to even; returns their sum as int32.

    Reads `count` (16 or 32, a literal) elements of float32 x from flat index i, whose products must be within ±127.5,
    and writes int8 elements of out from flat index j. It rounds by adding and subtracting a large number, which must
    not be reordered: only an `exact_device` may call it.
    """
    width = count.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, at, times, target, to, _ = args
        floats = vector_of(FLOAT, width)
        start = element(context, builder, sig.args[0], source, at)
        elements = builder.load(builder.bitcast(start, floats.as_pointer()), align=4)
        shift = ir.Constant(floats, [1.5 * 2.0**23] * width)
        scaled = builder.fmul(elements, broadcast(builder, times, width))
        rounded = builder.fsub(builder.fadd(scaled, shift), shift)
        rounded = builder.fptosi(rounded, vector_of(INT32, width))
        small = builder.trunc(rounded, vector_of(INT8, width))
        place = element(context, builder, sig.args[3], target, to)
        builder.store(small, builder.bitcast(place, small.type.as_pointer()), align=1)
        return add_lanes(builder, rounded)

    return types.int32(x, types.int64, types.float32, out, types.int64, count), codegen


@intrinsic  # type: ignore[untyped-decorator]
def largest_bits(typingctx: Any, x: Any, i: Any) -> Any:
    """Bits of the largest magnitude among 32 elements of float32 x from flat index i. A NaN's magnitude is largest.

    As integers, the bits of magnitudes compare like the floats, and those of NaNs are above infinity's.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = vector_of(INT32, 32)
        start = element(context, builder, sig.args[0], *args)
        elements = builder.load(builder.bitcast(start, bits.as_pointer()), align=4)
        magnitudes = builder.and_(elements, splat(bits, 0x7FFFFFFF))
        name, kind = "llvm.vector.reduce.smax.v32i32", ir.FunctionType(INT32, [bits])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [magnitudes])

    return types.int32(x, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.int32), codegen
