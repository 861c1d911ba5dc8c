"""`numballama doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from numballama import kernel_cache
from numballama.doctor import report
from numballama.doctor.cpu import MOST_DIFFERENCE, CpuReport
from tests.helpers.command_line import call
from tests.unit.doctor.test_report import HEALTHY


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of kernels, for this test only."""
    folders = (kernel_cache.cache_directory, kernel_cache.cuda_cache_directory)
    monkeypatch.setenv("NUMBALLAMA_CACHE", str(tmp_path))
    for folder in folders:
        folder.cache_clear()
    yield tmp_path
    for folder in folders:
        folder.cache_clear()


@pytest.mark.slow
def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "doctor", "--json")
    assert done.code == 0 and done.err == ""
    found = json.loads(done.out)
    assert found["cpu"]["works"] and found["cpu"]["cache"]["kernels"] > 0 and found["auto"] in ("cpu", "cuda")
    assert 0 <= found["cpu"]["difference"] <= MOST_DIFFERENCE and found["cpu"]["workers"] >= 1
    assert found["cpu"]["bandwidth_bytes_per_second"] is None or found["cpu"]["bandwidth_bytes_per_second"] > 1e8
    assert found["gpu"]["works"] or found["gpu"]["problem"]


@pytest.mark.parametrize(("cpu", "code"), [(HEALTHY.cpu, 0), (CpuReport(problem="no compiler"), 1)])
def test_the_exit_status_is_the_cpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cpu: CpuReport, code: int
) -> None:
    monkeypatch.setattr(report.Report, "make", lambda: replace(HEALTHY, cpu=cpu))
    done = call(capsys, "doctor")
    assert done.code == code and "GPU          works" in done.out
    assert json.loads(call(capsys, "doctor", "--json").out)["cpu"]["problem"] == cpu.problem


def test_doctor_clears_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, count in ((kernel_cache.cache_directory(), 3), (cache / ("0" * 16), 2)):
        assert directory is not None
        for index in range(count):
            kernel_cache.store(directory / f"{index}.kernel", "key", bytes(1 << 20))
    (cache / "mine").write_text("a file of somebody's")
    done = call(capsys, "doctor", "--clear-cache")
    assert done.code == 0 and done.out == f"removed 5 compiled kernels, 5.0 MiB, from {cache}\n"
    assert [path.name for path in cache.iterdir()] == ["mine"]
