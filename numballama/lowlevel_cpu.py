"""What Numba's Python cannot say on a CPU: 16-bit floats, atomics, a call by address. One intrinsic each."""

from __future__ import annotations

import os
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

INT16, INT32, INT64, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(make_array(kind)(context, builder, array).data, [index])


@intrinsic  # type: ignore[untyped-decorator]
def as_f32(typingctx: Any, number: Any) -> Any:
    """A stored number as float32. The array's type tells the format: uint16 holds float16, int16 holds bfloat16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (bits,) = args
        if number == types.uint16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), FLOAT)
        if number == types.int16:
            return builder.bitcast(builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16)), FLOAT)
        return bits

    return types.float32(number), codegen


@intrinsic  # type: ignore[untyped-decorator]
def f32_to(typingctx: Any, like: Any, number: Any) -> Any:
    """A float32 rounded to the nearest number of the format in which `like` is stored (see `as_f32`)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, value = args
        if like == types.uint16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), INT16)
        if like == types.int16:
            # round to nearest even: add half of the last kept place, less one where that place is even
            bits = builder.bitcast(value, INT32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
            rounded = builder.add(bits, builder.add(odd, ir.Constant(INT32, 0x7FFF)))
            is_nan = builder.fcmp_unordered("uno", value, value)
            rounded = builder.select(is_nan, ir.Constant(INT32, 0x7FC00000), rounded)
            return builder.trunc(builder.lshr(rounded, ir.Constant(INT32, 16)), INT16)
        return value

    return like(like, types.float32), codegen


BLOCK = 32
"""Numbers that `dot_block` multiplies at once."""


def _load_block(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """BLOCK consecutive elements of an array's memory as one vector, wherever they lie."""
    vector = ir.VectorType(context.get_data_type(kind.dtype), BLOCK)
    return builder.load(builder.bitcast(_element(context, builder, kind, array, index), vector.as_pointer()), align=1)


@intrinsic  # type: ignore[untyped-decorator]
def dot_block(typingctx: Any, weights: Any, i: Any, x: Any, j: Any) -> Any:
    """Sum of the products of BLOCK int8 weights from flat index i with BLOCK numbers of x from flat index j.

    The weights may be bytes of another 8-bit type: they are taken as int8. x is float32 or int8, and so is the sum
    float32 or int32. Written as vectors, because LLVM unrolls a loop this short into scalar code before it looks for
    vectors; which instructions become of it is LLVM's choice for the machine it runs on.
    """
    exact = x.dtype == types.int8

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = INT32 if exact else FLOAT
        vector = ir.VectorType(element, BLOCK)
        w = _load_block(context, builder, sig.args[0], *args[:2])
        v = _load_block(context, builder, sig.args[2], *args[2:])
        if exact:
            products = builder.mul(builder.sext(w, vector), builder.sext(v, vector))
            kind, name, start = ir.FunctionType(INT32, [vector]), "llvm.vector.reduce.add.v32i32", []
        else:
            products = builder.fmul(builder.sitofp(w, vector), v)
            kind, name = ir.FunctionType(FLOAT, [FLOAT, vector]), "llvm.vector.reduce.fadd.v32f32"
            start = [ir.Constant(FLOAT, 0.0)]
        reduce = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(reduce, [*start, products], fastmath=() if exact else ("reassoc", "contract", "nsz"))

    return (types.int32 if exact else types.float32)(weights, types.int64, x, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def atomic_add(typingctx: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to an int64 element as one indivisible act, in an order all threads agree on; returns the old value."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _element(context, builder, sig.args[0], *args[:2]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def atomic_load(typingctx: Any, array: Any, index: Any) -> Any:
    """Read an int64 element and see all that was written before it was last set."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_element(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(array, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def call_step(typingctx: Any, address: Any, operands: Any, part: Any, parts: Any, tokens: Any) -> Any:
    """Call a step function (see `jit`) by its address; returns its status, 0 when all is well."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(INT32, [INT64] * 4)
        function = builder.inttoptr(args[0], kind.as_pointer())
        return builder.sext(builder.call(function, args[1:]), INT64)

    return types.int64(*[types.int64] * 5), codegen


@intrinsic  # type: ignore[untyped-decorator]
def address_of(typingctx: Any, array: Any, index: Any) -> Any:
    """Address of element `index` of a flat array's memory."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(_element(context, builder, sig.args[0], *args), INT64)

    return types.int64(array, types.int64), codegen


def _call_void(builder: Any, name: str, result: Any) -> None:
    kind = ir.FunctionType(result, [])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [])


@intrinsic  # type: ignore[untyped-decorator]
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a waiting loop (x86's PAUSE; nothing elsewhere)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call_void(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def yield_core(typingctx: Any) -> Any:
    """Let another thread have this core (POSIX sched_yield; Windows has SwitchToThread)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _call_void(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", INT32)
        return context.get_dummy_value()

    return types.void(), codegen
