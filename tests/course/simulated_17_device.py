"""Solutions of docs/course/17-device.md, which run in the process of Numba's simulator:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/course/simulated_17_device.py
"""

from __future__ import annotations

import numpy as np

from numballama.config import ModelConfig
from numballama.cuda import ops  # noqa: F401 (registers the kernels)
from numballama.fusion import fuse
from numballama.graph import KVLayout, build
from numballama.plan import lower
from numballama.quantization.types import F32, TYPE_TRAITS


def test_1_alignment() -> None:
    """Every eighth: 8 · 34 = 272 is the first multiple of 16."""
    assert [block for block in range(32) if 34 * block % 16 == 0] == [0, 8, 16, 24]
    blocks = np.random.default_rng(0).integers(0, 256, 4 * 34, dtype=np.uint8)
    records = blocks.view(TYPE_TRAITS["q8_0"].record)
    quants, scales = np.ascontiguousarray(records["qs"]), np.ascontiguousarray(records["d"])
    assert quants.strides[0] == 32  # each row of quants is aligned to 16 bytes if the first is
    again = np.empty_like(records)
    again["qs"], again["d"] = quants, scales
    assert np.array_equal(again.view(np.uint8), blocks)


def steps(n_layers: int, fusions: bool) -> int:
    config = ModelConfig(16, 24, n_layers, 2, 1, 12, 8)
    types = dict.fromkeys(config.weight_shapes(), F32)
    return len(lower(fuse(build(config, types, KVLayout.of(config, 8)), "cuda", fusions), "cuda").steps)


def test_2_launches() -> None:
    assert [steps(n, True) for n in (1, 2, 3)] == [9, 14, 19]
    assert [steps(n, False) for n in (1, 2, 3)] == [24, 43, 62]


def time_for(tokens: int, h: float, g: float, k: int) -> float:
    """When the host has handled the last token. Step n may be queued once token n - 1 - k has been handled."""
    handled: list[float] = []
    gpu_free = 0.0
    done: list[float] = []
    for n in range(tokens):
        before = n - 1 - k
        while len(handled) <= before:  # the host handles tokens in order, as soon as they are done
            handled.append(max(done[len(handled)], handled[-1] if handled else 0.0) + h)
        queued = handled[before] if before >= 0 else 0.0
        gpu_free = max(gpu_free, queued) + g
        done.append(gpu_free)
    while len(handled) < tokens:
        handled.append(max(done[len(handled)], handled[-1] if handled else 0.0) + h)
    return handled[-1]


def test_3_a_pipeline() -> None:
    n = 1000
    for h, g in ((1.0, 1.0), (0.2, 1.0), (0.5, 0.7)):
        assert abs(time_for(n, h, g, 0) / n - (h + g)) < 0.01
        for k in (1, 2, 4):
            assert abs(time_for(n, h, g, k) / n - max(h, g)) < 0.01
    assert abs(time_for(n, 3.0, 1.0, 4) / n - 3.0) < 0.01  # then the host is the limit
