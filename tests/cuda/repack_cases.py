"""Cases for the kernel that repacks blocks during the upload: every byte as NumPy writes it.

python -m tests.cuda.repack_cases 9.0      # emulated, for one compute capability
python -m tests.cuda.repack_cases          # on the GPU
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.cuda.ops.repack import repack
from numballama.cuda.repack import LAYOUTS
from numballama.cuda.weights import layout_of
from numballama.quantization.types import BLOCKS
from tests.cuda.gemm_cases import machine_maker
from tests.helpers.gguf_files import random_blocks
from tests.helpers.repacked import memory_of


def repacked(machine: Any, kind: str, rows: int, count: int, together: int, seed: int) -> None:
    """Rows of `count` blocks, `together` blocks a launch."""
    weight = random_blocks(kind, rows, count, np.random.default_rng(seed), odd=bool(seed & 1))
    layout = layout_of(weight)
    memory = machine.put(np.zeros(layout.nbytes, np.uint8), "u8")
    target = layout.operand(memory.address)
    blocks = weight.data.reshape(rows * count, -1)
    runs = BLOCKS[kind][0] // 32
    for first in range(0, len(blocks), together):
        piece = blocks[first : first + together]
        source = machine.put(np.ascontiguousarray(piece).reshape(-1).view(np.uint16), "f16")
        machine.execute([repack(source, first * runs, len(piece) * runs, target)])
    np.testing.assert_array_equal(machine.get(memory, np.uint8), memory_of(layout), err_msg=kind)


def main(arguments: list[str]) -> int:
    machine_of = machine_maker(arguments)

    @settings(max_examples=30, deadline=None, database=None)
    @given(
        st.sampled_from(list(LAYOUTS)), st.integers(1, 4), st.integers(1, 9), st.integers(1, 20),
        st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def check(kind: str, rows: int, count: int, together: int, seed: int) -> None:
        repacked(machine_of(1), kind, rows, count, together, seed)

    check()
    for kind in LAYOUTS:
        repacked(machine_of(1), kind, 3, 300, 1000, 1)  # several blocks of threads
        print(f"{kind}: every byte", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
