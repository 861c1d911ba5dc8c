"""Clusters of sm_90: blocks that run at the same time on neighbouring multiprocessors and reach each other's memory.

A launch says how many blocks a cluster has (`launch.Launch.cluster`). Shared memory of a cluster is one space of
addresses; `mapa` of PTX gives that of a place in another block. A block may reach others once all have met at the
cluster's barrier, and must not end before they have finished with its memory. `wgmma.st_async_units` sends sums.

Functions are named after PTX (PTX ISA, "barrier.cluster", "mapa", "mbarrier.arrive").
"""

from __future__ import annotations

from .lowering import instruction

barrier_cluster_arrive = instruction("barrier.cluster.arrive.release;", "")
"""barrier_cluster_arrive(): what this thread has written is there for those that wait."""

barrier_cluster_arrive_relaxed = instruction("barrier.cluster.arrive.relaxed;", "")
"""barrier_cluster_arrive_relaxed(): the same without a fence of all memory, which takes a microsecond. After
`fence_mbarrier_init` others see new mbarriers."""

barrier_cluster_wait = instruction("barrier.cluster.wait.acquire;", "")
"""barrier_cluster_wait(): wait until all threads of the cluster have arrived."""

mbarrier_arrive_at = instruction(
    "{.reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [there];}", "rr"
)
"""mbarrier_arrive_at(address, rank): arrive at the mbarrier of block number `rank` with this address in its memory."""
