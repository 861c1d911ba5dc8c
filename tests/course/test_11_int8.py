"""Solutions of docs/course/11-int8.md."""

from __future__ import annotations

import numpy as np

from numballama.checkpoint import Weight
from numballama.quantization.convert import dequantize, quantize_int8
from numballama.quantization.types import WeightType


def restored(w: np.ndarray, group: int) -> np.ndarray:
    quants, scales = quantize_int8(w, group)
    return dequantize(Weight(w.shape, WeightType("int8", group), quants, scales))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


def test_1_an_outlier() -> None:
    """One scale for the row: all other elements are rounded to multiples of 0.79. Groups of 32: one group suffers."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 256), dtype=np.float32)
    w[0, 0] = 100
    normal = rms(restored(w, 256)[1] - w[1])
    row, groups = rms(restored(w, 256)[0] - w[0]), rms(restored(w, 32)[0] - w[0])
    assert row > 20 * normal
    assert groups < row / 2
    untouched = (restored(w, 32)[0] - w[0])[32:]
    assert rms(untouched) < normal


def test_2_groups_over_rows() -> None:
    rng = np.random.default_rng(0)
    w, x, group = rng.standard_normal((6, 96), dtype=np.float32), rng.standard_normal(96, dtype=np.float32), 64
    quants, scales = quantize_int8(w, group)
    out = np.zeros(6)
    for n in range(6):
        k = 0
        while k < 96:
            g = (96 * n + k) // group
            end = min(96, (g + 1) * group - 96 * n)  # the end of the group, or of the row
            out[n] += scales[g] * (quants[n, k:end] * x[k:end]).sum()
            k = end
    assert np.allclose(out, restored(w, group) @ x, atol=1e-5)


def test_3_int16() -> None:
    largest = 64 * 127 * 127
    assert largest == 1_032_256 > np.iinfo(np.int16).max
    assert np.iinfo(np.int32).max // (127 * 127) == 133_144  # elements that never overflow
