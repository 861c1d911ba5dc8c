"""Measure numballama on an NVIDIA GPU with models of real shapes and random weights, beside llama.cpp if installed.

python benchmarks/gpu.py [--quick] [--models TinyLlama-1.1B:bf16 Llama-2-7B] [--out FILE.json]

Speed does not depend on the weights' values, so one random matrix of each shape serves all layers. On the device each
layer has its own copy, so no weight is read from a cache. Decoding is 128 tokens after a short prompt,
the prompt has 512 tokens; both are medians of several rounds. If `llama-bench` is on the PATH, llama.cpp runs the same
shapes from a GGUF file in a temporary folder ($TMPDIR: up to 14 GB). Results are written after each model, so an
interrupted run loses one. benchmarks/compare.py compares two commits: it calls `random_checkpoint`, `compiled`,
`seconds_of_decoding` and `seconds_of_prompt` of each commit's copy of this file, so keep their parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from numballama import loader
from numballama.backend import backend_class, open_backend
from numballama.bench.benchmark import machine
from numballama.bench.traffic import bytes_per_token
from numballama.checkpoint import Checkpoint, Weight
from numballama.config import NAMED_SHAPES
from numballama.files import atomic_write
from numballama.formats.gguf.writer import write_gguf
from numballama.model import Model
from numballama.quantization.convert import convert
from numballama.quantization.policy import MIXTURES, mixture_type
from numballama.quantization.types import F32, WeightType
from numballama.sampling import SamplingParams

HERE = Path(__file__).parent
GROUP = 64
"""Elements that share a scale in int8 weights, as in KuiperLLama's files."""
FEW = 64
"""Different rows of a random matrix of a mixture."""
SHORT, TOKENS, PROMPT = 8, 128, 512
NEAR, FAR, STEPS = 128, 4096, 64
"""Positions at which decoding is compared, and the steps timed at each."""


@dataclass(frozen=True)
class Case:
    """A model and its goals, in tokens/s on one H200. `peer` is what llama.cpp reached there (NOTES.md)."""

    shape: str
    type: str
    must: int | None = None
    aim: int | None = None
    peer: int | None = None
    prompt_must: int | None = None
    prompt_aim: int | None = None

    @property
    def name(self) -> str:
        return f"{self.shape}:{self.type}"


CASES = (
    Case("stories15M", "f32", 3000, 6000),
    Case("TinyLlama-1.1B", "f32", 700, 850, 594, 45000, 64000),
    Case("TinyLlama-1.1B", "f16", 1150, 1470, 764, 110000, 145000),
    Case("TinyLlama-1.1B", "bf16", 1150, 1470, 764, 110000, 145000),
    Case("TinyLlama-1.1B", "q8_0", 1150, 1840, 751, 90000, 130000),
    Case("TinyLlama-1.1B", "int8", 1150, 1840, 751, 90000, 130000),
    Case("TinyLlama-1.1B", "q4_0", 1300, 2200, 896, 90000, 130000),
    Case("TinyLlama-1.1B", "q4_k", 1250, 1500, 831, 90000, 130000),
    Case("Llama-3.2-1B", "bf16", 1050, 1310, 750, 125000, 160000),
    Case("Llama-2-7B", "f16", 255, 280, 223, 33000, 40000),
    Case("Llama-2-7B", "q8_0", 380, 450, 274, 28000, 36000),
    Case("Llama-2-7B", "int8", 380, 450, 274, 28000, 36000),
    Case("Llama-2-7B", "q4_0", None, None, 361, 28000, 36000),
    Case("Llama-2-7B", "q4_k", 420, 520, None, 28000, 36000),
)
LARGE = "Llama-2-7B"


# Models


def random_checkpoint(shape: str, kind: str) -> Checkpoint:
    """A model of a named shape with random weights; its layers share one array of each shape and type on the host.

    "q4_k", "q5_k" and "q6_k" are mixtures of types, as of the files named Q4_K_M and so on. Their matrices repeat `FEW`
    random rows: to choose a block's scales takes long.
    """
    config, rng = NAMED_SHAPES[shape], np.random.default_rng(0)
    noise = rng.standard_normal(1 << 22, dtype=np.float32)
    made: dict[tuple[tuple[int, ...], str], Weight] = {}

    def weight(extents: tuple[int, ...], target: WeightType) -> Weight:
        if len(extents) == 1:
            return Weight(extents, F32, np.ones(extents, np.float32))
        rows, columns = extents
        some = min(FEW, rows) if kind in MIXTURES else rows
        numbers = np.resize(noise, some * columns).reshape(some, columns) * np.float32(columns**-0.5)
        found = convert(Weight((some, columns), F32, numbers), target)
        if some == rows:
            return found
        return Weight(extents, target, np.resize(found.data, (rows, found.data.shape[1])))

    weights = {}
    for name, extents in config.weight_shapes().items():
        target = WeightType(kind, GROUP if kind == "int8" else 0)
        if kind in MIXTURES and len(extents) == 2:
            target = mixture_type(kind, config, name, extents[1])
        key = extents, target.name
        if key not in made:
            made[key] = weight(extents, target)
        weights[name] = made[key]
    return Checkpoint(Path(f"{shape}, random, {kind}"), "random", config, weights)


