"""Measure models that several GPUs share, beside one GPU: decoding, 64 sequences, a long prompt, and communication.

python benchmarks/ranks.py [--gpus 1,2] [--models Llama-2-7B:q8_0 …] [--large] [--json FILE.json]

Models have real shapes and random weights. Each GPU's process opens the model by its path, so each model is written to
a GGUF file in a temporary folder (--folder; up to 16 GB, and 75 GB for the 70B shape of --large: GGUF lets no two
tensors share their bytes), and deleted after its measurements. Decoding is 128 tokens after 8, the 64 sequences have
prompts of 128 tokens and generate 128 each; all figures are medians. What a step's exchanges take is measured by runs
of nothing else (`Backend.time_exchanges`); `all_reduce.py` times all-reduces by size. NUMBALLAMA_EXCHANGE=nccl has NCCL
exchange values. Results are written after each measurement. A model that FILE.json has for
all numbers of GPUs, measured at the same commit, is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
from batched import generate_together
from gpu import commit, medians_of, seconds_of_decoding, seconds_of_prompt

import numballama
from numballama import DeviceError, Model, backend, loader, model
from numballama.backend import Backend
from numballama.bench.benchmark import machine
from numballama.bench.traffic import bytes_per_token
from numballama.checkpoint import Weight
from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.files import atomic_write, require_folder
from numballama.formats.gguf.writer import write_gguf
from numballama.parallel.processes import ProcessBackend
from numballama.quantization.convert import convert
from numballama.quantization.types import F32, WeightType

SHAPES = NAMED_SHAPES | {
    "Llama-3.1-8B": ModelConfig(4096, 14336, 32, 32, 8, 128256, 131072, tied_embeddings=False, rope_theta=500000.0),
    "Llama-2-70B": ModelConfig(8192, 28672, 80, 64, 8, 32000, 4096, tied_embeddings=False),
    "tiny": ModelConfig(64, 192, 2, 4, 2, 512, 256, tied_embeddings=False),
}
ROWS = 64
"""Different rows of a random matrix, which repeats them: to make more takes long."""
SHORT, OWN = 8, 128
"""Tokens of the prompt before decoding is timed, and of each prompt of many sequences."""
ROOM = 1 << 30
"""Bytes that a disk must have free beside the model."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of the prompt, tokens to decode, sequences at once, rounds of each measurement."""

    prompt: int
    tokens: int
    sequences: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """A model. `decode` is how many times as fast two H200 must decode as one, `must` and `aim` are tokens/s there."""

    shape: str
    type: str
    decode: float | None = None
    must: int | None = None
    aim: int | None = None

    @property
    def name(self) -> str:
        return f"{self.shape}:{self.type}"


CASES = (
    Case("Llama-2-7B", "f16", None, 420, 460),
    Case("Llama-2-7B", "q8_0", 1.35),
    Case("Llama-2-7B", "q4_0", 1.35),
    Case("Llama-3.1-8B", "bf16", 1.5),
)
LARGE = Case("Llama-2-70B", "q8_0")
MANY = 1.6
"""How many times as fast two H200 must be with many sequences, and for a long prompt."""


# Models


def random_weights(config: ModelConfig, kind: str) -> dict[str, Weight]:
    """Random weights whose matrices are of a type. Those of the same shape are one array."""
    noise = np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32)
    made: dict[tuple[int, ...], Weight] = {}
    for shape in set(config.weight_shapes().values()):
        if len(shape) == 1:
            made[shape] = Weight(shape, F32, np.ones(shape, np.float32))
            continue
        rows, columns = min(ROWS, shape[0]), shape[1]
        numbers = np.resize(noise, rows * columns).reshape(rows, columns) * np.float32(columns**-0.5)
        some = convert(Weight((rows, columns), F32, numbers), WeightType(kind))
        made[shape] = Weight(shape, some.type, np.resize(some.data, (shape[0], some.data.shape[1])))
    return {name: made[shape] for name, shape in config.weight_shapes().items()}


@contextlib.contextmanager
def written(case: Case, folder: Path | None) -> Iterator[Path]:
    """A GGUF file with random weights, deleted at the end. Raises `OSError` if it has no room in the folder."""
    weights = random_weights(SHAPES[case.shape], case.type)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        needed, free = sum(weight.nbytes for weight in weights.values()) + ROOM, shutil.disk_usage(name).free
        if free < needed:
            raise OSError(f"{name}: needs {needed:,} bytes, has {free:,}; pass a --folder with more")
        path = Path(name) / "model.gguf"
        with mock.patch.object(os, "fsync"):  # it is read from the page cache, and does not outlive this process
            write_gguf(path, SHAPES[case.shape], weights, name=case.name)
        yield path


