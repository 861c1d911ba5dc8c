"""Attention of heads that share keys and values, a page at a time: while a page is used, the next one is prefetched.

All heads go through a page before the next, so memory is read once. `dot_keys` and `add_values` load and convert each
vector once for up to SCORE_ROWS heads. `dot_keys` takes four positions at a time, of one head eight. `add_values` takes
all positions of a page for a few vectors of the head's elements. These heads make 12 sums, which stay in registers. The
arithmetic of a head is the same whatever heads are beside it, so its result has the same bits.

Rows are those of `kv_cache.kv_rows`: [rows, head_dim] of one page and head, with head_dim a multiple of LANES.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import KV_BLOCK
from .compiler import device
from .intrinsics import FLOAT, INT32, INT64, element, half_to_float, load_floats, prefetch
from .tiling import SCORE_ROWS, SCORES_BEYOND

LANES = 8
"""Elements of a vector."""
LINE = 64
"""Bytes of a cache line."""
PIECE = 8
"""Values between two prefetches: more lines at once are more than a core can wait for."""

_VECTOR = ir.VectorType(FLOAT, LANES)


def _int(number: int) -> Any:
    return ir.Constant(INT64, number)


def _broadcast(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(INT32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def _extent(context: Any, builder: Any, kind: Any, array: Any, axis: int) -> Any:
    return cgutils.unpack_tuple(builder, cgutils.create_struct_proxy(kind)(context, builder, array).shape)[axis]


def _rows(context: Any, builder: Any, kind: Any, rows: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """(head_dim, a function from row and first element to LANES elements as float32) of the rows of a cache."""
    if isinstance(kind, types.BaseTuple):
        quants, scales = (builder.extract_value(rows, i) for i in (0, 1))
        head_dim, blocks = (
            _extent(context, builder, one, array, 1) for one, array in zip(kind.types, (quants, scales), strict=True)
        )

        def load_quants(row: Any, first: Any) -> Any:
            at = builder.add(builder.mul(row, blocks), builder.udiv(first, _int(KV_BLOCK)))
            scale = half_to_float(builder, builder.load(element(context, builder, kind.types[1], scales, at)))
            start = element(context, builder, kind.types[0], quants, builder.add(builder.mul(row, head_dim), first))
            eight = builder.load(builder.bitcast(start, ir.VectorType(ir.IntType(8), LANES).as_pointer()), align=1)
            numbers = builder.sitofp(builder.sext(eight, ir.VectorType(INT32, LANES)), _VECTOR)
            return builder.fmul(numbers, _broadcast(builder, scale), flags=("contract",))

        return head_dim, load_quants
    head_dim = _extent(context, builder, kind, rows, 1)

    def load(row: Any, first: Any) -> Any:
        start = element(context, builder, kind, rows, builder.add(builder.mul(row, head_dim), first))
        return load_floats(builder, kind.dtype, start, LANES)

    return head_dim, load


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)


def _add_product(builder: Any, place: Any, a: Any, b: Any) -> None:
    """*place += a · b."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums of the lanes of four vectors, as one vector of four. The order of the additions is fixed."""

    def added(a: Any, b: Any, *starts: list[int]) -> Any:
        parts = [builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), lanes)) for lanes in starts]
        return builder.fadd(*parts, flags=("contract",))

    # as AVX2 shuffles: within the halves of a register
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    pairs = [added(vectors[i], vectors[i + 1], even, odd) for i in (0, 2)]
    fours = added(*pairs, even, odd)
    return added(fours, fours, [0, 1, 2, 3], [4, 5, 6, 7])


