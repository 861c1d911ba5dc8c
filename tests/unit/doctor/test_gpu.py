"""The check of the GPU, on machines that are made up of files, and of devices that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from numballama import DeviceError
from numballama.doctor import gpu
from numballama.doctor.gpu import Evidence, GpuDevice, GpuReport
from numballama.doctor.links import GpuLink
from numballama.errors import NEXT_STEP
from tests.helpers.cuda_host import missing_gpu, missing_packages
from tests.helpers.fake_nccl import FakeNccl


def machine(root: Path, files: dict[str, str]) -> Evidence:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return Evidence.read(root)


MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (host)\nGCC version: 12\n"
CARD = {
    "sys/bus/pci/devices/0000:00:00.0/vendor": "0x8086\n",
    "sys/bus/pci/devices/0000:00:00.0/class": "0x030000\n",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
}


def test_cards_module_and_distribution(tmp_path: Path) -> None:
    files = {
        **CARD,
        "proc/driver/nvidia/version": MODULE.format("580.95.05"),
        "etc/os-release": 'NAME="Linux Mint"\nID=linuxmint\nID_LIKE="ubuntu debian"\n',
    }
    assert machine(tmp_path, files) == Evidence(1, "580.95.05", False, ("linuxmint", "ubuntu", "debian"))


def test_a_machine_without_files(tmp_path: Path) -> None:
    found = machine(tmp_path, {})
    assert found == Evidence() and found.is_hopeless


NO_LIBRARY = 'no usable NVIDIA driver was found ("cuda" is an NVIDIA driver library and can only be found …)'
NO_DEVICE = "no usable NVIDIA driver was found (CUDA: CUDA_ERROR_NO_DEVICE no CUDA-capable device is detected)"


@pytest.mark.parametrize(
    ("evidence", "problem", "command"),
    [
        (Evidence(1, "580.1"), "NVIDIA's Python packages are missing (…)", 'pip install "numballama[cuda]"'),
        (Evidence(1, "570.86"), "numba-cuda is missing: …", 'pip install "numballama[cuda12]"'),
        (Evidence(1, "580.1"), "the environment has NUMBA_ENABLE_CUDASIM=1: …", "unset NUMBA_ENABLE_CUDASIM"),
        (Evidence(1, None, False, ("linuxmint", "ubuntu")), NO_LIBRARY, "sudo ubuntu-drivers install"),
        (Evidence(1, None, False, ("debian",)), NO_LIBRARY, "sudo apt-get install nvidia-driver"),
        (Evidence(1, None, False, ("other",)), NO_LIBRARY, None),
        (Evidence(1, "580.1", True, ("debian",)), NO_LIBRARY, "docker run --gpus all IMAGE"),
        (Evidence(1, "580.1"), NO_DEVICE, "unset CUDA_VISIBLE_DEVICES"),
        (Evidence(1, "580.1"), "CUDA: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH …", "sudo reboot"),
        (Evidence(1, "570.86"), "nvJitLink refuses a kernel: …", 'pip install --force-reinstall "numballama[cuda12]"'),
        (Evidence(1, "570.86"), "CUDA: CUDA_ERROR_INVALID_IMAGE …", 'pip install "numballama[cuda12]"'),
        (Evidence(1, "580.1"), "CUDA: CUDA_ERROR_INVALID_IMAGE …", None),
        (Evidence(1, "580.1"), "cuda:0: two arrays take 2 MiB, 0 B are free", "nvidia-smi"),
        (Evidence(1, "580.1"), "GTX 1080 has compute capability 6.1, at least 7.5 is needed", None),
    ],
)
def test_the_command_that_mends(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence, problem: str, command: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert evidence.mend(problem) == command


def test_the_simulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    monkeypatch.setattr(gpu.Evidence, "read", lambda: Evidence(cards=1))
    found = gpu.check()
    assert not found.works and found.command == "unset NUMBA_ENABLE_CUDASIM"
    assert found.problem is not None and NEXT_STEP not in found.problem


def test_no_card_is_no_problem_of_software(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    monkeypatch.setattr(gpu.Evidence, "read", lambda: Evidence(cards=0))
    monkeypatch.setattr(gpu.Evidence, "is_hopeless", True)
    found = gpu.check()
    assert not found.works and found.command is None and "no NVIDIA GPU" in str(found.problem)


def device(index: int, capability: tuple[int, int] = (9, 0)) -> SimpleNamespace:
    return SimpleNamespace(
        index=index, name="NVIDIA H200", capability=capability, n_sms=132, free_bytes=1 << 30, total_bytes=1 << 37,
        can_access=lambda peer: True, link_attribute=lambda peer, name: int(name != "PERFORMANCE_RANK"),
    )  # fmt: skip


needs_packages = pytest.mark.skipif(bool(missing_packages()), reason=missing_packages())


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two GPUs; returns what is done on them."""
    from numballama.cuda import driver, selfcheck

    done: list[str] = []

    def make(name: str) -> SimpleNamespace:
        index = int(name.partition(":")[2])
        if index >= 2:
            raise DeviceError("this machine has 2 CUDA devices")
        return device(index)

    monkeypatch.setattr(gpu.Evidence, "read", lambda: Evidence(2, "580.1"))
    monkeypatch.setattr(driver, "Device", make)
    monkeypatch.setattr(driver, "versions", lambda: {"driver": None, "cuda": "13.0"})
    monkeypatch.setattr(selfcheck, "compile_copy", lambda capability: done.append(f"compile {capability}"))
    monkeypatch.setattr(selfcheck, "run_copy", lambda device, code: done.append(f"run {device.index}"))
    monkeypatch.setattr(gpu, "_bandwidth", lambda name: 4e12)
    return done


