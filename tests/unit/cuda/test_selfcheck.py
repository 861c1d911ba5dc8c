"""The kernel that shows whether a GPU works, without one: compiled in a process of its own, run by NumPy."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from numballama import DeviceError
from numballama.host.child import python_environment
from tests.helpers.cuda_host import HostDevice, HostMemory, missing_packages

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=missing_packages())


@pytest.mark.slow
def test_it_is_compiled_for_each_capability() -> None:
    """A process compiles for one."""
    code = "from numballama.cuda import selfcheck\nprint(len(selfcheck.compile_copy((8, 0)).machine))\n"
    code += "print(selfcheck.nvjitlink_version())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment())
    size, version = done.stdout.split()
    assert int(size) > 1000 and version[:2] in ("12", "13"), done.stderr


@pytest.mark.parametrize("wrong", [0, 3])
def test_what_a_kernel_copies_is_compared(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    from numballama.cuda import compiler, selfcheck

    class HostLaunch:
        def __init__(self, device: object, kernel: object, launch: Any) -> None:
            self.source, self.out = launch.arguments["source"], launch.arguments["out"]

        def __call__(self) -> None:
            ctypes.memmove(self.out.address, self.source.address, self.out.nbytes - 4 * wrong)

    monkeypatch.setattr(selfcheck, "Memory", HostMemory)
    monkeypatch.setattr(selfcheck, "LoadedKernel", lambda device, code: code)
    monkeypatch.setattr(selfcheck, "PreparedLaunch", HostLaunch)
    code, before = compiler.Cubin(b"", "", 0, 0, 0), set(HostMemory.live)
    if wrong:
        with pytest.raises(DeviceError, match=f"but {wrong} of 65,536 numbers that it copied are wrong"):
            selfcheck.run_copy(HostDevice(), code)  # type: ignore[arg-type]
    else:
        selfcheck.run_copy(HostDevice(), code)  # type: ignore[arg-type]
    assert set(HostMemory.live) <= before
