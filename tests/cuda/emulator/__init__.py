"""An emulator of PTX in NumPy: it runs kernels as compiled by Numba, without a GPU.

It runs what Numba's simulator cannot: fragments of tensor cores, swizzled shared memory and asynchronous copies. It
follows their description in NVIDIA's PTX ISA, not the assumptions of a kernel.

What it emulates: the threads of a block, or of several that need not wait for each other, as elements of arrays, each
register being one array. Where threads diverge, those with the lowest program counter run first, which lets them meet
again. It is strict where a GPU is lenient: loads must be aligned and inside an allocation, shared memory begins as
NaNs, asynchronous copies arrive no sooner than they are waited for, and warps must be whole at instructions that need
whole warps. Not emulated: races between threads, and timing.

`program.py` parses PTX and holds global memory; `cluster.py` runs the blocks of a cluster, and `block.py` a block:
which threads go on, and where. `threads.py` has their registers and how operands are read. Instructions are in
`arithmetic.py` (results from registers), `memory_access.py` (loads and stores), `copies.py` (asynchronous copies and
mbarriers) and `warps.py` (shuffles, tensor cores). `barriers.py` has the state of named barriers and mbarriers,
`wgmma.py` that of a warpgroup's products.

To add an instruction: one that computes a result from operands of one type goes to `OPERATIONS` in `arithmetic.py`,
under the first part of its opcode. Any other is a method `_<first part of the opcode>(modifiers, operands, mask)` of
its file's class: `modifiers` are the other parts of the opcode, `operands` the operands as text, with tuples for
braces, and `mask` tells which threads execute it. Read operands by `_value(operand, type)`, write the result by
`_set(register, array, mask)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any

from tests.cuda.emulator.block import Block
from tests.cuda.emulator.cluster import Cluster
from tests.cuda.emulator.program import Memory, Program, from_16, round_16

__all__ = ["Memory", "Program", "from_16", "round_16", "run"]

TOGETHER = 4096
"""About how many threads execute an instruction together: blocks that are no cluster, a few at a time."""


def run(
    program: Program, memory: Memory, grid: Sequence[int], threads: int, arguments: Sequence[Any],
    shared_bytes: int = 0, cluster: int = 1, preceding: Event | None = None,
) -> dict[str, int]:  # fmt: skip
    """Run all blocks of a launch, some at a time; those of a cluster, which are neighbours along z, together.

    `preceding` is set when the kernel has ended that `griddepcontrol.wait` waits for. Returns how often each
    instruction was executed.
    """
    grid = (*grid, 1, 1)[:3]
    assert grid[2] % cluster == 0, "a grid has whole clusters"
    total: dict[str, int] = {}
    places = [(x, y, z) for z in range(0, grid[2], cluster) for y in range(grid[1]) for x in range(grid[0])]
    many = max(1, TOGETHER // threads) if program.is_plain and cluster == 1 else 1
    for first in range(0, len(places), many):
        of_each = [places[first : first + many]]
        if cluster > 1:
            ((x, y, z),) = of_each[0]
            of_each = [[(x, y, z + i)] for i in range(cluster)]
        blocks = [Block(program, memory, arguments, threads, each, grid, shared_bytes) for each in of_each]
        for block in blocks:
            block.preceding = preceding
        Cluster(blocks).run()
        for block in blocks:
            for name, count in block.executed.items():
                total[name] = total.get(name, 0) + count
    return total
