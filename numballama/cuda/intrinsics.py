"""What a kernel needs of the GPU beyond plain Numba: instructions that only PTX has, as functions of Python.

Kernels reach memory in two ways. Where speed does not matter they index typed pointers, `p[i]`. Where it does they
take an element's address, `address(p, i)`, and move 16 bytes at a time. A pointer's element type also tells how numbers
are stored, as on the CPU: uint16 is float16, int16 bfloat16, uint8 two 4-bit numbers, `Packed` those of other block
types.

A function marked "sm_80" or "sm_90" compiles to something of the same meaning on older cards.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic, models, register_model

from ..quantization.types import TYPE_TRAITS
from .launch import ELEMENTS_PER_16_BYTES, QUANTIZED
from .lowering import (  # fmt: skip
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    VOID,
    as_integer,
    call_asm,
    compiling_for,
    element_at,
    fma,
    is_memory,
    rounded_to_16,
)
from .repack import LAYOUTS

WORDS2 = types.UniTuple(types.uint32, 2)
WORDS4, FLOATS4 = types.UniTuple(types.uint32, 4), types.UniTuple(types.float32, 4)


class Packed(types.Type):  # type: ignore[misc]
    """Bytes with the integers of one of GGUF's block types, as `blocks_cuda` lays them out."""


@register_model(Packed)  # type: ignore[untyped-decorator]
class _PackedModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, I8)


PACKED = {name: Packed(name) for name in LAYOUTS}
"""Element types of pointers to such integers."""
ELEMENT_TYPES: dict[str, Any] = PACKED | {
    "f32": types.float32, "f16": types.uint16, "bf16": types.int16, "int8": types.int8, "q4_0": types.uint8,
    "i8": types.int8, "i32": types.int32, "i64": types.int64, "f64": types.float64, "u64": types.uint64,
    "u8": types.uint8, "u32": types.uint32,
}  # fmt: skip
"""`Array.dtype` → element type of a pointer to it."""


