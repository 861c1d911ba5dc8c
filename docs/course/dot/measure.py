"""GB/s of each kernel beside the floor: `python docs/course/dot/measure.py [ROWS COLUMNS]`. One core."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (3, 2)]

from course.dot.kernels import KERNELS, nbytes, read  # noqa: E402 (the line above makes it importable)


def seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """The shortest of several runs: other programs can only make one longer."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main(rows: int = 16384, columns: int = 4096) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((rows, columns), dtype=np.float32), rng.standard_normal(columns, dtype=np.float32)
    out = np.empty(rows, np.float32)
    read(w)
    floor = w.nbytes / seconds(lambda: read(w))
    print(f"{rows:,} × {columns:,}; a plain read moves {floor / 1e9:.1f} GB/s")
    print(f"{'kernel':16}{'MB':>8}{'ms':>9}{'GB/s':>8}  of the floor")
    for kernel, weights, _ in KERNELS:
        own = weights(w)
        kernel(own, x, out)  # compiles
        took = seconds(lambda kernel=kernel, own=own: kernel(own, x, out))
        speed = nbytes(own) / took
        print(f"{kernel.__name__:16}{nbytes(own) / 1e6:8.0f}{1000 * took:9.2f}{speed / 1e9:8.2f}  {speed / floor:.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
