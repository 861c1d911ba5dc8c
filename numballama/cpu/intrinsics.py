"""Intrinsics for features that Numba lacks on the CPU: 16-bit floats, atomics, vector loads, calls by address."""

from __future__ import annotations

import os
import platform
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

INT16, INT32, INT64, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typingctx: Any, n: Any) -> Any:
    """2^n as float32, for a whole float32 n from -126 to 127. Builds the bits of the exponent.

    Converts n to int32 at once. Numba goes through int64, for which AVX2 has no vector instruction.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], INT32), ir.Constant(INT32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(INT32, 23)), FLOAT)

    return types.float32(types.float32), codegen


def element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Pointer to the element of an array's memory at a flat index."""
    return builder.gep(make_array(kind)(context, builder, array).data, [index])


def cpu_features() -> dict[str, bool]:
    """Features of the CPU that Numba compiles for: this machine, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES is set."""
    configured = numba.config.CPU_FEATURES
    if configured is None and numba.config.CPU_NAME is None:
        return dict(llvm.get_host_cpu_features())
    return {word[1:]: word[0] == "+" for word in (configured or "").split(",") if word}


def _converts_half() -> bool:
    """Whether the CPU has float16 conversions. Without them LLVM calls a library function that is not linked here."""
    return platform.machine() not in ("x86_64", "AMD64") or cpu_features().get("f16c", False)


def _const(number: int) -> Any:
    return ir.Constant(INT32, number)


def half_to_float(builder: Any, bits: Any) -> Any:
    """The 16 bits of a float16, or of each in a vector, as float32, exactly."""
    lanes = getattr(bits.type, "count", 0)

    def shaped(kind: Any) -> Any:
        return ir.VectorType(kind, lanes) if lanes else kind

    def const(number: float, kind: Any = INT32) -> Any:
        return ir.Constant(shaped(kind), [number] * lanes if lanes else number)

    integers, floats = shaped(INT32), shaped(FLOAT)
    if _converts_half():
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), floats)
    wide = builder.zext(bits, integers)
    magnitude = builder.shl(builder.and_(wide, const(0x7FFF)), const(13))
    # the exponent's bias is 15 here and 127 in float32: 2^112 corrects it, for subnormals too
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, floats), const(2.0**112, FLOAT)), integers)
    special = builder.icmp_unsigned(">=", magnitude, const(0x7C00 << 13))
    scaled = builder.select(special, builder.or_(magnitude, const(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(wide, const(0x8000)), const(16))
    return builder.bitcast(builder.or_(scaled, sign), floats)


def _float_to_half(builder: Any, value: Any) -> Any:
    """The 16 bits of the float16 nearest to a float32, ties to even."""
    if _converts_half():
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), INT16)
    bits = builder.bitcast(value, INT32)
    magnitude = builder.and_(bits, _const(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _const(13)), _const(1))
    rounded = builder.lshr(builder.add(magnitude, builder.add(odd, _const(0xFFF))), _const(13))
    normal = builder.sub(rounded, _const(112 << 10))
    # adding 0.5 rounds a small value to a multiple of 2^-24, the unit of subnormal float16
    tiny = builder.fadd(builder.bitcast(magnitude, FLOAT), ir.Constant(FLOAT, 0.5))
    subnormal = builder.sub(builder.bitcast(tiny, INT32), _const(0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", magnitude, _const(0x38800000)), subnormal, normal)
    half = builder.select(builder.icmp_unsigned(">=", magnitude, _const(0x477FF000)), _const(0x7C00), half)
    half = builder.select(builder.icmp_unsigned(">", magnitude, _const(0x7F800000)), _const(0x7E00), half)
    sign = builder.and_(builder.lshr(bits, _const(16)), _const(0x8000))
    return builder.trunc(builder.or_(half, sign), INT16)


def to_float(builder: Any, kind: Any, bits: Any) -> Any:
    """A stored element as float32. The Numba type tells the format: uint16 holds float16, int16 holds bfloat16."""
    if kind == types.uint16:
        return half_to_float(builder, bits)
    if kind == types.int16:
        return builder.bitcast(builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16)), FLOAT)
    return bits


def load_floats(builder: Any, kind: Any, pointer: Any, count: int) -> Any:
    """`count` consecutive elements stored as this Numba type (see `to_float`), as a vector of float32."""
    floats, integers = ir.VectorType(FLOAT, count), ir.VectorType(INT32, count)
    stored = ir.VectorType(pointer.type.pointee, count)
    vector = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=1)
    if kind == types.int16:
        shift = ir.Constant(integers, [16] * count)
        return builder.bitcast(builder.shl(builder.zext(vector, integers), shift), floats)
    if kind == types.uint16 and _converts_half():
        return builder.fpext(builder.bitcast(vector, ir.VectorType(ir.HalfType(), count)), floats)
    if kind == types.uint16:
        result = ir.Constant(floats, ir.Undefined)
        for lane in range(count):
            at = ir.Constant(INT32, lane)
            number = half_to_float(builder, builder.extract_element(vector, at))
            result = builder.insert_element(result, number, at)
        return result
    return vector