@contextlib.contextmanager
def opened(path: Path, device: str, gpus: int, context: int, sequences: int) -> Iterator[Model]:
    """The model on several GPUs. With `device` "cpu" each stands for a process on the CPU, to try this script."""
    open_one, choose_one = backend.open_backend, backend.choose_device

    def open_ranks(
        name: str, weights: Mapping[str, Weight], threads: int | None, invariant: bool, ranks: int, *others: Any
    ) -> Backend:
        if name != "cpu" or ranks == 1:
            return open_one(name, weights, threads, invariant, ranks, *others)
        config = loader.open_checkpoint(path).config
        return cast("Backend", ProcessBackend(path, config, weights, [name] * ranks, threads, invariant))

    def choose(name: str, ranks: int) -> tuple[str, str]:
        return choose_one(name, 1 if name == "cpu" else ranks)

    with (
        mock.patch.object(model, "open_backend", open_ranks),
        mock.patch.object(model, "choose_device", choose),
        numballama.compile(path, device=device, gpus=gpus, context=context, max_sequences=sequences) as made,
    ):
        yield made


# Measurements


def measure(path: Path, device: str, gpus: int, sizes: Sizes) -> dict[str, Any]:
    """All measurements of a model on a number of GPUs."""
    found: dict[str, Any] = {}
    context = max(sizes.prompt, SHORT + sizes.tokens) + 8
    with opened(path, device, gpus, context, 1) as one:
        ids = np.random.default_rng(1).integers(0, one.config.vocab_size, sizes.prompt).tolist()
        decode, all_decode = medians_of(sizes.rounds, seconds_of_decoding, one, ids[:SHORT], sizes.tokens)
        prompt, _ = medians_of(sizes.rounds, seconds_of_prompt, one, ids)
        nbytes, bandwidth = bytes_per_token(one, SHORT + sizes.tokens // 2), None
        with contextlib.suppress(DeviceError):  # too little memory is left to measure with
            bandwidth = one.backend.measure_bandwidth()
        found |= {
            "decode_tokens_per_second": 1 / decode,
            "decode_rounds": [1 / seconds for seconds in all_decode],
            "prefill_tokens_per_second": sizes.prompt / prompt,
            "communication_s": exchanges(one, 1),
            "bytes_per_token": nbytes,
            "memory_bandwidth_bytes_per_second": bandwidth,
            "bandwidth_fraction": nbytes / decode / bandwidth if bandwidth else None,
            "device_memory_bytes": one.backend.memory_bytes,
            "load_s": one.load_s,
            "device": one.backend.description,
            "machine": one.backend.machine(),
        }
    with opened(path, device, gpus, OWN + sizes.tokens, sizes.sequences) as many:
        generate_together(many, sizes.sequences, OWN, min(sizes.tokens, 16), 0)
        rounds = [generate_together(many, sizes.sequences, OWN, sizes.tokens, n) for n in range(sizes.rounds)]
        if min(each["tokens_per_second"] for each in rounds) <= 0:
            raise ValueError("a sequence ended before the last one began: pass more --tokens, or fewer --sequences")
        found["batch_tokens_per_second"] = statistics.median(each["tokens_per_second"] for each in rounds)
        found["batch_rounds"] = [each["tokens_per_second"] for each in rounds]
        found["batch_communication_s"] = exchanges(many, sizes.sequences)
    return found


def exchanges(made: Model, tokens: int) -> float | None:
    """Seconds that a decode step's exchanges take; None on one GPU."""
    with made.exclusive():
        return made.backend.time_exchanges(made.graph, tokens)


# The table


RATES = ("decode_tokens_per_second", "batch_tokens_per_second", "prefill_tokens_per_second")


def ratios(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Number of GPUs → speeds as multiples of those of the fewest GPUs, without the ending of their names."""
    counts = sorted((count for count in found if "error" not in found[count]), key=int)
    return {
        count: {rate.partition("_")[0]: found[count][rate] / found[counts[0]][rate] for rate in RATES}
        for count in counts[1:]
    }


def _communication(seconds: float | None, step_s: float) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.0f} of {step_s * 1e6:,.0f} µs"


def _verdict(value: float, must: float | None, aim: float | None = None) -> str:
    if must is None:
        return ""
    if aim is not None and value >= aim:
        return " (aim)"
    return " (must)" if value >= must else " (**missed**)"


def table(result: Mapping[str, Any]) -> str:
    """The results as Markdown, with what must be reached on two GPUs."""
    sizes, cases = Sizes(**result["sizes"]), {case.name: case for case in (*CASES, LARGE)}
    gpu = result["machine"].get("gpu") or {}
    where = f"{gpu['name']}, driver {gpu.get('driver')}" if gpu else result["device"]
    lines = [
        f"{where}, {result['machine']['date']}, commit {result['commit']}; medians of {sizes.rounds}.",
        "",
        "| model | GPUs | decode, tokens/s | of the bandwidth | communication of a token "
        f"| {sizes.sequences} sequences | communication of a step | prompt of {sizes.prompt:,} "
        "| decode × | sequences × | prompt × |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["models"].items():
        case, gained = cases.get(name) or Case(*name.split(":")), ratios(found)
        for count, each in found.items():
            if "error" in each:
                lines.append(f"| {name} | {count} | failed: {each['error']} | | | | | | | | |")
                continue
            decode, batch, prompt = (each[rate] for rate in RATES)
            share = "–" if each["bandwidth_fraction"] is None else f"{each['bandwidth_fraction']:.0%}"
            has_goals = count == "2" and result["device"] != "cpu"
            goal = _verdict(decode, case.must, case.aim) if has_goals else ""
            row = [name, count, f"{decode:,.0f}{goal}", share, _communication(each["communication_s"], 1 / decode)]
            row += [f"{batch:,.0f}", _communication(each["batch_communication_s"], sizes.sequences / batch)]
            row.append(f"{prompt:,.0f}")
            if count in gained:
                for rate, must in (("decode", case.decode), ("batch", MANY), ("prefill", MANY)):
                    ratio = gained[count][rate]
                    row.append(f"{ratio:.2f}{_verdict(ratio, must if has_goals else None)}")
            else:
                row += ["–"] * 3
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def chosen(names: Sequence[str] | None, large: bool) -> list[Case]:
    """The models to measure. Raises `SystemExit` for a shape that is not known."""
    known = {case.name: case for case in (*CASES, LARGE)}
    cases = list(CASES) if names is None else []
    for name in names or ():
        shape, colon, kind = name.partition(":")
        if shape not in SHAPES or not colon:
            raise SystemExit(f"no model {name!r}: SHAPE:TYPE, of shapes {', '.join(SHAPES)}")
        cases.append(known.get(name) or Case(shape, kind))
    return cases + [LARGE] * (large and LARGE not in cases)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2", metavar="N[,N]", help="how many share each model (default 1,2)")
    parser.add_argument("--models", nargs="+", metavar="SHAPE:TYPE", help="only these; default all of the table")
    parser.add_argument("--large", action="store_true", help="also the 70B shape, which needs 75 GB on the disk")
    parser.add_argument("--device", default="cuda", help="cpu: processes in place of GPUs, to try this script")
    parser.add_argument("--prompt", type=int, default=2048, metavar="N", help="tokens of the prompt (default 2048)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens to decode (default 128)")
    parser.add_argument("--sequences", type=int, default=64, metavar="N", help="sequences at once (default 64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each measurement (default 5)")
    parser.add_argument("--folder", type=Path, help="where a model's file is written (default: $TMPDIR)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, after each measurement")
    options = parser.parse_args(arguments)
    cases, counts = chosen(options.models, options.large), sorted({int(each) for each in options.gpus.split(",")})
    sizes = Sizes(options.prompt, options.tokens, options.sequences, options.rounds)
    if options.json is not None:
        require_folder(options.json)
    if options.device != "cpu":
        backend.choose_device(options.device, max(counts))  # before anything is written
    result: dict[str, Any] = {
        "what": "a model that GPUs share, random weights", "device": options.device, "commit": commit(),
        "sizes": vars(sizes), "machine": machine(), "models": {},
    }  # fmt: skip
    if options.json is not None and options.json.exists():
        before = json.loads(options.json.read_text())
        if all(before.get(key) == result[key] for key in ("device", "commit", "sizes")):
            result["models"], result["machine"] = before["models"], before["machine"] | result["machine"]

    def save() -> None:
        if options.json is not None:
            with atomic_write(options.json) as file:
                file.write(json.dumps(result, indent=1).encode() + b"\n")

    for case in cases:
        found = result["models"].get(case.name, {})
        if all("error" not in found.get(str(count), {"error": ""}) for count in counts):
            continue
        found = result["models"][case.name] = {}
        try:
            started = time.perf_counter()
            with written(case, options.folder) as path:
                say(f"{case.name}: {path.stat().st_size / 1e9:,.1f} GB written", started)
                for count in counts:
                    started = time.perf_counter()
                    found[str(count)] = attempt(path, options.device, count, sizes)
                    result["machine"] |= found[str(count)].pop("machine", {})
                    rate = found[str(count)].get("decode_tokens_per_second", math.nan)
                    say(f"{case.name}, {count} GPUs: {rate:,.1f} tokens/s", started)
                    save()
        except Exception as error:
            found[str(counts[0])] = {"error": f"{type(error).__name__}: {error}"}
        save()
    print(table(result))


def attempt(path: Path, device: str, gpus: int, sizes: Sizes) -> dict[str, Any]:
    """`measure`, or the error: the other models are measured all the same."""
    try:
        return measure(path, device, gpus, sizes)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def say(text: str, started: float) -> None:
    print(f"{text} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
