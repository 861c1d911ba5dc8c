"""The CPU: a check that its kernels compile, run and agree with the reference, and facts about it."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ..bench.benchmark import machine
from ..errors import DeviceError, Error
from ..host import environment
from ..host.cgroup import cpu_quota, usable_cores
from ..kernel_cache import cache_directory
from ..progress import Report
from .cache import Cache
from .check import run_check

PROMPT = "Once upon a time"
MOST_DIFFERENCE = 1e-3
"""Largest difference of the story model's logits, which go up to 20, from the reference's. They differ by rounding."""
REPEATS = 3
"""Measurements of the bandwidth."""
PROCESSOR_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
"""With them, kernels may have instructions that this CPU lacks."""


@dataclass(frozen=True)
class CpuReport:
    """The CPU and what its kernels use. Fields that the check finds keep their defaults if it fails."""

    works: bool = False
    problem: str | None = None
    command: str | None = None
    """The command that mends the problem, if there is one."""
    processor: str = ""
    threading_layer: str = "numballama's own worker threads"
    workers: int = 0
    workers_because: str = ""
    vector_floats: int = 0
    """float32 numbers in the widest vector register that kernels use."""
    features: dict[str, bool] = field(default_factory=dict)
    """Instructions that kernels use where the CPU has them."""
    difference: float | None = None
    """Largest difference of the story model's logits from the reference's."""
    bandwidth_bytes_per_second: float | None = None
    """What all workers together read from main memory. None: memory is too short to measure."""
    cache: Cache | None = None


def find_cpu(report: Report) -> CpuReport:
    """Check the CPU, in a process of its own."""
    try:
        found = run_check("cpu", report)
        return CpuReport(**{**found, "cache": Cache(**found["cache"]) if found["cache"] else None})
    except DeviceError as error:
        return CpuReport(problem=str(error), command=mend(str(error)), processor=machine()["cpu"])


def mend(problem: str) -> str | None:
    """The command that mends a problem; None if none is known."""
    if found := re.match(r"the environment has (\w+)", problem):
        return f"unset {found[1]}"
    if problem.startswith("Numba cannot be imported"):
        return "pip install --force-reinstall numba"
    names = [name for name in PROCESSOR_VARIABLES if os.environ.get(name)]
    return f"unset {' '.join(names)}" if names and "signal" in problem else None


def check() -> CpuReport:
    """Compile and run the story model, compare its logits with the reference's, and measure the bandwidth."""
    facts: dict[str, Any] = {"processor": machine()["cpu"]}
    try:
        environment.import_numba()
        facts |= _facts()
        facts["difference"], facts["bandwidth_bytes_per_second"] = _try()
        facts["cache"] = Cache.of(cache_directory())
    except Error as error:
        return CpuReport(problem=str(error), command=mend(str(error)), **facts)
    if facts["difference"] <= MOST_DIFFERENCE:
        return CpuReport(works=True, **facts)
    problem = f"kernels disagree with the reference: logits differ by {facts['difference']:.3g}"
    return CpuReport(problem=problem, command="numballama doctor --clear-cache", **facts)


def _try() -> tuple[float, float | None]:
    """Difference of the story model's logits from the reference's, and the bandwidth in bytes per second."""
    import numpy as np

    from .. import compile
    from ..cpu.bandwidth import measure_bandwidth

    with compile(None, device="cpu", context=64) as model:
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(PROMPT)
        logits = model.logits(ids)
        bandwidth = measure_bandwidth(model.threads, REPEATS)
    with compile(None, device="reference", context=64) as model:
        difference = np.abs(logits - model.logits(ids)).max()
    return float(difference), bandwidth


def _facts() -> dict[str, Any]:
    """Fields of `CpuReport` that need no measurement."""
    from ..cpu.backend import CpuBackend
    from ..cpu.intrinsics import cpu_features

    backend, quota = CpuBackend({}), cpu_quota()
    because = f"this process may use {usable_cores()} of {os.cpu_count()} cores"
    if (limit := environment.thread_limit()) is not None:
        because = f"NUMBA_NUM_THREADS is {limit}"
    elif quota is not None:
        because = f"a quota of {quota:.3g} cores"
    found = cpu_features()
    features = {"FMA": "fma", "F16C": "f16c", "AVX": "avx", "AVX2": "avx2", "AVX-512": "avx512f"}
    if platform.machine() not in ("x86_64", "AMD64"):
        features = {"NEON": "neon", "FP16": "fullfp16", "dot product": "dotprod"}
    used = {name: found.get(word, False) for name, word in features.items()}
    if "AVX" in used:
        vnni = found.get("avx512vnni") and found.get("avx512vl")
        used["VNNI"] = bool(vnni or found.get("avxvnni"))
    return {
        "workers": backend.workers,
        "workers_because": because,
        "vector_floats": 16 if used.get("AVX-512") else 8 if used.get("AVX") else 4,
        "features": used,
    }


if __name__ == "__main__":
    print(json.dumps(asdict(check())))
