"""Variables that make Numba fail end in one line that names the variable."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama import backend
from numballama.errors import DeviceError
from numballama.host import environment
from tests.helpers.processes import PACKAGE, run_python


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " ", "0x2"])
def test_a_number_of_threads_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", value)
    with pytest.raises(DeviceError, match=f"NUMBA_NUM_THREADS={value}: it must be a whole number"):
        environment.import_numba()


def test_an_empty_variable_is_as_if_it_were_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, limit in ((None, None), ("", None), (" 3", 3)):
        monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
        if value is not None:
            monkeypatch.setenv("NUMBA_NUM_THREADS", value)
        assert environment.thread_limit() == limit


@pytest.mark.parametrize(
    ("value", "simulated"), [(None, False), ("", False), ("0", False), ("yes", False), ("1", True), (" 10 ", True)]
)
def test_the_simulator_is_no_gpu(monkeypatch: pytest.MonkeyPatch, value: str | None, simulated: bool) -> None:
    """With device="auto" the CPU is chosen, for this reason; with device="cuda" it is an error."""
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    if value is not None:
        monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", value)
    driver = ModuleType("numballama.cuda.driver")
    vars(driver)["Device"] = lambda name="cuda": "a GPU"
    monkeypatch.setitem(sys.modules, "numballama.cuda.driver", driver)
    monkeypatch.setattr(backend, "cuda_cache_directory", lambda: None)
    if simulated:
        assert backend.choose_device("auto")[0] == "cpu"
        assert "NUMBA_ENABLE_CUDASIM=" in backend.choose_device("auto")[1]
        with pytest.raises(DeviceError, match=r"NUMBA_ENABLE_CUDASIM=.*simulates a GPU.*; unset it"):
            backend.choose_device("cuda")
    else:
        assert backend.choose_device("auto")[0] == backend.choose_device("cuda")[0] == "cuda"


CPUS = {"": True, "foo": None, "help": None, "generic": True, "host": True, "i386": False}
FEATURES = {"+avx2": True, "-avx512f": True, "+bar": None, "avx2": None, "-64bit": False, "+help": None, "": True}
"""Name → whether LLVM compiles for it; None where it does not know the name."""


def _llvm(cpu: str, features: str) -> tuple[bool, str]:
    """What LLVM does. It ends the process for a feature without a sign."""
    words = [word for word in features.split(",") if word]
    assert all(word in FEATURES and word[0] in "+-" for word in words) and "+help" not in words
    unknown = [
        f"'{word}' is not a recognized feature for this target (ignoring feature)"
        for word in words
        if FEATURES[word] is None
    ]
    if CPUS[cpu] is None:
        unknown.append("Available CPUs" if cpu == "help" else f"'{cpu}' is not a recognized processor")
    return CPUS[cpu] is not False and "-64bit" not in words, " ".join(unknown * 3)


@given(st.none() | st.sampled_from(sorted(CPUS)), st.none() | st.lists(st.sampled_from(sorted(FEATURES)), max_size=4))
def test_processors_and_features_that_llvm_does_not_know(cpu: str | None, words: list[str] | None) -> None:
    """What it knows is compiled for, what it does not know is noted by name, what it cannot compile for is refused."""
    variables = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": None if words is None else ",".join(words)}
    config = SimpleNamespace(CPU_NAME=variables["NUMBA_CPU_NAME"], CPU_FEATURES=variables["NUMBA_CPU_FEATURES"])
    kept = [word for word in words or () if word and FEATURES[word] is not None]
    lost = [
        name
        for name, there in (
            ("NUMBA_CPU_NAME", CPUS[cpu or ""] is None),
            ("NUMBA_CPU_FEATURES", any(FEATURES[w] is None for w in words or ())),
        )
        if there
    ]
    with (
        mock.patch.dict(os.environ, {n: v for n, v in variables.items() if v is not None}),
        mock.patch.object(environment, "_probe", _llvm),
        mock.patch("numba.core.codegen.get_host_cpu_features", return_value="+avx2"),
        mock.patch.object(environment.progress.log, "warning") as note,
    ):
        if CPUS[cpu or ""] is False or "-64bit" in kept:
            with pytest.raises(
                DeviceError, match=r"NUMBA_CPU_(NAME|FEATURES)=.*: LLVM compiles nothing .*; correct or unset it"
            ):
                environment._check_processor(config)
            return
        environment._check_processor(config)
    assert [call.args[1].partition("=")[0] for call in note.call_args_list] == lost
    expected = cpu if cpu and CPUS[cpu] else None
    assert expected == config.CPU_NAME
    assert [word for word in (config.CPU_FEATURES or "").split(",") if word] == kept
    assert (config.CPU_FEATURES is None) == (words is None)


@pytest.mark.parametrize("name", ["DISABLE_JIT", "BOUNDSCHECK"])
def test_a_setting_that_kernels_do_not_survive(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import numba

    environment.import_numba()
    monkeypatch.setenv(f"NUMBA_{name}", "1")
    monkeypatch.setattr(numba.config, name, 1)
    with pytest.raises(DeviceError, match=f"NUMBA_{name}=1: .*; unset it"):
        environment.import_numba()
    monkeypatch.delenv(f"NUMBA_{name}")
    with pytest.raises(
        DeviceError, match=rf"^numba\.config has {name}: .*; take {name.lower()} out of \.numba_config\.yaml in the"
    ):
        environment.import_numba()


def test_settings_of_numbas_file_are_named_as_such(caplog: pytest.LogCaptureFixture) -> None:
    """There is no variable that could be unset."""
    config = SimpleNamespace(CPU_NAME="foo", CPU_FEATURES=None)
    with mock.patch.object(environment, "_probe", return_value=(True, "'foo' is not a recognized processor")):
        environment._check_processor(config)
    assert caplog.messages == ["cpu_name of .numba_config.yaml is ignored: LLVM knows no such processor"]


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
        "OMP_THREAD_LIMIT=1",  # NUMBA_CPU_NAME: test_threads.test_any_cpu_tells_the_story
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


SPACE = {
    "NUMBA_NUM_THREADS": ("", "0", "1", "two"),
    "NUMBA_CPU_NAME": ("", "foo", "generic", "help"),
    "NUMBA_CPU_FEATURES": ("", "+bar", "avx2", "-64bit", ","),
    "NUMBA_OPT": ("", "fast", "2"),
    "NUMBA_DISABLE_JIT": ("", "0", "yes"),
    "NUMBA_BOUNDSCHECK": ("", "0", "1"),
    "NUMBA_ENABLE_CUDASIM": ("", "1", "yes"),
    "NUMBA_THREADING_LAYER": ("", "none_such"),
    "NUMBA_DEVELOPER_MODE": ("", "none_such"),
}
"""Variable → values that people set, wrong ones among them."""
WHATEVER = """
from numballama import Error
from numballama.host import environment
try:
    environment.import_numba()
    import numba
    print(numba.njit("int64(int64)")(lambda x: 2 * x)(21), environment.thread_limit())
except Error as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_combination_of_values_is_used_noted_or_named(seed: int) -> None:
    """A function runs, or one line names a variable that is set; each line on stderr is a note on one that is set."""
    rng = random.Random(seed)
    chosen = {name: rng.choice(values) for name, values in SPACE.items() if rng.random() < 0.5}
    done = subprocess.run(
        [sys.executable, "-c", WHATEVER], capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(PACKAGE.parent), **chosen},
    )  # fmt: skip
    assert done.returncode == 0, (chosen, done.stderr)
    (line,) = done.stdout.splitlines()
    named = re.match(r"the environment has (NUMBA_\w+)=(.*?): ", line)
    assert line.startswith("42 ") if named is None else chosen[named[1]] == named[2] != ""
    for note in done.stderr.splitlines():
        name, value = re.fullmatch(r"(NUMBA_\w+)=(.*) is ignored: (Numba|LLVM) .*", note).groups()[:2]  # type: ignore[union-attr]
        assert chosen[name] == value != ""
