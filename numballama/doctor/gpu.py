"""The GPU: driver, libraries, a kernel compiled and run; why it cannot be used, and the command that mends that."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NEXT_STEP, DeviceError
from ..host import environment
from ..kernel_cache import cuda_cache_directory
from ..progress import Report
from .cache import Cache
from .check import run_check
from .links import GpuLink, find_links

if TYPE_CHECKING:
    from ..cuda.driver import Device

LIBRARIES = (
    "numba-cuda", "cuda-bindings", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12", "nvidia-nvvm", "nvidia-cuda-nvcc",
    "nvidia-cuda-nvcc-cu12",
)  # fmt: skip
"""Packages that compile kernels and talk to the driver, in either version of CUDA."""
MAX_DEVICES = 64
CAPABILITY = (8, 0)
"""Compute capability that the kernel is compiled for where there is no GPU."""
CUDA_13_DRIVER = 580
"""The oldest driver for CUDA 13."""
INSTALL_DRIVER = {
    "ubuntu": "sudo ubuntu-drivers install",
    "debian": "sudo apt-get install nvidia-driver",
    "fedora": "sudo dnf install akmod-nvidia",
    "arch": "sudo pacman -S nvidia",
}
"""Name of a Linux distribution in /etc/os-release → the command that installs NVIDIA's driver."""
REINSTALL = 'pip install --force-reinstall "numballama[{extra}]"'
MEND = (
    (r"SYSTEM_DRIVER_MISMATCH|COMPAT_NOT_SUPPORTED", "sudo reboot"),  # the driver was updated, its module still runs
    (r"SYSTEM_NOT_READY", "sudo systemctl restart nvidia-fabricmanager"),
    (r"CUDA_ERROR_UNKNOWN", "sudo modprobe nvidia_uvm"),
    (r"OUT_OF_MEMORY|\bare free\b", "nvidia-smi"),  # lists the processes that hold the memory
    (r"numba.cuda is not numba-cuda|cannot be imported|nvJitLink|nvvm|nvrtc|Failure finding|DynamicLib", REINSTALL),
)
"""Words of a problem → the command that mends it."""


@dataclass(frozen=True)
class Evidence:
    """What the system tells without NVIDIA's libraries."""

    cards: int | None = None
    """NVIDIA GPUs on the PCI bus. None if the system does not tell."""
    module: str | None = None
    """Version of the driver's kernel module, such as "580.95.05"; None: it is not loaded."""
    in_container: bool = False
    distributions: tuple[str, ...] = ()
    """Names in /etc/os-release, the most specific first."""

    @classmethod
    def read(cls, root: Path = Path("/")) -> Evidence:
        """From the files of the system below `root`."""
        module = re.search(r"\s(\d+\.[\d.]+)\s", _text(root / "proc/driver/nvidia/version").partition("\n")[0])
        release = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)"?$', _text(root / "etc/os-release"), re.MULTILINE))
        marks = ("docker", "kubepods", "containerd", "lxc")
        return cls(
            cards=_cards(root),
            module=module[1] if module else None,
            in_container=any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
            or any(mark in _text(root / "proc/1/cgroup") for mark in marks),
            distributions=tuple(f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()),
        )

    @property
    def extra(self) -> str:
        """The extra of numballama for this driver."""
        return "cuda12" if self.module and int(self.module.partition(".")[0]) < CUDA_13_DRIVER else "cuda"

    @property
    def is_hopeless(self) -> bool:
        """Whether there is no NVIDIA GPU at all."""
        return not self.cards and self.module is None and not os.path.exists("/dev/dxg")  # which Windows gives its WSL

    def mend(self, problem: str) -> str | None:
        """The command that mends a problem; None if none is known."""
        if found := re.match(r"the environment has (\w+)", problem):
            return f"unset {found[1]}"
        if "are missing" in problem or "is missing" in problem:
            return f'pip install "numballama[{self.extra}]"'
        if re.search(r"NO_DEVICE|has 0 CUDA", problem) and "CUDA_VISIBLE_DEVICES" in os.environ:
            return "unset CUDA_VISIBLE_DEVICES"
        for words, command in MEND:
            if re.search(words, problem):
                return command.format(extra=self.extra)
        if "no usable NVIDIA driver" in problem or "NO_DEVICE" in problem:
            if self.in_container and self.module:
                return "docker run --gpus all IMAGE"
            return next((INSTALL_DRIVER[name] for name in self.distributions if name in INSTALL_DRIVER), None)
        if "CUDA_ERROR" in problem and self.extra == "cuda12":  # machine code of CUDA 13 for a driver of CUDA 12
            return 'pip install "numballama[cuda12]"'
        return None


@dataclass
class GpuDevice:
    """One GPU, and whether the kernel ran on it."""

    device: str
    name: str
    compute_capability: str
    multiprocessors: int
    free_bytes: int
    total_bytes: int
    works: bool = False
    problem: str | None = None
    bandwidth_bytes_per_second: float | None = None
    """What a copy reads and writes. None: too little memory is free to measure."""


