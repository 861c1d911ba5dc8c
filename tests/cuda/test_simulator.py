"""The CUDA kernels' semantics without a GPU: simulated_kernels.py in Numba's CUDA simulator (simulator.py).

The simulator is chosen by an environment variable before Numba is imported, so its tests run in processes of their own:
two of them, each with half of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(f"no CUDA simulator: {reason}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PARTS = 2
FILE = "tests/cuda/simulated_kernels.py"


def start(*arguments: str, core: int = 0) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBALLAMA_TEST_CORE": str(core), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[list[tuple[int, subprocess.Popen[str]]]]:
    """(number of tests, process) of each part."""
    listed, _ = start("--collect-only", FILE).communicate(timeout=120)
    tests = [line for line in listed.splitlines() if "::" in line]
    assert len(tests) > 40, listed
    parts = [tests[part::PARTS] for part in range(PARTS)]
    processes = [start("--tb=short", *own, core=core) for core, own in enumerate(parts)]
    try:
        yield [(len(own), process) for own, process in zip(parts, processes, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_in_the_simulator(running: list[tuple[int, subprocess.Popen[str]]], part: int) -> None:
    count, process = running[part]
    output, _ = process.communicate(timeout=580)
    assert process.returncode == 0, output[-20000:]
    assert f"{count} passed" in output, output[-2000:]
