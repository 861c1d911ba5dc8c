"""Tensor cores: tiles that the lanes of a warp hold together, loaded by ldmatrix and multiplied by mma.

Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of a 16 × 8 tile of float32, lane l holds elements
(l / 4, 2 (l mod 4)) and the one to its right, then the same two of the row 8 below: four elements, one after the other
in a tuple. Tuples of float32 hold several such tiles.

Swizzle: 16-bit tiles lie in shared memory in rows of 128 or 256 bytes. Chunk c (16 bytes) of row r is stored at place
c xor (r mod 8), so the eight rows of one column of chunks lie in different banks. Rows begin at multiples of 128, so
moving by two chunks is an xor of the whole address.

Of a `memory` argument, a pointer, only the element type matters: uint16 for float16, int16 for bfloat16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .kernels.params import GEMM_STAGED_BYTES as STAGED_BYTES
from .lowering import F32, I32, VOID, as_integer, call_asm, compiling_for, fma, rounded_to_16
from .quant_traits import PER_16_BYTES


def _parts(builder: Any, kind: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, i) for i in range(kind.count)]


def _short(context: Any, builder: Any, value: Any, source_type: Any) -> Any:
    return as_integer(context, builder, value, source_type, types.uint32)


def _ldmatrix_x4(builder: Any, where: Any, offset: int, transposed: bool = False) -> list[Any]:
    """ldmatrix.x4: four 8 × 8 matrices of 16-bit elements. Lane l gives the address of row l mod 8 of matrix l / 8."""
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"
    loaded = call_asm(builder, ir.LiteralStructType([I32] * 4), text, "=r,=r,=r,=r,r,~{memory}", [where])
    return [builder.extract_value(loaded, i) for i in range(4)]


def _halves_of_bfloats(builder: Any, word: Any) -> Any:
    """A word of two bfloat16 as one of two float16.

    One asm block, so that LLVM keeps the packed words in registers across the loop, not the unpacked halves.
    """
    text = (
        "{.reg .b32 t; .reg .f32 a, b; .reg .b16 h, g; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xffff0000; "
        "mov.b32 b, t; cvt.rn.f16.f32 h, a; cvt.rn.f16.f32 g, b; mov.b32 $0, {h, g};}"
    )
    return call_asm(builder, I32, text, "=r,r", [word])


def _mma_m16n8k16(builder: Any, name: str, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    """mma.m16n8k16: c + a · b of tiles 16 × 16 and 16 × 8. Before sm_80 it is two m16n8k8, with bfloat16 converted to
    float16: exact for magnitudes from 2^-14 to 2^16, off by at most 2^-25 below.
    """
    result = ir.LiteralStructType([F32] * 4)
    if compiling_for() >= (8, 0):
        kind = "bf16" if name == "int16" else "f16"
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};"
        )
        summed = call_asm(builder, result, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *c])
        return [builder.extract_value(summed, i) for i in range(4)]
    text = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};"
    for i in range(2):
        words = [a[2 * i], a[2 * i + 1], b[i]]
        if name == "int16":
            words = [_halves_of_bfloats(builder, word) for word in words]
        summed = call_asm(builder, result, text, "=f,=f,=f,=f,r,r,r,f,f,f,f", [*words, *c])
        c = [builder.extract_value(summed, i) for i in range(4)]
    return c


def _pack(builder: Any, name: str, low: Any, high: Any) -> Any:
    """cvt.rn: two float32 rounded to nearest even to float16 ("uint16") or bfloat16, packed in a word."""
    if compiling_for() >= (8, 0):
        kind = "f16x2" if name == "uint16" else "bf16x2"
        return call_asm(builder, I32, f"cvt.rn.{kind}.f32 $0, $2, $1;", "=r,f,f", [low, high])
    halves = [builder.zext(rounded_to_16(builder, name, x), I32) for x in (low, high)]
    return builder.or_(halves[0], builder.shl(halves[1], ir.Constant(I32, 16)))


@intrinsic
def cvt_rn_x2(typingctx, memory, low, high):  # type: ignore[no-untyped-def]
    """cvt.rn.f16x2 or bf16x2: two float32 rounded to the 16-bit type of `memory`, packed in a word."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _pack(builder, memory.dtype.name, args[1], args[2])

    return types.uint32(memory, types.float32, types.float32), codegen


