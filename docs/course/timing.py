"""Times kernels on a GPU for `gemv/measure.py` and `attention/measure.py`."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

warnings.filterwarnings("ignore", ".*Grid size")  # too few blocks are what some kernels show

LAUNCHES, ROUNDS = 10, 9


def seconds(run: Callable[[], Any]) -> float:
    """Median seconds of one call, from events around `LAUNCHES` of them.

    A launch from Python takes some 24 µs on the host, so a kernel must take longer than that: give it enough to do.
    """
    run()
    times = []
    for _ in range(ROUNDS):
        begin, end = cuda.event(), cuda.event()
        begin.record()
        for _ in range(LAUNCHES):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return statistics.median(times)


def copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes per second that a copy on the device moves, those read and those written."""
    source, target = (cuda.device_array(nbytes // 4, np.float32) for _ in range(2))
    return 2 * nbytes / seconds(lambda: target.copy_to_device(source))


def multiprocessors() -> int:
    """SMs of the GPU."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def name() -> str:
    """The GPU's name."""
    found = cuda.get_current_device().name
    return found.decode() if isinstance(found, bytes) else str(found)
