"""Cases for linear layers of 2 to 128 tokens on a GPU, as those of `gemm_cases.py`.

python -m tests.cuda.skinny_cases 9.0      # emulated, for one compute capability
python -m tests.cuda.skinny_cases          # on the GPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from numballama.cuda.launch import PAYLOAD_TYPE
from numballama.cuda.ops import wide
from tests.cuda.gemm_cases import (
    EPS,
    QUANTISED,
    Case,
    Emulated,
    check_all,
    gate_up,
    launches_of,
    linear,
    machine_maker,
    not_finite,
    qkv_rope,
    upload,
)
from tests.cuda.older_cards import kinds_of, left_out

TYPES = ("f16", "bf16", *QUANTISED)


def same_rows(machine_of: Callable[[int], Any], kind: str, K: int, N: int, counts: list[tuple[int, int]]) -> None:
    """A row has the same bits in a run of any number of tokens, in any place and with any neighbours.

    `counts`: (tokens that the program is made for, tokens of the run), the largest first.
    """
    rng = np.random.default_rng(5)
    values, whole = rng.standard_normal((N, K)) * K**-0.5, rng.standard_normal((counts[0][0], K)).astype(np.float32)
    norm, first = (1 + 0.3 * rng.standard_normal(K)).astype(np.float32), None
    for capacity, tokens in counts:
        machine = machine_of(tokens)
        matrix, _ = upload(machine, values, kind)
        start = (counts[0][1] - tokens) // 2
        x = np.full((capacity, K), np.nan, np.float32)
        x[:tokens] = whole[start : start + tokens]
        out = machine.put(np.zeros((capacity, N), np.float32), "f32")
        operands = [machine.put(x, "f32"), machine.put(norm, "f32"), matrix]
        machine.execute(launches_of(machine, "norm_linear", ["f32", "f32", kind], operands, [out], eps=EPS))
        got = machine.get(out, np.float32)
        first = got[: counts[0][1]] if first is None else first
        same = got[:tokens].view(np.uint32) == first[start : start + tokens].view(np.uint32)
        assert same.all(), f"{kind}: {(~same).sum()} elements differ with {tokens} of {capacity} tokens"


def cases(kinds: Sequence[str]) -> list[Case]:
    """All cases of these types: (name, tokens of the run, check)."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], *arguments: Any, **named: Any) -> None:
        made.append((name, tokens, lambda machine: check(machine, *arguments, tokens=tokens, **named)))

    for kind in kinds:
        wide = kind in ("q4_k", "q5_k", "q6_k")
        add(f"norm_linear {kind}, 2", 2, linear, kind, 2, 1280 if wide else 320, 40, residual=False, normed=True)
        columns = 768 if wide else 672 if kind in ("f16", "bf16") else 352
        add(f"linear_add {kind}, 13 of 16", 13, linear, kind, 16, columns, 104, residual=True, normed=False)
        add(f"gate_up {kind}, 5 of 8", 5, gate_up, kind, 8, 512, 56, normed=True)
    add("linear f16, 24", 24, linear, "f16", 24, 72, 20, residual=True, normed=False)
    add("linear q4_0, 50 of 64", 50, linear, "q4_0", 64, 288, 72, residual=True, normed=False)
    add("linear bf16, more columns than a slice", 3, linear, "bf16", 4, 2472, 132, residual=True, normed=False)
    add("linear f16, odd sizes", 7, linear, "f16", 7, 37, 11, residual=True, normed=False)
    groups = (("of 16", 144, False, 16), ("of 512", 1536, False, 512), ("that no kernel wants", 36, True, 12))
    for what, columns, normed, group in groups if "int8" in kinds else ():
        add(
            f"linear int8, groups {what}", 4, linear, "int8", 4, columns, 33, residual=False, normed=normed, group=group
        )
    add("gate_up f16, odd sizes", 6, gate_up, "f16", 6, 40, 67, normed=False)
    for kind, heads, head_dim, interleaved, cache in (
        ("f16", (4, 2), 64, 0, "f16"), ("bf16", (3, 1), 48, 1, "bf16"), ("q8_0", (2, 1), 96, 0, "f16"),
        ("q4_1", (2, 1), 64, 0, "f16"), ("f16", (2, 1), 128, 1, "f32"),
    ):  # fmt: skip
        if kind not in kinds:
            continue
        add(f"qkv {kind}, heads of {head_dim}", 7, qkv_rope, kind, 8, 64, heads, head_dim, interleaved, cache)
    if "q4_k" in kinds:
        add("qkv q4_k and q6_k", 7, qkv_rope, "q4_k", 8, 256, (4, 2), 64, 0, "f16", values="q6_k")
    for kind in ("f16", "bf16", "q8_0"):
        made.append((f"not_finite numbers, {kind}", 12, lambda machine, kind=kind: not_finite(machine, kind)))  # type: ignore[misc]
    return made


