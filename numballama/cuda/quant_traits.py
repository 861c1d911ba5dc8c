"""Properties of storage types in kernels. The storage type of a weight or KV cache is the element type of its pointer.

uint16 is float16, int16 is bfloat16, uint8 is two 4-bit integers of q4_0, `Packed` the integers of other block types.
The first half are compile-time constants, so `if has_scales(weight)` costs nothing. The second half loads, stores and
multiplies elements according to the type. The tables come from `quantization/types.py`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic, models, register_model

from ..quantization.types import TYPE_TRAITS
from .launch import ELEMENTS_PER_16_BYTES, QUANTIZED
from .lowering import F16, F32, I8, I16, I32, I64, as_integer, element_pointer, fma, saturated_to_16
from .repack import PACKED as BLOCK_TYPES


class Packed(types.Type):  # type: ignore[misc]
    """Element type of the integers of a GGUF block type, in the layout of `cuda/repack.py`."""


@register_model(Packed)  # type: ignore[untyped-decorator]
class _PackedModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, I8)


PACKED = {name: Packed(name) for name in BLOCK_TYPES}
"""Type name → element type of a pointer to such integers."""
ELEMENT_TYPES: dict[str, Any] = PACKED | {
    "f32": types.float32, "f16": types.uint16, "bf16": types.int16, "int8": types.int8, "q4_0": types.uint8,
    "i8": types.int8, "i32": types.int32, "i64": types.int64, "f64": types.float64, "u64": types.uint64,
    "u8": types.uint8, "u32": types.uint32, "q8_0": Packed("q8_0"),
}  # fmt: skip
"""`Array.dtype` → element type of a pointer to it. "q8_0" is a KV cache: int8 quants, and scales behind them all."""


# Compile-time constants

PER_16_BYTES = {ELEMENT_TYPES[payload].name: count for payload, count in ELEMENTS_PER_16_BYTES.items()} | {"q8_0": 8}
"""Name of a pointer's element type → elements in 16 bytes of a weight or a KV cache. In 16 bytes of shared memory there
are 8 quants of a q8_0 cache and their scale.
"""
SCALED = tuple(ELEMENT_TYPES[payload].name for payload in QUANTIZED)
"""Names of the element types of weights that have scales."""
ZERO_POINTS = {ELEMENT_TYPES[payload].name: float(TYPE_TRAITS[payload].zero_point) for payload in QUANTIZED}
"""Name of such an element type → its zero point, the unsigned quant that means 0."""


def _constant(kind: Any, value: Any) -> Any:
    """An intrinsic pointer → `value(name of its element type)`, evaluated at compile time."""

    def typing(typingctx, memory):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return context.get_constant(kind, value(memory.dtype.name))

        return kind(memory), codegen

    return intrinsic(typing)


per_16_bytes = _constant(types.int64, PER_16_BYTES.__getitem__)
"""per_16_bytes(pointer): elements in 16 bytes."""

has_scales = _constant(types.boolean, lambda name: name in SCALED)
"""has_scales(pointer): whether the weight has scales."""

is_int8 = _constant(types.boolean, "int8".__eq__)
"""is_int8(pointer): whether the weight has 8-bit integers."""
is_q4_0 = _constant(types.boolean, ELEMENT_TYPES["q4_0"].name.__eq__)
"""is_q4_0(pointer): whether the weight is q4_0."""
is_packed = _constant(types.boolean, lambda name: name in PACKED)
"""is_packed(pointer): whether the element type is one of `PACKED`."""

is_q4_1, is_q5_k, is_q6_k = (_constant(types.boolean, name.__eq__) for name in ("q4_1", "q5_k", "q6_k"))
"""is_q5_k(pointer) and the like: whether the element type is this one."""
has_mins = _constant(types.boolean, ("q4_k", "q5_k").__contains__)
"""has_mins(pointer): whether this is q4_k or q5_k, with a scale and a min of six bits for each 32 elements."""

is_q8_0 = _constant(types.boolean, "q8_0".__eq__)
"""is_q8_0(pointer): whether this is a KV cache of q8_0. A weight's q8_0 is int8 in device memory."""

zero_point = _constant(types.float32, lambda name: ZERO_POINTS.get(name) or 1.0)
"""zero_point(pointer): zero point of the unsigned quants; the block's sum of activations is multiplied by it. 1 for
types that store a minimum of each block instead.
"""


# Elements


def _half(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(builder.trunc(bits, I16), F16), F32)


