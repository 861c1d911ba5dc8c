"""How fast a model runs here, and which part of what this machine's memory could do that is."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numba import prange

from .. import __version__, progress
from ..cpu.compiler import jit
from ..cpu.executor import parallel_region
from ..cpu.matmul import partition
from ..errors import ContextError
from ..memory import available_bytes, format_bytes, peak_bytes
from ..model import Model
from ..sampling import SamplerState, SamplingParams
from ..validation import whole_number
from .profiler import step_bytes_of_token

READ_BYTES = 1 << 30
"""Memory that the bandwidth is measured on: more than any cache holds."""


@jit(parallel=True)
def read_all(x, parts, sums):
    """Sum x in `parts` shares at once: every byte is loaded once, and nothing else happens."""
    for part in prange(parts):
        begin, end = partition(x.shape[0], part, parts, 1024)
        total = np.float32(0)
        for i in range(begin, end):
            total += x[i]
        sums[part] = total


def measure_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes a second that `threads` workers read from main memory together: the median of several passes."""
    nbytes = min(READ_BYTES, (available_bytes() or READ_BYTES) // 4)
    x = np.ones(nbytes // 4, np.float32)  # not zeros: those pages would all be one, and in the cache
    sums = np.zeros(threads, np.float32)
    with parallel_region(threads):
        times = _times(lambda: read_all(x, threads, sums), repeats)
    return nbytes / statistics.median(times)


def _times(action: Callable[[], object], repeats: int) -> list[float]:
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


def bytes_per_token(model: Model, position: float) -> int:
    """Bytes a decoded token must read: weights (of an untied embedding one row) and the cache so far."""
    if model.device.startswith("cuda"):  # weights lie there as kernels want them
        return step_bytes_of_token(model, int(position))
    total = 0.0
    weights = model.weights
    for name, weight in weights.items():
        rows = weight.shape[0] if name == "tok_embeddings" and not model.config.tied_embeddings else 1
        total += weight.nbytes / rows
    return int(total + model.kv.nbytes * min(1.0, position / model.kv.context))


def bench(model: Model, prompt_tokens: int = 128, tokens: int = 64, repeats: int = 5) -> dict[str, Any]:
    """Medians of `repeats` runs: a prompt of random tokens, then greedy decoding.

    Raises `ContextError` if prompt and answer do not fit the context. The keys ending in `_per_second`, `_s` and
    `_bytes` say their units; `bandwidth_fraction` is the share of the measured memory bandwidth that decoding uses
    (above 1 where the weights fit a cache), None on the reference. On a GPU `threads` are its multiprocessors, the
    bandwidth is what a copy reads and writes, and `device_memory_bytes` is what the model takes there.
    """
    prompt_tokens = whole_number("prompt_tokens", prompt_tokens, 1)
    tokens, repeats = whole_number("tokens", tokens, 1), whole_number("repeats", repeats, 1)
    if prompt_tokens + tokens > model.context:
        raise ContextError(
            f"{prompt_tokens} prompt tokens and {tokens} more need a context of {prompt_tokens + tokens}, "
            f"it has {model.context}; pass a larger --context, or fewer --prompt-tokens and --tokens"
        )
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.config.vocab_size, prompt_tokens).tolist()
    sampler = SamplerState(SamplingParams(temperature=0), model.config.vocab_size)
    prefill_times: list[float] = []
    decode_times: list[float] = []
    with model.exclusive(), progress.progress_bar("benchmark") as report, model.reset_session() as session:
        for index in range(repeats + 1):
            report("", index, repeats + 1)
            session.truncate()
            start = time.perf_counter()
            token = session.prefill(prompt, sampler)
            first = time.perf_counter()
            for _ in range(tokens):
                token = session.step(token or 0, sampler)
            prefill_times.append(first - start)
            decode_times.append(time.perf_counter() - first)
    prefill, decode = statistics.median(prefill_times[1:]), statistics.median(decode_times[1:])
    peak = peak_bytes()
    needed = bytes_per_token(model, prompt_tokens + tokens / 2)
    rate = needed * tokens / decode
    bandwidth, memory, gpu = _of_device(model)
    return {
        "model": model.path.name,
        "device": model.device,
        "threads": model.threads,
        "types": sorted({str(weight.type) for weight in model.weights.values()}),
        "activations": model.activations,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "repeats": repeats,
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "decode_tokens_per_second": tokens / decode,
        "time_to_first_token_s": prefill,
        "load_s": model.load_s,
        "peak_memory_bytes": peak,
        "device_memory_bytes": memory,
        "bytes_per_token": needed,
        "bytes_per_second": rate,
        "memory_bandwidth_bytes_per_second": bandwidth,
        "bandwidth_fraction": rate / bandwidth if bandwidth else None,
        "machine": machine() | gpu,
    }


def _of_device(model: Model) -> tuple[float | None, int | None, dict[str, Any]]:
    """The memory's bandwidth, what the model takes of a GPU's memory, and what to say of the GPU in "machine"."""
    if model.device.startswith("cuda"):
        from . import bandwidth as bench_cuda

        backend = model._backend
        return bench_cuda.measure_bandwidth(backend), backend.memory_bytes, {"gpu": bench_cuda.describe(backend.device)}
    return measure_bandwidth(model.threads) if model.device == "cpu" else None, None, {}


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        "python": platform.python_version(),
        "numballama": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_text(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    fraction = result["bandwidth_fraction"]
    gpu = result["machine"].get("gpu")
    where = f"{result['device']}, {result['threads']} threads"
    if gpu:
        where = f"{result['device']} ({gpu['name']}), {gpu['multiprocessors']} multiprocessors"
    lines = [
        f"{result['model']} on {where}, {', '.join(result['types'])}",
        f"  prompt   {result['prefill_tokens_per_second']:10,.1f} tokens/s   ({result['prompt_tokens']} tokens)",
        f"  decode   {result['decode_tokens_per_second']:10,.1f} tokens/s   ({result['tokens']} tokens, "
        f"median of {result['repeats']})",
        f"  first token after {result['time_to_first_token_s'] * 1000:.1f} ms; loaded in {result['load_s']:.2f} s",
        f"  reads    {result['bytes_per_second'] / 1e9:10,.1f} GB/s",
    ]
    if fraction:
        bandwidth = result["memory_bandwidth_bytes_per_second"] / 1e9
        lines[-1] += f"       ({fraction:.0%} of the {bandwidth:.1f} GB/s that memory gives)"
    if result["peak_memory_bytes"]:
        lines.append(f"  peak memory {format_bytes(result['peak_memory_bytes'])}")
    if result["device_memory_bytes"]:
        lines.append(f"  device memory {format_bytes(result['device_memory_bytes'])}")
    return "\n".join(lines)
