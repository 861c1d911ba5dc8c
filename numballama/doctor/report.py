"""All that the doctor finds, as one object: text for people, JSON for programs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__, progress
from ..host.cgroup import cpu_quota, memory_left, usable_cores
from ..memory import available_bytes, format_bytes
from .cpu import CpuReport, find_cpu
from .gpu import GpuReport, find_gpu
from .links import lines as link_lines
from .packages import Packages


@dataclass(frozen=True)
class Container:
    """What this process may use, as the package sees it."""

    cores: int | None
    """Cores of the machine. None if the system does not tell."""
    usable_cores: int
    cpu_quota: float | None
    """Cores that a container may use on average. None without a quota."""
    memory_limit_bytes: int | None
    """Memory that the container's limit leaves to this process. None without a limit."""
    free_bytes: int | None
    """Memory that is free for this process. None if the system does not tell."""

    @classmethod
    def find(cls) -> Container:
        return cls(os.cpu_count(), usable_cores(), cpu_quota(), memory_left(), available_bytes())


@dataclass(frozen=True)
class Report:
    """What `numballama doctor` shows."""

    container: Container
    packages: Packages
    cpu: CpuReport
    gpu: GpuReport

    @classmethod
    def make(cls) -> Report:
        """Check this machine. It takes some seconds, and a progress bar on a terminal shows them."""
        container, packages = Container.find(), Packages.find()
        with progress.progress_bar("checking the CPU") as report:
            cpu = find_cpu(report)
        with progress.progress_bar("checking the GPU") as report:
            gpu = find_gpu(report)
        return cls(container, packages, cpu, gpu)

    @property
    def device(self) -> str:
        """What device="auto" takes."""
        return "cuda" if self.gpu.works else "cpu"

    def to_dict(self) -> dict[str, Any]:
        """All facts as JSON values."""
        return {
            "numballama": __version__,
            "python": platform.python_version(),
            "executable": sys.executable,
            "system": f"{platform.system()} {platform.machine()}",
            "container": asdict(self.container),
            "packages": {package.name: package.version for package in self.packages.needed},
            "extras": {extra.name: extra.to_dict() for extra in self.packages.extras},
            "cpu": asdict(self.cpu),
            "gpu": asdict(self.gpu),
            "auto": self.device,
        }

    def as_text(self) -> str:
        """One fact a line. A line about something missing is followed by the command that mends it."""
        lines = [f"numballama {__version__}, Python {platform.python_version()} ({sys.executable})"]
        for title, facts in (
            ("system", self._system()),
            ("packages", self._packages()),
            ("extras", self._extras()),
            ("CPU", self._cpu()),
            ("GPU", self._gpu()),
            ("device", iter([f'"auto" takes {self.device}'])),
        ):
            for index, fact in enumerate(facts):
                lines.append(f"{'' if index else title:<12} {fact}")
        return "\n".join(lines)

    def _system(self) -> Iterator[str]:
        c = self.container
        yield f"{platform.system()} {platform.machine()}, {c.cores} cores, {c.usable_cores} usable" + (
            f", {format_bytes(c.free_bytes)} of memory free" if c.free_bytes is not None else ""
        )
        quota = "no CPU quota" if c.cpu_quota is None else f"a CPU quota of {c.cpu_quota:.3g} cores"
        limit = "no memory limit"
        if c.memory_limit_bytes is not None:
            limit = f"a memory limit that leaves {format_bytes(c.memory_limit_bytes)}"
        yield f"container: {quota}, {limit}"

    def _packages(self) -> Iterator[str]:
        if not self.packages.needed:
            yield 'numballama is not installed as a package, so its extras are not known: pip install "."'
            return
        yield ", ".join(map(str, self.packages.needed))
        if not all(package.fits for package in self.packages.needed):
            yield "to mend: pip install --upgrade numballama"

    def _extras(self) -> Iterator[str]:
        for extra in self.packages.extras:
            if extra.installed:
                yield f"{extra.name:<10} {', '.join(map(str, extra.packages))}"
            else:
                wrong = ", ".join(str(package) for package in extra.packages if not package.fits)
                yield f"{extra.name:<10} not installed ({wrong}): {extra.command}"

    def _cpu(self) -> Iterator[str]:
        cpu = self.cpu
        if cpu.works:
            yield f"works: the story model's logits differ from the reference's by {cpu.difference:.1e}"
        else:
            yield f"does not work: {cpu.problem}"
            if cpu.command:
                yield f"to mend: {cpu.command}"
        if cpu.workers:
            has = ", ".join(name for name, used in cpu.features.items() if used) or "none"
            lacks = ", ".join(name for name, used in cpu.features.items() if not used)
            yield f"{cpu.processor}: {cpu.workers} workers, because {cpu.workers_because}"
            yield f"threads: {cpu.threading_layer}, not one of Numba's threading layers"
            yield f"instructions: {cpu.vector_floats} float32 at a time; {has}" + (f"; not {lacks}" if lacks else "")
        if cpu.bandwidth_bytes_per_second:
            yield f"memory: {cpu.bandwidth_bytes_per_second / 1e9:.1f} GB/s, read by all workers"
        if cpu.cache:
            yield f"kernels: {cpu.cache}"

    def _gpu(self) -> Iterator[str]:
        gpu = self.gpu
        yield "works" if gpu.works else f"not used: {gpu.problem}"
        if gpu.command:
            yield f"to mend: {gpu.command}"
        for device in gpu.devices:
            yield f"{device.device}: {device.name}, compute capability {device.compute_capability}, " + (
                f"{device.multiprocessors} multiprocessors, {format_bytes(device.free_bytes)} of "
                f"{format_bytes(device.total_bytes)} free"
            )
            if device.bandwidth_bytes_per_second:
                yield f"{device.device}: a copy reads and writes {device.bandwidth_bytes_per_second / 1e9:,.0f} GB/s"
            if device.problem:
                yield f"{device.device}: {device.problem}"
        yield from link_lines(gpu.links, [each.device for each in gpu.devices if each.works], gpu.nccl is not None)
        if gpu.nccl:
            yield f"NCCL: {gpu.nccl}, for cards that do not reach each other's memory"
        elif gpu.nccl_problem:
            yield f"NCCL, for cards that do not reach each other's memory: {gpu.nccl_problem}"
        if gpu.driver or gpu.driver_cuda:
            yield f"driver: {gpu.driver or 'of unknown version'}, for CUDA {gpu.driver_cuda or 'of unknown version'}"
        libraries = ", ".join(f"{name} {version}" for name, version in gpu.libraries.items())
        yield f"libraries: {libraries or 'none'}"
        yield f"kernel: {gpu.kernel}"
        if gpu.cache:
            yield f"kernels: {gpu.cache}"