def prefetch(builder: Any, pointer: Any, level: int = 1) -> None:
    """Ask for the cache line at an address, which need not be valid, for reading. `level` is the cache that gets it."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    builder.call(
        function, [builder.bitcast(pointer, byte), *(ir.Constant(INT32, number) for number in (0, 4 - level, 1))]
    )


def unknown(builder: Any, number: Any) -> Any:
    """The number, of which LLVM does not know that it is a constant.

    It would unroll a loop of a known end, take a token after the other, and run out of registers.
    """
    return builder.asm(ir.FunctionType(number.type, [number.type]), "", "=r,0", [number], side_effect=False)


@intrinsic  # type: ignore[untyped-decorator]
def as_f32(typingctx: Any, stored: Any) -> Any:
    """A stored element as float32 (see `to_float`)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return to_float(builder, stored, args[0])

    return types.float32(stored), codegen


def _rounded_to(builder: Any, like: Any, number: Any) -> Any:
    """A float32 in the format of elements of type `like` (see `as_f32`), rounded to nearest even."""
    if like == types.uint16:
        return _float_to_half(builder, number)
    if like == types.int16:
        # add just under half of the last kept place, and its lowest bit
        bits = builder.bitcast(number, INT32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(INT32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", number, number)
        rounded = builder.select(is_nan, ir.Constant(INT32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(INT32, 16)), INT16)
    return number


@intrinsic  # type: ignore[untyped-decorator]
def f32_to(typingctx: Any, like: Any, value: Any) -> Any:
    """A float32 rounded to the nearest value of the format in which `like` is stored (see `as_f32`)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _rounded_to(builder, like, args[1])

    return like(like, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def saturate_to(typingctx: Any, like: Any, value: Any) -> Any:
    """`f32_to`, but a finite number beyond the format becomes its largest finite value, not infinity."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if like not in (types.uint16, types.int16):
            return args[1]
        bits = _rounded_to(builder, like, args[1])
        infinity = ir.Constant(INT16, 0x7C00 if like == types.uint16 else 0x7F80)
        magnitude = builder.and_(bits, ir.Constant(INT16, 0x7FFF))
        plain = builder.and_(builder.bitcast(args[1], INT32), _const(0x7FFFFFFF))
        finite = builder.icmp_unsigned("<", plain, _const(0x7F800000))
        overflowed = builder.and_(builder.icmp_unsigned("==", magnitude, infinity), finite)
        return builder.sub(bits, builder.zext(overflowed, INT16))

    return like(like, types.float32), codegen


BLOCK = 32
"""Number of elements that the dot products below multiply at a time."""


def load_block(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """BLOCK consecutive elements of an array's memory as one vector; they need not be aligned."""
    vector = ir.VectorType(context.get_data_type(kind.dtype), BLOCK)
    return builder.load(builder.bitcast(element(context, builder, kind, array, index), vector.as_pointer()), align=1)


def add_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, in any order."""
    flags: tuple[str, ...] = ()
    if vector.type.element == INT32:
        name, arguments = f"llvm.vector.reduce.add.v{vector.type.count}i32", [vector]
    else:
        name, arguments = f"llvm.vector.reduce.fadd.v{vector.type.count}f32", [ir.Constant(FLOAT, 0.0), vector]
        flags = ("reassoc", "contract", "nsz")
    kind = ir.FunctionType(vector.type.element, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=flags)


@intrinsic  # type: ignore[untyped-decorator]
def dot_block_int8(typingctx: Any, weights: Any, i: Any, x: Any, j: Any) -> Any:
    """Dot product of BLOCK int8 weights from flat index i and BLOCK int8 elements of x from j, as int32.

    Written with vectors, because LLVM unrolls such a short loop to scalar code before it vectorises. LLVM selects the
    machine's instructions.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(INT32, BLOCK)
        w = load_block(context, builder, sig.args[0], *args[:2])
        v = load_block(context, builder, sig.args[2], *args[2:])
        return add_lanes(builder, builder.mul(builder.sext(w, vector), builder.sext(v, vector)))

    return types.int32(weights, types.int64, x, types.int64), codegen


def _scaled_dot(builder: Any, blocks: Any, load: Any) -> Any:
    """Sum over blocks of scale · (w · x), where load(block index) → (w int8 vector, x float32 vector, scale).

    The sums stay in vector registers to the end. Adding up their lanes after each block would cost more than the
    products.
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
    return add_lanes(builder, builder.load(sums))


@intrinsic  # type: ignore[untyped-decorator]
def dot_int8(
    typingctx: Any, weights: Any, i: Any, scales: Any, g: Any, left: Any, period: Any, x: Any, j: Any, blocks: Any
) -> Any:
    """Dot product of `blocks` blocks of int8 weights from flat index i and float32 x from flat index j.

    The first `left` blocks have scale g; after them each scale is that of the next `period` blocks.
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
            scale = builder.load(element(context, builder, sig.args[2], factors, builder.load(current)), align=1)
            offset = builder.mul(block, ir.Constant(INT64, BLOCK))
            w = load_block(context, builder, sig.args[0], array, builder.add(start, offset))
            return w, load_block(context, builder, sig.args[6], other, builder.add(first, offset)), scale

        return _scaled_dot(builder, count, load)

    index = types.int64
    return types.float32(weights, index, scales, index, index, index, x, index, index), codegen


def _lanes() -> int:
    """Float32 lanes of the widest vector register. 16 sums and their operands must fit in registers."""
    features = cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


@intrinsic  # type: ignore[untyped-decorator]
def tile(
    typingctx: Any, w: Any, r0: Any, r1: Any, r2: Any, r3: Any, x: Any, t0: Any, t1: Any, t2: Any, t3: Any, n: Any
) -> Any:
    """The 16 dot products of four rows of float32 w[:, n] and four of x[:, n], as four tuples, one for each row of x.

    Eight loads feed 16 multiply-adds, and the sums stay in registers. Written with vectors, because LLVM by itself uses
    256 bits on machines that have 512.
    """
    width = _lanes()
    result = types.UniTuple(types.UniTuple(types.float32, 4), 4)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weights, rows, inputs, tokens, length = args[0], args[1:5], args[5], args[6:10], args[10]
        vector = ir.VectorType(FLOAT, width)

        def starts(kind: Any, array: Any, indices: Any) -> list[Any]:
            return [element(context, builder, kind, array, builder.mul(index, length)) for index in indices]

        def zeros(kind: Any, value: Any) -> list[Any]:
            sums = [cgutils.alloca_once_value(builder, ir.Constant(kind, value)) for _ in range(16)]
            for place in sums:
                builder.store(ir.Constant(kind, value), place)
            return sums

        def accumulate(sums: list[Any], w_values: list[Any], x_values: list[Any]) -> None:
            for index, place in enumerate(sums):
                product = builder.fmul(x_values[index // 4], w_values[index % 4], flags=("contract",))
                builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)

        w_starts = starts(sig.args[0], weights, rows)
        x_starts = starts(sig.args[5], inputs, tokens)
        sums, rest = zeros(vector, [0.0] * width), zeros(FLOAT, 0.0)
        whole = builder.mul(builder.udiv(length, ir.Constant(INT64, width)), ir.Constant(INT64, width))
        with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), whole, ir.Constant(INT64, width)) as (k, _):
            w_values, x_values = (
                [
                    builder.load(builder.bitcast(builder.gep(start, [k]), vector.as_pointer()), align=4)
                    for start in places
                ]
                for places in (w_starts, x_starts)
            )
            accumulate(sums, w_values, x_values)
        with cgutils.for_range_slice(builder, whole, length, ir.Constant(INT64, 1)) as (k, _):
            w_values, x_values = (
                [builder.load(builder.gep(start, [k])) for start in places] for places in (w_starts, x_starts)
            )
            accumulate(rest, w_values, x_values)
        totals = [
            builder.fadd(add_lanes(builder, builder.load(vectors)), builder.load(remainder))
            for vectors, remainder in zip(sums, rest, strict=True)
        ]
        rows_of_x = [context.make_tuple(builder, result.dtype, totals[t * 4 : t * 4 + 4]) for t in range(4)]
        return context.make_tuple(builder, result, rows_of_x)

    index = types.int64
    return result(w, index, index, index, index, x, index, index, index, index, index), codegen


@intrinsic  # type: ignore[untyped-decorator]
def atomic_add(typingctx: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to an int64 element atomically (sequentially consistent); returns the old value."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", element(context, builder, sig.args[0], *args[:2]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def atomic_load(typingctx: Any, array: Any, index: Any) -> Any:
    """Read an int64 element atomically (acquire): writes made before it was set are visible afterwards."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(element(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(array, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def call_step(typingctx: Any, address: Any, operands: Any, worker: Any, n_workers: Any, tokens: Any) -> Any:
    """Call a compiled kernel by its address (see `executor`); returns its status, 0 for success."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(INT32, [INT64] * 4)
        function = builder.inttoptr(args[0], kind.as_pointer())
        return builder.sext(builder.call(function, args[1:]), INT64)

    return types.int64(*[types.int64] * 5), codegen


def _array_at(dtype: Any) -> Any:
    """An intrinsic (address, length) → the flat array of `dtype` at this address; it does not own the memory."""

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
    """Call a C function or LLVM intrinsic without arguments."""
    kind = ir.FunctionType(result, [])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [])


@intrinsic  # type: ignore[untyped-decorator]
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop (x86's PAUSE; nothing elsewhere)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call_void(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def yield_core(typingctx: Any) -> Any:
    """Let another thread run on this core (POSIX sched_yield; SwitchToThread on Windows)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _call_void(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", INT32)
        return context.get_dummy_value()

    return types.void(), codegen
