"""Dot products of int8 activations with rows of GGUF blocks: integer products of each group, times the group's scales.

An element of a block is scale · (q - zero point) or scale · q + minimum, where the quant q is from 0 to 255. Products
of q and a signed element of x are added up in integers, by the instructions that the CPU has (`products_int8`). The
sums of groups that come with x subtract the zero point, in integers and so exactly.

For few tokens, `dot_rows_int8` and `dot_blocks_int8` multiply rows as their blocks come from memory, some blocks at a
time (`_RowSum`): scales of several blocks are converted together, and the integer scales of K-quants multiply in
integers. For more tokens, PANEL_ROWS rows become a panel, in which four elements of each row lie side by side
(`panel_bytes`). Then one instruction multiplies four elements of a token with those of several rows. `multiply_panel`
does it for a few tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import TYPE_TRAITS, VEC_DOT_TYPE
from .activations_int8 import Activations
from .intrinsics import FLOAT, INT16, INT32, add_lanes, element, prefetch
from .panel_bytes import (
    DECODERS,
    SCALE_GROUPS,
    Chunk,
    blocks_of_a_row,
    broadcast,
    concat,
    integer,
    lanes_of,
    splat,
    vector_of,
)
from .products_int8 import (
    ROWS_OF_A_VECTOR,
    add_products,
    add_word_products,
    group_products,
    join_words,
    least_tokens,
    multiplies_words,
    zero_point,
)
from .tiling import PANEL_ROWS, UNPACK_ELEMENTS
from .vecdot import INT8, TYPE_NAMES, Block, blocks_of_a_round, f16_of_each, for_rounds, locator, six_bit_integers

CACHE_LINE = 64


def _times_plus(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, which may be fused."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _accumulators(builder: Any, kind: Any, count: int) -> list[Any]:
    """`count` stack slots of a type, set to 0. LLVM keeps them in registers."""
    zero = ir.Constant(kind, None)
    places = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    for place in places:
        builder.store(zero, place)
    return places


@dataclass(frozen=True)
class _Products:
    """Some products of a round: each part is <32 x i8> of unsigned quants, with the two runs of 16 activations.

    Lanes 0 to 3 of their sums are of the first of two scale groups, lanes 4 to 7 of the second.
    """

    parts: list[tuple[Any, tuple[int, int]]]
    groups: tuple[int, int]


def _joined(builder: Any, numbers: list[Any]) -> Any:
    """Floats as a vector."""
    vector = ir.Constant(vector_of(FLOAT, len(numbers)), ir.Undefined)
    for i, number in enumerate(numbers):
        vector = builder.insert_element(vector, number, integer(i, INT32))
    return vector


def _products_of_round(name: str, blocks: list[Block]) -> tuple[list[_Products], list[Chunk]]:
    """(products, chunks that they are made of, if any) of some blocks.

    Two blocks whose bytes hold two elements each are decoded together: a half of their elements each time.
    """
    builder, traits = blocks[0].builder, TYPE_TRAITS[name]
    found: list[_Products] = []
    chunks: list[Chunk] = []
    if traits.block_size == UNPACK_ELEMENTS and traits.bits == 4 and len(blocks) % 2 == 0:
        for i in range(0, len(blocks), 2):
            packed = concat(builder, *(block.load("qs", vector_of(INT8, 16)) for block in blocks[i : i + 2]))
            at = UNPACK_ELEMENTS * i
            low, high = blocks[i].bits(packed, 0, 15), builder.lshr(packed, splat(packed.type, 4))
            found.append(_Products([(low, (at, at + 32)), (high, (at + 16, at + 48))], (i, i + 1)))
        return found, chunks
    for i, block in enumerate(blocks):
        for chunk in DECODERS[name](block):
            at = traits.block_size * i + chunk.first
            group = at // SCALE_GROUPS[name]
            found.append(_Products([(chunk.quants, (at, at + 16))], (group, group + len(chunk.scales) - 1)))
            chunks.append(chunk)
    return found, chunks


def _factors_of_round(name: str, blocks: list[Block], chunks: list[Chunk]) -> tuple[Any, Any]:
    """(scale of each scale group, minimum of each or None) of some blocks."""
    builder, has_min = blocks[0].builder, TYPE_TRAITS[name].has_min
    if TYPE_TRAITS[name].block_size == UNPACK_ELEMENTS:  # a field of each block: converted together
        return f16_of_each(blocks, "d"), f16_of_each(blocks, "m") if has_min else None
    scales = _joined(builder, [scale for chunk in chunks for scale in chunk.scales])
    return scales, _joined(builder, [chunk.minimum for chunk in chunks]) if has_min else None


class _RowSum:
    """Emits code that adds up one row's dot product with int8 activations."""

    def __init__(self, builder: Any, name: str) -> None:
        self.builder, self.name = builder, name
        self._totals = _accumulators(builder, vector_of(FLOAT, 8), 2)
        self._rests: dict[int, Any] = {}  # number of lanes → accumulator of minimums
        if TYPE_TRAITS[name].has_min:
            groups = TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]
            for count in sorted({groups, groups * blocks_of_a_round(name)}):
                (self._rests[count],) = _accumulators(builder, vector_of(FLOAT, count), 1)

    def add(self, blocks: list[Block], first: Any, x: Activations) -> None:
        """Add the products of some blocks and the activations from element `first` on."""
        builder, name = self.builder, self.name
        if VEC_DOT_TYPE[name] == "q8_k" and multiplies_words():
            self._add_in_integers(blocks[0], first, x)
            return
        products, chunks = _products_of_round(name, blocks)
        scales, minimums = _factors_of_round(name, blocks, chunks)
        floats, groups = vector_of(FLOAT, 8), scales.type.count
        several = len(blocks) > 1  # with a scale of x for each; otherwise there is one, which multiplies at the end
        if several:
            scales = builder.fmul(scales, x.scales(first, groups), flags=("contract",))
        nothing = ir.Constant(vector_of(INT32, groups), None)
        offsets = x.zero_point_terms(first, groups) if zero_point(name) else nothing
        start = ir.Constant(floats, [0.0] * 8)
        totals = [builder.load(place) if several else start for place in self._totals]
        for i, each in enumerate(products):
            low, high = each.groups
            lanes = [low, *[groups] * 3, high if high != low else groups, *[groups] * 3]  # lane `groups` is 0
            dots = builder.shuffle_vector(offsets, nothing, lanes_of(lanes))
            for quants, runs in each.parts:
                dots = add_products(builder, name, dots, quants, x.runs(first, runs))
            factor = builder.shuffle_vector(scales, scales, lanes_of([low] * 4 + [high] * 4))
            totals[i % 2] = _times_plus(builder, builder.sitofp(dots, floats), factor, totals[i % 2])
        scale = None if several else x.scale(first)
        for place, total in zip(self._totals, totals, strict=True):
            if scale is not None:
                total = _times_plus(builder, total, broadcast(builder, scale, 8), builder.load(place))
            builder.store(total, place)
        if minimums is not None:
            place, sums = self._rests[groups], x.group_sums(first, groups)
            if scale is not None and VEC_DOT_TYPE[name] != "q8_1":
                sums = builder.sitofp(sums, vector_of(FLOAT, groups))
                sums = builder.fmul(sums, broadcast(builder, scale, groups), flags=("contract",))
            builder.store(_times_plus(builder, minimums, sums, builder.load(place)), place)

    def _add_in_integers(self, block: Block, first: Any, x: Activations) -> None:
        """`add` for a block whose groups have integer scales: these multiply the groups' sums in integers.

        A lane's sum fits in 16 bits: it has four products of at most 63 · 127.
        """
        builder, name = self.builder, self.name
        scales, minimums = six_bit_integers(block) if TYPE_TRAITS[name].has_min else (None, None)
        if scales is None:
            scales = builder.sext(block.load("scales", vector_of(INT8, 16)), vector_of(INT16, 16))
        else:
            scales = builder.zext(scales, vector_of(INT16, 8))
        groups, floats = scales.type.count, vector_of(FLOAT, 8)
        start = total = ir.Constant(vector_of(INT32, 8), None)
        dots, halves = [], []
        for products in _products_of_round(name, [block])[0]:
            ((quants, runs),) = products.parts
            dots.append(add_products(builder, name, start, quants, x.runs(first, runs)))
            halves.append(products.groups)
        for i in range(0, len(dots), 2):
            (low, high), (next_low, next_high) = halves[i : i + 2]
            lanes = lanes_of([low] * 4 + [next_low] * 4 + [high] * 4 + [next_high] * 4)
            factors = builder.shuffle_vector(scales, scales, lanes)
            total = add_word_products(builder, total, join_words(builder, *dots[i : i + 2]), factors)
        if zero_point(name):
            wide = builder.sext(scales, vector_of(INT32, groups))
            terms = builder.mul(wide, x.zero_point_terms(first, groups))
            for at in range(0, groups, 8):
                total = builder.add(total, builder.shuffle_vector(terms, terms, lanes_of(range(at, at + 8))))
        scale_of_x = x.scale(first)
        scale = broadcast(builder, builder.fmul(block.f16("d"), scale_of_x), 8)
        place = self._totals[0]
        builder.store(_times_plus(builder, builder.sitofp(total, floats), scale, builder.load(place)), place)
        if minimums is not None:
            sums = builder.mul(builder.zext(minimums, vector_of(INT32, groups)), x.group_sums(first, groups))
            scale = broadcast(builder, builder.fneg(builder.fmul(block.f16("dmin"), scale_of_x)), groups)
            place = self._rests[groups]
            builder.store(_times_plus(builder, builder.sitofp(sums, floats), scale, builder.load(place)), place)

    def result(self) -> Any:
        """The dot product."""
        builder = self.builder
        total = add_lanes(builder, builder.fadd(*map(builder.load, self._totals)))
        for count, place in self._rests.items():
            rest = builder.load(place)
            rest = add_lanes(builder, rest) if count > 1 else builder.extract_element(rest, integer(0, INT32))
            total = builder.fadd(total, rest)
        return total


