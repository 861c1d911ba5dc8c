"""GB/s of each attention kernel beside the floor, on a GPU: `python docs/course/attention/measure.py [HEADS LENGTH]`.

With `--simulate` the kernels run in Numba's simulator on tiny shapes: they are checked, and nothing is timed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (3, 2)]


def main(heads: int = 32, length: int = 16384) -> None:
    import numpy as np
    from numba import cuda

    from course import timing
    from course.attention.kernels import KERNELS, D, check

    sms = timing.multiprocessors()
    floor = timing.copy_bandwidth()
    print(f"{timing.name()}, {sms} SMs; a copy moves {floor / 1e9:,.0f} GB/s")
    print(f"{heads} heads, {length:,} keys of {D} float32")
    rng = np.random.default_rng(0)
    q = cuda.to_device(rng.standard_normal(heads * D, dtype=np.float32))
    keys, values = (cuda.to_device(rng.standard_normal(heads * length * D, dtype=np.float32)) for _ in range(2))
    out = cuda.device_array(heads * D, np.float32)
    print("| kernel | µs | GB/s | of the floor |\n|---|---|---|---|")
    for attention in KERNELS:
        check(attention, heads, min(length, 1000), sms)
        scratch = cuda.device_array(attention.scratch(heads, length, sms), np.float32)
        took = timing.seconds(
            lambda attention=attention, scratch=scratch: attention.launch(
                q, keys, values, scratch, out, heads, length, sms
            )
        )
        speed = 2 * 4 * heads * length * D / took
        print(f"| {attention.name} | {1e6 * took:,.1f} | {speed / 1e9:,.0f} | {speed / floor:.0%} |")


def simulate(heads: int = 2, length: int = 20) -> None:
    from course.attention.kernels import KERNELS, D, check

    print(f"simulated, {heads} heads, {length:,} keys of {D} float32: nothing is timed")
    for attention in KERNELS:
        print(f"{attention.name:16} largest error {check(attention, heads, length):.1e}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--simulate"]
    if "--simulate" in sys.argv:
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        from course import simulator  # noqa: F401 (first: it replaces what kernels import)

        simulate(*map(int, arguments))
    else:
        main(*map(int, arguments))
