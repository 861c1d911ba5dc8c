"""Cases for the kernels by wgmma, for sm_90, as those of `gemm_cases.py`.

python -m tests.cuda.wgmma_cases 9.0      # emulated
python -m tests.cuda.wgmma_cases          # on the GPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tests.cuda.gemm_cases import Case, Emulated, attention, check_all, machine_maker


def few_blocks(machine: Any, check: Callable[..., float], *arguments: Any, **named: Any) -> float:
    """A check on a device of one multiprocessor."""
    machine.ctx = replace(machine.ctx, n_sms=1)
    return check(machine, *arguments, **named)


def cases() -> list[Case]:
    """All cases: (name, tokens of the run, check)."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], *arguments: Any, **named: Any) -> None:
        made.append((name, tokens, lambda machine: check(machine, *arguments, tokens=tokens, **named)))

    def one(count: int, start: int) -> tuple[list[int], list[int]]:
        return list(range(start, start + count)), [0] * count

    # several tiles of keys, a second warpgroup's queries, heads that share keys
    for cache, heads, head_dim, page in (
        ("f16", (2, 1), 128, 16), ("bf16", (1, 1), 64, 64), ("f16", (1, 1), 96, 32), ("f16", (1, 1), 256, 32),
    ):  # fmt: skip
        add(f"attention {cache}, heads of {head_dim}", 70, attention, cache, 72, heads, head_dim, 400, *one(72, 300),
            page=page)  # fmt: skip
    add("attention f16, heads of 80, from the first key on", 130, attention, "f16", 132, (1, 1), 80, 140, *one(132, 0))
    # chunks of three prompts between rows of others, as in a step of an engine
    chunks = [(2, range(70, 200)), (0, [99]), (4, range(5)), (1, [3]), (3, range(31, 33)), (5, [148])]
    where = [position for _, chunk in chunks for position in chunk]
    whose = [sequence for sequence, chunk in chunks for _ in chunk]
    add("attention bf16, mixed, several tiles a block", 140, few_blocks, attention, "bf16", 140, (2, 1), 64, 200, where,
        whose, page=64)  # fmt: skip
    for window in (1, 100):
        add(f"attention bf16, a window of {window}", 70, attention, "bf16", 70, (1, 1), 56, 400, *one(70, 290),
            window=window)  # fmt: skip
    return made


def main(arguments: Sequence[str]) -> int:
    machine_of = (lambda tokens: Emulated((9, 0), tokens, wgmma=True)) if arguments else machine_maker(())
    return len(check_all(machine_of, cases()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
