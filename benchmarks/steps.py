"""Show where a step of many sequences spends its time on an NVIDIA GPU: kernel by kernel, from a trace of CUPTI.

python benchmarks/steps.py [--models TinyLlama-1.1B:bf16 …] [--sequences 8 64] [--prompt 128] [--out FILE.json]

Models have real shapes and random weights (see gpu.py). Each sequence has a prompt of random tokens and generates
greedily. First `STEPS` steps are timed without a trace, then as many are traced through torch.profiler. Kernels of a
run overlap, so two times are given for each: its own, and how much later than all before it it ended, which adds up to
the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gpu import compiled, random_checkpoint

from numballama.bench.benchmark import machine
from numballama.cuda.backend import CudaBackend
from numballama.files import atomic_write
from numballama.model import Model
from numballama.sampling import SamplingParams

WARM, STEPS, MOST = 12, 16, 1000
LAST = "advance_kernel"
"""The kernel that ends each run."""


def kernel_events(model: Model, action: Any) -> list[tuple[str, float, float]]:
    """(name, begin, end) in µs of all kernels that run during `action`, in order of their ends."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        action()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    assert isinstance(model.backend, CudaBackend)
    names = sorted({key.name for key in model.backend._loaded}, key=len, reverse=True)
    found = []
    for event in events:
        if event.get("cat") == "kernel":  # by a name that is mangled or not
            name = next((known for known in names if known in event["name"]), event["name"])
            found.append((name, event["ts"], event["ts"] + event["dur"]))
    return sorted(found, key=lambda event: event[2])


def whole_steps(events: list[tuple[str, float, float]]) -> list[list[tuple[str, float, float]]]:
    """The events of each whole step."""
    ends = [index for index, event in enumerate(events) if event[0] == LAST]
    return [events[a + 1 : b + 1] for a, b in pairwise(ends)]


def summary(steps: list[list[tuple[str, float, float]]]) -> dict[str, Any]:
    """Medians over the steps: duration in µs, and for each kernel (launches, own time, time that it ended later)."""
    table: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    spans, idle = [], []
    for before, step in pairwise(steps):
        end = start = before[-1][2]
        counts: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        waited = 0.0
        for name, begin, finish in step:
            own = counts[name]
            own[0] += 1
            own[1] += finish - begin
            own[2] += finish - end
            waited += max(0.0, begin - end)
            end = finish
        spans.append(end - start)
        idle.append(waited)
        for name, (count, own_time, later) in counts.items():
            table[name].append((int(count), own_time, later))
    kernels = {
        name: {
            "launches": rows[0][0], "own_us": statistics.median(row[1] for row in rows),
            "later_us": statistics.median(row[2] for row in rows),
        }
        for name, rows in table.items()
    }  # fmt: skip
    return {"step_us": statistics.median(spans), "idle_us": statistics.median(idle), "kernels": kernels}


def profile(model: Model, sequences: int, prompt: int) -> dict[str, Any]:
    """Time and trace steps of `sequences` sequences."""
    rng, vocab = np.random.default_rng(0), model.config.vocab_size
    params = SamplingParams(temperature=0, max_tokens=MOST)
    requests = [
        model.token_engine.submit(rng.integers(0, vocab, prompt).tolist(), params, reuse_prefix=False)
        for _ in range(sequences)
    ]
    iterators = [iter(request) for request in requests]

    def step(count: int) -> None:
        for _ in range(count):
            for iterator in iterators:
                next(iterator)

    step(WARM)
    begin = time.perf_counter()
    step(STEPS)
    seconds = (time.perf_counter() - begin) / STEPS
    events = kernel_events(model, lambda: step(STEPS))
    for request in requests:
        request.cancel()
    for iterator in iterators:
        for _ in iterator:
            pass
    return {"untraced_step_us": 1e6 * seconds, **summary(whole_steps(events))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["TinyLlama-1.1B:bf16"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"what": "steps by kernel, random weights", "machine": machine(), "models": {}}
    for name in args.models:
        result = found["models"][name] = {}
        context = args.prompt + MOST
        checkpoint = random_checkpoint(*name.split(":"))
        with compiled(checkpoint, "cuda", context, max_sequences=max(args.sequences)) as model:
            for sequences in args.sequences:
                result[str(sequences)] = traced = profile(model, sequences, args.prompt)
                print(f"{name}, {sequences} sequences: {traced['untraced_step_us']:.0f} us a step, traced "
                      f"{traced['step_us']:.0f}, of which idle {traced['idle_us']:.0f}")  # fmt: skip
                rows = sorted(traced["kernels"].items(), key=lambda row: -row[1]["later_us"])
                for kernel, row in rows:
                    print(f"  {kernel:32} {row['launches']:4} {row['own_us']:8.0f} {row['later_us']:8.0f}", flush=True)
        if args.out:
            with atomic_write(args.out) as file:
                file.write(json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
