"""Weights as fragments of `mma.m16n8k16`: 16 bytes of a row in a lane, decoded to 16 bits in registers.

A product's order of k is free if both factors agree on it. The four lanes of a group hold 64 bytes of a row, 16 bytes
each, and of the activations the same columns. So a lane's 16 bytes are the fragments of one or more products as they
are: 8 columns of a 16-bit type, 16 of int8, 32 of a 4-bit type. A piece is 8 columns, 16 bytes of activations. For
4-bit types, of which two are taken from each half of a word, the second and third of four activations are exchanged.

A lane's part of a row is eight words (`WORDS8`): 16 bytes of payload, two factors, for q5_k and q6_k one or two
words of upper bits.
Factors are two equal float16, or the bits of a float32; `cuda/kernels/skinny.py` loads them.

Decoded elements have the values that `expand_kernel` gives them: integer times scale, plus the minimum, rounded once to
float16. Of q4_k and q5_k the minimum - 128 · scale is rounded to float32 before: exact where dmin is 2 to 1024 · d,
which is usual, and otherwise off by half a float32's last bit of that difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .kernels.params import units_together
from .lowering import F32, I32, VOID, as_integer, call_asm, fma
from .mma import _mma_m16n8k16, _pack, _parts
from .quant_traits import _constant

WORDS8 = types.UniTuple(types.uint32, 8)
FLOATS4 = types.UniTuple(types.float32, 4)
PIECES = {"uint16": 1, "int16": 1, "int8": 2, "uint8": 4, "q4_1": 4, "q4_k": 4, "q5_k": 4, "q6_k": 4}
"""Name of a payload's element type → pieces of 8 columns in 16 bytes."""

pieces_of = _constant(types.int64, PIECES.__getitem__)
"""pieces_of(pointer): pieces of 8 columns in 16 bytes of payload."""

is_float32 = _constant(types.boolean, "float32".__eq__)
"""is_float32(pointer): whether scales are float32, as those of llama2.c's int8."""


def _word(number: int) -> Any:
    return ir.Constant(I32, number)


