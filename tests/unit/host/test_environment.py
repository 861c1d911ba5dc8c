"""Variables that make Numba fail end in one line that names the variable."""

from __future__ import annotations

import subprocess
import sys

import pytest

from numballama.errors import DeviceError
from numballama.host import environment
from tests.helpers.processes import PACKAGE, run_python


@pytest.mark.parametrize("value", ["0", "-1", "", "two", "1.5", " ", "0x2"])
def test_a_number_of_threads_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", value)
    with pytest.raises(DeviceError, match=f"NUMBA_NUM_THREADS={value}: it must be a whole number"):
        environment.import_numba()


@pytest.mark.parametrize("name", ["DISABLE_JIT", "BOUNDSCHECK"])
def test_a_setting_that_kernels_do_not_survive(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import numba

    environment.import_numba()
    monkeypatch.setenv(f"NUMBA_{name}", "1")
    monkeypatch.setattr(numba.config, name, 1)
    with pytest.raises(DeviceError, match=f"NUMBA_{name}=1: .*; unset it"):
        environment.import_numba()


USE = """
import json, sys
import numballama
try:
    with numballama.compile(None, device=sys.argv[1]) as model:
        print(json.dumps(model.generate("Once upon a time", max_tokens=3, temperature=0)))
except numballama.Error as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_the_variable_is_named_on_every_device_that_needs_numba(device: str) -> None:
    found = run_python(USE, device, NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT=1" in found and "\n" not in found


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "NUMBA_THREADING_LAYER=none_such",
        "NUMBA_THREADING_LAYER_PRIORITY=none_such",
        "NUMBA_CACHE_LOCATOR_CLASSES=none_such",
        "OMP_NUM_THREADS=none_such",
        "OMP_THREAD_LIMIT=1",
        "NUMBA_CPU_NAME=generic",
    ],
)
def test_a_setting_that_does_not_matter(setting: str) -> None:
    name, _, value = setting.partition("=")
    assert run_python(USE, "cpu", timeout=600, **{name: value}) == ", there was"


@pytest.mark.slow
def test_what_numba_ignores_is_noted_in_a_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from numballama.host import environment; environment.import_numba()"],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(PACKAGE.parent), "NUMBA_OPT": "none_such"},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == "NUMBA_OPT=none_such is ignored: Numba does not understand it\n"
