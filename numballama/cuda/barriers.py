"""Barriers between parts of a block, for sm_90: mbarriers for copies by threads, named barriers for turns.

An mbarrier is 8 bytes of shared memory. A phase of it ends when as many threads have arrived as it was made for. Who
waits names the parity of the phase: 0 for the first, 1 for the second. Of a new one, parity 1 counts as ended. A named
barrier is one of 16: a part of a block waits at it, and the other part arrives and goes on.

Functions are named after PTX (PTX ISA, "mbarrier", "barrier"). Addresses are those of shared memory.
"""

from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import VOID, as_integer, call_asm


def _words(text: str, count: int) -> Any:
    """An intrinsic for PTX with `count` operands of 32 bits."""

    def made(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = [
            as_integer(context, builder, value, kind, types.uint32)
            for value, kind in zip(args, signature.args, strict=True)
        ]
        call_asm(builder, VOID, text, ",".join(["r"] * count + ["~{memory}"]), words)
        return context.get_dummy_value()

    def of_one(typingctx: Any, a: Any) -> Any:
        return types.void(a), made

    def of_two(typingctx: Any, a: Any, b: Any) -> Any:
        return types.void(a, b), made

    return intrinsic({1: of_one, 2: of_two}[count])


mbarrier_init = _words("mbarrier.init.shared::cta.b64 [$0], $1;", 2)
"""mbarrier_init(address, count): an mbarrier whose phases end after `count` arrivals."""

mbarrier_inval = _words("mbarrier.inval.shared::cta.b64 [$0];", 1)
"""mbarrier_inval(address): its 8 bytes may be used for anything, for another mbarrier too."""

mbarrier_arrive = _words("mbarrier.arrive.shared::cta.b64 _, [$0];", 1)
"""mbarrier_arrive(address)"""

mbarrier_wait = _words(
    "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again;}", 2
)
"""mbarrier_wait(address, parity): wait until the phase of this parity has ended."""

cp_async_mbarrier_arrive = _words("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", 1)
"""cp_async_mbarrier_arrive(address): this thread arrives when all copies that it has started so far are complete."""

barrier_sync = _words("barrier.cta.sync $0, $1;", 2)
"""barrier_sync(number, threads): wait at a named barrier until so many threads have come to it, in whole warps."""

barrier_arrive = _words("barrier.cta.arrive $0, $1;", 2)
"""barrier_arrive(number, threads): count among those threads, and go on."""
