"""Rows of GGUF blocks on a CPU times activations that are rounded to int8: integer products, a run of numbers at a
time, then the run's scales.

A block's numbers are scale · (q - offset) or scale · q + least, with q from 0 to 255. Such a q, and a signed number of
x, is what `vpdpbusd` takes (AVX512-VNNI, AVX-VNNI): it adds four products of bytes to each 32-bit lane. Offsets are
taken off through the sums of runs that come with x, in integers, so exactly; elsewhere than on a CPU with that
instruction the same sums are made of 16-bit products.

One token: `dot_blocks_int8`, a row at a time, as the blocks come from memory. Several: `unpack_blocks` and `interleave`
turn PANEL rows into a panel, four numbers of each row side by side, so that one instruction multiplies four numbers of
a token with those of all PANEL rows; `multiply_panel` uses it for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quantization.types import ACTIVATION_QUANT, TYPE_TRAITS, VEC_DOT_TYPE
from .intrinsics import FLOAT, INT16, INT32, INT64, add_lanes, cpu_features, element
from .vecdot import INT8, NAMES_OF_KINDS, Block, for_blocks, locator, six_bit_factors

PANEL = 16
"""Rows of a panel: 32-bit lanes of the widest register."""
TOKENS = 8
"""Tokens that a panel is multiplied with at once: their sums, integers and floats, fill half of the registers."""
TOGETHER = 32
"""Numbers that are unpacked at once."""
STRETCH = 256
"""Numbers of a row that are unpacked before they are interleaved with other rows'."""

ZERO_POINTS = {name: 128 if TYPE_TRAITS[name].bits == 8 else TYPE_TRAITS[name].zero_point for name in VEC_DOT_TYPE}
"""Block type → the unsigned quant that means 0: the decoders here add 128 to signed ones."""
SCALE_GROUPS = {name: TYPE_TRAITS[name].scale_group for name in VEC_DOT_TYPE}
"""Block type → elements that share a scale."""


@dataclass(frozen=True)
class _Part:
    """TOGETHER numbers of a block: index of the first, <32 x i8> without sign, a scale a run, the least number."""

    first: int
    numbers: Any
    scales: list[Any]
    least: Any = None


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def _int(number: int, kind: Any = INT64) -> Any:
    return ir.Constant(kind, number)


def _same(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count)


def _lanes(lanes: Any) -> Any:
    return ir.Constant(_vector(INT32, len(lanes)), list(lanes))


def _joined(builder: Any, *vectors: Any) -> Any:
    """Two vectors behind each other."""
    return builder.shuffle_vector(*vectors, _lanes(range(2 * vectors[0].type.count)))


def _spread(builder: Any, number: Any, count: int) -> Any:
    one = builder.insert_element(ir.Constant(_vector(number.type, count), ir.Undefined), number, _int(0, INT32))
    return builder.shuffle_vector(one, one, _lanes([0] * count))


# Decoders: the parts of a block.


def _q8_0(block: Block) -> Iterator[_Part]:
    numbers = block.load("qs", _vector(INT8, 32))
    yield _Part(0, block.builder.xor(numbers, _same(numbers.type, -128)), [block.half("d")])


def _nibbles(block: Block) -> Any:
    packed = block.load("qs", _vector(INT8, 16))
    return _joined(block.builder, block.bits(packed, 0, 15), block.builder.lshr(packed, _same(packed.type, 4)))


def _q4_0(block: Block) -> Iterator[_Part]:
    yield _Part(0, _nibbles(block), [block.half("d")])


def _q4_1(block: Block) -> Iterator[_Part]:
    yield _Part(0, _nibbles(block), [block.half("d")], block.half("m"))