def _dot_rows(context: Any, builder: Any, sig: Any, args: Any, many: int) -> list[Any]:
    """Dot products of rows from weights[row] on, for `dot_blocks_int8` and `dot_rows_int8`."""
    array, row, *arrays, token = args
    name = TYPE_NAMES[sig.args[0].dtype]
    blocks = blocks_of_a_row(context, builder, sig.args[0], array)
    columns = builder.mul(blocks, integer(TYPE_TRAITS[name].block_size))
    x = Activations(context, builder, sig.args[2:5], arrays, token, columns, name)
    sums = [_RowSum(builder, name) for _ in range(many)]
    starts = [builder.mul(builder.add(row, integer(i)), blocks) for i in range(many)]
    locators = [locator(context, builder, sig.args[0], array, start) for start in starts]

    def body(index: Any, found: list[list[Block]]) -> None:
        first = builder.mul(index, integer(TYPE_TRAITS[name].block_size))
        for each, own in zip(sums, found, strict=True):
            each.add(own, first, x)

    for_rounds(builder, name, blocks, locators, body)
    return [each.result() for each in sums]


@intrinsic  # type: ignore[untyped-decorator]
def dot_blocks_int8(typingctx: Any, weights: Any, row: Any, xq: Any, xs: Any, sums: Any, t: Any) -> Any:
    """weights[row] · x[t] as float32. x is (xq, xs, sums), quantised for the weight's type."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _dot_rows(context, builder, sig, args, 1)[0]

    return types.float32(weights, types.int64, xq, xs, sums, types.int64), codegen


def _rows_at_once(kind: Any) -> int:
    """How many rows of a block type are multiplied together: small blocks are, because they share what is read of x."""
    return 4 if TYPE_TRAITS[TYPE_NAMES[kind]].block_size == UNPACK_ELEMENTS else 1


@intrinsic  # type: ignore[untyped-decorator]
def rows_at_once(typingctx: Any, weights: Any) -> Any:
    """Number of rows that `dot_rows_int8` multiplies."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return integer(_rows_at_once(sig.args[0].dtype))

    return types.int64(weights), codegen


