"""Measure the speed of a model on this machine, and the share of the memory bandwidth that it uses."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__, progress
from ..errors import ContextError
from ..memory import format_bytes, peak_bytes
from ..sampling import SamplingParams
from ..validation import whole_number
from .traffic import bytes_per_token

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True)
class BenchResult:
    """Result of `bench`. Speeds and times are medians.

    On a GPU, `threads` is the number of multiprocessors, the memory bandwidth counts the bytes that a copy reads and
    writes, and `device_memory_bytes` is the device memory that the model takes (None on the CPU).
    """

    model: str
    device: str
    threads: int
    types: list[str]
    """Element types of the weights."""
    activations: str
    prompt_tokens: int
    tokens: int
    """Tokens decoded after the prompt."""
    repeats: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_s: float
    load_s: float
    peak_memory_bytes: int | None
    """Maximum resident memory of this process. None if the system does not tell."""
    device_memory_bytes: int | None
    bytes_per_token: int
    """Bytes that a decode step in the middle of the answer must read."""
    bytes_per_second: float
    memory_bandwidth_bytes_per_second: float | None
    bandwidth_fraction: float | None
    """Fraction of the memory bandwidth that decoding uses; above 1 if weights are in a cache. None on the reference."""
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    def as_text(self) -> str:
        """The result as a few lines of text."""
        gpu = self.machine.get("gpu")
        where = f"{self.device}, {self.threads} threads"
        if gpu:
            where = f"{self.device} ({gpu['name']}), {gpu['multiprocessors']} multiprocessors"
        lines = [
            f"{self.model} on {where}, {', '.join(self.types)}",
            f"  prompt   {self.prefill_tokens_per_second:10,.1f} tokens/s   ({self.prompt_tokens} tokens)",
            f"  decode   {self.decode_tokens_per_second:10,.1f} tokens/s   ({self.tokens} tokens, "
            f"median of {self.repeats})",
            f"  first token after {self.time_to_first_token_s * 1000:.1f} ms; loaded in {self.load_s:.2f} s",
            f"  reads    {self.bytes_per_second / 1e9:10,.1f} GB/s",
        ]
        if self.bandwidth_fraction and self.memory_bandwidth_bytes_per_second:
            bandwidth = self.memory_bandwidth_bytes_per_second / 1e9
            lines[-1] += f"       ({self.bandwidth_fraction:.0%} of the {bandwidth:.1f} GB/s that memory gives)"
        if self.peak_memory_bytes:
            lines.append(f"  peak memory {format_bytes(self.peak_memory_bytes)}")
        if self.device_memory_bytes:
            lines.append(f"  device memory {format_bytes(self.device_memory_bytes)}")
        return "\n".join(lines)


def bench(model: Model, prompt_tokens: int = 128, tokens: int = 64, repeats: int = 5) -> BenchResult:
    """Time a prompt of random tokens and greedy decoding after it; medians of `repeats` runs.

    Raises `ContextError` if prompt and answer do not fit the context, `DeviceError` if the device has too little free
    memory for the bandwidth measurement.
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
    params = SamplingParams(temperature=0, max_tokens=tokens + 1)
    prefill_times: list[float] = []
    decode_times: list[float] = []
    with progress.progress_bar("benchmark") as report:
        for index in range(repeats + 1):
            report("", index, repeats + 1)
            start = first = end = time.perf_counter()
            for _ in model.token_engine.submit(prompt, params, reuse_prefix=False):
                end = time.perf_counter()
                if first == start:
                    first = end
            prefill_times.append(first - start)
            decode_times.append(end - first)
    prefill, decode = statistics.median(prefill_times[1:]), statistics.median(decode_times[1:])
    peak = peak_bytes()  # before the bandwidth measurement, which allocates memory itself
    backend, nbytes = model.backend, bytes_per_token(model, prompt_tokens + tokens // 2)
    rate, bandwidth = nbytes * tokens / decode, backend.measure_bandwidth()
    return BenchResult(
        model=model.path.name,
        device=model.device,
        threads=model.threads,
        types=sorted({str(weight.type) for weight in model.weights.values()}),
        activations=model.activations,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        repeats=repeats,
        prefill_tokens_per_second=prompt_tokens / prefill,
        decode_tokens_per_second=tokens / decode,
        time_to_first_token_s=prefill,
        load_s=model.load_s,
        peak_memory_bytes=peak,
        device_memory_bytes=backend.memory_bytes,
        bytes_per_token=nbytes,
        bytes_per_second=rate,
        memory_bandwidth_bytes_per_second=bandwidth,
        bandwidth_fraction=rate / bandwidth if bandwidth else None,
        machine=machine() | backend.machine(),
    )


def machine() -> dict[str, Any]:
    """The host, for JSON: processor, cores, system, versions and today's date."""
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
