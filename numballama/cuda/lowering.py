"""LLVM building blocks of the modules with PTX: types, inline PTX, element pointers, rounding."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()


def compiling_for() -> tuple[int, int]:
    """Compute capability, as (9, 0), that the current kernel is compiled for."""
    capability: tuple[int, int] = ConfigStack().top().compute_capability
    return capability


def call_asm(builder: Any, result: Any, text: str, constraints: str, arguments: Any) -> Any:
    """A call of inline PTX, declared to have side effects so that the compiler never removes it."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), arguments)


def as_integer(context: Any, builder: Any, value: Any, source: Any, target: Any) -> Any:
    """Cast an integer from Numba's type `source` to `target`."""
    return context.cast(builder, value, source, target)


def is_memory(kind: Any) -> bool:
    """Whether a Numba type is a typed pointer or an array, which `element_pointer` takes."""
    return isinstance(kind, (types.CPointer, types.Array))


def element_pointer(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    """LLVM pointer to an element of a typed pointer or of an array."""
    base = context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
    return builder.gep(base, [index])


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, which the compiler may contract to an fma, rounded once."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def rounded_to_16(builder: Any, name: str, x: Any) -> Any:
    """A float32 rounded to nearest even to float16 ("uint16") or bfloat16 ("int16"), as 16 bits; a NaN stays one."""
    if name == "uint16":
        return builder.bitcast(builder.fptrunc(x, F16), I16)
    bits = builder.bitcast(x, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
    quiet = builder.or_(bits, ir.Constant(I32, 0x400000))
    rounded = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(builder.lshr(rounded, ir.Constant(I32, 16)), I16)


def saturated_to_16(builder: Any, name: str, x: Any) -> Any:
    """`rounded_to_16`, but a finite number beyond the type becomes its largest finite value, not infinity."""
    bits = rounded_to_16(builder, name, x)
    infinity = ir.Constant(I16, 0x7C00 if name == "uint16" else 0x7F80)
    magnitude = builder.and_(bits, ir.Constant(I16, 0x7FFF))
    plain = builder.and_(builder.bitcast(x, I32), ir.Constant(I32, 0x7FFFFFFF))
    finite = builder.icmp_unsigned("<", plain, ir.Constant(I32, 0x7F800000))
    overflowed = builder.and_(builder.icmp_unsigned("==", magnitude, infinity), finite)
    return builder.sub(bits, builder.zext(overflowed, I16))


OPERANDS = {"r": (I32, types.uint32), "l": (I64, types.int64)}
"""Constraint of an operand of inline PTX → its type."""


def instruction(text: str, operands: str, result: bool = False) -> Any:
    """An intrinsic for one PTX instruction whose arguments are integers: "r" has 32 bits, "l" 64. Its result has 32, if
    there is one. It is taken to read and write memory.
    """
    constraints = ",".join([*(["=r"] if result else []), *operands, "~{memory}"])

    def made(*given: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [
                as_integer(context, builder, value, kind, OPERANDS[name][1])
                for value, kind, name in zip(args, given, operands, strict=True)
            ]
            found = call_asm(builder, I32 if result else VOID, text, constraints, values)
            return found if result else context.get_dummy_value()

        return (types.uint32 if result else types.void)(*given), codegen

    return intrinsic(BY_COUNT[len(operands)](made))


LOADED = OPERANDS | {"f": (F32, types.float32)}
"""Constraint of a result of inline PTX → its type."""


def load(text: str, kind: str, count: int = 1, state_space: str = "global") -> Any:
    """An intrinsic for a PTX load from an address: of one value ("r", "l" as above, or "f"), or of a tuple of `count`.

    It is taken to read and write memory. Shared addresses have 32 bits in PTX.
    """
    asm_type, numba_type = LOADED[kind]
    asm_result = asm_type if count == 1 else ir.LiteralStructType([asm_type] * count)
    result = numba_type if count == 1 else types.UniTuple(numba_type, count)
    is_shared = state_space == "shared"
    constraints = ",".join([f"={kind}"] * count + ["r" if is_shared else "l", "~{memory}"])

    def typing(typingctx: Any, where: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = builder.trunc(args[0], I32) if is_shared else args[0]
            found = call_asm(builder, asm_result, text, constraints, [address])
            if count == 1:
                return found
            parts = [builder.extract_value(found, i) for i in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return result(types.int64), codegen

    return intrinsic(typing)


BY_COUNT: dict[int, Any] = {
    0: lambda made: lambda typingctx: made(),
    1: lambda made: lambda typingctx, a: made(a),
    2: lambda made: lambda typingctx, a, b: made(a, b),
    3: lambda made: lambda typingctx, a, b, c: made(a, b, c),
    4: lambda made: lambda typingctx, a, b, c, d: made(a, b, c, d),
    5: lambda made: lambda typingctx, a, b, c, d, e: made(a, b, c, d, e),
}
"""Number of operands → a typing function with that number of parameters, which Numba reads from its signature."""
