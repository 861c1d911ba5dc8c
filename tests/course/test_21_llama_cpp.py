"""Solutions of docs/course/21-llama-cpp.md."""

from __future__ import annotations

import numpy as np

from numballama.checkpoint import Weight
from numballama.config import NAMED_SHAPES
from numballama.cpu import ops  # noqa: F401 (registers the kernels)
from numballama.fusion import fuse
from numballama.graph import KVLayout, build
from numballama.plan import ALIGNMENT, Plan, lower
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.types import F32, TYPE_TRAITS, WeightType


def blocks(values: np.ndarray, kind: str) -> tuple[Weight, np.ndarray, np.ndarray]:
    """The weight, scales [n] as float32, and the bytes or int8 of the quants [n, …]."""
    weight = convert(Weight(values.shape, F32, values), WeightType(kind))
    records = weight.data.reshape(-1).view(TYPE_TRAITS[kind].record)
    return weight, records["d"].view(np.float16).astype(np.float32), records["qs"]


def test_1_q4_0_by_hand() -> None:
    values = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    weight, d, qs = blocks(values, "q4_0")
    elements = np.hstack([qs & 15, qs >> 4]).astype(np.float32) - 8
    assert np.array_equal((d[:, None] * elements).reshape(3, 64), dequantize(weight))


def test_2_q4_0_times_q8_0() -> None:
    """Σ (q - 8) x = Σ q x - 8 Σ x: with the sum of each block of x, the quants need not be changed (ggml's q8_1)."""
    rng = np.random.default_rng(0)
    w, dw, packed = blocks(rng.standard_normal((1, 256), dtype=np.float32), "q4_0")
    x, dx, xq = blocks(rng.standard_normal((1, 256), dtype=np.float32), "q8_0")
    q, integers = np.hstack([packed & 15, packed >> 4]).astype(np.int32), xq.astype(np.int32)
    plain = np.sum(dw * dx * ((q - 8) * integers).sum(axis=1))
    with_sums = np.sum(dw * dx * ((q * integers).sum(axis=1) - 8 * integers.sum(axis=1)))
    assert plain == with_sums
    assert abs(plain - float((dequantize(w) * dequantize(x)).sum())) < 1e-4


def rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def greedy_arena(plan: Plan) -> int:
    """Walk the steps, allocate at the smallest gap that fits, free after the last use."""
    living: dict[str, tuple[int, int]] = {}
    arena = 0
    for step in range(len(plan.steps)):
        for name, place in plan.placements.items():
            if place.first != step:
                continue
            size, gaps, end = rounded(place.nbytes), [], 0
            for offset, length in sorted(living.values()):
                if offset - end >= size:
                    gaps.append((offset - end, end))
                end = max(end, offset + length)
            at = min(gaps)[1] if gaps else end
            living[name] = (at, size)
            arena = max(arena, at + size)
        for name, place in plan.placements.items():
            if place.last == step:
                living.pop(name, None)
    return arena


def test_3_ggmls_allocator() -> None:
    config = NAMED_SHAPES["TinyLlama-1.1B"]
    types = dict.fromkeys(config.weight_shapes(), F32)
    for tokens in (1, 64):
        graph = build(config, types, KVLayout.of(config, 256), tokens=tokens)
        plan = lower(fuse(graph, "cpu"), "cpu", workers=2)
        greedy = greedy_arena(plan)
        print(tokens, plan.arena_bytes, greedy)
        assert plan.arena_bytes <= greedy < 1.6 * plan.arena_bytes
