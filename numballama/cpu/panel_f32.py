"""Panels of float32 weights, for prompts on CPUs with 16 vector registers.

A panel is [columns, PANEL_ROWS]: the elements of PANEL_ROWS rows of a weight, column by column. A column is two vectors
of AVX, and an element of x is multiplied with both. Six tokens make 12 sums, which stay in registers with the column
and the element: 8 loads feed 12 multiply-adds, and no sum goes across lanes. A tile of whole rows of both, as
`intrinsics.tile` has it, would need 16 sums, and there are 16 registers in all.

Each sum adds its products in the order of the columns, whatever the number of tokens and the panel's length.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import TYPE_TRAITS
from .intrinsics import FLOAT, INT32, INT64, element, load_floats, prefetch, to_float
from .panel_bytes import SCALE_GROUPS, ZERO_POINTS, transpose
from .tiling import PANEL_COLUMNS, PANEL_ROWS
from .vecdot import TYPE_NAMES

LANES = 8
"""Lanes of a vector; a CPU with narrower ones takes several."""
UNROLLED = 4
"""Columns of a panel that a turn of the loop multiplies."""


def _int(number: int, kind: Any = INT64) -> Any:
    return ir.Constant(kind, number)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), lanes))


def _store(builder: Any, panel: Any, column: Any, part: int, values: Any) -> None:
    """Write LANES rows of a column of a panel."""
    at = builder.add(builder.mul(column, _int(PANEL_ROWS)), _int(part))
    builder.store(values, builder.bitcast(builder.gep(panel, [at]), values.type.as_pointer()), align=4)


@intrinsic  # type: ignore[untyped-decorator]
def fill_panel_plain(
    typingctx: Any, weights: Any, row: Any, last: Any, first: Any, columns: Any, ahead: Any, panel: Any
) -> Any:
    """Write columns [first, first + columns) of rows from `row` on as a panel; past row `last`, it is taken again.

    `weights` holds float32, or 16-bit floats as `as_f32` has them. `ahead` is the flat index of what is needed next, on
    PANEL_ROWS rows: it is prefetched, because this reads pieces of rows, which the hardware does not foresee.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, at, final, begin, count, following, target = args
        kind = sig.args[0].dtype
        width = cgutils.unpack_tuple(builder, cgutils.create_struct_proxy(sig.args[0])(context, builder, array).shape)[
            1
        ]
        to = element(context, builder, sig.args[6], target, _int(0))
        starts, later = [], []
        for i in range(PANEL_ROWS):
            own = builder.add(at, _int(i))
            own = builder.select(builder.icmp_signed("<", own, final), own, final)
            starts.append(element(context, builder, sig.args[0], array, builder.add(builder.mul(own, width), begin)))
            index = builder.add(following, builder.mul(_int(i), width))
            later.append(element(context, builder, sig.args[0], array, index))
        whole = builder.and_(count, _int(-LANES))
        # eight rows, then the others: a cache keeps eight lines that are a power of two apart
        for part in range(0, PANEL_ROWS, LANES):
            with cgutils.for_range_slice(builder, _int(0), whole, _int(LANES)) as (column, _):
                rows = []
                for i in range(part, part + LANES):
                    rows.append(load_floats(builder, kind, builder.gep(starts[i], [column]), LANES))
                    prefetch(builder, builder.gep(later[i], [column]), 2)
                for i, values in enumerate(transpose(builder, rows)):
                    _store(builder, to, builder.add(column, _int(i)), part, values)
        with cgutils.for_range_slice(builder, whole, count, _int(1)) as (column, _):
            for i, start in enumerate(starts):
                number = to_float(builder, kind, builder.load(builder.gep(start, [column])))
                place = builder.add(builder.mul(column, _int(PANEL_ROWS)), _int(i))
                builder.store(number, builder.gep(to, [place]))
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, index, index, index, index, index, panel), codegen


