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
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic, models, register_model

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()
WORDS2, WORDS4 = types.UniTuple(types.uint32, 2), types.UniTuple(types.uint32, 4)
FLOATS4 = types.UniTuple(types.float32, 4)


class Packed(types.Type):  # type: ignore[misc]
    """Bytes with the integers of one of GGUF's block types, as `blocks_cuda` lays them out."""


@register_model(Packed)  # type: ignore[untyped-decorator]
class _PackedModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, I8)


PACKED = {name: Packed(name) for name in ("q4_1", "q4_k", "q6_k")}
"""Element types of pointers to such integers."""


def _compiling_for() -> tuple[int, int]:
    """Compute capability that the kernel now being lowered is compiled for."""
    capability: tuple[int, int] = ConfigStack().top().compute_capability
    return capability


def _asm(builder: Any, result: Any, text: str, constraints: str, arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), arguments)


def _integer(context: Any, builder: Any, value: Any, found: Any, wanted: Any) -> Any:
    return context.cast(builder, value, found, wanted)


def _is_memory(kind: Any) -> bool:
    return isinstance(kind, (types.CPointer, types.Array))


def _element(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    """LLVM pointer to an element of a typed pointer or of an array."""
    base = context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
    return builder.gep(base, [index])


@intrinsic
def address(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of an element of a typed pointer or of a shared array, as int64."""
    if not (_is_memory(memory) and isinstance(index, types.Integer)):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = _integer(context, builder, args[1], index, types.int64)
        return builder.ptrtoint(_element(context, builder, memory, args[0], where), I64)

    return types.int64(memory, index), codegen


@intrinsic
def pointer_at(typingctx, like, where):  # type: ignore[no-untyped-def]
    """A pointer of the same type as `like` to a global address."""
    if not isinstance(like, types.CPointer):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[1], args[0].type)

    return like(like, types.int64), codegen


@intrinsic
def shared_address(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of an element of a shared array, as the functions that copy to and load from shared memory take it."""
    if not isinstance(memory, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = _integer(context, builder, args[1], index, types.int64)
        generic = builder.ptrtoint(_element(context, builder, memory, args[0], where), I64)
        asm = ir.InlineAsm(ir.FunctionType(I64, [I64]), "cvta.to.shared.u64 $0, $1;", "=l,l")
        return builder.call(asm, [generic])

    return types.int64(memory, index), codegen


@intrinsic
def floats4(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Four float32 from a 16-byte aligned element of a pointer or of shared memory."""
    if not (_is_memory(memory) and memory.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = _integer(context, builder, args[1], index, types.int64)
        vector = ir.VectorType(F32, 4)
        element = builder.bitcast(_element(context, builder, memory, args[0], where), vector.as_pointer())
        loaded = builder.load(element, align=16)
        parts = [builder.extract_element(loaded, ir.Constant(I32, i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return FLOATS4(memory, index), codegen


@intrinsic
def store4(typingctx, memory, index, a, b, c, d):  # type: ignore[no-untyped-def]
    """Four float32 into a 16-byte aligned place of a pointer or of shared memory."""
    if not (_is_memory(memory) and memory.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where = _integer(context, builder, args[1], index, types.int64)
        vector = ir.VectorType(F32, 4)
        numbers = ir.Constant(vector, ir.Undefined)
        for i in range(4):
            numbers = builder.insert_element(numbers, args[2 + i], ir.Constant(I32, i))
        element = builder.bitcast(_element(context, builder, memory, args[0], where), vector.as_pointer())
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


@intrinsic
def half_of_f32(typingctx, number):  # type: ignore[no-untyped-def]
    """A float32 rounded to the nearest IEEE half: its bits, in the low 16 of a word."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.zext(builder.bitcast(builder.fptrunc(args[0], F16), I16), I32)

    return types.uint32(types.float32), codegen


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
        return _asm(builder, F32, "ex2.approx.f32 $0, $1;", "=f,f", args)

    return types.float32(types.float32), codegen


# Numbers by the element type of their pointer


PER_16_BYTES = {
    "float32": 4, "uint16": 8, "int16": 8, "int8": 16, "uint8": 32, "q4_1": 32, "q4_k": 32, "q6_k": 16,
}  # fmt: skip
"""Numbers in 16 bytes of a weight, or of a KV cache, by the element type of its pointer; of q6_k, whose 16 bytes hold
the lower four bits of 32, those that share a scale.
"""
SCALED = ("int8", "uint8", *PACKED)
"""Names of element types whose numbers want scales."""


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

counts_from = _constant(types.float32, lambda name: {"uint8": 8.0, "q6_k": 32.0}.get(name, 1.0))
"""What the sum of the numbers of x that meet a block is multiplied by: the integer that stands for 0; 1 for types whose
blocks have a least number. A constant.
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


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


@intrinsic
def dot16(typingctx, memory, words, x, index, step):  # type: ignore[no-untyped-def]
    """The numbers in 16 bytes of `memory`'s type, times float32: four of them from each of x[index], x[index + step] …

    Returns the sum; 0 for types with scales, which are not for this. `x` is shared memory, 16-byte aligned there.
    """
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = [builder.extract_value(args[1], i) for i in range(4)]
        at = _integer(context, builder, args[3], index, types.int64)
        stride = _integer(context, builder, args[4], step, types.int64)
        sums = [ir.Constant(F32, 0.0)] * 2
        if name in SCALED:
            return sums[0]
        vector = ir.VectorType(F32, 4)
        for four in range(PER_16_BYTES[name] // 4):
            where = builder.bitcast(_element(context, builder, x, args[2], at), vector.as_pointer())
            numbers = builder.load(where, align=16)
            for i in range(4):
                number = _unpack(builder, name, parts, 4 * four + i)
                sums[i % 2] = _fma(builder, number, builder.extract_element(numbers, ir.Constant(I32, i)), sums[i % 2])
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
        at = _integer(context, builder, args[2], index, types.int64)

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
        at = _integer(context, builder, args[1], index, types.int64)
        where, x = _element(context, builder, memory, args[0], at), args[2]
        if name == "float32":
            builder.store(x, where)
        elif name == "uint16":
            builder.store(builder.bitcast(builder.fptrunc(x, F16), I16), where)
        else:
            bits = builder.bitcast(x, I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
            broken = builder.fcmp_unordered("uno", x, x)
            rounded = builder.select(broken, builder.or_(bits, ir.Constant(I32, 0x400000)), rounded)
            builder.store(builder.trunc(builder.lshr(rounded, ir.Constant(I32, 16)), I16), where)
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
        at = _integer(context, builder, args[1], index, types.int64)
        where = builder.ptrtoint(_element(context, builder, memory, args[0], at), I64)
        return builder.and_(where, ir.Constant(I64, -4))

    return types.int64(memory, index), codegen


@intrinsic
def scale_in(typingctx, memory, word, index):  # type: ignore[no-untyped-def]
    """Scale `index` as float32, out of the word that `scale_word` tells."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if memory.dtype == types.float32:
            return builder.bitcast(args[1], F32)
        at = builder.trunc(_integer(context, builder, args[2], index, types.int64), I32)
        shift = builder.shl(builder.and_(at, ir.Constant(I32, 1)), ir.Constant(I32, 4))
        return _half(builder, builder.lshr(args[1], shift))

    return types.float32(memory, types.uint32, index), codegen


# Streams: copies from global memory into a ring in shared memory that the copying thread alone reads


def _copy(text: str, plain: str) -> Any:
    """A copy of bytes whose count the caller may set to 0 for zeros; sm_80 copies behind the thread's back."""

    def typing(typingctx, to, source, count):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            args = [builder.trunc(args[0], I32), args[1], _integer(context, builder, args[2], count, types.int32)]
            body = text if _compiling_for() >= (8, 0) else plain
            _asm(builder, VOID, body, "r,l,r,~{memory}", args)
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
        if _compiling_for() >= (8, 0):
            _asm(builder, VOID, "cp.async.commit_group;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), codegen


def _await(pending: int) -> Any:
    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if _compiling_for() >= (8, 0):
                _asm(builder, VOID, f"cp.async.wait_group {pending};", "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return intrinsic(typing)


await_all, await_all_but_1, await_all_but_2, await_all_but_3, await_all_but_7 = (_await(n) for n in (0, 1, 2, 3, 7))
"""Wait until at most that many of this thread's groups of copies are under way (sm_80): the number is in the opcode."""


@intrinsic
def shared_words4(typingctx, where):  # type: ignore[no-untyped-def]
    """Four words from a 16-byte aligned shared address (`shared_address`)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        loaded = _asm(
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
        loaded = _asm(builder, kind, text, "=r,=r,r,~{memory}", [builder.trunc(args[0], I32)])
        return context.make_tuple(builder, signature.return_type, [builder.extract_value(loaded, i) for i in range(2)])

    return WORDS2(types.int64), codegen


@intrinsic
def shared_word(typingctx, where):  # type: ignore[no-untyped-def]
    """A word from a 4-byte aligned shared address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _asm(builder, I32, "ld.shared.u32 $0, [$1];", "=r,r,~{memory}", [builder.trunc(args[0], I32)])

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
        loaded = _asm(
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
            if _compiling_for() >= (9, 0):
                _asm(builder, VOID, text, "~{memory}", [])
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
        return _asm(builder, I32, "fence.acq_rel.gpu; atom.global.add.u32 $0, [$1], 1; fence.acq_rel.gpu;",
                    "=r,l,~{memory}", args)  # fmt: skip

    return types.int32(types.int64), codegen


@intrinsic
def arrive(typingctx, counter):  # type: ignore[no-untyped-def]
    """Add 1 to a uint32 at a global address, after all that this thread, and those it met at a barrier, wrote."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _asm(builder, VOID, "fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [$0], 1;", "l,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def arrived(typingctx, counter):  # type: ignore[no-untyped-def]
    """What `arrive` has counted so far; what those threads wrote can be read after it."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _asm(builder, I32, "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l,~{memory}", args)

    return types.int32(types.int64), codegen


@intrinsic
def clock(typingctx):  # type: ignore[no-untyped-def]
    """Nanoseconds of a clock that all multiprocessors share."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _asm(builder, I64, "mov.u64 $0, %globaltimer;", "=l,~{memory}", [])

    return types.int64(), codegen


@intrinsic
def publish(typingctx, where, number):  # type: ignore[no-untyped-def]
    """Write an int64 where the host reads it, after all that this thread wrote."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _asm(builder, VOID, "st.release.sys.global.u64 [$0], $1;", "l,l,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


# Tensor cores: products of tiles that the lanes of a warp hold together
#
# Lane l of a warp holds, of a 16 × 8 tile of float32, numbers (l / 4, 2 (l mod 4)), the one beside it, and the same
# eight rows below: four in a row of a tuple. Tiles of 16-bit numbers lie in shared memory in rows of 128 or 256 bytes,
# chunk c of 16 bytes of row r at place c xor (r mod 8): eight rows' chunks of one column lie in different banks. As
# rows begin at multiples of 128, moving by two chunks is a xor of the whole address.

STAGED_BYTES = 544
"""Distance of two rows of 128 float32 that `put_sums` writes: rows of the same lanes lie in different banks."""


def _parts(builder: Any, kind: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, i) for i in range(kind.count)]


def _short(context: Any, builder: Any, value: Any, found: Any) -> Any:
    return _integer(context, builder, value, found, types.uint32)


def _ldmatrix(builder: Any, where: Any, offset: int, transposed: bool = False) -> list[Any]:
    """Four 8 × 8 matrices of 16-bit numbers; lane l names row l mod 8 of matrix l / 8."""
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"
    loaded = _asm(builder, ir.LiteralStructType([I32] * 4), text, "=r,=r,=r,=r,r,~{memory}", [where])
    return [builder.extract_value(loaded, i) for i in range(4)]


def _halves_of_bfloats(builder: Any, word: Any) -> Any:
    """In one piece, so that LLVM keeps the words and not, for a whole loop, what comes of them."""
    text = (
        "{.reg .b32 t; .reg .f32 a, b; .reg .b16 h, g; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xffff0000; "
        "mov.b32 b, t; cvt.rn.f16.f32 h, a; cvt.rn.f16.f32 g, b; mov.b32 $0, {h, g};}"
    )
    return _asm(builder, I32, text, "=r,r", [word])


def _mma(builder: Any, name: str, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    """c + a · b of tiles 16 × 16 and 16 × 8. Before sm_80 it takes two steps, and bfloat16 goes as float16 (which is
    the same for numbers between 2^-14 and 2^16, and to 2^-25 below).
    """
    result = ir.LiteralStructType([F32] * 4)
    if _compiling_for() >= (8, 0):
        kind = "bf16" if name == "int16" else "f16"
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};"
        )
        summed = _asm(builder, result, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *c])
        return [builder.extract_value(summed, i) for i in range(4)]
    text = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};"
    for i in range(2):
        words = [a[2 * i], a[2 * i + 1], b[i]]
        if name == "int16":
            words = [_halves_of_bfloats(builder, word) for word in words]
        summed = _asm(builder, result, text, "=f,=f,=f,=f,r,r,r,f,f,f,f", [*words, *c])
        c = [builder.extract_value(summed, i) for i in range(4)]
    return c


def _pack(builder: Any, name: str, low: Any, high: Any) -> Any:
    """A word of two float32, rounded to nearest even to float16 ("uint16") or bfloat16."""
    if _compiling_for() >= (8, 0):
        kind = "f16x2" if name == "uint16" else "bf16x2"
        return _asm(builder, I32, f"cvt.rn.{kind}.f32 $0, $2, $1;", "=r,f,f", [low, high])
    halves = []
    for x in (low, high):
        if name == "uint16":
            halves.append(builder.zext(builder.bitcast(builder.fptrunc(x, F16), I16), I32))
        else:
            bits = builder.bitcast(x, I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
            broken = builder.fcmp_unordered("uno", x, x)
            rounded = builder.select(broken, builder.or_(bits, ir.Constant(I32, 0x400000)), rounded)
            halves.append(builder.lshr(rounded, ir.Constant(I32, 16)))
    return builder.or_(halves[0], builder.shl(halves[1], ir.Constant(I32, 16)))


@intrinsic
def pack2(typingctx, memory, low, high):  # type: ignore[no-untyped-def]
    """Two float32 rounded to the 16-bit type of `memory`, in one word."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _pack(builder, memory.dtype.name, args[1], args[2])

    return types.uint32(memory, types.float32, types.float32), codegen


@intrinsic
def put_words2(typingctx, where, a, b):  # type: ignore[no-untyped-def]
    """Two words to an 8-byte aligned global address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _asm(builder, VOID, "st.global.v2.u32 [$0], {$1, $2};", "l,r,r,~{memory}", args)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32, types.uint32), codegen


@intrinsic
def put_words4(typingctx, where, a, b, c, d):  # type: ignore[no-untyped-def]
    """Four words to a 16-byte aligned place of the shared window (`shared_address`)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        args = [_short(context, builder, args[0], where), *args[1:]]
        _asm(builder, VOID, "st.shared.v4.u32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}", args)
        return context.get_dummy_value()

    return types.void(where, *[types.uint32] * 4), codegen


def _zeros(count: int) -> Any:
    kind = types.UniTuple(types.float32, count)

    def typing(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return context.make_tuple(builder, kind, [ir.Constant(F32, 0.0)] * count)

        return kind(), codegen

    return intrinsic(typing)


zeros32, zeros64, zeros128 = (_zeros(count) for count in (32, 64, 128))
"""Tuples of float32: what a lane holds of a sum of tiles."""


@intrinsic
def load_fragments(typingctx, sums, a_at, b_at):  # type: ignore[no-untyped-def]
    """What a lane needs to multiply 16 columns of two tiles: of A (as many rows as `sums` has), then of B (64 rows).

    Rows have 128 bytes. Lane l's addresses are of row l mod 16 of A, chunk l / 16, and of row (l mod 8) + 8 (l / 16) of
    B, chunk (l / 8) mod 2.
    """
    fours = sums.count // 32

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        a, b = _short(context, builder, args[1], a_at), _short(context, builder, args[2], b_at)
        words = []
        for i in range(fours):
            words += _ldmatrix(builder, a, 2048 * i)
        for i in range(4):
            words += _ldmatrix(builder, b, 2048 * i)
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4 * fours + 16)(sums, a_at, b_at), codegen


@intrinsic
def multiply_fragments(typingctx, memory, sums, words):  # type: ignore[no-untyped-def]
    """sums + A · Bᵀ of fragments in the 16-bit type of `memory`: 64 columns, 8 tiles a row of tiles."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, parts = _parts(builder, sums, args[1]), _parts(builder, words, args[2])
        fours = len(totals) // 32
        b = parts[4 * fours :]
        for i in range(fours):
            for j in range(8):
                at = 4 * (8 * i + j)
                totals[at : at + 4] = _mma(
                    builder, memory.dtype.name, parts[4 * i : 4 * i + 4], b[2 * j : 2 * j + 2], totals[at : at + 4]
                )
        return context.make_tuple(builder, sums, totals)

    return sums(memory, sums, words), codegen


@intrinsic
def put_sums(typingctx, sums, to):  # type: ignore[no-untyped-def]
    """A warp's sums into rows of float32 in shared memory, `STAGED_BYTES` apart; `to` is of the lane's first number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, totals = _short(context, builder, args[1], to), _parts(builder, sums, args[0])
        for i in range(len(totals) // 2):
            row, column = 16 * (i // 16) + 8 * (i % 2), 8 * (i // 2 % 8)
            text = f"st.shared.v2.f32 [$0+{row * STAGED_BYTES + 4 * column}], {{$1, $2}};"
            _asm(builder, VOID, text, "r,f,f,~{memory}", [where, *totals[2 * i : 2 * i + 2]])
        return context.get_dummy_value()

    return types.void(sums, to), codegen


@intrinsic
def load_queries(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """Fragments of 16 rows of as many numbers as `sums` has columns, two rows of eight for a lane: 64 or 128."""
    columns = 2 * sums.count

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, words = _short(context, builder, args[1], at), []
        for step in range(columns // 16):
            words += _ldmatrix(builder, builder.xor(where, ir.Constant(I32, 32 * step)), 0)
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, columns // 4)(sums, at), codegen


@intrinsic
def score_keys(typingctx, memory, queries, keys_at):  # type: ignore[no-untyped-def]
    """16 queries · 64 keysᵀ. Lane l's address is of key (l mod 8) + 8 (l / 16), chunk (l / 8) mod 2."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words, where = _parts(builder, queries, args[1]), _short(context, builder, args[2], keys_at)
        totals = [ir.Constant(F32, 0.0)] * 32
        steps, name = len(words) // 4, memory.dtype.name
        for step in range(steps):
            moved = builder.xor(where, ir.Constant(I32, 32 * step))
            for j in range(4):
                keys = _ldmatrix(builder, moved, 16 * j * 32 * steps)
                for i in range(2):
                    at = 4 * (2 * j + i)
                    totals[at : at + 4] = _mma(
                        builder, name, words[4 * step : 4 * step + 4], keys[2 * i : 2 * i + 2], totals[at : at + 4]
                    )
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.float32, 32)(memory, queries, keys_at), codegen


@intrinsic
def add_values(typingctx, memory, sums, weights, values_at):  # type: ignore[no-untyped-def]
    """sums + weights (16 × 64, as `score_keys` gives them) · 64 values. Lanes' addresses are as for `score_keys`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, numbers = _parts(builder, sums, args[1]), _parts(builder, weights, args[2])
        where, name = _short(context, builder, args[3], values_at), memory.dtype.name
        row_bytes = 4 * len(totals)
        for step in range(4):
            mine = numbers[8 * step : 8 * step + 8]
            a = [_pack(builder, name, mine[2 * i], mine[2 * i + 1]) for i in range(4)]
            for j in range(len(totals) // 8):
                moved = builder.xor(where, ir.Constant(I32, 32 * j))
                values = _ldmatrix(builder, moved, 16 * step * row_bytes, transposed=True)
                for i in range(2):
                    at = 4 * (2 * j + i)
                    totals[at : at + 4] = _mma(builder, name, a, [values[i], values[i + 2]], totals[at : at + 4])
        return context.make_tuple(builder, sums, totals)

    return sums(memory, sums, weights, types.int64), codegen


def _by_row(result: Any, function: Any) -> Any:
    """An intrinsic that makes a tuple of float32 from a lane's numbers, each with the argument that its row has.

    function(builder, numbers, rows): which row (0 or 1) number i belongs to is (i / 2) mod 2.
    """

    def typing(typingctx, numbers, first, second):  # type: ignore[no-untyped-def]
        kind = numbers if result is None else result

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            made = function(builder, _parts(builder, numbers, args[0]), args[1:])
            return context.make_tuple(builder, kind, made)

        return kind(numbers, types.float32, types.float32), codegen

    return intrinsic(typing)


def _reduce(combine: Any) -> Any:
    def function(builder: Any, numbers: list[Any], start: Any) -> list[Any]:
        totals = list(start)
        for i, number in enumerate(numbers):
            totals[i // 2 % 2] = combine(builder, totals[i // 2 % 2], number)
        return totals

    return function


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return _asm(builder, F32, "max.f32 $0, $1, $2;", "=f,f,f", [a, b])


def _power(builder: Any, x: Any) -> Any:
    return _asm(builder, F32, "ex2.approx.f32 $0, $1;", "=f,f", [x])


PAIR = types.UniTuple(types.float32, 2)
most_of_rows = _by_row(PAIR, _reduce(_larger))
"""most_of_rows(numbers, a, b): the largest of the lane's numbers and a in its first row, and b in its second."""
sums_of_rows = _by_row(PAIR, _reduce(lambda builder, a, b: builder.fadd(a, b)))
"""sums_of_rows(numbers, a, b): a plus the lane's numbers in its first row, b plus those in its second."""
powers_of_2 = _by_row(
    None, lambda builder, x, rows: [_power(builder, builder.fsub(x[i], rows[i // 2 % 2])) for i in range(len(x))]
)
"""powers_of_2(numbers, a, b): 2^(number - a) in the first row, 2^(number - b) in the second."""
scale_rows = _by_row(None, lambda builder, x, rows: [builder.fmul(x[i], rows[i // 2 % 2]) for i in range(len(x))])
"""scale_rows(numbers, a, b): the first row's numbers times a, the second's times b."""


@intrinsic
def mask_scores(typingctx, scores, first, second):  # type: ignore[no-untyped-def]
    """Scores, but -infinity for keys after the row's last: counted from the lane's first, it is `first` or `second`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lasts = [
            _integer(context, builder, args[1], first, types.int32),
            _integer(context, builder, args[2], second, types.int32),
        ]
        below, numbers = ir.Constant(F32, float("-inf")), []
        for i, number in enumerate(_parts(builder, scores, args[0])):
            seen = builder.icmp_signed("<=", ir.Constant(I32, 8 * (i // 4) + i % 2), lasts[i // 2 % 2])
            numbers.append(builder.select(seen, number, below))
        return context.make_tuple(builder, scores, numbers)

    return scores(scores, first, second), codegen


@intrinsic
def put_rows(typingctx, numbers, first_at, second_at, first, second):  # type: ignore[no-untyped-def]
    """A lane's numbers to global memory; of its rows the first `first` and `second` columns are wanted."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, numbers, args[0])
        wanted = [_short(context, builder, args[3], first), _short(context, builder, args[4], second)]
        for i in range(len(parts) // 2):
            column = 8 * (i // 2)
            text = f"{{.reg .pred p; setp.gt.s32 p, $1, {column}; @p st.global.v2.f32 [$0+{4 * column}], {{$2, $3}};}}"
            _asm(builder, VOID, text, "l,r,f,f,~{memory}", [args[1 + i % 2], wanted[i % 2], *parts[2 * i : 2 * i + 2]])
        return context.get_dummy_value()

    return types.void(numbers, types.int64, types.int64, first, second), codegen


@intrinsic
def add_products(typingctx, sums, a, b):  # type: ignore[no-untyped-def]
    """sums[i, j] + a[i] · b[j], in float32; tuples all, rows of `sums` one after the other."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, left, right = (_parts(builder, *pair) for pair in zip((sums, a, b), args, strict=True))
        n = len(right)
        totals = [_fma(builder, left[i // n], right[i % n], total) for i, total in enumerate(totals)]
        return context.make_tuple(builder, sums, totals)

    return sums(sums, a, b), codegen


@intrinsic
def put_block(typingctx, sums, to):  # type: ignore[no-untyped-def]
    """Rows of four numbers to shared memory, `STAGED_BYTES` apart."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, numbers = _short(context, builder, args[1], to), _parts(builder, sums, args[0])
        for i in range(0, len(numbers), 4):
            text = f"st.shared.v4.f32 [$0+{i // 4 * STAGED_BYTES}], {{$1, $2, $3, $4}};"
            _asm(builder, VOID, text, "r,f,f,f,f,~{memory}", [where, *numbers[i : i + 4]])
        return context.get_dummy_value()

    return types.void(sums, to), codegen


@intrinsic
def expand16(typingctx, memory, words, scale, to):  # type: ignore[no-untyped-def]
    """16 bytes of int8 or 4-bit numbers, times their scale and rounded to float16, to a 16-byte aligned address."""
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, words, args[1])
        numbers = []
        for i in range(PER_16_BYTES[name]):
            if name == "int8":
                shifted = builder.lshr(parts[i // 4], ir.Constant(I32, 8 * (i % 4)))
                kind = ir.FunctionType(F32, [I32])  # LLVM would widen the byte to 16 bits first
                number = builder.call(ir.InlineAsm(kind, "cvt.rn.f32.s8 $0, $1;", "=f,r"), [shifted])
            else:
                shift = ir.Constant(I32, 8 * (i % 4) + 4 * (i // 16))
                nibble = builder.and_(builder.lshr(parts[i % 16 // 4], shift), ir.Constant(I32, 15))
                number = builder.sitofp(builder.sub(nibble, ir.Constant(I32, 8)), F32)
            numbers.append(builder.fmul(number, args[2]))
        packed = [_pack(builder, "uint16", numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
        for i in range(0, len(packed), 4):
            text = f"st.global.v4.u32 [$0+{4 * i}], {{$1, $2, $3, $4}};"
            _asm(builder, VOID, text, "l,r,r,r,r,~{memory}", [args[3], *packed[i : i + 4]])
        return context.get_dummy_value()

    return types.void(memory, words, types.float32, types.int64), codegen


@intrinsic
def expand_packed(typingctx, memory, words, high, high_too, scale, scale_too, least, to):  # type: ignore[no-untyped-def]
    """A block of 32 numbers of a `PACKED` type, rounded to float16, to a 16-byte aligned address: of the first 16
    `high` are the upper bits and `scale` is the scale, of the others `high_too` and `scale_too`.
    """
    six = memory.dtype.name == "q6_k"

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts, (upper, scales), numbers = _parts(builder, words, args[1]), (args[2:4], args[4:6]), []
        for i in range(32):
            half, j = divmod(i, 16)
            integer = builder.lshr(parts[j // 4], ir.Constant(I32, 8 * (j % 4) + 4 * half))
            integer = builder.and_(integer, ir.Constant(I32, 15))
            if six:
                bits = builder.lshr(upper[half], ir.Constant(I32, 8 * (j % 4) + 2 * (j // 4)))
                bits = builder.shl(builder.and_(bits, ir.Constant(I32, 3)), ir.Constant(I32, 4))
                integer = builder.sub(builder.or_(integer, bits), ir.Constant(I32, 32))
            number = builder.fmul(builder.sitofp(integer, F32), scales[half], flags=("contract",))
            numbers.append(number if six else builder.fadd(number, args[6], flags=("contract",)))
        packed = [_pack(builder, "uint16", numbers[i], numbers[i + 1]) for i in range(0, 32, 2)]
        for i in range(0, 16, 4):
            text = f"st.global.v4.u32 [$0+{4 * i}], {{$1, $2, $3, $4}};"
            _asm(builder, VOID, text, "l,r,r,r,r,~{memory}", [args[7], *packed[i : i + 4]])
        return context.get_dummy_value()

    factors = [types.float32] * 3
    return types.void(memory, words, types.uint32, types.uint32, *factors, types.int64), codegen
