"""The measurement of main memory's bandwidth: all of the array is read, and no more memory taken than there is."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.cpu import bandwidth


@pytest.mark.parametrize("workers", [1, 3])
def test_every_element_is_read_once(workers: int) -> None:
    x, sums = np.arange(1000, dtype=np.float32), np.zeros(workers, np.float32)
    for worker in range(workers):
        bandwidth.read_all(worker, workers, 1, x, sums)
    assert sums.sum() == x.sum()
    size = -(-1000 // workers)
    assert sums.tolist() == [x[n * size : (n + 1) * size].sum() for n in range(workers)]


@pytest.mark.slow
def test_a_small_machine_reads_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def ones(size: int, dtype: type) -> np.ndarray:
        made.append(size)
        return np.full(size, 1, dtype)

    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 80 << 20)
    monkeypatch.setattr(bandwidth.np, "ones", ones)
    rate = bandwidth.measure_bandwidth(2, repeats=4)
    assert rate is not None and rate > 0
    assert made == [5 << 20]


@pytest.mark.parametrize("free", [0, (64 << 20) - 1])
def test_nothing_is_allocated_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: free)
    monkeypatch.setattr(bandwidth.np, "ones", lambda *_: pytest.fail("an array is allocated"))
    assert bandwidth.measure_bandwidth(2) is None
