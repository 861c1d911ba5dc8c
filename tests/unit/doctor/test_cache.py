"""The state of a cache of kernels, as the doctor tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from numballama import kernel_cache
from numballama.doctor.cache import Cache


def test_entries_are_counted(tmp_path: Path) -> None:
    for index in range(3):
        kernel_cache.store(tmp_path / f"{index}.kernel", "key", bytes(1 << 20))
    assert str(Cache.of(tmp_path)) == f"{tmp_path} (3 kernels, 3.0 MiB)"
    assert str(Cache.of(tmp_path / "none")) == f"{tmp_path / 'none'} (0 kernels, 0 B)"


def test_why_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBALLAMA_CACHE", raising=False)
    (tmp_path / "file").write_text("no folder")
    said = str(Cache.of(tmp_path / "file"))
    assert f"new ones are not kept: {tmp_path / 'file'} is not a folder; set NUMBALLAMA_CACHE" in said
    monkeypatch.setattr(kernel_cache, "cache_root", lambda: None)
    assert str(Cache.of(None)) == f"not kept: there is no home directory; {kernel_cache.ADVICE}"
