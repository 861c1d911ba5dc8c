"""Measure many sequences at once: generated tokens per second by number of sequences, as llama-batched-bench does.

python benchmarks/batched.py [--device cuda] [--models TinyLlama-1.1B:bf16 …] [--sequences 1 8 32] [--out FILE.json]

Models have real shapes and random weights (see gpu.py). Each sequence has a prompt of 128 random tokens and generates
128 greedy ones. Counted is what all generate from the last first token to the first last one, while all generate;
medians of the rounds. `--stall` also measures how long others wait when a long prompt arrives.
If `llama-batched-bench` is on the PATH, llama.cpp runs the same shapes with as many threads or on the same GPU, from a
GGUF file in a temporary folder ($TMPDIR: up to 14 GB).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gpu import compiled, random_checkpoint

from numballama.bench.benchmark import machine
from numballama.checkpoint import Checkpoint
from numballama.engine.request import TokenEvent
from numballama.files import atomic_write
from numballama.formats.gguf.writer import write_gguf
from numballama.model import Model
from numballama.sampling import SamplingParams

PROMPT, TOKENS = 128, 128


def generate_together(model: Model, sequences: int, prompt: int, tokens: int, seed: int) -> dict[str, float]:
    """Generate `sequences` texts at once; returns tokens/s while all generate, and seconds until all have begun."""
    rng = np.random.default_rng(seed)
    times: list[list[float]] = [[] for _ in range(sequences)]

    def record(own: list[float]) -> Any:
        def process(event: TokenEvent) -> TokenEvent:
            own.append(time.perf_counter())
            return event

        return process

    params = SamplingParams(temperature=0, max_tokens=tokens)
    start = time.perf_counter()
    requests = [
        model.token_engine.submit(
            rng.integers(0, model.config.vocab_size, prompt).tolist(), params, reuse_prefix=False, process=record(own)
        )
        for own in times
    ]
    for request in requests:
        for _ in request:
            pass
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    count = sum(begin < moment <= end for own in times for moment in own)
    return {"tokens_per_second": count / (end - begin), "all_begun_s": begin - start, "whole_s": times[-1][-1] - start}


def stall(model: Model, sequences: int, prompt: int) -> dict[str, float]:
    """Gaps between tokens of `sequences` streams while a prompt of `prompt` tokens arrives; in usual steps."""
    rng = np.random.default_rng(3)
    times: list[list[float]] = [[] for _ in range(sequences)]

    def record(own: list[float]) -> Any:
        def process(event: TokenEvent) -> TokenEvent:
            own.append(time.perf_counter())
            return event

        return process

    vocab, engine = model.config.vocab_size, model.token_engine
    params = SamplingParams(temperature=0, max_tokens=300)
    requests = [
        engine.submit(rng.integers(0, vocab, 64).tolist(), params, reuse_prefix=False, process=record(own))
        for own in times
    ]
    iterators = [iter(request) for request in requests]
    for _ in range(100):
        for iterator in iterators:
            next(iterator)
    arrived = time.perf_counter()
    late: list[float] = []
    long = engine.submit(
        rng.integers(0, vocab, prompt).tolist(), SamplingParams(temperature=0, max_tokens=1), reuse_prefix=False,
        process=record(late),
    )  # fmt: skip
    for iterator in iterators:
        for _ in iterator:
            pass
    for _ in long:
        pass
    before = [b - a for own in times for a, b in pairwise(own[20:100])]
    during = [b - a for own in times for a, b in pairwise(own) if arrived < b < late[0]]
    usual = statistics.median(before)
    return {
        "usual_step_s": usual, "worst_gap_in_steps": max(during) / usual,
        "p99_gap_in_steps": float(np.quantile(during, 0.99)) / usual, "prompt_s": late[0] - arrived,
    }  # fmt: skip


def llama_batched_bench(
    program: str, checkpoint: Checkpoint, sequences: Sequence[int], prompt: int, tokens: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Medians of llama.cpp's tokens/s by number of sequences. `threads` 0: all layers on the GPU, flash attention."""
    where = ("-ngl", 0, "-t", threads) if threads else ("-ngl", 99, "-fa", "on")
    words = [program, "-npp", prompt, "-ntg", tokens, "-npl", ",".join(map(str, sequences)), *where]
    words += ["-c", max(sequences) * (prompt + tokens), "-b", 2048, "-ub", 512, "--output-format", "jsonl"]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, checkpoint.config, checkpoint.weights, name=checkpoint.path.name)
        for _ in range(rounds):
            done = subprocess.run(
                [str(word) for word in (*words, "-m", path)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                return {"error": done.stderr.strip()[-500:]}
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    entry = json.loads(line)
                    rates.setdefault(str(entry["pl"]), []).append(entry["speed_tg"])
    return {count: {"tokens_per_second": statistics.median(found), "rounds": found} for count, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["TinyLlama-1.1B:bf16"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stall", type=int, default=0, help="tokens of a prompt that arrives among 16 streams")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--activations", help="f32 or int8, on the CPU")
    parser.add_argument("--peer-rounds", type=int, default=1, help="runs of llama.cpp, each loads the model")
    parser.add_argument("--batch-invariant", action="store_true", help="one family of kernels for runs of any size")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "what": "many sequences, random weights", "batch_invariant": args.batch_invariant, "machine": machine(),
        "activations": args.activations,
        "llama-batched-bench": (peer := shutil.which("llama-batched-bench")), "models": {},
    }  # fmt: skip
    for name in args.models:
        shape, kind = name.split(":")
        most, context = max(*args.sequences, 16 if args.stall else 1), args.prompt + args.tokens
        context = max(context, args.stall + 64, 400 if args.stall else 0)
        result: dict[str, Any] = {}
        options: dict[str, Any] = {"max_sequences": most, "batch_invariant": args.batch_invariant}
        options |= {name: value for name in ("threads", "activations") if (value := getattr(args, name)) is not None}
        checkpoint = random_checkpoint(shape, kind)
        with compiled(checkpoint, args.device, context, **options) as model:
            result["load_s"], threads = model.load_s, model.threads if args.device == "cpu" else 0
            for sequences in args.sequences:
                generate_together(model, sequences, args.prompt, min(args.tokens, 16), 0)
                rounds = [generate_together(model, sequences, args.prompt, args.tokens, n) for n in range(args.rounds)]
                rates = [each["tokens_per_second"] for each in rounds]
                result[str(sequences)] = {
                    "tokens_per_second": statistics.median(rates), "rounds": rates,
                    "all_begun_s": statistics.median(each["all_begun_s"] for each in rounds),
                }  # fmt: skip
                print(f"{name} B = {sequences}: {statistics.median(rates):,.0f} tokens/s", flush=True)
            if args.stall:
                result["stall"] = stall(model, 16, args.stall)
                print(f"{name} stall: {result['stall']}", flush=True)
            result["device_memory_bytes"] = model.backend.memory_bytes
        if peer and kind != "int8":
            rounds = args.peer_rounds, threads
            beside = llama_batched_bench(peer, checkpoint, args.sequences, args.prompt, args.tokens, *rounds)
            result["llama.cpp"] = beside
            print(f"{name} llama.cpp: {beside}", flush=True)
        found["models"][name] = result
        if args.out:
            with atomic_write(args.out) as file:
                file.write(json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
