"""`inspect`: its plan is the CPU's, and making it needs no Numba."""

from __future__ import annotations

import subprocess
import sys

import numballama


def test_a_report_needs_no_numba() -> None:
    code = "import sys, numballama as n; assert 'plan of llama' in str(n.inspect(None)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert {"numballama.plan", "numpy"} <= set(done.stdout.split())
    assert not {"numba", "llvmlite", "numballama.kernels_cpu"} & set(done.stdout.split())


def test_its_plan_is_that_of_the_model() -> None:
    found = numballama.inspect(None)
    with numballama.compile(None, device="cpu", threads=1) as model:
        assert [step.kernel.name for step in found.plan.steps] == [step.kernel.name for step in model.plan.steps]
        assert found.plan.arena_bytes == found.memory["arena"] == model.plan.arena_bytes
