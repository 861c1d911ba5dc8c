"""Cases for the kernels by wgmma, for sm_90, as those of `gemm_cases.py`.

python -m tests.cuda.wgmma_cases 9.0      # emulated
python -m tests.cuda.wgmma_cases          # on the GPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from numballama.cuda.launch import Launch, LaunchContext, Matrix
from numballama.cuda.ops import attention as attention_ops
from numballama.cuda.ops import skinny, wgmma_gemm, wide
from numballama.cuda.ops.joins import join
from numballama.cuda.program import write_tiles
from tests.cuda.emulator import round_16
from tests.cuda.gemm_cases import (
    QUANTISED,
    UNTOUCHED,
    Case,
    Emulated,
    attention,
    check_all,
    gate_up,
    launches_of,
    linear,
    machine_maker,
    ones_on,
    qkv_rope,
    upload,
    within,
)
from tests.helpers.paging import shuffled_table


def few_blocks(machine: Any, check: Callable[..., float], *arguments: Any, **named: Any) -> float:
    """A check on a device of one multiprocessor."""
    machine.ctx = replace(machine.ctx, n_sms=1)
    return check(machine, *arguments, **named)


def noted(machine: Any) -> list[Launch]:
    """The launches that the machine executes from now on."""
    launched: list[Launch] = []
    execute = machine.execute

    def execute_noted(launches: Sequence[Launch]) -> None:
        launched.extend(launches)
        execute(launches)

    machine.execute = execute_noted
    return launched


def by_bulk_copies(machine: Any, *arguments: Any, n_sms: int = 1, **named: Any) -> float:
    """Attention by the kernels of `bulk_attention`, on a device with these multiprocessors, even for few rows."""
    launched = noted(machine)
    with mock.patch.object(attention_ops, "BULK_FROM", 2):
        machine.ctx = replace(machine.ctx, n_sms=n_sms)
        worst = attention(machine, *arguments, **named)
    names = [launch.name for launch in launched]
    assert any(name.startswith("attention_bulk") for name in names), f"by {names}"
    return worst


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
    add("attention bf16, mixed, several tiles a block", 140, few_blocks, attention, "bf16", 140, (2, 2), 64, 200, where,
        whose, page=64)  # fmt: skip
    for window in (1, 100):
        add(f"attention bf16, a window of {window}", 70, attention, "bf16", 70, (1, 1), 56, 400, *one(70, 290),
            window=window)  # fmt: skip
    # rows alone by bulk copies: of one page and of several splits, in runs of few rows and of more than there are warps
    rows, six = [63, 5, 94, 0, 31, 32], [0, 1, 2, 3, 4, 5]
    for cache, heads, head_dim, page in (("f16", (1, 1), 128, 32), ("bf16", (2, 2), 128, 64), ("f16", (3, 3), 64, 128)):
        add(f"attention {cache}, rows of {head_dim}", 6, by_bulk_copies, cache, 7, heads, head_dim, 100,
            [*rows, 0], [*six, 0], page=page, exact=True)  # fmt: skip
    add("attention bf16, rows in splits", 3, by_bulk_copies, "bf16", 4, (3, 3), 64, 1400, [600, 5, 1300, 0],
        [0, 1, 2, 0], n_sms=132, exact=True)  # fmt: skip
    add("attention f16, more keys than splits of 256", 2, by_bulk_copies, "f16", 2, (1, 1), 64, 8600, [8500, 40],
        [0, 1], n_sms=132, page=128, exact=True)  # fmt: skip
    for window in (1, 300):
        add(f"attention f16, rows with a window of {window}", 3, by_bulk_copies, "f16", 4, (2, 2), 128, 700,
            [650, 5, 420, 0], [0, 1, 2, 0], page=64, window=window, exact=True)  # fmt: skip
    # tokens of a short prompt, which see each other's keys, before they are in memory for long
    add("attention f16, rows of one sequence", 7, by_bulk_copies, "f16", 8, (2, 2), 64, 100, [*range(60, 67), 0],
        [0] * 8, n_sms=132, exact=True)  # fmt: skip
    # rows that are listed, between chunks of prompts, and none of them
    for name, alone in (("between chunks", [(1, [70]), (2, [33])]), ("none", [])):
        chunks = [(0, range(5, 75)), *alone, (3, range(4))]
        where = [position for _, chunk in chunks for position in chunk]
        whose = [sequence for sequence, chunk in chunks for _ in chunk]
        add(f"attention f16, rows listed, {name}", len(where), by_bulk_copies if alone else attention, "f16",
            len(where) + 2, (3, 3), 64, 100, [*where, 0, 0], [*whose, 0, 0])  # fmt: skip
    # those that share keys, of few rows
    add("attention bf16, rows whose heads share keys", 3, attention, "bf16", 4, (6, 2), 128, 700, [600, 5, 130, 0],
        [0, 1, 2, 0], page=16, window=300)  # fmt: skip
    return made


def in_width(machine: Any, kind: str, width: int, tokens: int) -> float:
    """Tiles of one width, of a linear layer and of a pair, in the kernels of `wgmma_gemm`."""
    with mock.patch.object(wgmma_gemm, "width_for", return_value=width):
        worst = linear(machine, kind, 300, 328, 600, tokens, residual=True, normed=False)
        worst = max(worst, gate_up(machine, kind, 300, 328, 300, tokens, normed=True))
        for head_dim, interleaved in ((64, 0), (64, 1), (128, 0), (128, 1)):
            if width % head_dim == 0:  # a tile has whole heads
                worst = max(worst, qkv_rope(machine, kind, 300, 328, (6, 3), head_dim, interleaved, "f16", tokens))
        return worst


def in_halves(machine: Any, kind: str, capacity: int, columns: int, rows: int, tokens: int) -> float:
    """Two blocks have half of K each, for a linear layer and for queries, keys and values; two tiles a block."""

    def halved(_: LaunchContext, weights: Sequence[Matrix], paired: bool = False) -> bool:
        return weights[0].quantized or weights[0].scales.dtype != "f32"

    with mock.patch.object(wgmma_gemm, "is_halved", halved):
        launched = noted(machine)
        worst = few_blocks(machine, linear, kind, capacity, columns, rows, tokens, residual=True, normed=False)
        worst = max(worst, qkv_rope(machine, kind, capacity, columns, (2, 1), 64, 0, "f16", tokens))
    assert any(launch.grid[-1] == launch.cluster == 2 for launch in launched), "no cluster was launched"
    return worst


def in_tall_tiles(machine: Any, kind: str, tokens: int) -> float:
    """Tiles of 256 tokens, several a block."""
    with mock.patch.object(wgmma_gemm, "tall_wins", return_value=True):
        worst = linear(machine, kind, 600, 512, 9000, tokens, residual=True, normed=False)
        worst = max(worst, gate_up(machine, kind, 600, 256, 300, tokens, normed=True))
        return max(worst, qkv_rope(machine, kind, 600, 256, (6, 3), 64, 0, "f16", tokens))


def in_pieces(machine: Any, kind: str, tokens: int) -> float:
    """A float32 weight that is split part by part, of columns whose sums are taken out many times."""
    with mock.patch.object(wgmma_gemm, "MAX_PIECES", 128 * 11008):
        worst = linear(machine, kind, tokens, 11008, 300, tokens, residual=True, normed=False)
        worst = max(worst, gate_up(machine, kind, tokens, 2048, 300, tokens, normed=True))
        return max(worst, qkv_rope(machine, kind, tokens, 328, (6, 3), 64, 0, "f16", tokens))


def joined_with(machine: Any, name: str, steps: list[list[Launch]], out: Any, tokens: int) -> np.ndarray:
    """`out` after two steps whose rounding the first one does, of which a launch is therefore left out."""
    before = [len(step) for step in steps]
    join(steps, [True], ones_on(machine))
    assert [len(step) for step in steps] == [before[0], before[1] - 1], f"{name}: {before} launches were not joined"
    machine.execute([launch for step in steps for launch in step])
    got: np.ndarray = machine.get(out, np.float32)
    assert (got[tokens:] == UNTOUCHED).all(), f"{name}: rows of tokens beyond the run were written"
    return got[:tokens].astype(np.float64)


def rounded_attention(
    machine: Any, cache: str, kind: str, T: int, heads: tuple[int, int], head_dim: int, positions: Sequence[int],
    sequences: Sequence[int], tokens: int,
) -> float:  # fmt: skip
    """Attention that writes its results in 16 bits, and the linear layer that reads them. The two steps apart give what
    is wanted, as other cases check: the same bits, but where an element is tiny.
    """
    rng, context, page, N = np.random.default_rng(6), 128, 64, 72
    slots, K = max(sequences) + 1, heads[0] * head_dim
    where, whose, table = np.array(positions, np.int32), np.array(sequences, np.int32), shuffled_table(slots, 2)
    tiles = np.full((1 + T, 2), -1, np.int32)
    write_tiles(where[:tokens], whose[:tokens], 128, tiles)
    machine.ctx = replace(machine.ctx, tiles=machine.put(tiles, "i32"))
    q = machine.put(rng.standard_normal((T, K)).astype(np.float32), "f32")
    pages = [
        machine.put(
            round_16(rng.standard_normal((1 + 2 * slots, heads[1], page, head_dim)).astype(np.float32), cache), cache
        )
        for _ in "kv"
    ]  # fmt: skip
    matrix, w = upload(machine, rng.standard_normal((N, K)) * K**-0.5, kind)
    old = machine.put(rng.standard_normal((T, N)).astype(np.float32), "f32")
    kinds = [*["chunks"] * bool(tiles[0, 0]), *["single rows"] * bool(tiles[0, 1])]
    assert int(where.max()) < context

    def steps_of(mixed: Any, out: Any) -> list[list[Launch]]:
        first = launches_of(
            machine, "attention", ["f32", cache, "i32", "i32", "i32", cache],
            [q, pages[0], machine.put(where, "i32"), machine.put(whose, "i32"), machine.put(table, "i32"), pages[1]],
            [mixed], window=0,
        )  # fmt: skip
        first = [launch for launch in first if launch.only_for is None or launch.only_for in kinds]
        return [first, launches_of(machine, "linear_add", ["f32", kind, "f32"], [mixed, matrix, old], [out])]

    outs = [machine.put(np.full((T, N), UNTOUCHED, np.float32), "f32") for _ in range(2)]
    mixed = [machine.put(np.full((T, K), UNTOUCHED, np.float32), "f32") for _ in range(2)]
    apart = steps_of(mixed[0], outs[0])
    machine.execute([launch for step in apart for launch in step])
    want, exact = machine.get(outs[0], np.float32)[:tokens], machine.get(mixed[0], np.float32)[:tokens]
    got = joined_with(machine, f"attention {cache}, linear {kind}", steps_of(mixed[1], outs[1]), outs[1], tokens)
    error = 2 * within(exact, w, kind) + 2.0**-24 * np.abs(w).sum(axis=1)
    return float((np.abs(got - want) / error).max())


def rounded_gate_up(machine: Any, T: int, K: int, N: int, tokens: int) -> float:
    """SwiGLU that writes its results in bfloat16, and the linear layer that reads them, as `rounded_attention`."""
    rng = np.random.default_rng(7)
    x, norm = (machine.put(rng.standard_normal(shape).astype(np.float32), "f32") for shape in ((T, K), (K,)))
    (w1, _), (w3, _) = (upload(machine, rng.standard_normal((N, K)) * 2 * K**-0.5, "bf16") for _ in range(2))
    matrix, w = upload(machine, rng.standard_normal((40, N)) * N**-0.5, "bf16")
    hidden = [machine.put(np.full((T, N), UNTOUCHED, np.float32), "f32") for _ in range(2)]
    outs = [machine.put(np.full((T, 40), UNTOUCHED, np.float32), "f32") for _ in range(2)]
    both = [
        [
            launches_of(
                machine, "norm_gate_up", ["f32", "f32", "bf16", "bf16"], [x, norm, w1, w3], [middle], eps=1e-5
            ),
            launches_of(machine, "linear", ["f32", "bf16"], [middle, matrix], [out]),
        ]
        for middle, out in zip(hidden, outs, strict=True)
    ]  # fmt: skip
    machine.execute([launch for step in both[0] for launch in step])
    want, exact = machine.get(outs[0], np.float32)[:tokens], machine.get(hidden[0], np.float32)[:tokens]
    got = joined_with(machine, "gate_up bf16", both[1], outs[1], tokens)
    return float((np.abs(got - want) / (2 * within(exact, w, "bf16"))).max())


def joined_cases() -> list[Case]:
    """Steps that are joined (`ops.joins`)."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], *arguments: Any) -> None:
        made.append((name, tokens, lambda machine: checked(name, check(machine, *arguments, tokens=tokens))))

    rows = [*range(3, 23), 0, 0]
    add("rounded attention f16, linear f16, by bulk copies", 20, rounded_attention, "f16", "f16", 22, (2, 2), 64, rows,
        [*range(20), 0, 0])  # fmt: skip
    add("rounded attention f16, linear q4_0, chunks and rows", 70, rounded_attention, "f16", "q4_0", 72, (2, 1), 64,
        [*range(40, 80), 9, *range(29), 0, 0], [*[0] * 40, 1, *[2] * 29, 0, 0])  # fmt: skip
    add("rounded attention bf16, linear bf16, heads that share keys", 18, rounded_attention, "bf16", "bf16", 20, (4, 2),
        64, [*range(30, 48), 0, 0], [*range(18), 0, 0])  # fmt: skip
    add("rounded attention f16, linear q8_0, many heads that share keys", 34, rounded_attention, "f16", "q8_0", 34,
        (6, 1), 64, [*range(34)], [*range(34)])  # fmt: skip
    for kind in ("bf16", "q4_0"):
        add(f"rounded attention f16, linear {kind}, a prompt and a row", 135, rounded_attention, "f16", kind, 136,
            (2, 1), 64, [*range(100), *range(5, 39), 17, 0], [*[0] * 100, *[1] * 34, 2, 0])  # fmt: skip
    add("rounded gate_up bf16", 35, rounded_gate_up, 40, 128, 136)
    return made