@intrinsic  # type: ignore[untyped-decorator]
def expand_panel(typingctx: Any, weights: Any, packed: Any, scales: Any, mins: Any, n: Any, panel: Any) -> Any:
    """Make a panel of a panel of bytes with `n` columns (see `panel_bytes`).

    `weights` gives the block type. An element has the same bits as `vecdot` makes.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, source, *factors, count, target = args
        name = TYPE_NAMES[sig.args[0].dtype]
        size, has_min = SCALE_GROUPS[name], TYPE_TRAITS[name].has_min
        integers, floats = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT, LANES)
        quants, to = (element(context, builder, sig.args[i], array, _int(0)) for i, array in ((1, source), (5, target)))
        scale_at, min_at = (
            element(context, builder, kind, array, _int(0)) for kind, array in zip(sig.args[2:4], factors, strict=True)
        )

        def load(start: Any, index: Any, part: int, kind: Any) -> Any:
            place = builder.gep(start, [builder.add(builder.mul(index, _int(PANEL_ROWS)), _int(part))])
            return builder.load(builder.bitcast(place, kind.as_pointer()), align=4)

        with cgutils.for_range_slice(builder, _int(0), count, _int(size)) as (column, _):
            group = builder.udiv(column, _int(size))
            for part in range(0, PANEL_ROWS, LANES):
                scale = load(scale_at, group, part, floats)
                minimum = load(min_at, group, part, floats) if has_min else None
                for start in range(0, size, 4):
                    at = builder.udiv(builder.add(column, _int(start)), _int(4))
                    four = load(quants, at, part, integers)
                    for i in range(4):
                        fields = builder.lshr(four, ir.Constant(integers, [8 * i] * LANES)) if i else four
                        if i < 3:
                            fields = builder.and_(fields, ir.Constant(integers, [255] * LANES))
                        if ZERO_POINTS[name]:
                            fields = builder.sub(fields, ir.Constant(integers, [ZERO_POINTS[name]] * LANES))
                        values = builder.fmul(builder.sitofp(fields, floats), scale, flags=("contract",))
                        if minimum is not None:
                            values = builder.fadd(values, minimum, flags=("contract",))
                        _store(builder, to, builder.add(column, _int(start + i)), part, values)
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, packed, scales, mins, index, panel), codegen


@intrinsic  # type: ignore[untyped-decorator]
def transpose_panel(typingctx: Any, rows: Any, columns: Any, panel: Any) -> Any:
    """Write the first `columns` columns, rounded up to LANES, of flat rows[PANEL_ROWS, PANEL_COLUMNS] as a panel."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, count, target = args
        start, to = (element(context, builder, sig.args[i], array, _int(0)) for i, array in ((0, source), (2, target)))
        with cgutils.for_range_slice(builder, _int(0), count, _int(LANES)) as (column, _):
            for part in range(0, PANEL_ROWS, LANES):
                rows = []
                for row in range(part, part + LANES):
                    place = builder.gep(start, [builder.add(column, _int(row * PANEL_COLUMNS))])
                    rows.append(load_floats(builder, types.float32, place, LANES))
                for i, values in enumerate(transpose(builder, rows)):
                    _store(builder, to, builder.add(column, _int(i)), part, values)
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

    Token t + i's PANEL_ROWS results go to flat out from at + i · stride on; if `more`, sums go on from what is there.
    Past token `last`, that token is computed again.
    """
    count = tokens.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weights, length, inputs, begin, token, final, _, target, to, step, again = args
        vector = ir.VectorType(FLOAT, LANES)
        width = cgutils.unpack_tuple(builder, cgutils.create_struct_proxy(sig.args[2])(context, builder, inputs).shape)[
            1
        ]
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
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.select(again, builder.load(place, align=4), zero), total)
        packed = element(context, builder, sig.args[0], weights, _int(0))
        parts = PANEL_ROWS // LANES

        def add_column(at: Any) -> None:
            column = builder.gep(packed, [builder.mul(at, _int(PANEL_ROWS))])
            values = [
                builder.load(builder.bitcast(builder.gep(column, [_int(LANES * part)]), vector.as_pointer()), align=4)
                for part in range(parts)
            ]
            for i, row in enumerate(rows):
                one = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), builder.load(builder.gep(row, [at])), _int(0, INT32)
                )
                number = _shuffle(builder, one, one, [0] * LANES)
                for value, place in zip(values, sums[parts * i : parts * i + parts], strict=True):
                    product = builder.fmul(number, value, flags=("contract",))
                    builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)

        whole = builder.and_(length, _int(-UNROLLED))
        with cgutils.for_range_slice(builder, _int(0), whole, _int(UNROLLED)) as (first, _):
            for i in range(UNROLLED):
                add_column(builder.add(first, _int(i)))
        with cgutils.for_range_slice(builder, whole, length, _int(1)) as (first, _):
            add_column(first)
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.void(panel, index, x, index, index, index, tokens, out, index, index, types.boolean), codegen
