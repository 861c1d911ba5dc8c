"""Loads and stores that other devices and the host see, and see in order: scope `.sys` of PTX's memory model.

`relaxed`: the access itself is whole and is seen at once, and orders nothing else. A pair of 64-bit words is two such
accesses. `release` and `acquire`: who sees the stored number has all that was written before it.

Functions are named after PTX (PTX ISA, "Memory Consistency Model"). Addresses are global, of this device or another.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import F32, I64, call_asm, instruction

ld_relaxed_u32 = instruction("ld.relaxed.sys.global.u32 $0, [$1];", "l", result=True)
"""ld_relaxed_u32(address)"""

ld_acquire_u32 = instruction("ld.acquire.sys.global.u32 $0, [$1];", "l", result=True)
"""ld_acquire_u32(address): what was written before the number that is seen is seen too."""

st_release_u32 = instruction("st.release.sys.global.u32 [$0], $1;", "lr")
"""st_release_u32(address, number): after all that this thread has written, or has seen at a barrier of the block."""

st_relaxed_u64 = instruction("st.relaxed.sys.global.u64 [$0], $1;", "ll")
"""st_relaxed_u64(address, word)"""

st_relaxed_v2_u64 = instruction("st.relaxed.sys.global.v2.u64 [$0], {$1, $2};", "lll")
"""st_relaxed_v2_u64(address, word, next word): each of them whole. The address is a multiple of 16."""

st_v4_u32 = instruction("st.global.v4.u32 [$0], {$1, $2, $3, $4};", "lrrrr")
"""st_v4_u32(address, four words): a plain store, of which others know after a release."""


def _loaded(text: str, kind: Any, numba_type: Any, constraint: str, count: int) -> Any:
    def typing(typingctx, where):  # type: ignore[no-untyped-def]
        result = numba_type if count == 1 else types.UniTuple(numba_type, count)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            asm_type = kind if count == 1 else ir.LiteralStructType([kind] * count)
            constraints = ",".join([f"={constraint}"] * count + ["l", "~{memory}"])
            found = call_asm(builder, asm_type, text, constraints, args)
            if count == 1:
                return found
            parts = [builder.extract_value(found, i) for i in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return result(types.int64), codegen

    return intrinsic(typing)


ld_relaxed_u64 = _loaded("ld.relaxed.sys.global.u64 $0, [$1];", I64, types.int64, "l", 1)
"""ld_relaxed_u64(address): a word as an int64."""

ld_relaxed_v2_u64 = _loaded("ld.relaxed.sys.global.v2.u64 {$0, $1}, [$2];", I64, types.int64, "l", 2)
"""ld_relaxed_v2_u64(address): two words as int64, each of them whole."""

ld_relaxed_v4_f32 = _loaded("ld.relaxed.sys.global.v4.f32 {$0, $1, $2, $3}, [$4];", F32, types.float32, "f", 4)
"""ld_relaxed_v4_f32(address): four float32 that others have written, never old ones from this SM's cache."""