@intrinsic
def address(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of an element of a typed pointer or of a shared array, as int64."""
    if not (is_memory(memory) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        return builder.ptrtoint(element_at(context, builder, memory, args[0], where), I64)

    return types.int64(memory, index), codegen


@intrinsic
def shared_address(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of an element of a shared array, as the functions that copy to and load from shared memory take it."""
    if not isinstance(memory, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        generic = builder.ptrtoint(element_at(context, builder, memory, args[0], where), I64)
        asm = ir.InlineAsm(ir.FunctionType(I64, [I64]), "cvta.to.shared.u64 $0, $1;", "=l,l")
        return builder.call(asm, [generic])

    return types.int64(memory, index), codegen


@intrinsic
def floats4(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Four float32 from a 16-byte aligned element of a pointer or of shared memory."""
    if not (is_memory(memory) and memory.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        vector = ir.VectorType(F32, 4)
        element = builder.bitcast(element_at(context, builder, memory, args[0], where), vector.as_pointer())
        loaded = builder.load(element, align=16)
        parts = [builder.extract_element(loaded, ir.Constant(I32, i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return FLOATS4(memory, index), codegen


@intrinsic
def store4(typingctx, memory, index, a, b, c, d):  # type: ignore[no-untyped-def]
    """Four float32 into a 16-byte aligned place of a pointer or of shared memory."""
    if not (is_memory(memory) and memory.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = as_integer(context, builder, args[1], index, types.int64)
        vector = ir.VectorType(F32, 4)
        numbers = ir.Constant(vector, ir.Undefined)
        for i in range(4):
            numbers = builder.insert_element(numbers, args[2 + i], ir.Constant(I32, i))
        element = builder.bitcast(element_at(context, builder, memory, args[0], where), vector.as_pointer())
        builder.store(numbers, element, align=16)
        return context.get_dummy_value()

    return types.void(memory, index, *[types.float32] * 4), codegen


# Bits


@intrinsic
def f32_of_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], F32)

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_f32(typingctx, number):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def f32_of_half(typingctx, bits):  # type: ignore[no-untyped-def]
    """The IEEE half in the low 16 bits of a word, as float32."""

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
"""dp4a(a, b, total): total plus the four products of the bytes of two words; s and u say whose are signed."""


@intrinsic
def nearest(typingctx, x):  # type: ignore[no-untyped-def]
    """x rounded to the nearest int32, halves to even."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        asm = ir.InlineAsm(ir.FunctionType(I32, [F32]), "cvt.rni.s32.f32 $0, $1;", "=r,f")
        return builder.call(asm, args)

    return types.int32(types.float32), codegen


@intrinsic
def planes(typingctx, a, b, c, d):  # type: ignore[no-untyped-def]
    """Three words: the lowest bytes of four int32, their second and their third ones."""

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


@intrinsic
def f32_of_signed_byte(typingctx, word):  # type: ignore[no-untyped-def]
    """The lowest byte of a word, as a signed integer, as float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        asm = ir.InlineAsm(ir.FunctionType(F32, [I32]), "cvt.rn.f32.s8 $0, $1;", "=f,r")
        return builder.call(asm, args)

    return types.float32(types.uint32), codegen


@intrinsic
def exp2(typingctx, x):  # type: ignore[no-untyped-def]
    """2^x by the special function unit, to two units in the last place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, F32, "ex2.approx.f32 $0, $1;", "=f,f", args)

    return types.float32(types.float32), codegen


# Numbers by the element type of their pointer


PER_16_BYTES = {ELEMENT_TYPES[payload].name: count for payload, count in ELEMENTS_PER_16_BYTES.items()}
"""Name of a pointer's element type → numbers in 16 bytes of a weight, or of a KV cache."""
SCALED = tuple(ELEMENT_TYPES[payload].name for payload in QUANTIZED)
"""Names of element types whose numbers want scales."""
ZERO_POINTS = {ELEMENT_TYPES[payload].name: float(TYPE_TRAITS[payload].zero_point) for payload in QUANTIZED}
"""Name of such an element type → the unsigned quant that means 0."""


def _constant(kind: Any, value: Any) -> Any:
    """An intrinsic that a pointer's element type answers at compile time."""

    def typing(typingctx, memory):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return context.get_constant(kind, value(memory.dtype.name))

        return kind(memory), codegen

    return intrinsic(typing)


per_16_bytes = _constant(types.int64, PER_16_BYTES.__getitem__)
"""How many numbers of this pointer's type 16 bytes hold: a constant."""

has_scales = _constant(types.boolean, lambda name: name in SCALED)
"""Whether numbers of this pointer's type want a scale: a constant."""

is_packed = _constant(types.boolean, lambda name: name in PACKED)
"""Whether this pointer's element type is one of `PACKED`: a constant."""

is_q4_1, is_q4_k, is_q6_k = (_constant(types.boolean, name.__eq__) for name in ("q4_1", "q4_k", "q6_k"))
"""Whether it is this one: constants."""

counts_from = _constant(types.float32, lambda name: ZERO_POINTS.get(name) or 1.0)
"""The zero point of the unsigned quants, by which the sum of the activations of a block is multiplied. 1 for types that
store a minimum of each block instead. A constant.
"""


def _half(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(builder.trunc(bits, I16), F16), F32)


def _unpack(builder: Any, name: str, words: Any, i: int) -> Any:
    """Number `i` of 16 bytes as float32."""
    if name == "float32":
        return builder.bitcast(words[i], F32)
    if name == "uint16":
        return _half(builder, builder.lshr(words[i // 2], ir.Constant(I32, 16 * (i % 2))))
    if name == "int16":
        word = words[i // 2]
        high = builder.and_(word, ir.Constant(I32, 0xFFFF0000)) if i % 2 else builder.shl(word, ir.Constant(I32, 16))
        return builder.bitcast(high, F32)
    raise AssertionError(f"{name} has scales: `dp4a` is for it")


@intrinsic
def dot16(typingctx, memory, words, x, index, step):  # type: ignore[no-untyped-def]
    """The numbers in 16 bytes of `memory`'s type, times float32: four of them from each of x[index], x[index + step] …

    Returns the sum; 0 for types with scales, which are not for this. `x` is shared memory, 16-byte aligned there.
    """
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = [builder.extract_value(args[1], i) for i in range(4)]
        at = as_integer(context, builder, args[3], index, types.int64)
        stride = as_integer(context, builder, args[4], step, types.int64)
        sums = [ir.Constant(F32, 0.0)] * 2
        if name in SCALED:
            return sums[0]
        vector = ir.VectorType(F32, 4)
        for four in range(PER_16_BYTES[name] // 4):
            where = builder.bitcast(element_at(context, builder, x, args[2], at), vector.as_pointer())
            numbers = builder.load(where, align=16)
            for i in range(4):
                number = _unpack(builder, name, parts, 4 * four + i)
                sums[i % 2] = fma(builder, number, builder.extract_element(numbers, ir.Constant(I32, i)), sums[i % 2])
            at = builder.add(at, stride)
        return builder.fadd(*sums)

    return types.float32(memory, words, x, index, step), codegen


@intrinsic
def unpack8(typingctx, memory, words):  # type: ignore[no-untyped-def]
    """Numbers in 16 bytes of a float32 or 16-bit type as eight float32; the last four of float32 are 0."""
    name = memory.dtype.name
    if name not in ("float32", "uint16", "int16"):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = [builder.extract_value(args[1], i) for i in range(4)]
        zero, count = ir.Constant(F32, 0.0), PER_16_BYTES[name]
        numbers = [_unpack(builder, name, parts, i) if i < count else zero for i in range(8)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(types.float32, 8)(memory, words), codegen


@intrinsic
def number(typingctx, memory, row, index):  # type: ignore[no-untyped-def]
    """Number `index` of the row that begins at address `row`, without its scale, as float32. Not for `PACKED` types."""
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = as_integer(context, builder, args[2], index, types.int64)

        def load(kind, offset):  # type: ignore[no-untyped-def]
            pointer = builder.inttoptr(builder.add(args[1], offset), kind.as_pointer(1))
            return builder.load(pointer)

        def constant(n):  # type: ignore[no-untyped-def]
            return ir.Constant(I64, n)

        if name == "float32":
            return load(F32, builder.mul(at, constant(4)))
        if name in ("uint16", "int16"):
            bits = builder.zext(load(I16, builder.mul(at, constant(2))), I32)
            if name == "uint16":
                return _half(builder, bits)
            return builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), F32)
        if name == "int8":
            return builder.sitofp(load(I8, at), F32)
        inside = builder.and_(at, constant(31))
        byte = load(I8, builder.add(builder.mul(builder.lshr(at, constant(5)), constant(16)),
                                    builder.and_(inside, constant(15))))  # fmt: skip
        shift = builder.trunc(builder.shl(builder.lshr(inside, constant(4)), constant(2)), I8)
        bits = builder.zext(builder.and_(builder.lshr(byte, shift), ir.Constant(I8, 15)), I32)
        return builder.sitofp(builder.sub(bits, ir.Constant(I32, 8)), F32)

    return types.float32(memory, types.int64, index), codegen


@intrinsic
def store_number(typingctx, memory, index, value):  # type: ignore[no-untyped-def]
    """memory[index] = value, rounded to nearest even to the type of a float32, float16 or bfloat16 pointer."""
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = as_integer(context, builder, args[1], index, types.int64)
        where, x = element_at(context, builder, memory, args[0], at), args[2]
        if name == "float32":
            builder.store(x, where)
        else:
            builder.store(rounded_to_16(builder, name, x), where)
        return context.get_dummy_value()

    return types.void(memory, index, types.float32), codegen


@intrinsic
def scale_bytes(typingctx, memory):  # type: ignore[no-untyped-def]
    """Bytes of one of these scales: a constant."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(I64, memory.dtype.bitwidth // 8)

    return types.int64(memory), codegen


@intrinsic
def scale_word(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of the aligned word that holds scale `index` of float32 or float16 scales."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = as_integer(context, builder, args[1], index, types.int64)
        where = builder.ptrtoint(element_at(context, builder, memory, args[0], at), I64)
        return builder.and_(where, ir.Constant(I64, -4))

    return types.int64(memory, index), codegen


@intrinsic
def scale_in(typingctx, memory, word, index):  # type: ignore[no-untyped-def]
    """Scale `index` as float32, out of the word that `scale_word` tells."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if memory.dtype == types.float32:
            return builder.bitcast(args[1], F32)
        at = builder.trunc(as_integer(context, builder, args[2], index, types.int64), I32)
        shift = builder.shl(builder.and_(at, ir.Constant(I32, 1)), ir.Constant(I32, 4))
        return _half(builder, builder.lshr(args[1], shift))

    return types.float32(memory, types.uint32, index), codegen


# Streams: copies from global memory into a ring in shared memory that the copying thread alone reads


def _copy(text: str, plain: str) -> Any:
    """A copy of bytes whose count the caller may set to 0 for zeros; sm_80 copies behind the thread's back."""

    def typing(typingctx, to, source, count):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            args = [builder.trunc(args[0], I32), args[1], as_integer(context, builder, args[2], count, types.int32)]
            body = text if compiling_for() >= (8, 0) else plain
            call_asm(builder, VOID, body, "r,l,r,~{memory}", args)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, count), codegen

    return typing


copy16 = intrinsic(
    _copy(
        "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;",
        "{.reg .pred p; .reg .u32 a, b, c, d; setp.ne.u32 p, $2, 0; "
        "mov.u32 a, 0; mov.u32 b, 0; mov.u32 c, 0; mov.u32 d, 0; @p ld.global.nc.v4.u32 {a, b, c, d}, [$1]; "
        "st.shared.v4.u32 [$0], {a, b, c, d};}",
    )
)
"""copy16(to, source, count): 16 bytes from a global to a shared address (`shared_address`), both aligned; `count` 16,
or 0 for zeros: the source is not looked at then.
"""

copy8 = intrinsic(
    _copy(
        "cp.async.ca.shared.global [$0], [$1], 8, $2;",
        "{.reg .pred p; .reg .u32 a, b; setp.ne.u32 p, $2, 0; mov.u32 a, 0; mov.u32 b, 0; "
        "@p ld.global.nc.v2.u32 {a, b}, [$1]; st.shared.v2.u32 [$0], {a, b};}",
    )
)
"""copy8(to, source, count): the same for 8 bytes; `count` 8 or 0."""

copy4 = intrinsic(
    _copy(
        "cp.async.ca.shared.global [$0], [$1], 4, $2;",
        "{.reg .pred p; .reg .u32 a; setp.ne.u32 p, $2, 0; mov.u32 a, 0; "
        "@p ld.global.nc.u32 a, [$1]; st.shared.u32 [$0], a;}",
    )
)
"""copy4(to, source, count): the same for 4 bytes; `count` 4 or 0."""


@intrinsic
def close_copies(typingctx):  # type: ignore[no-untyped-def]
    """End a group of copies (sm_80)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if compiling_for() >= (8, 0):
            call_asm(builder, VOID, "cp.async.commit_group;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), codegen


def _await(pending: int) -> Any:
    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if compiling_for() >= (8, 0):
                call_asm(builder, VOID, f"cp.async.wait_group {pending};", "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return intrinsic(typing)


await_all, await_all_but_1, await_all_but_2, await_all_but_3 = (_await(n) for n in (0, 1, 2, 3))
"""Wait until at most that many of this thread's groups of copies are under way (sm_80): the number is in the opcode."""


@intrinsic
def shared_words4(typingctx, where):  # type: ignore[no-untyped-def]
    """Four words from a 16-byte aligned shared address (`shared_address`)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        loaded = call_asm(
            builder,
            ir.LiteralStructType([I32] * 4),
            "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r,~{memory}",
            [builder.trunc(args[0], I32)],
        )
        parts = [builder.extract_value(loaded, i) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return WORDS4(types.int64), codegen


@intrinsic
def shared_words2(typingctx, where):  # type: ignore[no-untyped-def]
    """Two words from an 8-byte aligned shared address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.LiteralStructType([I32] * 2)
        text = "ld.shared.v2.u32 {$0, $1}, [$2];"
        loaded = call_asm(builder, kind, text, "=r,=r,r,~{memory}", [builder.trunc(args[0], I32)])
        return context.make_tuple(builder, signature.return_type, [builder.extract_value(loaded, i) for i in range(2)])

    return WORDS2(types.int64), codegen


@intrinsic
def shared_word(typingctx, where):  # type: ignore[no-untyped-def]
    """A word from a 4-byte aligned shared address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, I32, "ld.shared.u32 $0, [$1];", "=r,r,~{memory}", [builder.trunc(args[0], I32)])

    return types.uint32(types.int64), codegen


@intrinsic
def word(typingctx, where):  # type: ignore[no-untyped-def]
    """A word from a 4-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[0], I32.as_pointer(1)), align=4)

    return types.uint32(types.int64), codegen


@intrinsic
def words4(typingctx, where):  # type: ignore[no-untyped-def]
    """Four words from a 16-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        loaded = call_asm(
            builder,
            ir.LiteralStructType([I32] * 4),
            "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l,~{memory}",
            args,
        )
        parts = [builder.extract_value(loaded, i) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return WORDS4(types.int64), codegen


@intrinsic
def keep_loop(typingctx):  # type: ignore[no-untyped-def]
    """Nothing; but the compiler does not unroll a loop with a number of rounds that it does not know if this is in it.

    Kernels of a step follow each other so closely that fetching their code shows: what runs once must be short.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(VOID, [])
        builder.call(ir.InlineAsm(kind, "", "", side_effect=True), [], attrs=("convergent",))
        return context.get_dummy_value()

    return types.void(), codegen


# Order between kernels and between blocks


def _for_sm_90(text: str) -> Any:
    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if compiling_for() >= (9, 0):
                call_asm(builder, VOID, text, "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return typing


wait_for_predecessor = intrinsic(_for_sm_90("griddepcontrol.wait;"))
"""Wait until the kernel before this one has ended and its results can be read (sm_90). Before it a kernel may only read
what no kernel of the same run writes: weights, inputs, keys and values of earlier runs.
"""

let_successor_start = intrinsic(_for_sm_90("griddepcontrol.launch_dependents;"))
"""Let the next kernel's blocks begin as soon as all of this one's have come here or ended (sm_90): at once. They fill
their rings while this kernel still works; each kernel waits before it looks at another one's results or writes its own.
"""


@intrinsic
def count_up(typingctx, counter):  # type: ignore[no-untyped-def]
    """Add 1 to an int32 at a global address, after all that this thread wrote; returns what it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, I32, "fence.acq_rel.gpu; atom.global.add.u32 $0, [$1], 1; fence.acq_rel.gpu;",
                    "=r,l,~{memory}", args)  # fmt: skip

    return types.int32(types.int64), codegen


@intrinsic
def publish(typingctx, where, number):  # type: ignore[no-untyped-def]
    """Write an int64 where the host reads it, after all that this thread wrote."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        call_asm(builder, VOID, "st.release.sys.global.u64 [$0], $1;", "l,l,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