@intrinsic
def st_global_v2_u32(typingctx, where, a, b):  # type: ignore[no-untyped-def]
    """st.global.v2.u32: two words to an 8-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        call_asm(builder, VOID, "st.global.v2.u32 [$0], {$1, $2};", "l,r,r,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32, types.uint32), codegen


@intrinsic
def st_global_as(typingctx, memory, where, x):  # type: ignore[no-untyped-def]
    """Store a float32 in the type of `memory`, float32 or of 16 bits, to a global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if memory.dtype.name == "float32":
            call_asm(builder, VOID, "st.global.f32 [$0], $1;", "l,f,~{memory}", args[1:])
        else:
            text = "{.reg .b16 low, high; mov.b32 {low, high}, $1; st.global.b16 [$0], low;}"
            call_asm(builder, VOID, text, "l,r,~{memory}", [args[1], _pack(builder, memory.dtype.name, *args[2:] * 2)])
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.float32), codegen


@intrinsic
def st_global_eight(typingctx, memory, where, elements):  # type: ignore[no-untyped-def]
    """Store eight float32 in the type of `memory`, float32 or of 16 bits, from a 16-byte aligned global address on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at, parts = args[1], _parts(builder, elements, args[2])
        if memory.dtype.name == "float32":
            call_asm(builder, VOID, "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f,~{memory}", [at, *parts[:4]])
            call_asm(
                builder, VOID, "st.global.v4.f32 [$0+16], {$1, $2, $3, $4};", "l,f,f,f,f,~{memory}", [at, *parts[4:]]
            )
        else:
            words = [_pack(builder, memory.dtype.name, parts[i], parts[i + 1]) for i in range(0, 8, 2)]
            call_asm(builder, VOID, "st.global.v4.u32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r,~{memory}", [at, *words])
        return context.get_dummy_value()

    return types.void(memory, types.int64, elements), codegen


@intrinsic
def st_shared_v4_u32(typingctx, where, a, b, c, d):  # type: ignore[no-untyped-def]
    """st.shared.v4.u32: four words to a 16-byte aligned shared address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        args = [_short(context, builder, args[0], where), *args[1:]]
        call_asm(builder, VOID, "st.shared.v4.u32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}", args)
        return context.get_dummy_value()

    return types.void(where, *[types.uint32] * 4), codegen


def _zeros(count: int) -> Any:
    kind = types.UniTuple(types.float32, count)

    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return context.make_tuple(builder, kind, [ir.Constant(F32, 0.0)] * count)

        return kind(), codegen

    return intrinsic(typing)


zeros8, zeros16, zeros32, zeros64, zeros128 = (_zeros(count) for count in (8, 16, 32, 64, 128))
"""Tuples of float32 zeros: the initial value of a lane's sums."""


@intrinsic
def ldmatrix_x4(typingctx, sums, a_at, b_at):  # type: ignore[no-untyped-def]
    """Fragments to multiply 16 columns of two tiles: of A (as many rows as `sums` has), then of B (64 rows).

    Rows have 128 bytes. Lane l's addresses are of row l mod 16 of A, chunk l / 16, and of row (l mod 8) + 8 (l / 16) of
    B, chunk (l / 8) mod 2.
    """
    fours = sums.count // 32

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        a, b = _short(context, builder, args[1], a_at), _short(context, builder, args[2], b_at)
        words = []
        for i in range(fours):
            words += _ldmatrix_x4(builder, a, 2048 * i)
        for i in range(4):
            words += _ldmatrix_x4(builder, b, 2048 * i)
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4 * fours + 16)(sums, a_at, b_at), codegen


