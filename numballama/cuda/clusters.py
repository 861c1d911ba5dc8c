"""Clusters of sm_90: blocks that run at the same time on neighbouring multiprocessors and read each other's memory.

A launch says how many blocks a cluster has (`launch.Launch.cluster`). Shared memory of a cluster is one space of
addresses: `map_to_rank` gives an address in another block. A block must not end while others read its memory, so all
meet at the cluster's barrier before that.

Functions are named after PTX (PTX ISA, "barrier.cluster", "mapa").
"""

from __future__ import annotations

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import F32, I32, call_asm, instruction

barrier_cluster_arrive = instruction("barrier.cluster.arrive.release;", "")
"""barrier_cluster_arrive(): what this thread has written is there for those that wait."""

barrier_cluster_wait = instruction("barrier.cluster.wait.acquire;", "")
"""barrier_cluster_wait(): wait until all threads of the cluster have arrived."""

map_to_rank = instruction("mapa.shared::cluster.u32 $0, $1, $2;", "rr", result=True)
"""map_to_rank(address, rank): where what is at an address of this block's shared memory is in block number `rank`."""


@intrinsic
def ld_cluster_v4_f32(typingctx, where):  # type: ignore[no-untyped-def]
    """ld.shared::cluster.v4.f32: four float32 from a 16-byte aligned address of `map_to_rank`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        loaded = call_asm(
            builder,
            ir.LiteralStructType([F32] * 4),
            "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,r,~{memory}",
            [builder.trunc(args[0], I32) if args[0].type.width > 32 else args[0]],
        )
        parts = [builder.extract_value(loaded, i) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.float32, 4)(where), codegen