def wide_cases() -> list[Case]:
    """Cases of more tokens, for the kernels of `wide`."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], *arguments: Any, **named: Any) -> None:
        made.append((name, tokens, lambda machine: check(machine, *arguments, tokens=tokens, **named)))

    for kind in TYPES:
        add(f"linear {kind}, 20 of 24", 20, linear, kind, 24, 2048, 200, residual=True, normed=False)
        add(f"linear {kind}, 33 of 64", 33, linear, kind, 64, 2048, 328, residual=False, normed=True)
        add(f"gate_up {kind}, 128", 128, gate_up, kind, 128, 512, 200, normed=True)
        add(f"linear {kind}, 250 of 256", 250, linear, kind, 256, 1536, 392, residual=True, normed=False)
        add(f"qkv {kind}, 150 of 160", 150, qkv_rope, kind, 160, 256, (4, 2), 64, 0, "f16")
    return made


def few_sms(machine: Any, check: Callable[..., float], *arguments: Any, **named: Any) -> float:
    """A check on a device of four multiprocessors, which one cluster takes."""
    machine.ctx = replace(machine.ctx, n_sms=4)

    def divide(tiles: int, columns: int, n_sms: int) -> wide.Division:
        return wide.Division(each := -(-columns // 64 // 4), -(-columns // 64 // each))

    with mock.patch.object(wide, "divide", divide):
        return check(machine, *arguments, **named)


def small_wide_cases() -> list[Case]:
    """The same for the emulator: each kernel, each kind of weight, and a slice that is longer than a warp's registers
    hold.
    """
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], *arguments: Any, **named: Any) -> None:
        made.append((name, tokens, lambda machine: check(machine, *arguments, tokens=tokens, **named)))

    add("wide linear f16, 34 of 40", 34, linear, "f16", 40, 312, 140, residual=True, normed=False)
    add("wide norm_linear bf16, long slices", 33, linear, "bf16", 36, 8448, 40, residual=False, normed=True)
    add("wide gate_up f16, 50 of 64", 50, gate_up, "f16", 64, 192, 72, normed=True)
    add("wide qkv f16, 41", 41, qkv_rope, "f16", 48, 128, (2, 1), 64, 0, "f16")
    add("wide gate_up q4_0, 70 of 72", 70, gate_up, "q4_0", 72, 256, 40, normed=True)
    add("wide linear q4_k, 66 of 128", 66, linear, "q4_k", 128, 512, 72, residual=True, normed=False)
    add("wide linear q8_0, one slice", 65, linear, "q8_0", 66, 32, 36, residual=True, normed=False)
    add("wide gate_up bf16, tiles in turn", 35, few_sms, gate_up, "bf16", 40, 448, 150, normed=True)
    add("wide linear f16, tiles in turn", 70, few_sms, linear, "f16", 80, 584, 300, residual=True, normed=False)
    add("wide linear q4_0, tiles in turn", 65, few_sms, linear, "q4_0", 66, 512, 260, residual=True, normed=False)
    made.append(("wide, not finite numbers", 40, lambda machine: not_finite(machine, "f16", 40, 128)))
    return made


MANY_COUNTS = [(600, 590), (512, 400), (300, 270), (160, 150)]
"""Programs and runs of `wgmma_gemm`, for `same_rows`."""
WIDE_COUNTS = [(128, 100), (96, 90), (72, 66), (64, 41), (40, 33)]
COUNTS = {"f16": [(64, 41), (32, 30), (16, 9), (8, 8), (2, 2)], "others": [(64, 41), (16, 9), (2, 2)]}
"""Programs and runs of `same_rows`: those of float16 are of every kernel, which others share."""
FEWER = {
    "q5_k": [(8, 8), (2, 2)],
    **{kind: [(16, 9), (2, 2)] for kind in ("int8", "q4_1", "q4_k")},
    **{kind: [(64, 41), (2, 2)] for kind in ("bf16", "q8_0", "q4_0", "q6_k")},
}
"""Those of the emulator for sm_90 by default."""


def main(arguments: list[str]) -> int:
    machine_of = machine_maker(arguments)
    kinds = kinds_of(arguments, TYPES)
    hopper, some = machine_of(1).ctx.wgmma, bool(arguments) and "all" not in arguments
    to_check = [case for case in cases(kinds) if case[0] not in left_out(arguments)]
    failed = check_all(machine_of, to_check + wide_cases() * hopper)
    if arguments[:1] == ["9.0"]:
        failed |= check_all(lambda tokens: Emulated((9, 0), tokens, wgmma=True), small_wide_cases())
    for kind in kinds:
        counts = COUNTS.get(kind, COUNTS["others"])
        wide_counts, many_counts = WIDE_COUNTS, MANY_COUNTS
        if some and kind not in ("f16", "q4_k"):
            wide_counts, many_counts = WIDE_COUNTS[:1] + WIDE_COUNTS[-1:], MANY_COUNTS[-1:]
        if some and arguments[0] == "9.0":
            counts = FEWER.get(kind, counts)
        try:
            least = wide.LEAST[PAYLOAD_TYPE[kind]] if hopper else 1000
            if hopper:
                same_rows(machine_of, kind, 2048, 200, [pair for pair in wide_counts if pair[0] >= least])
                same_rows(machine_of, kind, 512, 4500, many_counts)
            counts = [pair for pair in counts if pair[0] < least]
            columns = 1024 if kind in ("f16", "q4_k", "q5_k", "q6_k") else 512
            same_rows(machine_of, kind, columns, 72, counts)
        except AssertionError as error:
            failed[kind] = str(error)
            print(f"same rows {kind}: WRONG: {error}", flush=True)
            continue
        print(f"same rows {kind}: the same bits", flush=True)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