@dataclass
class GpuReport:
    """The GPUs and the software for them. `problem` is why device="cuda" cannot be used."""

    works: bool = False
    problem: str | None = None
    command: str | None = None
    """The command that mends the problem, if there is one."""
    cards: int | None = None
    """NVIDIA GPUs on the PCI bus. None if the system does not tell."""
    driver: str | None = None
    driver_cuda: str | None = None
    """The version of CUDA that the driver supports."""
    libraries: dict[str, str] = field(default_factory=dict)
    kernel: str = "not compiled"
    """How far a kernel came: "not compiled", "compiled for 8.0, not run", "compiled and run"."""
    devices: list[GpuDevice] = field(default_factory=list)
    cache: Cache | None = None
    links: list[GpuLink] = field(default_factory=list)
    """Of each pair of devices. Empty with fewer than two."""
    nccl: str | None = None
    """NCCL's version and where it is; None: it is not there, or there are fewer than two devices."""
    nccl_problem: str | None = None
    """Why it cannot be used, if it was looked for."""


def find_gpu(report: Report) -> GpuReport:
    """Check the GPUs, in a process of its own."""
    try:
        found = run_check("gpu", report)
        devices, cache = [GpuDevice(**device) for device in found["devices"]], found["cache"]
        links = [GpuLink(**link) for link in found["links"]]
        return GpuReport(**{**found, "devices": devices, "cache": Cache(**cache) if cache else None, "links": links})
    except DeviceError as error:
        return GpuReport(problem=str(error), command=Evidence.read().mend(str(error)))


def check() -> GpuReport:
    """Compile a kernel and run it on the GPUs of this machine."""
    evidence = Evidence.read()
    gpu = GpuReport(cards=evidence.cards, driver=evidence.module, libraries=_libraries())
    try:
        environment.refuse_simulator()
        _check(gpu, evidence)
    except Exception as error:  # NVIDIA's packages have errors of their own, for libraries that they do not find
        message = " ".join(str(error).split()) or type(error).__name__
        gpu.problem = message.removesuffix(f"; {NEXT_STEP}").removeprefix("device 'cuda:0': ")
    if gpu.problem is not None:
        gpu.command = evidence.mend(gpu.problem)
        if evidence.is_hopeless and not gpu.devices:
            gpu.problem, gpu.command = _no_gpu(), None
    gpu.works = gpu.problem is None
    return gpu


def _no_gpu() -> str:
    system = platform.system()
    return "this machine has no NVIDIA GPU" if system == "Linux" else f"no NVIDIA GPU was found on this {system}"


def _check(gpu: GpuReport, evidence: Evidence) -> None:
    """Fill in what is found. Raises an exception for what is missing."""
    from ..cuda.compiler import require_compiler

    require_compiler()
    from ..cuda import selfcheck
    from ..cuda.driver import Device, versions

    gpu.libraries["nvJitLink"] = selfcheck.nvjitlink_version()
    gpu.cache = Cache.of(cuda_cache_directory())
    try:
        devices = list(_devices(Device))
    except DeviceError:
        if not evidence.is_hopeless:
            selfcheck.compile_copy(CAPABILITY)
            gpu.kernel = "compiled for {}.{}, not run".format(*CAPABILITY)
        raise
    gpu.driver_cuda = versions()["cuda"]
    gpu.driver = versions()["driver"] or gpu.driver
    gpu.devices = [_describe(device) for device in devices]
    gpu.links = find_links(devices)
    if gpu.links:
        _find_nccl(gpu)
    capability = devices[0].capability  # a process compiles for one
    code = selfcheck.compile_copy(capability)
    gpu.kernel = "compiled for {}.{}, not run".format(*capability)
    for device, entry in zip(devices, gpu.devices, strict=True):
        if device.capability == capability:
            try:
                selfcheck.run_copy(device, code)
                entry.works = True
            except DeviceError as error:
                entry.problem = str(error)
                continue
            entry.bandwidth_bytes_per_second = _bandwidth(entry.device)
    if not gpu.devices[0].works:
        raise DeviceError(gpu.devices[0].problem or "the kernel did not run")
    gpu.kernel = "compiled and run"


def _find_nccl(gpu: GpuReport) -> None:
    from ..cuda import nccl

    try:
        found = nccl.load()
        gpu.nccl = f"{found.version} ({found.place})"
    except DeviceError as error:
        gpu.nccl_problem = str(error)


def _devices(kind: type[Device]) -> Iterator[Device]:
    """The GPUs of this machine, at least one. Raises `DeviceError` if there is none."""
    for index in itertools.islice(itertools.count(), MAX_DEVICES):
        try:
            yield kind(f"cuda:{index}")
        except DeviceError:
            if index == 0:
                raise
            return


def _describe(device: Device) -> GpuDevice:
    capability = "{}.{}".format(*device.capability)
    return GpuDevice(
        f"cuda:{device.index}", device.name, capability, device.n_sms, device.free_bytes, device.total_bytes
    )


def _bandwidth(name: str) -> float | None:
    from ..cuda.backend import CudaBackend

    try:
        backend = CudaBackend({}, name)
        try:
            return backend.measure_bandwidth()
        finally:
            backend.close()
    except DeviceError:  # memory is short
        return None


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cards(root: Path) -> int | None:
    """GPUs of NVIDIA's on the PCI bus: vendor 0x10de, a class of displays or 3D controllers."""
    bus = root / "sys/bus/pci/devices"
    if not bus.is_dir():
        return None
    return sum(
        _text(device / "vendor").strip() == "0x10de" and _text(device / "class").startswith("0x03")
        for device in bus.iterdir()
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    print(json.dumps(asdict(check())))
