"""Measure the speed of a model on this machine, and the share of the memory bandwidth that it uses."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__, progress
from ..engine.request import TokenEvent
from ..errors import ContextError, Error
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
    writes, and `device_memory_bytes` is the device memory that the model takes (None on the CPU). If several GPUs share
    the model, `threads` and `device_memory_bytes` are those of the first, bytes and bandwidth those of all together.
    """

    model: str
    device: str
    gpus: int
    """GPUs that share the model."""
    threads: int
    types: list[str]
    """Element types of the weights."""
    activations: str
    batch_invariant: bool
    """Whether the model was compiled so: one family of kernels for runs of any size."""
    context: int
    sequences: int
    """Sequences that run at once, each with its prompt and its answer. Speeds are those of all together."""
    prompt_tokens: int
    tokens: int
    """Tokens decoded after the prompt."""
    repeats: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_s: float
    """Until every sequence has its first token."""
    communication_s: float | None
    """Of a decode step, the seconds that GPUs need at least to exchange values. None if one has the model."""
    load_s: float
    peak_memory_bytes: int | None
    """Maximum resident memory of this process. None if the system does not tell."""
    device_memory_bytes: int | None
    bytes_per_token: int
    """Bytes that a decode step in the middle of the answer must read; several sequences share the weights of one."""
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
        if self.gpus > 1:
            where += f", shared by {self.gpus} GPUs"
        if self.sequences > 1:
            where += f", {self.sequences} sequences at once"
        if self.batch_invariant:
            where += ", batch-invariant"
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
        if self.communication_s is not None:
            step_s = self.sequences / self.decode_tokens_per_second
            lines.append(f"  communication {communication_text(self.communication_s, step_s, self.sequences)}")
        if self.peak_memory_bytes:
            lines.append(f"  peak memory {format_bytes(self.peak_memory_bytes)}")
        if self.device_memory_bytes:
            lines.append(f"  device memory {format_bytes(self.device_memory_bytes)}")
        return "\n".join(lines)


def communication_text(seconds: float, step_s: float, sequences: int) -> str:
    """What communication costs beside a decode step: "310 µs of 2,150 µs a token"."""
    what = "a token" if sequences == 1 else f"a step of {sequences} sequences"
    return f"{seconds * 1e6:,.0f} µs of {step_s * 1e6:,.0f} µs {what}"


def bench(
    model: Model,
    prompt_tokens: int = 128,
    tokens: int = 64,
    repeats: int = 5,
    sequences: int = 1,
    bandwidth: float | None = None,
) -> BenchResult:
    """Time prompts of random tokens and greedy decoding after them; medians of `repeats` runs.

    `bandwidth` is the memory bandwidth in bytes/s, where it has been measured already.

    Raises `ContextError` if prompts and answers do not fit the context or the KV cache, `Error` for more sequences than
    the model was compiled for, `DeviceError` if the device has too little free memory for the bandwidth measurement.
    """
    prompt_tokens, sequences = whole_number("prompt_tokens", prompt_tokens, 1), whole_number("sequences", sequences, 1)
    tokens, repeats = whole_number("tokens", tokens, 1), whole_number("repeats", repeats, 1)
    whole = prompt_tokens + tokens
    if whole > model.context:
        raise ContextError(
            f"{prompt_tokens} prompt tokens and {tokens} more need a context of {whole}, "
            f"it has {model.context}; pass a larger --context, or fewer --prompt-tokens and --max-tokens"
        )
    if sequences > model.max_sequences:
        raise Error(f"{sequences} sequences at once need compile(max_sequences={sequences}), not {model.max_sequences}")
    if sequences * -(-whole // model.kv.page) >= model.kv.pages:
        raise ContextError(
            f"{sequences} sequences of {whole} tokens do not fit the KV cache of {model.kv.tokens:,} tokens; pass a "
            "larger --context, or fewer --sequences"
        )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.config.vocab_size, prompt_tokens).tolist() for _ in range(sequences)]
    params = SamplingParams(temperature=0, max_tokens=tokens + 1)
    prefill_times: list[float] = []
    decode_times: list[float] = []
    with progress.progress_bar("benchmark") as report:
        for index in range(repeats + 1):
            report("", index, repeats + 1)
            prefill, decode = _generate_together(model, prompts, params)
            prefill_times.append(prefill)
            decode_times.append(decode)
    prefill, decode = statistics.median(prefill_times[1:]), statistics.median(decode_times[1:])  # the first warms up
    peak = peak_bytes()  # before the bandwidth measurement, which allocates memory itself
    backend, nbytes = model.backend, bytes_per_token(model, prompt_tokens + tokens // 2, sequences)
    communication = None
    if model.gpus > 1:
        with model.exclusive():
            communication = backend.time_exchanges(model.graph, sequences)
    rate, bandwidth = nbytes / decode / sequences, bandwidth or backend.measure_bandwidth()
    return BenchResult(
        model=model.path.name,
        device=model.device,
        gpus=model.gpus,
        threads=model.threads,
        types=sorted({str(weight.type) for weight in model.weights.values()}),
        activations=model.activations,
        batch_invariant=model.batch_invariant,
        context=model.context,
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        repeats=repeats,
        prefill_tokens_per_second=sequences * prompt_tokens / prefill,
        decode_tokens_per_second=1 / decode,
        time_to_first_token_s=prefill,
        communication_s=communication,
        load_s=model.load_s,
        peak_memory_bytes=peak,
        device_memory_bytes=backend.memory_bytes,
        bytes_per_token=nbytes,
        bytes_per_second=rate,
        memory_bandwidth_bytes_per_second=bandwidth,
        bandwidth_fraction=rate / bandwidth if bandwidth else None,
        machine=machine() | backend.machine(),
    )


def _generate_together(model: Model, prompts: list[list[int]], params: SamplingParams) -> tuple[float, float]:
    """(seconds until all sequences have begun, seconds for a token while all generate)."""
    times: list[list[float]] = [[] for _ in prompts]

    def recorded(own: list[float]) -> Callable[[TokenEvent], TokenEvent]:
        def process(event: TokenEvent) -> TokenEvent:
            own.append(time.perf_counter())
            return event

        return process

    start = time.perf_counter()
    requests = [
        model.token_engine.submit(prompt, params, reuse_prefix=False, process=recorded(own))
        for prompt, own in zip(prompts, times, strict=True)
    ]
    for request in requests:
        for _ in request:
            pass
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    if end <= begin:
        raise Error("a sequence ended before the last one began: pass more --max-tokens, or fewer --prompt-tokens")
    count = sum(begin < moment <= end for own in times for moment in own)
    return begin - start, (end - begin) / count


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