def checked(name: str, worst: float) -> float:
    """The largest error as a fraction of its bound, which it may not exceed."""
    assert worst <= 1, f"{name}: error is {worst:.3g} of the allowed one"
    return worst


def large_cases() -> list[Case]:
    """Linear layers of many tokens, for `wgmma_gemm` on a GPU."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], kind: str, *arguments: Any, **named: Any) -> None:
        made.append((name, tokens, lambda machine: check(machine, kind, *arguments, tokens=tokens, **named)))

    for kind in ("f32", "f16", "bf16", *QUANTISED):
        add(f"linear {kind}, 300 of 400", 300, linear, kind, 400, 1536, 392, residual=True, normed=False)
        add(f"norm_linear {kind}, 257 of 260", 257, linear, kind, 260, 256, 72, residual=False, normed=True)
        add(f"gate_up {kind}, 384", 384, gate_up, kind, 384, 512, 200, normed=True)
        add(f"qkv {kind}, 290 of 300", 290, qkv_rope, kind, 300, 256, (4, 2), 64, 0, "f16")
        if kind == "q4_k":
            for tokens in (1, 290):
                add(f"qkv q4_k and q6_k, {tokens}", tokens, qkv_rope, kind, tokens, 256, (4, 2), 64, 0, "f16",
                    values="q6_k")  # fmt: skip
        add(f"linear {kind}, several tiles a block", 500, linear, kind, 512, 256, 8200, residual=True, normed=False)
    for kind in ("f16", "bf16"):
        for width in wgmma_gemm.KERNELS:
            add(f"{kind}, tiles of {width}", 270, in_width, kind, width)
    for kind in QUANTISED:
        add(f"{kind}, tiles of 256 tokens", 590, in_tall_tiles, kind)
    for kind in ("f16", "bf16", *QUANTISED):
        add(f"{kind}, halves of K", 300, in_halves, kind, 400, 1792 + 64 * (kind in ("f16", "q8_0")), 500)
    for tokens in (9, 129):
        add(f"linear f32, {tokens}, float32 in pieces", tokens, in_pieces, "f32")
    add("linear int8, groups of 16", 280, linear, "int8", 300, 144, 70, residual=False, normed=False, group=16)
    add("linear int8, groups of 12, as float32", 280, linear, "int8", 300, 144, 70, residual=False, normed=False,
        group=12)  # fmt: skip
    add("linear f16, odd sizes", 280, linear, "f16", 300, 37, 10, residual=True, normed=False)
    add("linear f16, results that are stored one at a time", 280, linear, "f16", 300, 64, 131, residual=True,
        normed=False)  # fmt: skip
    return made


def small_cases() -> list[Case]:
    """The same as small as they can be, for the emulator: one width and one type of each decoder."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], *arguments: Any, **named: Any) -> None:
        made.append((name, tokens, lambda machine: check(machine, *arguments, tokens=tokens, **named)))

    add("linear f16, several tiles a block", 130, few_blocks, linear, "f16", 132, 136, 140, residual=True, normed=False)
    add("gate_up bf16", 9, gate_up, "bf16", 10, 456, 76, normed=True)
    add("qkv f16", 9, qkv_rope, "f16", 12, 72, (3, 1), 64, 0, "f16")
    add("qkv bf16, neighbours rotated", 9, qkv_rope, "bf16", 12, 72, (3, 1), 128, 1, "bf16")
    add("qkv q4_k and q6_k", 12, qkv_rope, "q4_k", 12, 256, (2, 1), 64, 0, "f16", values="q6_k")
    add("qkv f16, no whole heads in a tile", 9, qkv_rope, "f16", 12, 72, (2, 1), 48, 0, "f16")
    add("linear f32, in two parts", 9, in_two_parts, "f32")
    add("linear int8, groups of 12, as float32", 9, linear, "int8", 12, 36, 20, residual=False, normed=True, group=12)
    add("linear q4_0, several tiles a block", 18, few_blocks, linear, "q4_0", 20, 224, 140, residual=False, normed=True)
    add("gate_up q8_0", 12, gate_up, "q8_0", 12, 96, 68, normed=True)
    add("qkv q4_k", 12, qkv_rope, "q4_k", 12, 256, (3, 1), 64, 0, "f16")
    add("f16, halves of K", 70, in_halves, "f16", 72, 328, 140)
    add("q4_k, halves of K", 140, in_halves, "q4_k", 140, 512, 100)
    add("q6_k, tiles of 256 tokens", 131, in_tall_tile, "q6_k")
    return made


def in_two_parts(machine: Any, kind: str, tokens: int) -> float:
    """A float32 weight of more rows than are split at a time, of columns whose sums are taken out once."""
    with mock.patch.object(wgmma_gemm, "MAX_PIECES", 1):
        return linear(machine, kind, 10, 136, 140, tokens, residual=True, normed=False)


def in_tall_tile(machine: Any, kind: str, tokens: int) -> float:
    """A tile of 256 tokens."""
    with mock.patch.object(wgmma_gemm, "tall_wins", return_value=True):
        return linear(machine, kind, 132, 256, 40, tokens, residual=True, normed=False)


def main(arguments: Sequence[str]) -> int:
    machine_of = (lambda tokens: Emulated((9, 0), tokens, wgmma=True)) if arguments else machine_maker(())
    with mock.patch.multiple(skinny, MOST=1), mock.patch.multiple(wide, MOST=1):
        failed = check_all(machine_of, cases() + (small_cases() if arguments else large_cases()))
    # emulated: other types have the same code, and take as long to compile
    joined = [case for case in joined_cases() if not arguments or "linear bf16" not in case[0]]
    return len(failed | check_all(machine_of, joined))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
