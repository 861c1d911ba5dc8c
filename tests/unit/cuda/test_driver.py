"""Devices on machines that cannot run CUDA: errors say what is missing and what to do; nothing is chosen silently."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

import numballama
from numballama import DeviceError, kernel_cache
from numballama.backend import LOADED_DRIVER
from numballama.errors import NEXT_STEP
from tests.helpers.cuda_host import missing_gpu, missing_packages
from tests.helpers.random_models import save

ROOT = Path(numballama.__file__).parent.parent


WITHOUT_PACKAGES = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cuda", "numba_cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
"""
"""NVIDIA's packages cannot be imported, even where they are installed."""
WITHOUT_DEVICES = "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '-1'\n"
"""The driver, where there is one, shows no device."""

REPORT = """
import numballama
try:
    numballama.compile(None, device=sys.argv[1] if len(sys.argv) > 1 else "cuda")
except numballama.DeviceError as error:
    print("DeviceError:", error)
"""


def python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + script, *arguments],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_without_the_packages(device: str) -> None:
    """The message names what could not be imported and the command that installs it."""
    said = python(WITHOUT_PACKAGES + REPORT, device)
    assert said.startswith(f"DeviceError: device {device!r}: ")
    assert "NVIDIA's Python packages" in said and "No module named 'cuda" in said
    assert f"pip install 'numballama[cuda]'; {NEXT_STEP}" in said


needs_packages = pytest.mark.skipif(
    bool(missing_packages()), reason=f"the packages are what is missing: {missing_packages()}"
)


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_a_driver_or_a_device(device: str) -> None:
    said = python(WITHOUT_DEVICES + REPORT, device)
    assert said.startswith(f"DeviceError: device {device!r}: ")
    assert "no usable NVIDIA driver was found" in said or "this machine has 0 CUDA devices" in said
    assert said.endswith(f"; {NEXT_STEP}\n")


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [WITHOUT_PACKAGES, WITHOUT_DEVICES], ids=["no packages", "no device"])
def test_auto_takes_the_cpu_and_says_why(hidden: str) -> None:
    said = python(
        hidden + "import numballama\n"
        "with numballama.compile(None, device='auto', context=16) as model:\n"
        "    print(model.device)\n"
        "    print(*(note for note in model.notes if note.startswith('device')))\n"
        "    print(model.generate('Once upon a time', max_tokens=3, temperature=0))\n"
    )
    device, note, text = said.splitlines()[:3]
    assert device == "cpu"
    assert note.startswith("device cpu, chosen because ")
    if not any(map(os.path.exists, LOADED_DRIVER)):
        assert note == "device cpu, chosen because no NVIDIA driver is loaded"
    else:
        assert ("NVIDIA's Python packages" if hidden is WITHOUT_PACKAGES else "device") in note
    assert text


@pytest.mark.skipif(not missing_gpu(), reason="this machine has a GPU")
def test_on_this_very_machine(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "llama2c-v0")
    with pytest.raises(DeviceError, match="cuda"):
        numballama.compile(path, device="cuda")
    with numballama.compile(path, device="auto") as model:
        assert model.device == "cpu"
        assert any(note.startswith("device cpu, chosen because ") for note in model.notes)


@pytest.mark.slow
def test_a_device_is_looked_for_before_the_file_is_opened() -> None:
    """A wrong device is not blamed on the file."""
    said = python(WITHOUT_PACKAGES + REPORT.replace("compile(None", "compile('no such file'"))
    assert said.startswith("DeviceError: device 'cuda'")


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's package alone is not enough."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kernel_cache, "version", version)
    kernel_cache.cuda_cache_directory.cache_clear()
    with pytest.raises(
        DeviceError, match=r"numba-cuda is missing: pip install 'numballama\[cuda\]'; run `numballama doctor`"
    ):
        kernel_cache.cuda_cache_directory()


@pytest.mark.slow
@needs_packages
def test_auto_takes_the_cpu_without_the_compiler() -> None:
    """Although there is a GPU: other packages may install the driver's bindings."""
    said = python(
        "from importlib.metadata import PackageNotFoundError\n"
        "from numballama import DeviceError, backend, kernel_cache\n"
        "from numballama.cuda import driver\n"
        "def version(name):\n    raise PackageNotFoundError(name)\n"
        "kernel_cache.version, driver.Device = version, lambda name='cuda': 'a GPU'\n"
        "backend.LOADED_DRIVER = ('/',)\n"
        "print(*backend.choose_device('auto'))\n"
        "try:\n    backend.choose_device('cuda')\n"
        "except DeviceError as error:\n    print('DeviceError:', error)\n"
    )
    auto, explicit = said.splitlines()
    assert auto.startswith("cpu numba-cuda is missing: pip install") and explicit.startswith("DeviceError: numba-cuda")


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cuda:-1"])
def test_a_name_is_looked_at_before_the_driver(device: str) -> None:
    assert python(REPORT, device).strip() == f"DeviceError: device {device!r} is not 'cuda' or 'cuda:N'"


@pytest.mark.slow
def test_the_rest_works_without_the_packages() -> None:
    """Importing, inspecting and the CPU need none of NVIDIA's packages; the doctor says that they are missing."""
    said = python(
        WITHOUT_PACKAGES + "import numballama\n"
        "print(numballama.inspect(None))\n"
        "from numballama.doctor import gpu\n"
        "print(gpu.check())\n"
        "gpu.Evidence.read = lambda: gpu.Evidence(cards=1)\n"
        "print(gpu.check().command)\n"
        "print(sorted(name for name in sys.modules if name.startswith(('cuda', 'numba_cuda'))))\n"
    )
    assert 'pip install "numballama[cuda]"' in said.splitlines()[-2]
    assert said.splitlines()[-1] == "[]"


