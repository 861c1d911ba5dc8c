"""TMA, the copy engine of sm_90, and mbarriers, by which threads wait for its copies and for each other.

A tensor map describes a matrix to the engine; the host writes it (`launch.TensorMap`). One thread asks for a box of the
matrix, and the engine reports its bytes to an mbarrier in shared memory. An mbarrier's phase ends when as many threads
have arrived as it was made for, and all expected bytes have. Who waits names the parity of the phase: 0 for the
first, 1 for the second, 0 for the third.

Functions are named after PTX (PTX ISA, "mbarrier", "cp.async.bulk.tensor"). Addresses are those of shared memory.
"""

from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import I32, I64, VOID, as_integer, call_asm

WIDTHS = {"r": (I32, types.uint32), "l": (I64, types.int64)}
"""Constraint of an operand in inline PTX → its type."""


def _instruction(text: str, operands: str, result: bool = False) -> Any:
    """An intrinsic whose arguments are integers: "r" has 32 bits, "l" 64. Its result has 32, if there is one."""
    constraints = ",".join([*(["=r"] if result else []), *operands, "~{memory}"])

    def typing(typingctx: Any, given: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.extract_value(args[0], i) for i in range(len(operands))]
            values = [
                as_integer(context, builder, value, kind, WIDTHS[name][1])
                for value, kind, name in zip(values, given.types, operands, strict=True)
            ]
            made = call_asm(builder, I32 if result else VOID, text, constraints, values)
            return made if result else context.get_dummy_value()

        return (types.uint32 if result else types.void)(given), codegen

    return intrinsic(typing)


mbarrier_init = _instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "rr")
"""mbarrier_init((address, count)): a barrier at 8 bytes, whose phases end after `count` arrivals."""

fence_mbarrier_init = _instruction("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", "")
"""fence_mbarrier_init(()): after it and a barrier of the block, all threads and the copy engine see the mbarriers."""

mbarrier_expect_tx = _instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "rr")
"""mbarrier_expect_tx((address, bytes)): arrive; the phase does not end before so many bytes have been copied."""

mbarrier_arrive = _instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", "r")
"""mbarrier_arrive((address,))"""

mbarrier_wait = _instruction(
    "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again;}", "rr"
)
"""mbarrier_wait((address, parity)): wait until the phase of this parity has ended."""

copy_box = _instruction(
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1, {$2, $3}], [$4];", "rlrrr"
)
"""copy_box((to, tensor map, column, row, mbarrier)): start copying a box to shared memory, zeros outside the matrix."""

div_u32 = _instruction("div.u32 $0, $1, $2;", "rr", result=True)
"""div_u32((a, b)): a / b rounded down. One of 64 bits is a function call, beside which wgmma runs one at a time."""
