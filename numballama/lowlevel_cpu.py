"""What Numba's Python cannot say on a CPU: 16-bit floats, atomics, a call by address. One intrinsic each."""

from __future__ import annotations

import os
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

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
"""Numbers that the products below take at once."""


def _load_block(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """BLOCK consecutive elements of an array's memory as one vector, wherever they lie."""
    vector = ir.VectorType(context.get_data_type(kind.dtype), BLOCK)
    return builder.load(builder.bitcast(_element(context, builder, kind, array, index), vector.as_pointer()), align=1)


def _reduce(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, in whatever order is fast."""
    flags: tuple[str, ...] = ()
    if vector.type.element == INT32:
        name, arguments = f"llvm.vector.reduce.add.v{BLOCK}i32", [vector]
    else:
        name, arguments = f"llvm.vector.reduce.fadd.v{BLOCK}f32", [ir.Constant(FLOAT, 0.0), vector]
        flags = ("reassoc", "contract", "nsz")
    kind = ir.FunctionType(vector.type.element, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=flags)


@intrinsic  # type: ignore[untyped-decorator]
def dot_block_int8(typingctx: Any, weights: Any, i: Any, x: Any, j: Any) -> Any:
    """Sum of the products of BLOCK int8 weights from flat index i with BLOCK int8 numbers of x from j, an int32.

    Written as vectors, because LLVM unrolls a loop this short into scalar code before it looks for vectors; which
    instructions become of it is LLVM's choice for the machine it runs on.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(INT32, BLOCK)
        w = _load_block(context, builder, sig.args[0], *args[:2])
        v = _load_block(context, builder, sig.args[2], *args[2:])
        return _reduce(builder, builder.mul(builder.sext(w, vector), builder.sext(v, vector)))

    return types.int32(weights, types.int64, x, types.int64), codegen


def _scaled_dot(builder: Any, blocks: Any, load: Any) -> Any:
    """Sum over blocks of scale · (w · x), where load(index of a block) → (w int8 vector, x float32 vector, scale).

    The sums stay in vector registers from the first block to the last: adding up lanes after each would cost more than
    the products.
    """
    vector = ir.VectorType(FLOAT, BLOCK)
    sums = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * BLOCK))
    builder.store(ir.Constant(vector, [0.0] * BLOCK), sums)
    with cgutils.for_range(builder, blocks) as loop:
        w, x, scale = load(loop.index)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), scale, ir.Constant(INT32, 0))
        scales = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, BLOCK), [0] * BLOCK))
        weights = builder.fmul(builder.sitofp(w, vector), scales, flags=("contract",))
        products = builder.fmul(weights, x, flags=("contract",))
        builder.store(builder.fadd(builder.load(sums), products, flags=("contract",)), sums)
    return _reduce(builder, builder.load(sums))


@intrinsic  # type: ignore[untyped-decorator]
def dot_q8_0(typingctx: Any, weights: Any, i: Any, x: Any, j: Any, blocks: Any) -> Any:
    """Product of `blocks` q8_0 blocks (a float16 scale, BLOCK int8) from flat byte i with float32 x from index j."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, other, first, count = args

        def load(block: Any) -> tuple[Any, Any, Any]:
            at = builder.add(start, builder.mul(block, ir.Constant(INT64, 2 + BLOCK)))
            pointer = builder.bitcast(_element(context, builder, sig.args[0], array, at), ir.HalfType().as_pointer())
            scale = builder.fpext(builder.load(pointer, align=1), FLOAT)
            w = _load_block(context, builder, sig.args[0], array, builder.add(at, ir.Constant(INT64, 2)))
            j = builder.add(first, builder.mul(block, ir.Constant(INT64, BLOCK)))
            return w, _load_block(context, builder, sig.args[2], other, j), scale

        return _scaled_dot(builder, count, load)

    return types.float32(weights, types.int64, x, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def dot_int8(
    typingctx: Any, weights: Any, i: Any, scales: Any, g: Any, left: Any, period: Any, x: Any, j: Any, blocks: Any
) -> Any:
    """Product of `blocks` blocks of int8 weights from flat index i with float32 x from index j.

    The first `left` blocks have scale g, then every `period` blocks the next one.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, start, factors, group, remaining, every, other, first, count = args
        current = cgutils.alloca_once_value(builder, group)
        until = cgutils.alloca_once_value(builder, remaining)
        builder.store(group, current)
        builder.store(remaining, until)
        one = ir.Constant(INT64, 1)

        def load(block: Any) -> tuple[Any, Any, Any]:
            over = builder.icmp_signed("==", builder.load(until), ir.Constant(INT64, 0))
            builder.store(builder.add(builder.load(current), builder.zext(over, INT64)), current)
            builder.store(builder.sub(builder.select(over, every, builder.load(until)), one), until)
            scale = builder.load(_element(context, builder, sig.args[2], factors, builder.load(current)), align=1)
            offset = builder.mul(block, ir.Constant(INT64, BLOCK))
            w = _load_block(context, builder, sig.args[0], array, builder.add(start, offset))
            return w, _load_block(context, builder, sig.args[6], other, builder.add(first, offset)), scale

        return _scaled_dot(builder, count, load)

    index = types.int64
    return types.float32(weights, index, scales, index, index, index, x, index, index), codegen


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


def _array_at(dtype: Any) -> Any:
    """An intrinsic (address, length) → the flat array of `dtype` that lies there, which it does not own."""

    @intrinsic  # type: ignore[untyped-decorator]
    def array_at(typingctx: Any, address: Any, length: Any) -> Any:
        kind = types.Array(dtype, 1, "C")

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array = make_array(kind)(context, builder)
            item = ir.Constant(INT64, context.get_abi_sizeof(context.get_data_type(dtype)))
            data = builder.inttoptr(args[0], array.data.type)
            populate_array(array, data=data, shape=[args[1]], strides=[item], itemsize=item, meminfo=None)
            return array._getvalue()

        return kind(types.int64, types.int64), codegen

    return array_at


f32_at, f64_at = _array_at(types.float32), _array_at(types.float64)
i32_at, i64_at, u64_at = _array_at(types.int32), _array_at(types.int64), _array_at(types.uint64)


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
