"""Barriers between parts of a block, for sm_90: mbarriers for copies by threads, named barriers for turns.

An mbarrier is 8 bytes of shared memory. A phase of it ends when as many threads have arrived as it was made for. Who
waits names the parity of the phase: 0 for the first, 1 for the second. Of a new one, parity 1 counts as ended. A named
barrier is one of 16: a part of a block waits at it, and the other part arrives and goes on.

Functions are named after PTX (PTX ISA, "mbarrier", "barrier"). Addresses are those of shared memory.
"""

from __future__ import annotations

from .lowering import instruction

mbarrier_init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "rr")
"""mbarrier_init(address, count): an mbarrier whose phases end after `count` arrivals."""

mbarrier_inval = instruction("mbarrier.inval.shared::cta.b64 [$0];", "r")
"""mbarrier_inval(address): its 8 bytes may be used for anything, for another mbarrier too."""

mbarrier_arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", "r")
"""mbarrier_arrive(address)"""

mbarrier_wait = instruction(
    "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again;}", "rr"
)
"""mbarrier_wait(address, parity): wait until the phase of this parity has ended."""

cp_async_mbarrier_arrive = instruction("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "r")
"""cp_async_mbarrier_arrive(address): this thread arrives when all copies that it has started so far are complete."""

barrier_sync = instruction("barrier.cta.sync $0, $1;", "rr")
"""barrier_sync(number, threads): wait at a named barrier until `threads` threads, in whole warps, are there."""

barrier_arrive = instruction("barrier.cta.arrive $0, $1;", "rr")
"""barrier_arrive(number, threads): count among those threads, and go on."""
