"""TMA, the copy engine of sm_90: boxes of a matrix, or plain bytes, to shared memory. It reports them to an mbarrier.

A tensor map describes a matrix to the engine; the host writes it (`launch.TensorMap`). One thread asks for a box, after
it has told the mbarrier how many bytes to expect. `barriers` has the rest of mbarriers.

Functions are named after PTX (PTX ISA, "cp.async.bulk"). Addresses are those of shared memory.
"""

from __future__ import annotations

from .lowering import instruction

fence_mbarrier_init = instruction("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;", "")
"""fence_mbarrier_init(): after it and a barrier of the block, all threads and the engine see new mbarriers."""

mbarrier_expect_tx = instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "rr")
"""mbarrier_expect_tx(address, bytes): arrive; the phase ends after `bytes` more bytes have been copied."""

fence_tensormap = instruction("fence.proxy.tensormap::generic.acquire.sys [$0], 128;", "l")
"""fence_tensormap(tensor map): what the host has written there is what the engine reads from now on."""

prefetch_tensormap = instruction("prefetch.tensormap [$0];", "l")
"""prefetch_tensormap(tensor map): the engine's first copy by this map will not wait for the map itself."""

copy_box = instruction(
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1, {$2, $3}], [$4];", "rlrrr"
)
"""copy_box(to, tensor map, column, row, mbarrier): start copying a box to shared memory, zeros outside the matrix."""

copy_bytes = instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];", "rlrr"
)
"""copy_bytes(to, source, bytes, mbarrier): start copying a multiple of 16 bytes from global to shared memory."""

div_u32 = instruction("div.u32 $0, $1, $2;", "rr", result=True)
"""div_u32(a, b): a / b rounded down. One of 64 bits is a function call, beside which wgmma runs one at a time."""
