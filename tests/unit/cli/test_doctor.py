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