def _q4_k(block: Block) -> Iterator[_Part]:
    scales, least = six_bit_factors(block)
    for run in range(8):
        packed = block.load("qs", _vector(INT8, 32), 32 * (run // 2))
        numbers = block.builder.lshr(packed, _same(packed.type, 4)) if run % 2 else block.bits(packed, 0, 15)
        scale, smallest = (block.builder.extract_element(vector, _int(run, INT32)) for vector in (scales, least))
        yield _Part(32 * run, numbers, [scale], smallest)


def _q6_k(block: Block) -> Iterator[_Part]:
    builder, byte = block.builder, _vector(INT8, 32)
    scales = block.times(block.floats(block.octets("scales", signed=True)), block.spread(block.half("d")))
    for part in range(8):
        half, quarter = divmod(part, 4)
        low = block.bits(block.load("ql", byte, 64 * half + 32 * (quarter % 2)), 4 * (quarter // 2), 15)
        high = block.bits(block.load("qh", byte, 32 * half), 2 * quarter, 3)
        numbers = builder.or_(low, builder.shl(high, _same(byte, 4)))
        yield _Part(32 * part, numbers, [builder.extract_element(scales, _int(2 * part + i, INT32)) for i in range(2)])


_DECODERS: dict[str, Callable[[Block], Iterator[_Part]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}


# Integer products


def _add_products(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """sums[i] + the four products of bytes 4i to 4i + 3, the first factors without sign, the second with it."""
    count, features = sums.type.count, cpu_features()
    if count == 16 and not features.get("avx512vnni"):
        halves = [
            [
                builder.shuffle_vector(v, v, _lanes(range(v.type.count // 2 * h, v.type.count // 2 * (h + 1))))
                for h in (0, 1)
            ]
            for v in (sums, unsigned, signed)
        ]
        return _joined(builder, *(_add_products(builder, *(half[h] for half in halves)) for h in (0, 1)))
    if (features.get("avx512vnni") and features.get("avx512vl")) or features.get("avxvnni"):
        name = f"llvm.x86.avx512.vpdpbusd.{32 * count}"
        kind = ir.FunctionType(sums.type, [sums.type] * 3)
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [sums, *(builder.bitcast(vector, sums.type) for vector in (unsigned, signed))])
    words = _vector(INT16, 2 * count)
    a, b = (builder.bitcast(vector, words) for vector in (unsigned, signed))
    eight, sixteen = _same(words, 8), _same(sums.type, 16)
    for first, second in (
        (builder.and_(a, _same(words, 255)), builder.ashr(builder.shl(b, eight), eight)),
        (builder.lshr(a, eight), builder.ashr(b, eight)),
    ):  # 255 · -128 still fits 16 bits, the sum of two products does not
        pairs = builder.bitcast(builder.mul(first, second), sums.type)
        sums = builder.add(sums, builder.ashr(builder.shl(pairs, sixteen), sixteen))
        sums = builder.add(sums, builder.ashr(pairs, sixteen))
    return sums


class _Activations:
    """Int8 activations of one token, while code that reads them is written."""

    def __init__(
        self, context: Any, builder: Any, kinds: Any, arrays: Any, token: Any, columns: Any, name: str
    ) -> None:
        self.builder, self.name = builder, name
        group, run, _ = ACTIVATION_QUANT[VEC_DOT_TYPE[name]]
        self.per_group, self.per_sum = group, run
        self._starts = [
            element(context, builder, kind, array, builder.mul(token, builder.udiv(columns, _int(every))))
            for kind, array, every in zip(kinds, arrays, (1, group, run), strict=True)
        ]

    def _load(self, which: int, index: Any, kind: Any) -> Any:
        at = self.builder.gep(self._starts[which], [index])
        return self.builder.load(self.builder.bitcast(at, kind.as_pointer()), align=1)

    def numbers(self, index: Any, kind: Any) -> Any:
        """What lies from number `index` on, as an LLVM type."""
        return self._load(0, index, kind)

    def scale(self, index: Any) -> Any:
        """The scale of number `index`."""
        return self._load(1, self.builder.udiv(index, _int(self.per_group)), FLOAT)

    def offset(self, index: Any) -> Any:
        """What is to be added to a run's integer product, because the weight's numbers have an offset."""
        total = self._load(2, self.builder.udiv(index, _int(self.per_sum)), INT32)
        return self.builder.mul(total, _int(-ZERO_POINTS[self.name], INT32))

    def sum(self, index: Any) -> Any:
        """The sum of the TOGETHER numbers from `index` on, times their scale: a least number's factor."""
        at = self.builder.udiv(index, _int(self.per_sum))
        if VEC_DOT_TYPE[self.name] == "q8_1":
            return self._load(2, at, FLOAT)
        both = [self._load(2, self.builder.add(at, _int(half)), INT32) for half in range(TOGETHER // self.per_sum)]
        total = both[0] if len(both) == 1 else self.builder.add(*both)
        return self.builder.fmul(self.builder.sitofp(total, FLOAT), self.scale(index), flags=("contract",))


def _times_plus(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _places(builder: Any, kind: Any, count: int) -> list[Any]:
    """Memory for sums, 0 at first; LLVM keeps it in registers."""
    zero = ir.Constant(kind, None if kind != FLOAT else 0.0)
    places = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    for place in places:
        builder.store(zero, place)
    return places


@intrinsic  # type: ignore[untyped-decorator]
def dot_blocks_int8(typingctx: Any, weights: Any, row: Any, xq: Any, xs: Any, sums: Any, t: Any) -> Any:
    """weights[row] · x[t], x as `quantize_…` of the weight's type makes it, as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, r, *arrays, token = args
        name, lanes = NAMES_OF_KINDS[sig.args[0].dtype], _vector(INT32, 8)
        blocks = cgutils.unpack_tuple(builder, cgutils.create_struct_proxy(sig.args[0])(context, builder, array).shape)[
            1
        ]
        columns = builder.mul(blocks, _int(TYPE_TRAITS[name].block_size))
        x = _Activations(context, builder, sig.args[2:5], arrays, token, columns, name)
        totals = _places(builder, _vector(FLOAT, 8), 2)
        (rest,) = _places(builder, FLOAT, 1)
        which = 0

        def body(index: Any, block: Block) -> None:
            nonlocal which
            start = builder.mul(index, _int(TYPE_TRAITS[name].block_size))
            for part in _DECODERS[name](block):
                first = builder.add(start, _int(part.first))
                count = len(part.scales)
                dots = ir.Constant(lanes, None)
                for run in range(count if ZERO_POINTS[name] else 0):
                    offset = x.offset(builder.add(first, _int(run * SCALE_GROUPS[name])))
                    dots = builder.insert_element(dots, offset, _int(run * 8 // count, INT32))
                dots = _add_products(builder, dots, part.numbers, x.numbers(first, _vector(INT8, TOGETHER)))
                scale = x.scale(first)
                factors = [
                    _spread(builder, builder.fmul(s, scale, flags=("contract",)), 8 // count) for s in part.scales
                ]
                factor = factors[0] if count == 1 else _joined(builder, *factors)
                place = totals[which % 2]
                builder.store(
                    _times_plus(builder, builder.sitofp(dots, _vector(FLOAT, 8)), factor, builder.load(place)), place
                )
                if part.least is not None:
                    builder.store(_times_plus(builder, part.least, x.sum(first), builder.load(rest)), rest)
                which += 1

        locate = locator(context, builder, sig.args[0], array, builder.mul(r, blocks))
        for_blocks(builder, name, blocks, locate, body)
        return builder.fadd(add_lanes(builder, builder.fadd(*map(builder.load, totals))), builder.load(rest))

    return types.float32(weights, types.int64, xq, xs, sums, types.int64), codegen


# Panels. `stage`, `panel`, `scales` and `least` are float32 arrays, the first two for their bytes.


@intrinsic  # type: ignore[untyped-decorator]
def unpack_blocks(
    typingctx: Any, weights: Any, row: Any, begin: Any, count: Any, lane: Any, stage: Any, scales: Any, least: Any
) -> Any:
    """Blocks [begin, begin + count) of a row, of at most STRETCH numbers, for one lane of a panel.

    Their numbers go to row `lane` of `stage` [PANEL, STRETCH bytes], the factors of run i to [i, lane] of `scales` and
    `least` [runs, PANEL].
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, r, first_block, number, at, *places = args
        name = NAMES_OF_KINDS[sig.args[0].dtype]
        blocks = cgutils.unpack_tuple(builder, cgutils.create_struct_proxy(sig.args[0])(context, builder, array).shape)[
            1
        ]
        start = builder.add(builder.mul(r, blocks), first_block)
        zero = _int(0)
        bytes_, *factors = (
            element(context, builder, kind, place, zero) for kind, place in zip(sig.args[5:], places, strict=True)
        )
        bytes_ = builder.gep(builder.bitcast(bytes_, INT8.as_pointer()), [builder.mul(at, _int(STRETCH))])
        run_of_block = builder.mul(first_block, _int(TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]))

        def body(index: Any, block: Block) -> None:
            base = builder.mul(index, _int(TYPE_TRAITS[name].block_size))
            runs = builder.add(
                run_of_block, builder.mul(index, _int(TYPE_TRAITS[name].block_size // SCALE_GROUPS[name]))
            )
            for part in _DECODERS[name](block):
                to = builder.gep(bytes_, [builder.add(base, _int(part.first))])
                builder.store(part.numbers, builder.bitcast(to, part.numbers.type.as_pointer()), align=1)
                for field, values in zip(factors, (part.scales, [part.least]), strict=True):
                    for i, value in enumerate(values if values != [None] else []):
                        run = builder.add(runs, _int(part.first // SCALE_GROUPS[name] + i))
                        builder.store(value, builder.gep(field, [builder.add(builder.mul(run, _int(PANEL)), at)]))

        for_blocks(builder, name, number, locator(context, builder, sig.args[0], array, start), body)
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, index, index, index, index, stage, scales, least), codegen


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """PANEL vectors of eight → eight of PANEL: doubled at first, then always two shuffled into two."""
    parts = [
        (_joined(builder, *rows[i : i + 2]), [(i + j, k) for j in (0, 1) for k in range(8)]) for i in range(0, PANEL, 2)
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
                wanted = sorted(label for label in labels if start <= label[1] < start + width)
                lanes = _lanes([labels.index(label) for label in wanted])
                parts.append((builder.shuffle_vector(first, second, lanes), wanted))
    return [vector for vector, labels in sorted(parts, key=lambda part: part[1][0][1])]


@intrinsic  # type: ignore[untyped-decorator]
def interleave(typingctx: Any, stage: Any, count: Any, panel: Any, begin: Any) -> Any:
    """`count` times TOGETHER numbers of all rows of a stage, into a panel from number `begin` of its rows on.

    A panel is [K / 4, PANEL, 4 bytes].
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, number, target, first = args
        eight, whole = _vector(INT32, 8), _vector(INT32, PANEL)
        start, to = (
            builder.bitcast(element(context, builder, kind, array, _int(0)), INT8.as_pointer())
            for kind, array in ((sig.args[0], source), (sig.args[2], target))
        )
        to = builder.gep(to, [builder.mul(first, _int(PANEL))])
        with cgutils.for_range(builder, number) as loop:
            at = builder.mul(loop.index, _int(TOGETHER))
            rows = []
            for row in range(PANEL):
                place = builder.gep(start, [builder.add(at, _int(row * STRETCH))])
                rows.append(builder.load(builder.bitcast(place, eight.as_pointer()), align=4))
            for i, vector in enumerate(_transpose(builder, rows)):
                place = builder.gep(to, [builder.add(builder.mul(at, _int(PANEL)), _int(4 * PANEL * i))])
                builder.store(vector, builder.bitcast(place, whole.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(stage, types.int64, panel, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def multiply_panel(
    typingctx: Any,
    weights: Any,
    panel: Any,
    scales: Any,
    least: Any,
    xq: Any,
    xs: Any,
    sums: Any,
    t: Any,
    last: Any,
    result: Any,
) -> Any:
    """The products of a panel's rows with TOKENS tokens from t on, none after `last`, to float32 `result` [TOKENS,
    PANEL]. `weights` tells the type; past `last` that token is done again.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, *factors, xq_, xs_, sums_, first, final, out = args
        name = NAMES_OF_KINDS[sig.args[0].dtype]
        blocks = cgutils.unpack_tuple(builder, cgutils.create_struct_proxy(sig.args[0])(context, builder, array).shape)[
            1
        ]
        columns = builder.mul(blocks, _int(TYPE_TRAITS[name].block_size))
        floats, integers, octets = _vector(FLOAT, PANEL), _vector(INT32, PANEL), _vector(INT8, 4 * PANEL)
        packed, scale_of, least_of = (
            element(context, builder, kind, place, _int(0)) for kind, place in zip(sig.args[1:4], factors, strict=True)
        )

        def vector_at(start: Any, index: Any, kind: Any) -> Any:
            return builder.load(builder.bitcast(builder.gep(start, [index]), kind.as_pointer()), align=4)

        tokens = []
        for k in range(TOKENS):
            token = builder.add(first, _int(k))
            token = builder.select(builder.icmp_signed("<", token, final), token, final)
            tokens.append(_Activations(context, builder, sig.args[4:7], (xq_, xs_, sums_), token, columns, name))
        totals = _places(builder, floats, TOKENS)
        with cgutils.for_range(builder, builder.udiv(columns, _int(SCALE_GROUPS[name]))) as loop:
            start = builder.mul(loop.index, _int(SCALE_GROUPS[name]))
            dots = [
                _spread(builder, x.offset(start), PANEL) if ZERO_POINTS[name] else ir.Constant(integers, None)
                for x in tokens
            ]
            for k in range(0, SCALE_GROUPS[name], 4):
                index = builder.add(start, _int(k))
                # PANEL rows, four numbers of each: as many floats of the panel as numbers of a row, times PANEL / 4
                numbers = vector_at(packed, builder.mul(index, _int(PANEL // 4)), octets)
                for i, x in enumerate(tokens):
                    four = builder.bitcast(_spread(builder, x.numbers(index, INT32), PANEL), octets)
                    dots[i] = _add_products(builder, dots[i], numbers, four)
            at = builder.mul(loop.index, _int(PANEL))
            scale = vector_at(scale_of, at, floats)
            smallest = vector_at(least_of, at, floats) if TYPE_TRAITS[name].has_min else None
            for x, place, dot in zip(tokens, totals, dots, strict=True):
                total = builder.load(place)
                product = builder.fmul(builder.sitofp(dot, floats), scale, flags=("contract",))
                total = _times_plus(builder, product, _spread(builder, x.scale(start), PANEL), total)
                if smallest is not None:
                    total = _times_plus(builder, smallest, _spread(builder, x.sum(start), PANEL), total)
                builder.store(total, place)
        for k, place in enumerate(totals):
            to = builder.bitcast(element(context, builder, sig.args[9], out, _int(k * PANEL)), floats.as_pointer())
            builder.store(builder.load(place), to, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.void(weights, panel, scales, least, xq, xs, sums, index, index, result), codegen


# Rounding activations


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def round_to_int8(typingctx: Any, x: Any, i: Any, factor: Any, out: Any, j: Any, count: Any) -> Any:
    """x · factor, rounded to integers, ties to even, of `count` (16 or 32, a literal) numbers from flat index i of
    float32 x to int8 out from j; returns their sum, an int32. All are to be within ±127.5.

    A number that is added and taken off again does it, so neither may be reordered: for an `exact_device` to call.
    """
    width = count.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, at, times, target, to, _ = args
        floats = _vector(FLOAT, width)
        start = element(context, builder, sig.args[0], source, at)
        numbers = builder.load(builder.bitcast(start, floats.as_pointer()), align=4)
        shift = ir.Constant(floats, [1.5 * 2.0**23] * width)
        scaled = builder.fmul(numbers, _spread(builder, times, width))
        rounded = builder.fsub(builder.fadd(scaled, shift), shift)
        rounded = builder.fptosi(rounded, _vector(INT32, width))
        small = builder.trunc(rounded, _vector(INT8, width))
        place = element(context, builder, sig.args[3], target, to)
        builder.store(small, builder.bitcast(place, small.type.as_pointer()), align=1)
        return add_lanes(builder, rounded)

    return types.int32(x, types.int64, types.float32, out, types.int64, count), codegen


@intrinsic  # type: ignore[untyped-decorator]
def largest_bits(typingctx: Any, x: Any, i: Any) -> Any:
    """The bits of the largest magnitude of 32 numbers from flat index i of float32 x; of a NaN's if there is one.

    Magnitudes compare as integers as their floats do, and NaNs have more than infinity's bits.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = _vector(INT32, 32)
        start = element(context, builder, sig.args[0], *args)
        numbers = builder.load(builder.bitcast(start, bits.as_pointer()), align=4)
        magnitudes = builder.and_(numbers, _same(bits, 0x7FFFFFFF))
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