@needs_packages
def test_gpus_that_work(two_gpus: list[str]) -> None:
    found = gpu.check()
    assert found.works and found.problem is None and found.kernel == "compiled and run"
    assert two_gpus == ["compile (9, 0)", "run 0", "run 1"]
    assert (found.driver, found.driver_cuda, found.cards) == ("580.1", "13.0", 2)
    assert [each.device for each in found.devices] == ["cuda:0", "cuda:1"]
    assert found.devices[0].bandwidth_bytes_per_second == 4e12
    assert "nvJitLink" in found.libraries and found.cache is not None
    assert found.links == [GpuLink("cuda:0", "cuda:1", "NVLink", True, True, True, 0)]


@needs_packages
def test_a_link_that_cannot_be_asked_harms_nothing_else(two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from numballama.cuda import driver

    make = driver.Device

    def ask(*question: object) -> int:
        raise DeviceError("CUDA: CUDA_ERROR_UNKNOWN unknown error")

    def broken(name: str) -> SimpleNamespace:
        return SimpleNamespace(**{**vars(make(name)), "can_access": ask, "link_attribute": ask})

    monkeypatch.setattr(driver, "Device", broken)
    found = gpu.check()
    assert found.works and found.problem is None and found.command is None
    assert two_gpus == ["compile (9, 0)", "run 0", "run 1"] and all(each.works for each in found.devices)
    (link,) = found.links
    assert link.kind == "unknown" and str(link.problem).endswith(": CUDA: CUDA_ERROR_UNKNOWN unknown error")


@needs_packages
def test_one_gpu_has_no_links(two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_DEVICES", 1)
    found = gpu.check()
    assert found.works and len(found.devices) == 1 and found.links == []


@needs_packages
def test_a_kernel_that_fails(two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from numballama.cuda import selfcheck

    def fail(device: object, code: object) -> None:
        raise DeviceError("CUDA: CUDA_ERROR_UNKNOWN unknown error")

    monkeypatch.setattr(selfcheck, "run_copy", fail)
    found = gpu.check()
    assert not found.works and found.kernel == "compiled for 9.0, not run"
    assert found.problem == "CUDA: CUDA_ERROR_UNKNOWN unknown error" and found.command == "sudo modprobe nvidia_uvm"
    assert [link.kind for link in found.links] == ["NVLink"]
    assert not any(each.works for each in found.devices)


def test_the_answer_of_the_check_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import asdict

    from numballama.doctor.cache import Cache

    whole = GpuReport(
        True, devices=[GpuDevice("cuda:0", "H200", "9.0", 132, 1, 2, True)], cache=Cache("/cache", 3, 4),
        links=[GpuLink("cuda:0", "cuda:1", "PCIe", True, True, False, 1)],
    )  # fmt: skip
    monkeypatch.setattr(gpu, "run_check", lambda *arguments: json.loads(json.dumps(asdict(whole))))
    assert gpu.find_gpu(lambda *report: None) == whole


def test_nccl_or_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from numballama.cuda import nccl

    found = GpuReport()
    monkeypatch.setattr(nccl, "load", lambda: nccl.Library(FakeNccl(), "/site/libnccl.so.2"))
    gpu._find_nccl(found)
    assert (found.nccl, found.nccl_problem) == ("2.28.5 (/site/libnccl.so.2)", None)
    missing = GpuReport()
    monkeypatch.setattr(nccl, "load", Mock(side_effect=DeviceError("NCCL was not found")))
    gpu._find_nccl(missing)
    assert (missing.nccl, missing.nccl_problem) == (None, "NCCL was not found")


@pytest.mark.skipif(bool(missing_gpu()), reason="needs a GPU")
@pytest.mark.gpu
def test_this_gpu_works() -> None:
    found = gpu.find_gpu(lambda *report: None)
    assert found.works and found.kernel == "compiled and run" and found.devices[0].works
    assert found.devices[0].bandwidth_bytes_per_second
    count = len(found.devices)
    assert len(found.links) == count * (count - 1) // 2
    assert all(link.problem is None and link.kind != "unknown" for link in found.links)
