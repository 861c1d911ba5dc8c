"""A sample of the format fuzzer's cases, and tests that its checks work."""

from __future__ import annotations

import gc
import mmap
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from numballama.errors import FormatError
from tests.helpers import fuzz_formats

pytestmark = pytest.mark.slow

SAMPLE = 150
"""Number of cases per format. The script runs any number."""


@pytest.fixture(autouse=True)
def _nothing_left_of_other_tests() -> None:
    """What is freed while memory is measured would hide what is taken."""
    gc.collect()


@pytest.mark.parametrize("name", fuzz_formats.FORMATS)
def test_mutated_files_end_in_an_error_or_in_a_model(tmp_path: Path, name: str) -> None:
    opened, refused = fuzz_formats.fuzz(name, SAMPLE, 0, tmp_path)
    assert opened + refused == SAMPLE
    assert refused > SAMPLE // 4, "most damage is seen"
    assert opened > 0, "not all of it is, or the valid files are none"


def _slow(path: Path) -> None:
    started = time.process_time()
    while time.process_time() < started + fuzz_formats.SECONDS + 0.05:
        pass


def _waiting(path: Path) -> None:
    time.sleep(fuzz_formats.SECONDS + 0.1)


def _write(nbytes: int) -> None:
    """Take memory and write to it. An array may get pages that the process has had before: they would not count."""
    with mmap.mmap(-1, nbytes) as memory:
        for page in range(0, nbytes, mmap.PAGESIZE):
            memory[page] = 1


def _greedy(path: Path) -> None:
    _write(fuzz_formats.BYTES + (8 << 20))


def _greedy_and_refusing(path: Path) -> None:
    _greedy(path)
    raise FormatError("no")


def _warning(path: Path) -> None:
    warnings.warn("a doubt", RuntimeWarning, stacklevel=1)


def _broken(path: Path) -> None:
    raise KeyError("name")


@pytest.mark.parametrize(
    ("opener", "message"),
    [
        (_slow, "took 0.6"),
        (_greedy, "bytes of memory for"),
        (_greedy_and_refusing, "bytes of memory for"),
        (_warning, "a doubt"),
        (_broken, "KeyError"),
    ],
)
def test_the_checks_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Callable[[Path], None], message: str
) -> None:
    calls = []

    def after_the_valid_one(path: Path) -> None:
        calls.append(path)
        if len(calls) > 1:
            opener(path)

    monkeypatch.setattr(fuzz_formats, "SECONDS", 0.5)
    with pytest.raises(AssertionError, match=rf"gguf-small, seed 3, case 0: .*{message}"):
        fuzz_formats.fuzz("gguf-small", 5, 3, tmp_path, after_the_valid_one)


def test_waiting_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_formats, "SECONDS", 0.1)
    with fuzz_formats.limits(0):
        _waiting(Path())


def test_an_earlier_peak_neither_hides_one_nor_passes_for_one() -> None:
    mega = 1 << 20
    with fuzz_formats.limits(fuzz_formats.BYTES):  # a limit of twice BYTES
        _write(fuzz_formats.BYTES * 3 // 2)
    with fuzz_formats.limits(0):
        pass
    with fuzz_formats.limits(0):
        _write(fuzz_formats.BYTES * 2 // 5)
    with fuzz_formats.limits(0):
        pass
    with pytest.raises(AssertionError, match="bytes of memory"), fuzz_formats.limits(0):
        _write(fuzz_formats.BYTES + 8 * mega)


def test_a_total_is_divided_among_the_formats(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for total in range(40):
        found = fuzz_formats.shares(total, list("abcdefg"))
        assert sum(found.values()) == total and max(found.values()) - min(found.values()) <= 1
    assert [name for group in fuzz_formats.GROUPS.values() for name in group] == list(fuzz_formats.FORMATS)
    monkeypatch.setattr(fuzz_formats, "EVERY_S", -1.0)
    fuzz_formats.main(["llama2c-v0", "kuiper", "--total", "5", "--seed", "2"])
    shown = capfd.readouterr().out
    assert (
        "1 of 3; " in shown and "1 of 2; " in shown and "5 cases in" in shown and "ms of processor time a case" in shown
    )


def test_mapped_memory_counts_when_it_is_read(tmp_path: Path) -> None:
    with mmap.mmap(-1, fuzz_formats.BYTES + (8 << 20)) as memory:
        touched = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        with fuzz_formats.limits(0):
            pass
        with pytest.raises(AssertionError, match="bytes of memory"), fuzz_formats.limits(0):
            touched[:] = 1
        with fuzz_formats.limits(0):
            touched[:] = 2
        del touched


def test_cases_differ_and_come_again() -> None:
    import random

    def once(case: int) -> fuzz_formats.Files:
        files: fuzz_formats.Files = {"a": bytes(range(256)) * 4, "b": b'{"dim": 4, "name": "blk.0.attn_q.weight"}' * 9}
        fuzz_formats.mutate(random.Random(case), files)
        return files

    assert [once(case) for case in range(50)] == [once(case) for case in range(50)]
    kinds = {tuple(sorted((n, type(c).__name__) for n, c in once(case).items())) for case in range(400)}
    assert len(kinds) > 8
    assert any(b"1e999" in bytes(c) for case in range(400) for c in once(case).values() if isinstance(c, bytearray))
