"""Arithmetic of PTX as Python functions, for what Numba's integers and floats cannot say: 32 bits that stay 32, bytes,
halves of words, and fast approximations.

Functions are named as in `intrinsics`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import F16, F32, I16, I32, I64, as_integer, call_asm, compiling_for


@intrinsic
def s32(typingctx, x):  # type: ignore[no-untyped-def]
    """An integer as int32. Numba adds and multiplies int32 as int64, which takes twice the registers and instructions:
    indices and shared addresses that a loop changes stay int32 by this.
    """
    if not isinstance(x, types.Integer):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return as_integer(context, builder, args[0], x, types.int32)

    return types.int32(x), codegen


@intrinsic
def mad_wide_s32(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """mad.wide.s32: a · b + c of two int32 and an int64, one instruction. Of `b` that a loop keeps in 64 bits, `a * b`
    takes three.
    """
    if not all(isinstance(each, types.Integer) for each in (a, b, c)):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds = types.int32, types.int32, types.int64
        values = [as_integer(context, builder, *each) for each in zip(args, signature.args, kinds, strict=True)]
        asm = ir.InlineAsm(ir.FunctionType(I64, [I32, I32, I64]), "mad.wide.s32 $0, $1, $2, $3;", "=l,r,r,l")
        return builder.call(asm, values)

    return types.int64(a, b, c), codegen


@intrinsic
def uint_as_float(typingctx, bits):  # type: ignore[no-untyped-def]
    """Reinterpret 32 bits as float32 (mov.b32)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], F32)

    return types.float32(types.uint32), codegen


@intrinsic
def float_as_uint(typingctx, number):  # type: ignore[no-untyped-def]
    """Reinterpret a float32 as 32 bits (mov.b32)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def cvt_f32_f16(typingctx, bits):  # type: ignore[no-untyped-def]
    """cvt.f32.f16: the float16 in the low 16 bits of a word, as float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(builder.trunc(args[0], I16), F16), F32)

    return types.float32(types.uint32), codegen


def _dp4a(kinds: str) -> Any:
    def typing(typingctx, a, b, total):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            asm = ir.InlineAsm(ir.FunctionType(I32, [I32] * 3), f"dp4a.{kinds} $0, $1, $2, $3;", "=r,r,r,r")
            return builder.call(asm, args)

        return types.int32(types.uint32, types.uint32, types.int32), codegen

    return intrinsic(typing)


dp4a, dp4a_su, dp4a_us, dp4a_uu = (_dp4a(kinds) for kinds in ("s32.s32", "s32.u32", "u32.s32", "u32.u32"))
"""dp4a(a, b, total): total + the dot product of the four bytes of a and of b; "su" means a is signed, b unsigned."""


def _of_one_operand(opcode: str, result: Any, operand: Any) -> Any:
    """An instruction with one operand, which the compiler may move or leave out."""
    kinds = {types.float32: (F32, "f"), types.int32: (I32, "r"), types.uint32: (I32, "r")}

    def typing(typingctx, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            (to, place), (source, given) = kinds[result], kinds[operand]
            asm = ir.InlineAsm(ir.FunctionType(to, [source]), f"{opcode} $0, $1;", f"={place},{given}")
            return builder.call(asm, args)

        return result(operand), codegen

    return intrinsic(typing)


cvt_rni_s32 = _of_one_operand("cvt.rni.s32.f32", types.int32, types.float32)
"""cvt_rni_s32(x): x rounded to the nearest int32, halves to even."""


@intrinsic
def prmt_byte_planes(typingctx, a, b, c, d):  # type: ignore[no-untyped-def]
    """Byte planes of four int32 by prmt: words with their lowest, their second and their third bytes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        asm = ir.InlineAsm(ir.FunctionType(I32, [I32] * 3), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")

        def choose(x, y, selector):  # type: ignore[no-untyped-def]
            return builder.call(asm, [x, y, ir.Constant(I32, selector)])

        words = []
        for which in range(3):
            pair = 0x40 + 0x11 * which
            words.append(choose(choose(args[0], args[1], pair), choose(args[2], args[3], pair), 0x5410))
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 3)(types.int32, types.int32, types.int32, types.int32), codegen


cvt_f32_s8 = _of_one_operand("cvt.rn.f32.s8", types.float32, types.uint32)
"""cvt_f32_s8(word): the lowest byte of a word as a signed integer, as float32."""


cvt_f32_u8 = _of_one_operand("cvt.rn.f32.u8", types.float32, types.uint32)
"""cvt_f32_u8(word): the lowest byte of a word as float32. Numba makes uint32 & uint32 a uint64, whose
conversion is slow.
"""


@intrinsic
def half_word(typingctx, word, odd):  # type: ignore[no-untyped-def]
    """The word, shifted right by 16 bits if `odd` is 1. Only the lower half of the result is meant."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number = as_integer(context, builder, args[1], odd, types.uint32)
        return builder.lshr(args[0], builder.shl(number, ir.Constant(I32, 4)))

    return types.uint32(types.uint32, odd), codegen


@intrinsic
def max_magnitude(typingctx, a, b):  # type: ignore[no-untyped-def]
    """max.f32 of |a| and |b|, the other one if one is NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        text = "{.reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b;}"
        return builder.call(ir.InlineAsm(ir.FunctionType(F32, [F32, F32]), text, "=f,f,f"), args)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def redux_max_s32(typingctx, x):  # type: ignore[no-untyped-def]
    """redux.sync.max.s32: maximum of an int32 over the 32 lanes, in every lane; shuffles before sm_80."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if compiling_for() >= (8, 0):
            return call_asm(builder, I32, "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", args)
        step = "shfl.sync.bfly.b32 b, a, {0}, 31, 0xffffffff; max.s32 a, a, b;"
        steps = " ".join(step.format(16 >> i) for i in range(5))
        text = "{.reg .s32 a, b; mov.b32 a, $1; " + steps + " mov.b32 $0, a;}"
        return call_asm(builder, I32, text, "=r,r", args)

    return types.int32(types.int32), codegen


@intrinsic
def div_full(typingctx, a, b):  # type: ignore[no-untyped-def]
    """div.full.f32: a / b, off by at most two units in the last place. A division with `/` is a function call."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, F32, "div.full.f32 $0, $1, $2;", "=f,f,f", args)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def rsqrt_approx(typingctx, x):  # type: ignore[no-untyped-def]
    """rsqrt.approx.f32: 1 / sqrt(x), off by at most two units in the last place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, F32, "rsqrt.approx.f32 $0, $1;", "=f,f", args)

    return types.float32(types.float32), codegen


@intrinsic
def ex2_approx(typingctx, x):  # type: ignore[no-untyped-def]
    """ex2.approx.f32: 2^x by the special function unit, off by at most two units in the last place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, F32, "ex2.approx.f32 $0, $1;", "=f,f", args)

    return types.float32(types.float32), codegen


ex2_approx_ftz = _of_one_operand("ex2.approx.ftz.f32", types.float32, types.float32)
"""ex2_approx_ftz(x): the same, but 0 below 2^-126: one instruction instead of four."""
