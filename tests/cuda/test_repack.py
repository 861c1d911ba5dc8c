"""The kernel that repacks blocks of a GGUF file: the cases of `repack_cases.py`, emulated and on a GPU."""

from __future__ import annotations

import pytest

from tests.helpers.cuda_host import missing_gpu, missing_packages

if reason := missing_packages():
    pytest.skip(f"kernels are not compiled: {reason}", allow_module_level=True)

from numballama.cuda.repack import LAYOUTS
from tests.cuda.test_tensor_cores import run_cases

pytestmark = pytest.mark.slow


def check(printed: str) -> None:
    assert [line.partition(":")[0] for line in printed.splitlines()] == list(LAYOUTS)


def test_emulated() -> None:
    check(run_cases("9.0", module="repack_cases"))


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    if reason := missing_gpu():
        pytest.skip(f"no GPU: {reason}")
    check(run_cases(module="repack_cases"))
