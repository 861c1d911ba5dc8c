"""The doctor's report as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from numballama.doctor.cache import Cache
from numballama.doctor.cpu import CpuReport
from numballama.doctor.gpu import GpuDevice, GpuReport
from numballama.doctor.links import GpuLink
from numballama.doctor.packages import Extra, Package, Packages
from numballama.doctor.report import Container, Report

HEALTHY = Report(
    Container(8, 2, 1.5, 1 << 30, 1 << 29),
    Packages(
        (Package("numpy", "2.4.6", ""),),
        (Extra("hub", (Package("huggingface-hub", None, ""),)), Extra("serve", (Package("uvicorn", "0.54", ""),))),
    ),
    CpuReport(
        True, None, None, "EPYC", "own threads", 2, "a quota of 1.5 cores", 8, {"FMA": True, "VNNI": False}, 1e-5, 2e10,
        Cache("/cache/cpu", 3, 4096),
    ),
    GpuReport(
        True, None, None, 1, "580.1", "13.0", {"numba-cuda": "0.30.4"}, "compiled and run",
        [GpuDevice("cuda:0", "NVIDIA H200", "9.0", 132, 1 << 36, 1 << 37, True, None, 4e12)],
        Cache("/cache/cuda", 5, 8192),
    ),
)  # fmt: skip


def test_text_of_a_machine_on_which_all_works() -> None:
    lines = HEALTHY.as_text().splitlines()
    for line in (
        "             container: a CPU quota of 1.5 cores, a memory limit that leaves 1.0 GiB",
        "packages     numpy 2.4.6",
        'extras       hub        not installed (huggingface-hub missing): pip install "numballama[hub]"',
        "             serve      uvicorn 0.54",
        "CPU          works: the story model's logits differ from the reference's by 1.0e-05",
        "             EPYC: 2 workers, because a quota of 1.5 cores",
        "             instructions: 8 float32 at a time; FMA; not VNNI",
        "             memory: 20.0 GB/s, read by all workers",
        "             kernels: /cache/cpu (3 kernels, 4.0 KiB)",
        "GPU          works",
        "             cuda:0: NVIDIA H200, compute capability 9.0, 132 multiprocessors, 64.0 GiB of 128.0 GiB free",
        "             cuda:0: a copy reads and writes 4,000 GB/s",
        "             driver: 580.1, for CUDA 13.0",
        'device       "auto" takes cuda',
    ):
        assert line in lines, "\n".join(lines)
    assert "to mend" not in HEALTHY.as_text() and "links" not in HEALTHY.as_text()


def two_gpus(second_works: bool = True) -> Report:
    first = HEALTHY.gpu.devices[0]
    second = replace(first, device="cuda:1", works=second_works, problem=None if second_works else "no answer")
    link = GpuLink("cuda:0", "cuda:1", "NVLink", True, True, True, 0)
    return replace(HEALTHY, gpu=replace(HEALTHY.gpu, devices=[first, second], links=[link]))


def test_links_of_two_gpus() -> None:
    """In the text after the devices, and in JSON."""
    lines = [line[13:] for line in two_gpus().as_text().splitlines()]
    start = lines.index("links     cuda:0    cuda:1")
    assert lines[start - 1].startswith("cuda:1: a copy") and lines[start + 6].startswith("driver: 580.1")
    assert lines[start + 1] == "cuda:0    -         NVLink 0"
    assert lines[start + 5] == "several cards can share a model: cuda:0, cuda:1"
    found = json.loads(json.dumps(two_gpus().to_dict()))["gpu"]["links"]
    assert found == [
        {
            "device": "cuda:0", "peer": "cuda:1", "kind": "NVLink", "peer_access": True, "access_supported": True,
            "native_atomics": True, "performance_rank": 0, "problem": None,
        }
    ]  # fmt: skip


def test_nccl_of_several_gpus() -> None:
    """Its version, or why it is of no use; nothing of it with one GPU."""
    assert "NCCL" not in HEALTHY.as_text() + two_gpus().as_text()
    report = two_gpus()
    apart = replace(report.gpu.links[0], kind="none", peer_access=False)
    found = replace(report.gpu, links=[apart], nccl="2.32.3 (/site/libnccl.so.2)")
    lines = [line[13:] for line in replace(report, gpu=found).as_text().splitlines()]
    assert "NCCL: 2.32.3 (/site/libnccl.so.2), for cards that do not reach each other's memory" in lines
    assert "no card reaches another's memory: several can share a model through NCCL, which is slower" in lines
    missing = replace(found, nccl=None, nccl_problem="NCCL was not found; pip install it")
    lines = [line[13:] for line in replace(report, gpu=missing).as_text().splitlines()]
    assert "no card reaches another's memory: only replicas of a model, one on each card" in lines
    assert "NCCL, for cards that do not reach each other's memory: NCCL was not found; pip install it" in lines


def test_a_gpu_that_does_not_work_shares_nothing() -> None:
    assert "fewer than two of these cards ran the kernel: no cards can share a model" in two_gpus(False).as_text()


def test_text_of_a_machine_on_which_nothing_works() -> None:
    broken = replace(
        HEALTHY,
        packages=Packages((), ()),
        cpu=CpuReport(problem="Numba is broken", command="pip install numba"),
        gpu=GpuReport(problem="no driver", command="sudo reboot"),
    )
    lines = broken.as_text().splitlines()
    assert "CPU          does not work: Numba is broken" in lines and "             to mend: pip install numba" in lines
    assert "GPU          not used: no driver" in lines and "             to mend: sudo reboot" in lines
    assert 'device       "auto" takes cpu' in lines and any("not installed as a package" in line for line in lines)


def test_json_has_the_same_facts() -> None:
    found = json.loads(json.dumps(HEALTHY.to_dict()))
    assert found["gpu"]["links"] == []
    assert found["auto"] == "cuda" and found["cpu"]["works"] and found["gpu"]["devices"][0]["name"] == "NVIDIA H200"
    assert found["container"]["cpu_quota"] == 1.5 and found["cpu"]["cache"]["kernels"] == 3
    assert found["extras"]["hub"]["command"] == 'pip install "numballama[hub]"'
    assert found["packages"] == {"numpy": "2.4.6"}