@intrinsic
def mma_m16n8k16(typingctx, memory, sums, words):  # type: ignore[no-untyped-def]
    """sums + A · Bᵀ of the fragments that `ldmatrix_x4` loaded, in the 16-bit type of `memory`: 8 tiles per row."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, parts = _parts(builder, sums, args[1]), _parts(builder, words, args[2])
        fours = len(totals) // 32
        b = parts[4 * fours :]
        for i in range(fours):
            for j in range(8):
                at = 4 * (8 * i + j)
                totals[at : at + 4] = _mma_m16n8k16(
                    builder, memory.dtype.name, parts[4 * i : 4 * i + 4], b[2 * j : 2 * j + 2], totals[at : at + 4]
                )
        return context.make_tuple(builder, sums, totals)

    return sums(memory, sums, words), codegen


@intrinsic
def st_shared_sums(typingctx, sums, to):  # type: ignore[no-untyped-def]
    """Store a warp's sums to rows of float32 in shared memory, `STAGED_BYTES` apart; `to` is for the lane's first
    element.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, totals = _short(context, builder, args[1], to), _parts(builder, sums, args[0])
        for i in range(len(totals) // 2):
            row, column = 16 * (i // 16) + 8 * (i % 2), 8 * (i // 2 % 8)
            text = f"st.shared.v2.f32 [$0+{row * STAGED_BYTES + 4 * column}], {{$1, $2}};"
            call_asm(builder, VOID, text, "r,f,f,~{memory}", [where, *totals[2 * i : 2 * i + 2]])
        return context.get_dummy_value()

    return types.void(sums, to), codegen


@intrinsic
def ldmatrix_queries(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """Fragments of 16 queries of head size 64 or 128: twice the elements that a lane has in `sums`."""
    columns = 2 * sums.count

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, words = _short(context, builder, args[1], at), []
        for step in range(columns // 16):
            words += _ldmatrix_x4(builder, builder.xor(where, ir.Constant(I32, 32 * step)), 0)
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, columns // 4)(sums, at), codegen


@intrinsic
def mma_qk(typingctx, memory, queries, keys_at):  # type: ignore[no-untyped-def]
    """Scores Q · Kᵀ of 16 queries and 64 keys, 32 float32 per lane. Lane l's address is of key (l mod 8) + 8 (l / 16),
    chunk (l / 8) mod 2.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words, where = _parts(builder, queries, args[1]), _short(context, builder, args[2], keys_at)
        totals = [ir.Constant(F32, 0.0)] * 32
        steps, name = len(words) // 4, memory.dtype.name
        for step in range(steps):
            moved = builder.xor(where, ir.Constant(I32, 32 * step))
            for j in range(4):
                keys = _ldmatrix_x4(builder, moved, 16 * j * 32 * steps)
                for i in range(2):
                    at = 4 * (2 * j + i)
                    totals[at : at + 4] = _mma_m16n8k16(
                        builder, name, words[4 * step : 4 * step + 4], keys[2 * i : 2 * i + 2], totals[at : at + 4]
                    )
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.float32, 32)(memory, queries, keys_at), codegen


@intrinsic
def mma_pv(typingctx, memory, sums, weights, values_at):  # type: ignore[no-untyped-def]
    """sums + P · V of weights P (16 × 64, as `mma_qk` returns them) and 64 values V. Addresses are as for `mma_qk`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, elements = _parts(builder, sums, args[1]), _parts(builder, weights, args[2])
        where, name = _short(context, builder, args[3], values_at), memory.dtype.name
        row_bytes = 4 * len(totals)
        for step in range(4):
            mine = elements[8 * step : 8 * step + 8]
            a = [_pack(builder, name, mine[2 * i], mine[2 * i + 1]) for i in range(4)]
            for j in range(len(totals) // 8):
                moved = builder.xor(where, ir.Constant(I32, 32 * j))
                values = _ldmatrix_x4(builder, moved, 16 * step * row_bytes, transposed=True)
                for i in range(2):
                    at = 4 * (2 * j + i)
                    totals[at : at + 4] = _mma_m16n8k16(
                        builder, name, a, [values[i], values[i + 2]], totals[at : at + 4]
                    )
        return context.make_tuple(builder, sums, totals)

    return sums(memory, sums, weights, types.int64), codegen


def _by_row(result: Any, function: Any) -> Any:
    """An intrinsic (elements, first, second) → tuple: a lane has elements of two rows, and an argument for each row.

    `function(builder, elements, arguments)` computes it; element i is of row (i / 2) mod 2.
    """

    def typing(typingctx, elements, first, second):  # type: ignore[no-untyped-def]
        kind = elements if result is None else result

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            made = function(builder, _parts(builder, elements, args[0]), args[1:])
            return context.make_tuple(builder, kind, made)

        return kind(elements, types.float32, types.float32), codegen

    return intrinsic(typing)


def _reduce(combine: Any) -> Any:
    def function(builder: Any, elements: list[Any], start: Any) -> list[Any]:
        totals = list(start)
        for i, element in enumerate(elements):
            totals[i // 2 % 2] = combine(builder, totals[i // 2 % 2], element)
        return totals

    return function


def _max(builder: Any, a: Any, b: Any) -> Any:
    return call_asm(builder, F32, "max.f32 $0, $1, $2;", "=f,f,f", [a, b])


def _ex2(builder: Any, x: Any) -> Any:
    # without .ftz it takes three more instructions, for results below 2^-126
    return call_asm(builder, F32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x])


PAIR = types.UniTuple(types.float32, 2)
row_max = _by_row(PAIR, _reduce(_max))
"""row_max(elements, a, b): (maximum of a and the lane's elements in its first row, of b and those in its second)."""
row_sum = _by_row(PAIR, _reduce(lambda builder, a, b: builder.fadd(a, b)))
"""row_sum(elements, a, b): (a + the lane's elements in its first row, b + those in its second)."""
row_exp2 = _by_row(
    None, lambda builder, x, rows: [_ex2(builder, builder.fsub(x[i], rows[i // 2 % 2])) for i in range(len(x))]
)
"""row_exp2(elements, a, b): 2^(element - a) in the first row, 2^(element - b) in the second."""
row_scale = _by_row(None, lambda builder, x, rows: [builder.fmul(x[i], rows[i // 2 % 2]) for i in range(len(x))])
"""row_scale(elements, a, b): elements · a in the first row, elements · b in the second."""


@intrinsic
def causal_mask(typingctx, scores, first, second):  # type: ignore[no-untyped-def]
    """Scores with -infinity for keys that a row does not see. The last that it sees is the lane's key number `first` in
    its first row and number `second` in its second, counted from the lane's first key.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lasts = [
            as_integer(context, builder, args[1], first, types.int32),
            as_integer(context, builder, args[2], second, types.int32),
        ]
        below, elements = ir.Constant(F32, float("-inf")), []
        for i, element in enumerate(_parts(builder, scores, args[0])):
            seen = builder.icmp_signed("<=", ir.Constant(I32, 8 * (i // 4) + i % 2), lasts[i // 2 % 2])
            elements.append(builder.select(seen, element, below))
        return context.make_tuple(builder, scores, elements)

    return scores(scores, first, second), codegen


@intrinsic
def st_global_rows(typingctx, elements, first_at, second_at, first, second):  # type: ignore[no-untyped-def]
    """Store a lane's elements of two rows to global memory: the first `first` columns of one, `second` of the other."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, elements, args[0])
        wanted = [_short(context, builder, args[3], first), _short(context, builder, args[4], second)]
        for i in range(len(parts) // 2):
            column = 8 * (i // 2)
            text = f"{{.reg .pred p; setp.gt.s32 p, $1, {column}; @p st.global.v2.f32 [$0+{4 * column}], {{$2, $3}};}}"
            call_asm(
                builder, VOID, text, "l,r,f,f,~{memory}", [args[1 + i % 2], wanted[i % 2], *parts[2 * i : 2 * i + 2]]
            )
        return context.get_dummy_value()

    return types.void(elements, types.int64, types.int64, first, second), codegen


@intrinsic
def st_global_rows_16(typingctx, memory, elements, places, first, second):  # type: ignore[no-untyped-def]
    """The same in the 16-bit type of `memory`. `places`: where the first element of either row belongs, and the second
    of either. Elements further on lie 8 columns further, by twos.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts, at = _parts(builder, elements, args[1]), _parts(builder, places, args[2])
        wanted = [_short(context, builder, args[3], first), _short(context, builder, args[4], second)]
        for i in range(len(parts) // 2):
            column, row = 8 * (i // 2), i % 2
            word = _pack(builder, memory.dtype.name, parts[2 * i], parts[2 * i + 1])
            text = (
                f"{{.reg .pred p; .reg .b16 low, high; setp.gt.s32 p, $2, {column}; mov.b32 {{low, high}}, $3; "
                f"@p st.global.b16 [$0+{2 * column}], low; @p st.global.b16 [$1+{2 * column}], high;}}"
            )
            call_asm(builder, VOID, text, "l,l,r,r,~{memory}", [at[row], at[2 + row], wanted[row], word])
        return context.get_dummy_value()

    return types.void(memory, elements, places, first, second), codegen


@intrinsic
def fma_outer(typingctx, sums, a, b):  # type: ignore[no-untyped-def]
    """Outer product: sums[i, j] + a[i] · b[j] in float32. All are tuples, rows of `sums` one after the other."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, left, right = (_parts(builder, *pair) for pair in zip((sums, a, b), args, strict=True))
        n = len(right)
        totals = [fma(builder, left[i // n], right[i % n], total) for i, total in enumerate(totals)]
        return context.make_tuple(builder, sums, totals)

    return sums(sums, a, b), codegen


@intrinsic
def st_shared_block(typingctx, sums, to):  # type: ignore[no-untyped-def]
    """Store rows of four float32 to shared memory, `STAGED_BYTES` apart."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, elements = _short(context, builder, args[1], to), _parts(builder, sums, args[0])
        for i in range(0, len(elements), 4):
            text = f"st.shared.v4.f32 [$0+{i // 4 * STAGED_BYTES}], {{$1, $2, $3, $4}};"
            call_asm(builder, VOID, text, "r,f,f,f,f,~{memory}", [where, *elements[i : i + 4]])
        return context.get_dummy_value()

    return types.void(sums, to), codegen


@intrinsic
def dequant_16_bytes(typingctx, memory, words, scale, to):  # type: ignore[no-untyped-def]
    """Dequantise 16 bytes of int8 or q4_0: integers times their scale, rounded to float16, to a 16-byte aligned
    address.
    """
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, words, args[1])
        elements = []
        for i in range(PER_16_BYTES[name]):
            if name == "int8":
                shifted = builder.lshr(parts[i // 4], ir.Constant(I32, 8 * (i % 4)))
                kind = ir.FunctionType(F32, [I32])  # LLVM would widen the byte to 16 bits first
                element = builder.call(ir.InlineAsm(kind, "cvt.rn.f32.s8 $0, $1;", "=f,r"), [shifted])
            else:
                shift = ir.Constant(I32, 8 * (i % 4) + 4 * (i // 16))
                nibble = builder.and_(builder.lshr(parts[i % 16 // 4], shift), ir.Constant(I32, 15))
                element = builder.sitofp(builder.sub(nibble, ir.Constant(I32, 8)), F32)
            elements.append(builder.fmul(element, args[2]))
        packed = [_pack(builder, "uint16", elements[i], elements[i + 1]) for i in range(0, len(elements), 2)]
        for i in range(0, len(packed), 4):
            text = f"st.global.v4.u32 [$0+{4 * i}], {{$1, $2, $3, $4}};"
            call_asm(builder, VOID, text, "l,r,r,r,r,~{memory}", [args[3], *packed[i : i + 4]])
        return context.get_dummy_value()

    return types.void(memory, words, types.float32, types.int64), codegen


@intrinsic
def dequant_packed_block(typingctx, memory, words, high, high2, scale, scale2, block_min, to):  # type: ignore[no-untyped-def]
    """Dequantise a block of 32 elements of a `PACKED` type to float16, at a 16-byte aligned address. `high` and `scale`
    are the upper bits and the scale of the first 16, `high2` and `scale2` of the last 16 (see `dequant.block_at`); of
    q5_k `high` has all upper bits.
    """
    five, six = (memory.dtype.name == name for name in ("q5_k", "q6_k"))

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts, (upper, scales), elements = _parts(builder, words, args[1]), (args[2:4], args[4:6]), []
        for i in range(32):
            half, j = divmod(i, 16)
            integer = builder.lshr(parts[j // 4], ir.Constant(I32, 8 * (j % 4) + 4 * half))
            integer = builder.and_(integer, ir.Constant(I32, 15))
            if six:
                bits = builder.lshr(upper[half], ir.Constant(I32, 8 * (j % 4) + 2 * (j // 4)))
                bits = builder.shl(builder.and_(bits, ir.Constant(I32, 3)), ir.Constant(I32, 4))
                integer = builder.sub(builder.or_(integer, bits), ir.Constant(I32, 32))
            if five:
                bits = builder.lshr(upper[0], ir.Constant(I32, 8 * (j % 4) + j // 4 + 4 * half))
                integer = builder.or_(
                    integer, builder.shl(builder.and_(bits, ir.Constant(I32, 1)), ir.Constant(I32, 4))
                )
            element = builder.fmul(builder.sitofp(integer, F32), scales[half], flags=("contract",))
            elements.append(element if six else builder.fadd(element, args[6], flags=("contract",)))
        packed = [_pack(builder, "uint16", elements[i], elements[i + 1]) for i in range(0, 32, 2)]
        for i in range(0, 16, 4):
            text = f"st.global.v4.u32 [$0+{4 * i}], {{$1, $2, $3, $4}};"
            call_asm(builder, VOID, text, "l,r,r,r,r,~{memory}", [args[7], *packed[i : i + 4]])
        return context.get_dummy_value()

    factors = [types.float32] * 3
    return types.void(memory, words, types.uint32, types.uint32, *factors, types.int64), codegen