@contextlib.contextmanager
def compiled(checkpoint: Checkpoint, device: str, context: int, **options: Any) -> Iterator[Model]:
    """The checkpoint's model on the device; all device memory is freed at the end. `options` are those of `Model`."""
    copy = replace(checkpoint)  # a closed model empties its own
    with mock.patch.object(loader, "open_checkpoint", return_value=copy):
        model = Model(checkpoint.path, device=device, context=context, **options)
    try:
        yield model
    finally:
        model.close()
        del model
        gc.collect()


# Measurements


def event_times(model: Model, prompt: Sequence[int], tokens: int) -> list[float]:
    """Times of submitting a prompt and of each of `tokens` greedy tokens, all computed by the engine."""
    times = [time.perf_counter()]
    params = SamplingParams(temperature=0, max_tokens=tokens)
    for _ in model.token_engine.submit(prompt, params, reuse_prefix=False):
        times.append(time.perf_counter())
    return times


def seconds_of_decoding(model: Model, before: Sequence[int], steps: int) -> float:
    """Seconds per token of greedy decoding after `before`. The first step starts the chain and is not timed."""
    times = event_times(model, before, steps + 2)
    return (times[-1] - times[2]) / steps


def seconds_of_prompt(model: Model, prompt: Sequence[int]) -> float:
    """Seconds until the first token after a prompt."""
    times = event_times(model, prompt, 1)
    return times[1] - times[0]


def medians_of(rounds: int, measure: Any, *arguments: Any) -> tuple[float, list[float]]:
    """(median, all) of several rounds after one that is not counted."""
    measure(*arguments)
    times = [measure(*arguments) for _ in range(rounds)]
    return statistics.median(times), times


def speed(case: Case, device: str, rounds: int, bandwidth: float) -> tuple[dict[str, Any], Checkpoint]:
    """All measurements of one model."""
    checkpoint = random_checkpoint(case.shape, case.type)
    config = checkpoint.config
    ids = np.random.default_rng(1).integers(0, config.vocab_size, PROMPT).tolist()
    with compiled(checkpoint, device, min(config.context, 1024)) as model:
        decode, all_decode = medians_of(rounds, seconds_of_decoding, model, ids[:SHORT], TOKENS)
        prompt = None
        if model.context >= PROMPT:
            prompt, _ = medians_of(rounds, seconds_of_prompt, model, ids)
        nbytes = bytes_per_token(model, SHORT + TOKENS // 2)
        found = {
            "decode_tokens_per_second": 1 / decode,
            "decode_rounds": [1 / seconds for seconds in all_decode],
            "prefill_tokens_per_second": PROMPT / prompt if prompt else None,
            "bytes_per_token": nbytes,
            "bandwidth_fraction": nbytes / decode / bandwidth if bandwidth else None,
            "device_memory_bytes": model.backend.memory_bytes,
            "load_s": model.load_s,
            "kernels": getattr(model.backend, "compiled", None),
        }
    return found, checkpoint


def context_cost(device: str, rounds: int, shape: str = "TinyLlama-1.1B", far: int = FAR) -> dict[str, Any]:
    """Decoding far into the context against decoding near its beginning; keys and values are float16."""
    checkpoint = random_checkpoint(shape, "f16")
    ids = np.random.default_rng(2).integers(0, checkpoint.config.vocab_size, far).tolist()
    with compiled(checkpoint, device, far + STEPS + 8) as model:
        near, _ = medians_of(rounds, seconds_of_decoding, model, ids[:NEAR], STEPS)
        distant, _ = medians_of(rounds, seconds_of_decoding, model, ids, STEPS)
        prompt, _ = medians_of(1, seconds_of_prompt, model, ids)
    return {
        "model": f"{shape}:f16", "near": NEAR, "far": far, "near_tokens_per_second": 1 / near,
        "far_tokens_per_second": 1 / distant, "ratio": distant / near, "prefill_of_far_tokens_per_second": far / prompt,
    }  # fmt: skip


def first_token_s(device: str, story: Sequence[str], cache: str) -> float:
    """Seconds from the command, in a fresh process, to the first character of its story."""
    words = [sys.executable, "-m", "numballama", "story", *story, "--device", device, "--length", "40"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*words, "--temperature", "0"], env=os.environ | {"NUMBALLAMA_CACHE": cache}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), "no text came"
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def first_tokens(device: str, story: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds to the first token with an empty kernel cache, then with the cache that this has filled."""
    with tempfile.TemporaryDirectory() as cache:
        empty = first_token_s(device, story, cache)
        cached = [first_token_s(device, story, cache) for _ in range(rounds)]
    return {
        "model": Path(story[1]).name if story else "the packaged story model",
        "cached_s": statistics.median(cached), "empty_cache_s": empty,
        "compilation_s": empty - statistics.median(cached),
    }  # fmt: skip


# llama.cpp


def llama_bench(program: str, checkpoint: Checkpoint, kind: str, rounds: int) -> dict[str, Any]:
    """Medians of llama.cpp's own benchmark, all layers on the GPU, with flash attention."""
    weights = checkpoint.weights
    if kind == "int8":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, checkpoint.config, weights, name=checkpoint.path.name)
        words = (program, "-m", path, "-p", PROMPT, "-n", TOKENS, "-r", rounds, "-ngl", 99, "-fa", 1, "-o", "json")
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip()[-500:]}
    return parse_llama_bench(done.stdout)