def _prmt(builder: Any, a: Any, b: Any, selector: Any) -> Any:
    """prmt.b32: a word of four of the eight bytes of b and a, chosen by the selector's hexadecimal digits."""
    asm = ir.InlineAsm(ir.FunctionType(I32, [I32] * 3), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
    return builder.call(asm, [a, b, selector])


def _two(builder: Any, name: str, *words: Any) -> Any:
    """An operation on two float16 in a word each."""
    constraints = ",".join(["=r", *["r"] * len(words)])
    text = f"{name}.f16x2 " + ", ".join(f"${i}" for i in range(len(words) + 1)) + ";"
    return builder.call(ir.InlineAsm(ir.FunctionType(I32, [I32] * len(words)), text, constraints), words)


@intrinsic
def splat_half(typingctx, word, odd):  # type: ignore[no-untyped-def]
    """Two copies of a word's upper half if `odd`, else of its lower one."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        upper = as_integer(context, builder, args[1], odd, types.uint32)
        selector = builder.add(builder.mul(upper, _word(0x2222)), _word(0x1010))
        return _prmt(builder, args[0], args[0], selector)

    return types.uint32(types.uint32, odd), codegen


# A piece: four words of two elements


def _shifted(builder: Any, word: Any, bits: int) -> Any:
    return builder.lshr(word, _word(bits)) if bits else word


def _bytes_as_f32(builder: Any, word: Any, zero: int) -> list[Any]:
    """Four bytes as float32, minus `zero`. A byte is the last of 2^23's mantissa."""
    numbers = []
    for i in range(4):
        bits = _prmt(builder, word, _word(0x4B000000), _word(0x7440 + i))
        numbers.append(builder.fsub(builder.bitcast(bits, F32), ir.Constant(F32, float((1 << 23) + zero))))
    return numbers


def _biased_bytes_as_f32(builder: Any, word: Any) -> list[Any]:
    """128 plus four bytes below 128, as float32: a byte is the first of 128's mantissa."""
    high = _word(0x43000000)
    return [builder.bitcast(_prmt(builder, word, high, _word(0x7044 | i << 8)), F32) for i in range(4)]


def _rounded(builder: Any, elements: list[Any]) -> list[Any]:
    return [_pack(builder, "uint16", elements[i], elements[i + 1]) for i in range(0, len(elements), 2)]


def _int8(builder: Any, words: list[Any], scale: Any, wide: bool) -> list[Any]:
    made = []
    for word in words:
        unsigned = builder.xor(word, _word(0x80808080))
        if wide:
            factor = builder.bitcast(scale, F32)
            made += _rounded(builder, [builder.fmul(x, factor) for x in _bytes_as_f32(builder, unsigned, 128)])
            continue
        for selector in (0x4140, 0x4342):  # 1024 + the byte, as float16
            pair = _prmt(builder, unsigned, _word(0x64646464), _word(selector))
            made.append(_two(builder, "mul", _two(builder, "sub", pair, _word(0x64806480)), scale))
    return made


def _nibbles(builder: Any, word: Any, high: bool, zero: int, bias: Any) -> list[Any]:
    """Two words of float16: four 4-bit integers minus `zero`, from the low or the high halves of a word's bytes.

    `bias` is a word of two float16 1024.
    """
    made = []
    for half in (word, _shifted(builder, word, 8)):
        if high:  # 1024 + 16 · integer; its 16th part minus 64 + zero is exact
            pair = builder.or_(builder.and_(half, _word(0x00F000F0)), bias)
            least = int(np.float16(-64 - zero).view(np.uint16)) * 0x10001
            made.append(_two(builder, "fma.rn", pair, _word(0x2C002C00), _word(least)))
        else:  # 1024 + integer
            pair = builder.or_(builder.and_(half, _word(0x000F000F)), bias)
            made.append(_two(builder, "sub", pair, _word(0x64006400 + zero * 0x10001)))
    return made


def _four_bits(builder: Any, name: str, row: list[Any], piece: int, bias: Any) -> list[Any]:
    """A piece of a type of 4 to 6 bits. A word has four elements of the first 16 and four of the last. Of four, the
    result has the first and the third in one word.
    """
    last, first, made = piece >= 2, 2 * (piece & 1), []
    for i in (first, first + 1):
        if name == "uint8":
            made += [_two(builder, "mul", pair, row[4]) for pair in _nibbles(builder, row[i], last, 8, bias)]
            continue
        if name == "q4_1":
            pairs = _nibbles(builder, row[i], last, 0, bias)
            made += [_two(builder, "fma.rn", pair, row[4], row[5]) for pair in pairs]
            continue
        integers = builder.and_(_shifted(builder, row[i], 4 * last), _word(0x0F0F0F0F))
        if name == "q5_k":
            place = i + 4 * last - 4
            upper = builder.shl(row[6], _word(-place)) if place < 0 else _shifted(builder, row[6], place)
            integers = builder.or_(integers, builder.and_(upper, _word(0x10101010)))
        if name in ("q4_k", "q5_k"):
            scale, least = (builder.bitcast(word, F32) for word in row[4:6])
            offset = fma(builder, scale, ir.Constant(F32, -128.0), least)
        else:
            upper = builder.and_(_shifted(builder, row[6 + last], 2 * i), _word(0x03030303))
            integers = builder.or_(integers, builder.shl(upper, _word(4)))
            scale = builder.bitcast(row[4 + last], F32)
            offset = builder.fmul(scale, ir.Constant(F32, -128.0 - 32.0))
        numbers = [fma(builder, x, scale, offset) for x in _biased_bytes_as_f32(builder, integers)]
        made += _rounded(builder, [numbers[0], numbers[2], numbers[1], numbers[3]])
    return made


def _piece(builder: Any, name: str, wide: bool, row: list[Any], piece: int, bias: Any) -> list[Any]:
    if name in ("uint16", "int16"):
        return row[:4]
    if name == "int8":
        return _int8(builder, row[2 * piece : 2 * piece + 2], row[4], wide)
    return _four_bits(builder, name, row, piece, bias)


@intrinsic
def st_shared_decoded(typingctx, memory, scales, row, at, first, bias):  # type: ignore[no-untyped-def]
    """Decode 16 bytes of a row, `WORDS8`, to shared memory: piece p is stored at `at` + 16 (`first` xor p).

    `bias` is two float16 1024.
    """
    name, wide = memory.dtype.name, scales.dtype.name == "float32"

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words = _parts(builder, WORDS8, args[2])
        where = as_integer(context, builder, args[3], at, types.uint32)
        place = as_integer(context, builder, args[4], first, types.uint32)
        two_1024 = as_integer(context, builder, args[5], bias, types.uint32)
        for piece in range(PIECES[name]):
            to = builder.add(where, builder.shl(builder.xor(place, _word(piece)), _word(4)))
            made = _piece(builder, name, wide, words, piece, two_1024)
            call_asm(builder, VOID, "st.shared.v4.u32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}", [to, *made])
        return context.get_dummy_value()

    return types.void(memory, scales, WORDS8, at, first, bias), codegen


@intrinsic
def mma_step(typingctx, memory, scales, sums, a, b, c, d, x_at, x_step, bias):  # type: ignore[no-untyped-def]
    """sums + W · Xᵀ of 64 bytes of 32 rows of W: a lane's parts of four rows 8 apart, `WORDS8` each.

    `sums` are two rows of tiles 16 × 8, one for each 8 tokens. `x_at` is the shared address of the first piece of the
    lane's token among the first 8; pieces are 64 bytes apart, 8 tokens `x_step` bytes. Of two neighbouring 64 bytes,
    tokens with odd numbers have the second one first. `bias` is two float16 1024: `lop3` takes one constant and this
    from a kernel's parameters, where a second constant would be moved to a register each time.
    """
    name, wide, tokens = memory.dtype.name, scales.dtype.name == "float32", sums.count // 8

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, rows = _parts(builder, sums, args[2]), [_parts(builder, WORDS8, row) for row in args[3:7]]
        where = as_integer(context, builder, args[7], x_at, types.uint32)
        step = as_integer(context, builder, args[8], x_step, types.uint32)
        kind = "int16" if name == "int16" else "uint16"
        loaded = ir.LiteralStructType([I32] * 4)
        two_1024 = as_integer(context, builder, args[9], bias, types.uint32)
        for piece in range(PIECES[name]):
            first, second, third, fourth = (_piece(builder, name, wide, row, piece, two_1024) for row in rows)
            at = builder.xor(where, _word(64)) if piece & 1 else where
            for j in range(tokens):
                text = f"ld.shared.v4.u32 {{$0, $1, $2, $3}}, [$4+{128 * (piece >> 1)}];"
                x = _parts(
                    builder, types.UniTuple(types.uint32, 4),
                    call_asm(builder, loaded, text, "=r,=r,=r,=r,r,~{memory}", [at]),
                )  # fmt: skip
                at = builder.add(at, step)
                for i, (upper, lower) in enumerate(((first, second), (third, fourth))):
                    place = 4 * (i * tokens + j)
                    for k in (0, 2):
                        words = [upper[k], lower[k], upper[k + 1], lower[k + 1]]
                        totals[place : place + 4] = _mma_m16n8k16(
                            builder, kind, words, x[k : k + 2], totals[place : place + 4]
                        )
        return context.make_tuple(builder, sums, totals)

    return sums(memory, scales, sums, WORDS8, WORDS8, WORDS8, WORDS8, x_at, x_step, bias), codegen


@intrinsic
def st_shared_units(typingctx, sums, at, part):  # type: ignore[no-untyped-def]
    """Store `units_together` units of a lane's sums, from number `part` times as many on: of each, four float32 of its
    first tile at `at`, four of its second 512 bytes further. A unit is two tiles of 8 tokens and takes 1024 bytes.
    """
    units = sums.count // 8
    together = units_together(units)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, where = _parts(builder, sums, args[0]), as_integer(context, builder, args[1], at, types.uint32)
        wanted = as_integer(context, builder, args[2], part, types.uint32)
        for i in range(8 * together):
            unit, inside = divmod(i, 8)
            chosen = totals[4 * (inside // 4 * units + unit) + inside % 4]
            for other in range(1, units // together):
                candidate = totals[4 * (inside // 4 * units + unit + other * together) + inside % 4]
                chosen = builder.select(builder.icmp_unsigned("==", wanted, _word(other)), candidate, chosen)
            if inside % 4 == 0:
                stored = []
            stored.append(chosen)
            if inside % 4 == 3:
                text = f"st.shared.v4.f32 [$0+{1024 * unit + 512 * (inside // 4)}], {{$1, $2, $3, $4}};"
                call_asm(builder, VOID, text, "r,f,f,f,f,~{memory}", [where, *stored])
        return context.get_dummy_value()

    return types.void(sums, at, part), codegen


@intrinsic
def st_global_units(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """Store all units of a lane's sums, as `st_shared_units` does, to a global address."""
    units = sums.count // 8

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals = _parts(builder, sums, args[0])
        for unit in range(units):
            for i in range(2):
                place = 4 * (i * units + unit)
                text = f"st.global.v4.f32 [$0+{1024 * unit + 512 * i}], {{$1, $2, $3, $4}};"
                call_asm(builder, VOID, text, "l,f,f,f,f,~{memory}", [args[1], *totals[place : place + 4]])
        return context.get_dummy_value()

    return types.void(sums, types.int64), codegen


@intrinsic
def st_global_v4_f32(typingctx, where, a, b, c, d):  # type: ignore[no-untyped-def]
    """st.global.v4.f32: four float32 to a 16-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        call_asm(builder, VOID, "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, *[types.float32] * 4), codegen


@intrinsic
def st_global_f32(typingctx, where, number):  # type: ignore[no-untyped-def]
    """st.global.f32: a float32 to a 4-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        call_asm(builder, VOID, "st.global.f32 [$0], $1;", "l,f,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen
