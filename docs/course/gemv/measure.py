"""GB/s of each GEMV kernel beside the floor, on a GPU: `python docs/course/gemv/measure.py [ROWS COLUMNS]`.

With `--simulate` the kernels run in Numba's simulator on tiny shapes: they are checked, and nothing is timed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (3, 2)]


def main(rows: int = 65536, columns: int = 4096) -> None:
    import numpy as np
    from numba import cuda

    from course import timing
    from course.gemv.kernels import KERNELS, check, launch

    sms = timing.multiprocessors()
    floor = timing.copy_bandwidth()
    print(f"{timing.name()}, {sms} SMs; {rows:,} × {columns:,} float32; a copy moves {floor / 1e9:,.0f} GB/s")
    rng = np.random.default_rng(0)
    w = cuda.to_device(rng.standard_normal((rows, columns), dtype=np.float32).reshape(-1))
    x, out = cuda.to_device(rng.standard_normal(columns, dtype=np.float32)), cuda.device_array(rows, np.float32)
    print("| kernel | µs | GB/s | of the floor |\n|---|---|---|---|")
    for gemv in KERNELS:
        check(gemv, min(rows, 1000), columns, sms)
        took = timing.seconds(lambda gemv=gemv: launch(gemv, w, x, out, sms))
        speed = 4 * rows * columns / took
        print(f"| {gemv.kernel.__name__} | {1e6 * took:,.1f} | {speed / 1e9:,.0f} | {speed / floor:.0%} |")


def simulate(rows: int = 5, columns: int = 256) -> None:
    from course.gemv.kernels import KERNELS, check

    print(f"simulated, {rows:,} × {columns:,} float32: nothing is timed")
    for gemv in KERNELS:
        print(f"{gemv.kernel.__name__:16} relative error {check(gemv, rows, columns):.1e}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--simulate"]
    if "--simulate" in sys.argv:
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        from course import simulator  # noqa: F401 (first: it replaces what kernels import)

        simulate(*map(int, arguments))
    else:
        main(*map(int, arguments))
