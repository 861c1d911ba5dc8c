"""How steps are timed on a GPU, tested with a fake GPU."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class MadeUpGpu:
    """A stream in which kernel k takes `times[k]` seconds and a replay `start` more; it counts what runs."""

    start = 3e-6

    def __init__(self, times: list[float]) -> None:
        self.times, self.clock, self.replays = times, 0.0, 0
        driver = ModuleType("driver")
        gpu = self

        class CudaGraph:
            def __init__(self, device: Any, calls: list[int]) -> None:
                self.calls = calls

            def replay(self) -> None:
                gpu.replays += 1
                gpu.clock += gpu.start + sum(gpu.times[call] for call in self.calls)

        class Stopwatch:
            def __init__(self, device: Any) -> None:
                pass

            def measure(self, action: Any) -> float:
                before = gpu.clock
                action()
                return gpu.clock - before

        driver.CudaGraph, driver.Stopwatch = CudaGraph, Stopwatch  # type: ignore[attr-defined]
        self.driver = driver


def test_gpu_times_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind by itself, without the overhead of a replay; small steps are repeated."""
    gpu = MadeUpGpu([1e-6, 20e-6, 5e-6, 22e-6, 5e-6, 60e-6])
    monkeypatch.setitem(sys.modules, "numballama.cuda.driver", gpu.driver)
    monkeypatch.setitem(sys.modules, "numballama.cuda.timing", ModuleType("not used"))  # put back afterwards
    del sys.modules["numballama.cuda.timing"]
    timing = importlib.import_module("numballama.cuda.timing")
    ran: list[int] = []
    program = SimpleNamespace(
        backend=SimpleNamespace(device=None), launches_of_run=lambda tokens: [[n] for n in range(6)], run=ran.append
    )
    sizes = [100, 40_000_000, 2000, 40_000_000, 2000, 200_000_000]
    times, whole = timing.time_steps(program, ["a", "b", "c", "b", "c", "d"], sizes)
    assert times == pytest.approx([1e-6, 21e-6, 5e-6, 21e-6, 5e-6, 60e-6])
    assert whole == pytest.approx(sum(gpu.times) + gpu.start)
    assert ran == [1], "the inputs are sent once"
    timing.time_steps(program, ["a", "b", "c", "b", "c", "d"], sizes, 30)
    assert ran == [1, 30]