def _prefetch_some(builder: Any, cursor: Any, lines: Any) -> None:
    """Prefetch `lines` cache lines from *cursor on, and move it past them."""
    with cgutils.for_range(builder, lines):
        address = builder.load(cursor)
        prefetch(builder, builder.inttoptr(address, ir.IntType(8).as_pointer()))
        builder.store(builder.add(address, _int(LINE)), cursor)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def dot_keys(
    typingctx: Any, q: Any, at: Any, heads: Any, keys: Any, count: Any, scale: Any, scores: Any, to: Any, stride: Any,
    ahead: Any, lines: Any,
) -> Any:  # fmt: skip
    """scores[to + h · stride + i] = q of head h · key i · scale, for `heads` (a literal) heads and i < count.

    The queries lie one after the other in flat q from `at` on. Up to SCORES_BEYOND scores more are written. `lines`
    cache lines are prefetched each time, from address `ahead` on; returns the address after them.
    """
    n_heads = heads.literal_value
    n_keys = SCORES_BEYOND + 1 if n_heads == 1 else 4

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        query, start, _, rows, number, factor, target, first, step, address, n_lines = args
        head_dim, load = _rows(context, builder, sig.args[3], rows)
        cursor = cgutils.alloca_once(builder, INT64)
        builder.store(address, cursor)
        places = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(n_keys)] for _ in range(n_heads)]
        four = ir.VectorType(FLOAT, 4)
        factors = builder.shuffle_vector(
            _broadcast(builder, factor), ir.Constant(_VECTOR, ir.Undefined),
            ir.Constant(ir.VectorType(INT32, 4), [0] * 4),
        )  # fmt: skip
        last = builder.sub(number, _int(1))
        with cgutils.for_range_slice(builder, _int(0), number, _int(n_keys)) as (position, _):
            _prefetch_some(builder, cursor, n_lines)
            chosen = []
            for i in range(n_keys):
                row = builder.add(position, _int(i))
                chosen.append(builder.select(builder.icmp_signed("<", row, last), row, last))
            for place in itertools.chain(*places):
                builder.store(ir.Constant(_VECTOR, [0.0] * LANES), place)
            with cgutils.for_range_slice(builder, _int(0), head_dim, _int(LANES)) as (d, _):
                queries = []
                for h in range(n_heads):
                    index = builder.add(builder.add(start, builder.mul(_int(h), head_dim)), d)
                    queries.append(_load(builder, element(context, builder, sig.args[0], query, index)))
                for i, row in enumerate(chosen):
                    vector = load(row, d)
                    for numbers, own in zip(queries, places, strict=True):
                        _add_product(builder, own[i], vector, numbers)
            for h, own in enumerate(places):
                for i in range(0, n_keys, 4):
                    sums = _lane_sums(builder, [builder.load(place) for place in own[i : i + 4]])
                    index = builder.add(builder.add(first, builder.mul(_int(h), step)), position)
                    pointer = element(context, builder, sig.args[6], target, builder.add(index, _int(i)))
                    result = builder.fmul(sums, factors, flags=("contract",))
                    builder.store(result, builder.bitcast(pointer, four.as_pointer()), align=4)
        return builder.load(cursor)

    index = types.int64
    return index(q, index, heads, keys, index, types.float32, scores, index, index, index, index), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_values(
    typingctx: Any, weights: Any, at: Any, stride: Any, heads: Any, values: Any, count: Any, out: Any, to: Any,
    ahead: Any, lines: Any,
) -> Any:  # fmt: skip
    """out of head h += the sum over i < count of weights[at + h · stride + i] · value i, for `heads` (a literal) heads.

    The outputs of the heads lie one after the other in flat out from `to` on. `lines` cache lines are
    prefetched with PIECE values of a pass, from address `ahead` on; returns the address after them.
    """
    n_heads = heads.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        factors, start, step, _, rows, number, target, first, address, n_lines = args
        head_dim, load = _rows(context, builder, sig.args[4], rows)
        cursor = cgutils.alloca_once(builder, INT64)
        builder.store(address, cursor)

        def add(d: Any, n_vectors: int) -> None:
            """Emit the sums of elements d to d + LANES · n_vectors."""
            offsets = [builder.add(d, _int(LANES * i)) for i in range(n_vectors)]
            outputs, places = [], []
            for h in range(n_heads):
                own = builder.add(first, builder.mul(_int(h), head_dim))
                pointers = [element(context, builder, sig.args[6], target, builder.add(own, o)) for o in offsets]
                outputs.append([builder.bitcast(pointer, _VECTOR.as_pointer()) for pointer in pointers])
                places.append([cgutils.alloca_once(builder, _VECTOR) for _ in offsets])
                for pointer, place in zip(outputs[-1], places[-1], strict=True):
                    builder.store(builder.load(pointer, align=4), place)
            with cgutils.for_range_slice(builder, _int(0), number, _int(PIECE)) as (begin, _):
                _prefetch_some(builder, cursor, n_lines)
                left = builder.sub(number, begin)
                some = builder.select(builder.icmp_signed("<", left, _int(PIECE)), left, _int(PIECE))
                with cgutils.for_range(builder, some) as loop:
                    row, own_weights = builder.add(begin, loop.index), []
                    for h in range(n_heads):
                        index = builder.add(builder.add(start, builder.mul(_int(h), step)), row)
                        factor = builder.load(element(context, builder, sig.args[0], factors, index))
                        own_weights.append(_broadcast(builder, factor))
                    for i, offset in enumerate(offsets):
                        vector = load(row, offset)
                        for weight, own_places in zip(own_weights, places, strict=True):
                            _add_product(builder, own_places[i], vector, weight)
            for pointers, own_places in zip(outputs, places, strict=True):
                for pointer, place in zip(pointers, own_places, strict=True):
                    builder.store(builder.load(place), pointer, align=4)

        done = _int(0)
        for n_vectors in (8, 4, 2, 1) if n_heads == 1 else (4, 2, 1):
            whole = builder.and_(head_dim, _int(-LANES * n_vectors))
            with cgutils.for_range_slice(builder, done, whole, _int(LANES * n_vectors)) as (d, _):
                add(d, n_vectors)
            done = whole
        return builder.load(cursor)

    index = types.int64
    return index(weights, index, index, heads, values, index, out, index, index, index), codegen