@needs_packages
def test_questions_about_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked with the devices' handles, in this order, and an error of the driver is raised."""
    from cuda.bindings import driver as bindings

    from numballama.cuda import driver

    asked: list[tuple[object, ...]] = []

    def answer(*question: object) -> tuple[int, int]:
        asked.append(question)
        return (0 if question[-1] != 7 else 1), 1

    devices = []
    for handle in (5, 6, 7):
        device = object.__new__(driver.Device)
        device._handle = handle
        devices.append(device)
    first, second, broken = devices
    monkeypatch.setattr(driver.driver, "cuDeviceCanAccessPeer", answer)
    monkeypatch.setattr(driver.driver, "cuDeviceGetP2PAttribute", answer)
    monkeypatch.setattr(driver.driver, "cuGetErrorName", lambda code: (0, b"CUDA_ERROR_INVALID_DEVICE"))
    monkeypatch.setattr(driver.driver, "cuGetErrorString", lambda code: (0, b"invalid device ordinal"))
    assert first.can_access(second) is True and second.link_attribute(first, "PERFORMANCE_RANK") == 1
    rank = bindings.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK
    assert asked == [(5, 6), (rank, 6, 5)]
    with pytest.raises(DeviceError, match="CUDA: CUDA_ERROR_INVALID_DEVICE invalid device ordinal"):
        first.can_access(broken)
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_DEVICE"):
        first.link_attribute(broken, "NATIVE_ATOMIC_SUPPORTED")
    for name in ("ACCESS_SUPPORTED", "NATIVE_ATOMIC_SUPPORTED"):  # these exist, too
        assert first.link_attribute(second, name) == 1


@needs_packages
def test_pairs_without_access(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, and no card is asked about itself: ranks may share one in tests."""
    from numballama.cuda import driver

    asked: list[tuple[int, int]] = []

    def answer(device: int, peer: int) -> tuple[int, int]:
        asked.append((device, peer))
        return 0, (device, peer) not in ((2, 1), (0, 2))

    monkeypatch.setattr(driver.driver, "cuInit", lambda flags: (0,))
    monkeypatch.setattr(driver.driver, "cuDeviceGet", lambda index: (0, index))
    monkeypatch.setattr(driver.driver, "cuDeviceCanAccessPeer", answer)
    found = driver.pairs_without_access(["cuda:0", "cuda:1", "cuda:2"])
    assert found == [("cuda:0", "cuda:2"), ("cuda:1", "cuda:2")]
    assert driver.pairs_without_access(["cuda", "cuda:1"]) == [] and (1, 0) in asked
    asked.clear()
    assert driver.pairs_without_access(["cuda:0", "cuda:0"]) == [] == asked


def prepared(name: str, cluster: int = 0, capability: tuple[int, int] = (9, 0)) -> Any:
    """A launch with the driver's structures; no kernel is loaded."""
    from numballama.cuda import driver
    from numballama.cuda.launch import Launch
    from numballama.registry import KernelRef

    stream = driver.driver.CUstream(0)
    device: Any = SimpleNamespace(capability=capability, stream=stream)
    kernel: Any = SimpleNamespace(shared_limit=1 << 10, handle=driver.driver.CUfunction(0))
    return driver.PreparedLaunch(device, kernel, Launch(KernelRef("module", name), (3,), 32, {}, cluster=cluster))


def collective() -> Any:
    from numballama.cuda.launch import Array, Collective
    from numballama.cuda.nccl import PreparedCollective

    x, device, link = Array(64, (1, 1), "f32"), SimpleNamespace(stream=0), Mock()
    return PreparedCollective(cast("Any", device), link, Collective("all_reduce", x, x, x, 1), 1)


@needs_packages
def test_what_follows_a_collective_begins_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other launches of sm_90 may begin early. Attributes of clusters stay."""
    from numballama.cuda import driver

    ids = driver.driver.CUlaunchAttributeID
    early = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    seen: list[list[Any]] = []

    def launch(config: Any, *others: Any) -> tuple[int]:
        seen.append([each.id for each in config.attrs][: config.numAttrs])
        return (0,)

    monkeypatch.setattr(driver.driver, "cuLaunchKernelEx", launch)
    monkeypatch.setattr(driver.driver, "cuOccupancyMaxActiveClusters", lambda *given: (0, 8))
    one, clusters, exchange = prepared("one"), prepared("clusters", 2), collective()
    driver.enqueue([one, clusters, exchange, clusters, one, exchange, exchange, one, clusters])
    dimension = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    both = [dimension, early]
    assert seen == [[early], both, [dimension], [early], [], both]
    assert exchange.communicator.all_reduce.call_count == 3
    older, count = prepared("older", capability=(8, 0)), len(seen)
    driver.enqueue([exchange, older, older])
    assert seen[count:] == [[], []]


@needs_packages
def test_a_capture_that_fails_leaves_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits until all graphs with its calls are gone."""
    from numballama.cuda import driver

    done: list[str] = []
    for name, answer in {
        "cuStreamBeginCapture": (0,), "cuStreamEndCapture": (0, "graph"), "cuGraphDestroy": (0,),
    }.items():  # fmt: skip
        monkeypatch.setattr(driver.driver, name, lambda *given, n=name, a=answer: done.append(n) or a)
    device: Any = SimpleNamespace(stream=0, make_current=lambda: None)

    def fail() -> None:
        raise DeviceError("NCCL: the exchanges between ranks have been ended")

    with pytest.raises(DeviceError, match="have been ended"):
        driver.CudaGraph(device, [fail])
    assert done == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"] and gc.isenabled()
