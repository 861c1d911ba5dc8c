"""`numballama doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from numballama import kernel_cache
from tests.helpers.command_line import call


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
def test_doctor_says_what_there_is(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "doctor")
    assert done.code == 0 and done.err == ""
    for word in ("numballama ", "numba ", "cores", str(cache), "CUDA ", "device='auto' takes"):
        assert word in done.out


@pytest.mark.slow
def test_doctor_counts_and_clears_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, count in ((kernel_cache.cache_directory(), 3), (kernel_cache.cuda_cache_directory(), 2)):
        assert directory is not None
        for index in range(count):
            kernel_cache.store(directory / f"{index}.kernel", "key", bytes(1 << 20))
    said = call(capsys, "doctor").out
    assert f"{kernel_cache.cache_directory()} (3 kernels, 3.0 MiB)" in said
    assert f"{kernel_cache.cuda_cache_directory()} (2 kernels, 2.0 MiB)" in said or "numba-cuda missing" in said
    (cache / "mine").write_text("a file of somebody's")
    done = call(capsys, "doctor", "--clear-cache")
    assert done.code == 0 and done.out == f"removed 5 compiled kernels, 5.0 MiB, from {cache}\n"
    assert [path.name for path in cache.iterdir()] == ["mine"]
    assert f"{kernel_cache.cache_directory()} (0 kernels, 0 B)" in call(capsys, "doctor").out


@pytest.mark.slow
def test_doctor_says_why_nothing_is_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.rmdir()
    cache.write_text("no folder")
    said = call(capsys, "doctor").out
    assert f"new ones are not kept: {cache} is not a folder; set NUMBALLAMA_CACHE" in said
