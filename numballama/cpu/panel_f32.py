"""Panels of float32 weights, for prompts on CPUs with 16 vector registers.

A panel is [columns, PANEL_ROWS]: the elements of PANEL_ROWS rows of a weight, column by column. A column is two vectors
of AVX, and an element of x is multiplied with both. Six tokens make 12 sums, which stay in registers with the column and
the element: 8 loads feed 12 multiply-adds, and no sum goes across lanes. A tile of whole rows of both, as
`intrinsics.tile` has it, would need 16 sums, more than there are registers.

Each sum adds its products in the order of the columns, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .intrinsics import FLOAT, INT32, INT64, element
from .tiling import PANEL_COLUMNS, PANEL_ROWS

LANES = 8
"""Lanes of a vector; a CPU with narrower ones takes several."""


def _int(number: int, kind: Any = INT64) -> Any:
    return ir.Constant(kind, number)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), lanes))


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight, transposed: pairs of elements, then of pairs, then of halves change places."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [_shuffle(builder, *rows[i : i + 2], lanes) for i in range(0, 8, 2) for lanes in (low, high)]
    first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = [
        _shuffle(builder, pairs[i + j], pairs[i + j + 2], lanes)
        for i in (0, 4)
        for j in (0, 1)
        for lanes in (first, second)
    ]
    halves = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [_shuffle(builder, fours[i], fours[i + 4], lanes) for lanes in halves for i in range(4)]


@intrinsic  # type: ignore[untyped-decorator]
def transpose_panel(typingctx: Any, rows: Any, columns: Any, panel: Any) -> Any:
    """Write the first `columns` columns, rounded up to LANES, of flat rows[PANEL_ROWS, PANEL_COLUMNS] as a panel."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, count, target = args
        vector = ir.VectorType(FLOAT, LANES)
        start, to = (element(context, builder, sig.args[i], array, _int(0)) for i, array in ((0, source), (2, target)))
        with cgutils.for_range_slice(builder, _int(0), count, _int(LANES)) as (column, _):
            for part in range(0, PANEL_ROWS, LANES):
                loaded = []
                for row in range(part, part + LANES):
                    place = builder.gep(start, [builder.add(column, _int(row * PANEL_COLUMNS))])
                    loaded.append(builder.load(builder.bitcast(place, vector.as_pointer()), align=4))
                for i, values in enumerate(_transpose(builder, loaded)):
                    at = builder.add(builder.mul(column, _int(PANEL_ROWS)), _int(PANEL_ROWS * i + part))
                    builder.store(values, builder.bitcast(builder.gep(to, [at]), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(rows, types.int64, panel), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply_panel_f32(
    typingctx: Any,
    panel: Any,
    columns: Any,
    x: Any,
    first: Any,
    t: Any,
    last: Any,
    tokens: Any,
    out: Any,
    at: Any,
    stride: Any,
    more: Any,
) -> Any:
    """Dot products of a panel with columns [first, first + columns) of `tokens` (a literal) rows of x from t on.

    Token t + i's PANEL_ROWS results go to flat out from at + i · stride on; if `more`, they are added there. Past token
    `last`, that token is computed again.
    """
    count = tokens.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weights, length, inputs, begin, token, final, _, target, to, step, again = args
        vector = ir.VectorType(FLOAT, LANES)
        width = cgutils.unpack_tuple(
            builder, cgutils.create_struct_proxy(sig.args[2])(context, builder, inputs).shape
        )[1]
        rows, places = [], []
        for i in range(count):
            own = builder.add(token, _int(i))
            own = builder.select(builder.icmp_signed("<", own, final), own, final)
            start = builder.add(builder.mul(own, width), begin)
            rows.append(element(context, builder, sig.args[2], inputs, start))
            offset = builder.add(to, builder.mul(builder.sub(own, token), step))
            for part in range(0, PANEL_ROWS, LANES):
                place = element(context, builder, sig.args[7], target, builder.add(offset, _int(part)))
                places.append(builder.bitcast(place, vector.as_pointer()))
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [cgutils.alloca_once(builder, vector) for _ in places]
        for place in sums:
            builder.store(zero, place)
        packed = element(context, builder, sig.args[0], weights, _int(0))
        parts = PANEL_ROWS // LANES
        with cgutils.for_range(builder, length) as loop:
            column = builder.gep(packed, [builder.mul(loop.index, _int(PANEL_ROWS))])
            values = [
                builder.load(
                    builder.bitcast(builder.gep(column, [_int(LANES * part)]), vector.as_pointer()), align=4
                )
                for part in range(parts)
            ]
            for i, row in enumerate(rows):
                one = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), builder.load(builder.gep(row, [loop.index])), _int(0, INT32)
                )
                number = _shuffle(builder, one, one, [0] * LANES)
                for value, place in zip(values, sums[parts * i : parts * i + parts], strict=True):
                    product = builder.fmul(number, value, flags=("contract",))
                    builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)
        # all are read before the first is written, because the last token may be there several times
        before = [builder.select(again, builder.load(place, align=4), zero) for place in places]
        for place, total, old in zip(places, sums, before, strict=True):
            builder.store(builder.fadd(builder.load(total), old), place, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.void(panel, index, x, index, index, index, tokens, out, index, index, types.boolean), codegen
