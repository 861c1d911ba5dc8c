"""Solutions of docs/course/07-mmap.md."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from numballama import loader


def test_1_alignment() -> None:
    """All of them: GGUF aligns each tensor to `general.alignment`, 32 bytes unless the file says otherwise."""
    weights = loader.open_checkpoint(None).weights
    assert all(weight.data.ctypes.data % 32 == 0 for weight in weights.values())
    assert any(weight.data.ctypes.data % 64 for weight in weights.values())


def faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


@pytest.mark.skipif(sys.platform != "linux", reason="counts differ elsewhere")
def test_2_lazy() -> None:
    weights = loader.open_checkpoint(None).weights
    first, second = weights["layers.0.w1"].data, weights["layers.4.w1"].data
    counts = []
    for array in (first, second, first):
        before = faults()
        for start in range(0, array.size, mmap.PAGESIZE):
            array.reshape(-1)[start]
        counts.append(faults() - before)
    assert counts[0] and counts[1]  # fewer than pages: a fault maps neighbouring pages as well
    assert counts[2] < counts[0]


def test_3_replace_a_file(tmp_path: Path) -> None:
    """The name leads to the new file; the old one lives on without a name until its last mapping goes."""
    path, other = tmp_path / "a", tmp_path / "b"

    def view() -> np.ndarray:
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    path.write_bytes(b"old!")
    old = view()
    other.write_bytes(b"new!")
    os.replace(other, path)
    assert old.tobytes() == b"old!" and view().tobytes() == b"new!"