@intrinsic  # type: ignore[untyped-decorator]
def memory_of(typingctx: Any, rows: Any) -> Any:
    """(address, bytes) of the rows of a cache; of a pair, of its quants."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, array = sig.args[0], args[0]
        if isinstance(kind, types.BaseTuple):
            kind, array = kind.types[0], builder.extract_value(array, 0)
        address = builder.ptrtoint(element(context, builder, kind, array, _int(0)), INT64)
        size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        elements = builder.mul(*(_extent(context, builder, kind, array, axis) for axis in (0, 1)))
        return context.make_tuple(builder, sig.return_type, [address, builder.mul(elements, _int(size))])

    return types.UniTuple(types.int64, 2)(rows), codegen


@device
def heads_at_once(left: Any) -> Any:
    """How many of `left` heads are next: three, but not so that one is left over."""
    return min(left, SCORE_ROWS) if left != SCORE_ROWS + 1 else SCORE_ROWS - 1


@device
def lines_apiece(size: Any, heads: Any, pieces: Any) -> Any:
    """Cache lines to prefetch with each of `pieces` pieces of work of SCORE_ROWS heads, for `size` bytes in all."""
    return size // (LINE * ((heads + SCORE_ROWS - 1) // SCORE_ROWS) * pieces) + 1 if size > 0 else 0


@device
def page_scores(
    q: Any, at: Any, heads: Any, head_dim: Any, keys: Any, count: Any, scale: Any, scores: Any, to: Any, ahead: Any,
    size: Any,
) -> Any:  # fmt: skip
    """scores[h, to + i] = query of head h · key i · scale, for i < count.

    Meanwhile `size` bytes from address `ahead` on are prefetched, as in `page_values`.
    """
    stride, h = scores.shape[1], 0
    lines = lines_apiece(size, heads, (count + 3) // 4 if heads > 1 else (count + 7) // 8)
    while h < heads:
        n, query, place = heads_at_once(heads - h), at + h * head_dim, h * stride + to
        if n == 3:
            ahead = dot_keys(q, query, 3, keys, count, scale, scores, place, stride, ahead, lines)
        elif n == 2:
            ahead = dot_keys(q, query, 2, keys, count, scale, scores, place, stride, ahead, lines)
        else:
            ahead = dot_keys(q, query, 1, keys, count, scale, scores, place, stride, ahead, lines)
        h += n


@device
def page_values(
    weights: Any, to: Any, heads: Any, head_dim: Any, values: Any, count: Any, out: Any, at: Any, ahead: Any, size: Any
) -> Any:
    """out of head h += sum of weights[h, to + i] · value i, for i < count."""
    stride, h = weights.shape[1], 0
    width = 8 * LANES if heads == 1 else 4 * LANES
    lines = lines_apiece(size, heads, (count + PIECE - 1) // PIECE * ((head_dim + width - 1) // width))
    while h < heads:
        n, place, result = heads_at_once(heads - h), h * stride + to, at + h * head_dim
        if n == 3:
            ahead = add_values(weights, place, stride, 3, values, count, out, result, ahead, lines)
        elif n == 2:
            ahead = add_values(weights, place, stride, 2, values, count, out, result, ahead, lines)
        else:
            ahead = add_values(weights, place, stride, 1, values, count, out, result, ahead, lines)
        h += n
