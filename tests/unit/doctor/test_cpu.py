"""The check of the CPU."""

from __future__ import annotations

import sys

import pytest

from numballama import DeviceError
from numballama.doctor import cpu


@pytest.mark.slow
def test_facts_of_this_cpu() -> None:
    """`tests/unit/cli/test_doctor.py` makes the whole check."""
    from numballama.cpu import intrinsics

    found = cpu._facts()
    assert found["workers"] >= 1 and found["vector_floats"] == intrinsics._lanes()


@pytest.mark.slow
def test_kernels_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_try", lambda: (0.5, 1e10))
    found = cpu.check()
    assert not found.works and found.problem == "kernels disagree with the reference: logits differ by 0.5"
    assert found.command == "numballama doctor --clear-cache"


def test_a_variable_that_breaks_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", "many")
    found = cpu.check()
    assert not found.works and found.command == "unset NUMBA_NUM_THREADS"
    assert found.problem is not None and "NUMBA_NUM_THREADS=many" in found.problem and found.processor


def test_what_mends_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise DeviceError("the check ended with signal SIGILL: it printed nothing")

    monkeypatch.setattr(cpu, "run_check", crash)
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    assert cpu.find_cpu(lambda *report: None).command is None
    monkeypatch.setenv("NUMBA_CPU_NAME", "skylake-avx512")
    assert cpu.find_cpu(lambda *report: None).command == "unset NUMBA_CPU_NAME"
    assert cpu.mend("Numba cannot be imported: no") == "pip install --force-reinstall numba"


def test_nothing_of_the_check_is_loaded_by_the_command() -> None:
    """What may crash is imported by the check's own process."""
    from tests.unit.test_architecture import modules_after, tops

    loaded = modules_after("import numballama.doctor.report")
    assert "numballama.doctor.gpu" in loaded and not tops(loaded) & {"numba", "llvmlite", "cuda"}, sys.executable
