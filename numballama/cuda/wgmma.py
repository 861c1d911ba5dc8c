"""wgmma, the tensor cores' instruction of sm_90: 64 rows of A times up to 256 rows of B, both in shared memory.

A tile has 64 columns of 16 bits: rows of 128 bytes, whose eight 16-byte pieces are swizzled (piece p of row r is in
place p xor (r mod 8)). Tiles begin at multiples of 1,024 bytes. The compiler assembles kernels that contain wgmma for
sm_90a.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import F32, I64, VOID, call_asm
from .mma import _ex2, _parts

LOG2_E = math.log2(math.e)

DESCRIPTOR = 1 << 62 | 1024 // 16 << 32 | 1 << 16
"""Of a tile at address 0: swizzled by 128 bytes, eight rows are 1,024 bytes; all by 16, as the address is added."""


def _in_place(context: Any, builder: Any, text: str, kind: Any, value: Any, more: list[Any]) -> Any:
    """Inline PTX whose first operands are the elements of a tuple of float32, read and written where they are."""
    count = kind.count
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l"] * len(more) + ["~{memory}"]
    result = ir.LiteralStructType([F32] * count)
    made = call_asm(builder, result, text, ",".join(constraints), [*_parts(builder, kind, value), *more])
    return context.make_tuple(builder, kind, [builder.extract_value(made, i) for i in range(count)])


@intrinsic
def zeros_of(typingctx, count):  # type: ignore[no-untyped-def]
    """`count` float32 of 0, a number that is written in the program."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    kind = types.UniTuple(types.float32, count.literal_value)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.make_tuple(builder, kind, [ir.Constant(F32, 0.0)] * kind.count)

    return kind(count), codegen


@intrinsic
def wgmma_tile(typingctx, memory, sums, a, b):  # type: ignore[no-untyped-def]
    """Begin sums += A · Bᵀ over the 64 columns of two tiles, given by descriptors, in the 16-bit type of `memory`.

    A warpgroup has 64 rows of A, and as many of B as `sums` has numbers in two rows. All that earlier calls began has
    ended when this one returns.
    """
    kind = "bf16" if memory.dtype.name == "int16" else "f16"

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = sums.count
        registers = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        op = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{kind}.{kind} {registers}"
        text = "{.reg .b64 a, b; wgmma.fence.sync.aligned; "
        for i in range(4):  # 16 columns are 32 bytes, 2 in a descriptor's units: the swizzle is one of addresses
            text += f"add.s64 a, ${2 * count}, {2 * i}; add.s64 b, ${2 * count + 1}, {2 * i}; "
            text += f"{op}, a, b, 1, 1, 1, 0, 0; "
        text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;}"
        return _in_place(context, builder, text, sums, args[1], list(args[2:]))

    return sums(memory, sums, types.int64, types.int64), codegen


@intrinsic
def wgmma_end(typingctx, sums):  # type: ignore[no-untyped-def]
    """The sums, once all products have ended."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _in_place(context, builder, "wgmma.wait_group.sync.aligned 0;", sums, args[0], [])

    return sums(sums), codegen


@intrinsic
def add_global_rows(typingctx, sums, first_at, second_at, first, second):  # type: ignore[no-untyped-def]
    """sums + what is in global memory where `mma.st_global_rows` would store them."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        pair = ir.LiteralStructType([F32] * 2)
        for i in range(0, len(parts), 2):
            row, column = i // 2 % 2, 8 * (i // 4)
            text = f"{{.reg .pred p; setp.gt.s64 p, $5, {column}; @p ld.global.v2.f32 {{$0, $1}}, [$4+{4 * column}];}}"
            zeros = [ir.Constant(F32, 0.0)] * 2
            loaded = call_asm(builder, pair, text, "=f,=f,0,1,l,l,~{memory}", [*zeros, args[1 + row], args[3 + row]])
            for j in range(2):
                parts[i + j] = builder.fadd(parts[i + j], builder.extract_value(loaded, j))
        return context.make_tuple(builder, sums, parts)

    return sums(sums, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def add_parts(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a + b, number by number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pairs = zip(_parts(builder, a, args[0]), _parts(builder, b, args[1]), strict=True)
        return context.make_tuple(builder, a, [builder.fadd(*pair) for pair in pairs])

    return a(a, b), codegen


@intrinsic
def scale_columns(typingctx, sums, first_at, second_at, first, second):  # type: ignore[no-untyped-def]
    """Multiply each column by a float32 in global memory: those of the first half of the columns begin at `first_at`,
    of which `first` are wanted; the second half's at `second_at`.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        pair, count = ir.LiteralStructType([F32] * 2), len(parts) // 2
        for half in range(2):
            for i in range(0, count, 4):
                column = 2 * i
                text = "{.reg .pred p; setp.gt.s64 p, $5, "
                text += f"{column}; @p ld.global.v2.f32 {{$0, $1}}, [$4+{4 * column}];}}"
                given = [*[ir.Constant(F32, 0.0)] * 2, args[1 + half], args[3 + half]]
                loaded = call_asm(builder, pair, text, "=f,=f,0,1,l,l,~{memory}", given)
                for j in range(4):
                    at = half * count + i + j
                    parts[at] = builder.fmul(parts[at], builder.extract_value(loaded, j & 1))
        return context.make_tuple(builder, sums, parts)

    return sums(sums, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def silu_and_mul_halves(typingctx, sums):  # type: ignore[no-untyped-def]
    """silu(gate) · up, where the first half of the columns is the gate's and the second half up's."""
    kind = types.UniTuple(types.float32, sums.count // 2)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        made = []
        for gate, up in zip(parts[: kind.count], parts[kind.count :], strict=True):
            power = _ex2(builder, builder.fmul(gate, ir.Constant(F32, -LOG2_E)))
            below = builder.fadd(power, ir.Constant(F32, 1.0))
            # not fdiv: its slow path is a function call, beside which wgmma runs one at a time
            silu = call_asm(builder, F32, "div.full.f32 $0, $1, $2;", "=f,f,f", [gate, below])
            made.append(builder.fmul(silu, up))
        return context.make_tuple(builder, kind, made)

    return kind(sums), codegen


@intrinsic
def fence_proxy_async(typingctx):  # type: ignore[no-untyped-def]
    """fence.proxy.async: what this thread has written to shared memory is there for wgmma after the next barrier."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        call_asm(builder, VOID, "fence.proxy.async.shared::cta;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def st_global_parts(typingctx, sums, at, distance, count):  # type: ignore[no-untyped-def]
    """Store four numbers of `sums` to each of the first `count` places in global memory, `distance` bytes apart."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        for i in range(0, len(parts), 4):
            text = f"{{.reg .pred p; setp.gt.s64 p, $1, {i // 4}; @p st.global.v4.f32 [$0], {{$2, $3, $4, $5}};}}"
            to = builder.add(args[1], builder.mul(args[2], ir.Constant(I64, i // 4)))
            call_asm(builder, VOID, text, "l,l,f,f,f,f,~{memory}", [to, args[3], *parts[i : i + 4]])
        return context.get_dummy_value()

    return types.void(sums, types.int64, types.int64, types.int64), codegen
