"""What the compiler refuses before it compiles. Compiled kernels are tested in tests/cuda/test_assembly.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(f"kernels cannot be compiled: {reason}", allow_module_level=True)

from numballama.cuda import compiler
from numballama.cuda.launch import named
from numballama.cuda.ops import elementwise
from numballama.errors import DeviceError, Error
from tests.unit.cuda.test_launch import CTX, array


@pytest.mark.parametrize("fault", ["swapped", "missing", "renamed", "extra"])
def test_other_names_are_an_error_when_the_kernel_is_compiled(fault: str) -> None:
    """It names the kernel, the expected parameters and the found ones."""
    (launch,) = elementwise.bias(CTX, array(1, 64), array(64), array(1, 64))
    x = dict(launch.arguments)
    arguments = {
        "swapped": named(tokens=x["tokens"], weight=x["weight"], x=x["x"], out=x["out"], columns=64),
        "missing": named(tokens=x["tokens"], x=x["x"], weight=x["weight"], out=x["out"]),
        "renamed": named(tokens=x["tokens"], x=x["x"], weights=x["weight"], out=x["out"], columns=64),
        "extra": named(**x, rows=1),
    }[fault]
    with pytest.raises(Error, match=r"numballama\.kernels_cuda\.bias_kernel") as caught:
        compiler.to_ptx(replace(launch, arguments=arguments).specialization, (9, 0))
    assert "its parameters are (tokens, x, weight, out, columns)" in str(caught.value)
    assert f"a launch passes ({', '.join(arguments)})" in str(caught.value)


def test_settings_of_numba_do_not_change_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's key does not tell them: it is made without Numba."""
    (launch,) = elementwise.bias(CTX, array(1, 64), array(64), array(1, 64))

    def ptx() -> list[str]:
        """The lines, without the number of the compilation. Declarations are in any order."""
        return sorted(re.sub(r"B\d+v\d+", "", compiler.to_ptx(launch.specialization, (9, 0))).splitlines())

    usual = ptx()
    from numba.cuda.core import config

    monkeypatch.setattr(config, "OPT", 0)
    monkeypatch.setattr(config, "CUDA_DEBUGINFO_DEFAULT", 1)
    assert ptx() == usual


def test_a_variable_that_numba_does_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", "0")
    with pytest.raises(DeviceError, match="NUMBA_NUM_THREADS=0: it must be a whole number"):
        compiler.require_compiler()