def parse_llama_bench(text: str) -> dict[str, Any]:
    """tokens/s of `llama-bench -o json`: an entry for the prompt and one for generating."""
    found: dict[str, Any] = {}
    for entry in json.loads(text):
        rate = statistics.median(entry.get("samples_ts") or [entry["avg_ts"]])
        if entry["n_gen"] and not entry["n_prompt"]:
            found["decode_tokens_per_second"] = rate
        elif entry["n_prompt"] and not entry["n_gen"]:
            found["prefill_tokens_per_second"] = rate
        found["build"] = entry.get("build_commit")
    return found


# The table


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _verdict(value: float, must: float | None, aim: float | None) -> str:
    if must is None or aim is None:
        return ""
    return "aim" if value >= aim else "must" if value >= must else "**missed**"


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    gpu = result["machine"].get("gpu") or {}
    bandwidth = result["memory_bandwidth_bytes_per_second"]
    lines = [
        f"{gpu.get('name', result['device'])}, driver {gpu.get('driver')}, {result['machine']['date']}, commit "
        f"{result['commit']}; a copy moves {_number(bandwidth and bandwidth / 1e9)} GB/s; "
        f"medians of {result['rounds']}.",
        "",
        f"| model | type | decode, tokens/s | of the bandwidth | prompt of {PROMPT} "
        "| llama.cpp beside it: decode, prompt | llama.cpp before | must | aim | reached |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = {case.name: case for case in CASES}
    for name, found in result["models"].items():
        case = cases.get(name) or Case(*name.split(":"))
        if "error" in found:
            lines.append(f"| {case.shape} | {case.type} | failed: {found['error']} | | | | | | | |")
            continue
        peer = found.get("llama.cpp") or {}
        beside = "–"
        if "decode_tokens_per_second" in peer:
            beside = f"{_number(peer['decode_tokens_per_second'])}, {_number(peer.get('prefill_tokens_per_second'))}"
        decode, fraction = found["decode_tokens_per_second"], found["bandwidth_fraction"]
        reached = _verdict(decode, case.must, case.aim)
        prompt = _number(found["prefill_tokens_per_second"])
        if case.prompt_must is not None and found["prefill_tokens_per_second"]:
            verdict = _verdict(found["prefill_tokens_per_second"], case.prompt_must, case.prompt_aim)
            prompt += f" (must {case.prompt_must:,}, aim {case.prompt_aim:,}: {verdict})"
        share = "–" if fraction is None else f"{fraction:.0%}"
        lines.append(
            f"| {case.shape} | {case.type} | {_number(decode)} | {share} | {prompt} | {beside} "
            f"| {_number(case.peer)} | {_number(case.must)} | {_number(case.aim)} | {reached} |"
        )
    lines += ["", "| | measured | must | reached |", "|---|---|---|---|"]
    if cost := result.get("context"):
        lines.append(
            f"| {cost['model']}: a step at context {cost['far']:,} against one at {cost['near']} "
            f"| {cost['ratio']:.2f}× | ≤ 1.2× | {'must' if cost['ratio'] <= 1.2 else '**missed**'} |"
        )
    if first := result.get("first_token"):
        for what, key, most in (
            ("command to first token, kernels cached", "cached_s", 2.5),
            ("compiling with an empty kernel cache", "compilation_s", 60),
        ):
            good = "must" if first[key] <= most else "**missed**"
            lines.append(f"| {first['model']}: {what} | {first[key]:.2f} s | ≤ {most} s | {good} |")
    return "\n".join(lines)


def commit() -> str | None:
    """The commit that is checked out; None outside a repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        words = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    return None


def chosen(wanted: Sequence[str] | None, quick: bool) -> list[Case]:
    """The cases of a list of shapes and shape:type pairs. A pair that is not in the table has no goal."""
    if not wanted:
        return [case for case in CASES if not (quick and case.shape == LARGE)]
    known = {case.name: case for case in CASES}
    found: list[Case] = []
    for word in wanted:
        shape, _, kind = word.partition(":")
        if shape not in NAMED_SHAPES:
            raise SystemExit(f"no shape {shape!r}; choose from {', '.join(NAMED_SHAPES)}")
        found += [known.get(word) or Case(shape, kind)] if kind else [case for case in CASES if case.shape == shape]
    return found


def story_words() -> list[str]:
    """Options of `story` for stories15M, if it is beside the repository; otherwise none, for the packaged model."""
    folder = Path(os.environ.get("NUMBALLAMA_TEST_MODELS", HERE.parent.parent / "shared" / "models"))
    model, tokenizer = folder / "stories15M.bin", folder / "llama2_tokenizer.model"
    return ["--model", str(model), "--tokenizer", str(tokenizer)] if model.exists() and tokenizer.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="SHAPE[:TYPE]", help="only these; default all of the table")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="three rounds, no 7B, no first-token time")
    parser.add_argument("--only-models", action="store_true", help="neither the long context nor first-token times")
    parser.add_argument("--no-first-token", action="store_true", help="no new processes, which take minutes")
    parser.add_argument("--commit", default=commit(), help="what is measured (default: git describe)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-cuda-GPU.json")
    options = parser.parse_args(arguments)
    rounds = min(3, options.rounds) if options.quick else options.rounds
    peer = shutil.which("llama-bench")
    device: Any = None

    result: dict[str, Any] = {
        "what": "GPU, random weights", "device": options.device, "rounds": rounds, "commit": options.commit,
        "machine": machine(), "memory_bandwidth_bytes_per_second": None, "llama-bench": peer, "models": {},
    }  # fmt: skip
    if not backend_class(options.device).in_host_memory:
        backend = open_backend(options.device, {"one": Weight((1,), F32, np.ones(1, np.float32))})
        result["machine"] |= backend.machine()
        result["memory_bandwidth_bytes_per_second"] = backend.measure_bandwidth()
        device = getattr(backend, "device", None)  # for its free bytes
        backend.close()
    where = re.sub(r"\W+", "-", result["machine"].get("gpu", {}).get("name", options.device)).strip("-").lower()
    out = options.out or HERE / "results" / f"{datetime.date.today().isoformat()}-cuda-{where}.json"

    def save() -> None:
        with atomic_write(out) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")

    for case in chosen(options.models, options.quick):
        started, free = time.perf_counter(), device and device.free_bytes
        try:
            found, checkpoint = speed(case, options.device, rounds, result["memory_bandwidth_bytes_per_second"] or 0.0)
            found["device_memory_not_given_back_bytes"] = device and free - device.free_bytes
            if peer:
                found["llama.cpp"] = llama_bench(peer, checkpoint, case.type, rounds)
            del checkpoint
        except Exception as error:  # the others are measured all the same
            found = {"error": f"{type(error).__name__}: {error}"}
        result["models"][case.name] = found
        save()
        rate = found.get("decode_tokens_per_second")
        said = found.get("error") or f"{rate:,.0f} tokens/s"
        print(f"{case.name}: {said} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    if not options.only_models:
        with contextlib.suppress(KeyboardInterrupt):
            try:
                result["context"] = context_cost(options.device, rounds)
                save()
                if not (options.quick or options.no_first_token):
                    result["first_token"] = first_tokens(options.device, story_words(), min(5, rounds))
            except Exception as error:
                print(f"not measured: {error}", file=sys.stderr)
    save()
    print(table(result))
    print(f"\n{out}", file=sys.stderr)


if __name__ == "__main__":
    main()