def _unpack(builder: Any, name: str, words: Any, i: int) -> Any:
    """Element `i` of 16 bytes as float32."""
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
def dot_16_bytes(typingctx, memory, words, x, step):  # type: ignore[no-untyped-def]
    """Dot product of the elements in 16 bytes of `memory`'s type with float32: four of them from each of the shared
    addresses x, x + step, …, which are 16-byte aligned.

    Returns 0 for types with scales, which `dp4a` multiplies.
    """
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = [builder.extract_value(args[1], i) for i in range(4)]
        at = as_integer(context, builder, args[2], x, types.int32)
        stride = as_integer(context, builder, args[3], step, types.int32)
        sums = [ir.Constant(F32, 0.0)] * 2
        if name in SCALED:
            return sums[0]
        vector = ir.VectorType(F32, 4)
        for four in range(PER_16_BYTES[name] // 4):
            elements = builder.load(builder.inttoptr(at, vector.as_pointer(3)), align=16)
            for i in range(4):
                number = _unpack(builder, name, parts, 4 * four + i)
                sums[i % 2] = fma(builder, number, builder.extract_element(elements, ir.Constant(I32, i)), sums[i % 2])
            at = builder.add(at, stride)
        return builder.fadd(*sums)

    return types.float32(memory, words, x, step), codegen


@intrinsic
def unpack8(typingctx, memory, words):  # type: ignore[no-untyped-def]
    """The elements in 16 bytes of a float32 or 16-bit type as eight float32; the last four of float32 are 0. Of q8_0,
    two words of quants times the float16 scale in the lower half of the third word.
    """
    name = memory.dtype.name
    if name not in ("float32", "uint16", "int16", "q8_0"):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = [builder.extract_value(args[1], i) for i in range(4)]
        if name == "q8_0":
            scale, quants = _half(builder, parts[2]), []
            for i in range(8):
                shifted = builder.lshr(parts[i // 4], ir.Constant(I32, 8 * (i % 4)))
                kind = ir.FunctionType(F32, [I32])  # LLVM would widen the byte to 16 bits first
                quant = builder.call(ir.InlineAsm(kind, "cvt.rn.f32.s8 $0, $1;", "=f,r"), [shifted])
                quants.append(builder.fmul(quant, scale))
            return context.make_tuple(builder, signature.return_type, quants)
        zero, count = ir.Constant(F32, 0.0), PER_16_BYTES[name]
        elements = [_unpack(builder, name, parts, i) if i < count else zero for i in range(8)]
        return context.make_tuple(builder, signature.return_type, elements)

    return types.UniTuple(types.float32, 8)(memory, words), codegen


@intrinsic
def load_element(typingctx, memory, row, index):  # type: ignore[no-untyped-def]
    """Element `index` of the row at address `row`, without its scale, as float32. Not for `PACKED` types."""
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
        if name in ("int8", "q8_0"):
            return builder.sitofp(load(I8, at), F32)
        inside = builder.and_(at, constant(31))
        byte = load(I8, builder.add(builder.mul(builder.lshr(at, constant(5)), constant(16)),
                                    builder.and_(inside, constant(15))))  # fmt: skip
        shift = builder.trunc(builder.shl(builder.lshr(inside, constant(4)), constant(2)), I8)
        bits = builder.zext(builder.and_(builder.lshr(byte, shift), ir.Constant(I8, 15)), I32)
        return builder.sitofp(builder.sub(bits, ir.Constant(I32, 8)), F32)

    return types.float32(memory, types.int64, index), codegen


@intrinsic
def store_element(typingctx, memory, index, value):  # type: ignore[no-untyped-def]
    """memory[index] = value, in the type of a KV cache: rounded to the nearest float32, float16 or bfloat16, ties to
    even; what is finite stays finite. Of q8_0 the value is an integer, a quant.
    """
    name = memory.dtype.name

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = as_integer(context, builder, args[1], index, types.int64)
        where, x = element_pointer(context, builder, memory, args[0], at), args[2]
        if name == "float32":
            builder.store(x, where)
        elif name == "q8_0":
            builder.store(builder.fptosi(x, I8), where)
        else:
            builder.store(saturated_to_16(builder, name, x), where)
        return context.get_dummy_value()

    return types.void(memory, index, types.float32), codegen


@intrinsic
def scale_bytes(typingctx, memory):  # type: ignore[no-untyped-def]
    """Bytes of one scale. A compile-time constant."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(I64, memory.dtype.bitwidth // 8)

    return types.int64(memory), codegen


@intrinsic
def scale_word(typingctx, memory, index):  # type: ignore[no-untyped-def]
    """Address of the aligned word that holds element `index` of float32 or float16 scales."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = as_integer(context, builder, args[1], index, types.int64)
        where = builder.ptrtoint(element_pointer(context, builder, memory, args[0], at), I64)
        return builder.and_(where, ir.Constant(I64, -4))

    return types.int64(memory, index), codegen


@intrinsic
def scale_in(typingctx, memory, word, index):  # type: ignore[no-untyped-def]
    """Scale `index` as float32, from the word at address `scale_word(memory, index)`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if memory.dtype == types.float32:
            return builder.bitcast(args[1], F32)
        at = builder.trunc(as_integer(context, builder, args[2], index, types.int64), I32)
        shift = builder.shl(builder.and_(at, ir.Constant(I32, 1)), ir.Constant(I32, 4))
        return _half(builder, builder.lshr(args[1], shift))

    return types.float32(memory, types.uint32, index), codegen