@intrinsic  # type: ignore[untyped-decorator]
def panels_from(typingctx: Any, weights: Any) -> Any:
    """Least number of tokens that are multiplied by panels (`least_tokens`)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return integer(least_tokens(TYPE_NAMES[sig.args[0].dtype]))

    return types.int64(weights), codegen


@intrinsic  # type: ignore[untyped-decorator]
def dot_rows_int8(typingctx: Any, weights: Any, row: Any, xq: Any, xs: Any, sums: Any, t: Any) -> Any:
    """weights[row + i] · x[t] as a tuple of `rows_at_once` float32: see `dot_blocks_int8`."""
    many = _rows_at_once(weights.dtype)
    result = types.UniTuple(types.float32, many)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, _dot_rows(context, builder, sig, args, many))

    return result(weights, types.int64, xq, xs, sums, types.int64), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply_panel(
    typingctx: Any,
    weights: Any,
    panel: Any,
    scales: Any,
    mins: Any,
    xq: Any,
    xs: Any,
    sums: Any,
    offsets: Any,
    where: Any,
    many: Any,
    out: Any,
    at: Any,
    stride: Any,
    ahead: Any,
) -> Any:
    """Dot products of a panel with `many` (a literal) tokens. `weights` gives the block type.

    `offsets` are those of `fill_offsets`.

    `where` is (first column k of the panel, columns, first token t, last token); past the last token, that token is
    computed again. Token t + i's PANEL_ROWS results go to flat float32 out from at + i · stride on; if k is not 0, they
    are added there. `ahead` is (flat index of a block, number of the pass, passes): blocks from there on, as many as
    the panel has, are prefetched bit by bit. All at once would be more cache lines than a core can wait for.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, *factors, xq_, xs_, sums_, offsets_, where_, _, target, to, step, ahead_ = args
        later, number, passes = cgutils.unpack_tuple(builder, ahead_)
        begin, length, first, final = cgutils.unpack_tuple(builder, where_)
        again = builder.icmp_signed("!=", begin, integer(0))
        name = TYPE_NAMES[sig.args[0].dtype]
        blocks = blocks_of_a_row(context, builder, sig.args[0], array)
        width = builder.mul(blocks, integer(TYPE_TRAITS[name].block_size))
        floats, integers = vector_of(FLOAT, ROWS_OF_A_VECTOR), vector_of(INT32, ROWS_OF_A_VECTOR)
        parts = range(0, PANEL_ROWS, ROWS_OF_A_VECTOR)
        packed, scales_start, mins_start = (
            element(context, builder, kind, place, integer(0))
            for kind, place in zip(sig.args[1:4], factors, strict=True)
        )

        def vectors_at(start: Any, index: Any, kind: Any) -> list[Any]:
            """A vector of each part of PANEL_ROWS lanes of 32 bits, from float32 element `index` on."""
            places = (builder.gep(start, [builder.add(index, integer(part))]) for part in parts)
            return [builder.load(builder.bitcast(place, kind.as_pointer()), align=4) for place in places]

        all_offsets = builder.bitcast(element(context, builder, sig.args[7], offsets_, integer(0)), INT32.as_pointer())
        tokens, results, offset_starts = [], [], []
        for k in range(many.literal_value):
            token = builder.add(first, integer(k))
            token = builder.select(builder.icmp_signed("<", token, final), token, final)
            offset = builder.add(to, builder.mul(builder.sub(token, first), step))
            for part in parts:
                place = element(context, builder, sig.args[10], target, builder.add(offset, integer(part)))
                results.append(builder.bitcast(place, floats.as_pointer()))
            tokens.append(Activations(context, builder, sig.args[4:7], (xq_, xs_, sums_), token, width, name))
            groups_of_row = builder.udiv(width, integer(SCALE_GROUPS[name]))
            offset_starts.append(builder.gep(all_offsets, [builder.mul(token, groups_of_row)]))
        totals = [_accumulators(builder, floats, len(parts)) for _ in tokens]
        zero = ir.Constant(floats, [0.0] * ROWS_OF_A_VECTOR)
        for place, total in zip(results, itertools.chain(*totals), strict=True):
            builder.store(builder.select(again, builder.load(place, align=4), zero), total)
        group = integer(SCALE_GROUPS[name])
        first_group, groups = builder.udiv(begin, group), builder.udiv(length, group)
        nbytes = PANEL_ROWS * TYPE_TRAITS[name].block_bytes * SCALE_GROUPS[name] // TYPE_TRAITS[name].block_size
        # Two passes each ask for half of a group's lines. One asks for two of three: the hardware foresees the others.
        count = -(-nbytes // CACHE_LINE // 2)
        one = builder.icmp_signed("==", passes, integer(1))
        apart = builder.select(one, integer(CACHE_LINE * 3 // 2), integer(CACHE_LINE))
        line = builder.sub(builder.mul(builder.and_(number, integer(1)), groups), first_group)
        line_bytes = builder.mul(apart, integer(count))
        later = locator(context, builder, sig.args[0], array, later)(integer(0))
        later = builder.gep(later, [builder.mul(line, line_bytes)])
        # the panel and its factors as if they began with the row: one index for all, of which registers are few
        packed = builder.gep(packed, [builder.mul(begin, integer(-PANEL_ROWS // 4))])
        before = builder.mul(first_group, integer(-PANEL_ROWS))
        scales_start, mins_start = (builder.gep(place, [before]) for place in (scales_start, mins_start))
        with cgutils.for_range_slice(builder, first_group, builder.add(first_group, groups), integer(1)) as (index, _):
            ahead = builder.gep(later, [builder.mul(index, line_bytes)])
            for i in range(count):
                prefetch(builder, builder.gep(ahead, [builder.mul(integer(i), apart)]), 2)
            start = builder.mul(index, group)

            def offset(token: int) -> Any:
                return (
                    builder.load(builder.gep(offset_starts[token], [index])) if zero_point(name) else integer(0, INT32)
                )

            def quants_at(column: Any) -> list[Any]:
                # a column of the panel has PANEL_ROWS 32-bit elements
                at = builder.add(builder.mul(start, integer(PANEL_ROWS // 4)), builder.mul(column, integer(PANEL_ROWS)))
                return vectors_at(packed, at, integers)

            def x_at(token: int, column: Any) -> Any:
                index = builder.add(start, builder.mul(column, integer(4)))
                return broadcast(builder, tokens[token].quants(index, INT32), ROWS_OF_A_VECTOR)

            dots_of_group = group_products(builder, name, len(tokens), quants_at, x_at, offset)
            at = builder.mul(index, integer(PANEL_ROWS))
            scales_of_rows = vectors_at(scales_start, at, floats)
            minimums = vectors_at(mins_start, at, floats) if TYPE_TRAITS[name].has_min else [None] * len(parts)
            for x, places, dots_of_x in zip(tokens, totals, dots_of_group, strict=True):
                scale_of_x = broadcast(builder, x.scale(start), ROWS_OF_A_VECTOR)
                sum_of_x = broadcast(builder, x.sum(start), ROWS_OF_A_VECTOR) if TYPE_TRAITS[name].has_min else None
                for place, sums_of_rows, scale, minimum in zip(
                    places, dots_of_x, scales_of_rows, minimums, strict=True
                ):
                    dots = builder.sitofp(sums_of_rows, floats)
                    product = builder.fmul(dots, scale, flags=("contract",))
                    total = _times_plus(builder, product, scale_of_x, builder.load(place))
                    if minimum is not None:
                        total = _times_plus(builder, minimum, sum_of_x, total)
                    builder.store(total, place)
        for place, total in zip(results, itertools.chain(*totals), strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        weights, panel, scales, mins, xq, xs, sums, offsets, where, many, out, index, index, ahead
    ), codegen
