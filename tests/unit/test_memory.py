"""Sizes: rounded up, and printed."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama import memory
from numballama.memory import ceil_div, format_bytes, resident_bytes, round_up


@given(count=st.integers(0, 1 << 50), size=st.integers(1, 1 << 20))
def test_rounding_up(count: int, size: int) -> None:
    assert ceil_div(count, size) * size == round_up(count, size)
    assert 0 <= round_up(count, size) - count < size
    assert ceil_div(count * size, size) == count


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (58 << 20, "58.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_bytes_as_text(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_a_limit_of_the_process_counts() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        free = memory.available_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert free is not None and 0 < free <= 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_resident_bytes_grow_with_what_is_written() -> None:
    gc.collect()  # models of other tests, which would be freed in between
    with mmap.mmap(-1, 64 << 20) as pages:  # an array may get pages that the process has had before
        before = resident_bytes()
        for page in range(0, len(pages), mmap.PAGESIZE):
            pages[page] = 1
        after = resident_bytes()
        assert before is not None and after is not None and after - before > len(pages) // 2
