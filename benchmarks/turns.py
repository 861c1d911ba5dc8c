"""Compare prompts and decoding on the CPU with llama.cpp, in turns: each program holds the model in a process.

python benchmarks/turns.py MODEL.gguf … --llama-cpp PYTHON [--threads 1] [--activations f32 int8] [--out FILE.json]

`--llama-cpp` is an interpreter that has llama-cpp-python. With one thread the time is the processor's, which other
programs disturb less than the clock; with more it is the clock. With `--sequences 8` eight prompts are read, and then
eight tokens are generated in each step; the time of decoding is that of a whole run less that of the prompts alone.
benchmarks/cpu.py starts a process for each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEER = "llama.cpp"


def serve(once: Callable[[], tuple[float, float]]) -> None:
    """Answer each line of standard input by seconds of the prompt and of the tokens after it."""
    once()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


def worker(options: argparse.Namespace) -> None:
    """Measure one model with this package."""
    import numballama
    from numballama.sampling import SamplingParams

    clock = time.process_time if options.threads == 1 else time.perf_counter
    ids = [7 + i % 400 for i in range(options.prompt_tokens)]
    context = max(256, options.prompt_tokens + options.tokens)
    path, activations = options.models[0], options.activations[0]
    many = {"max_sequences": options.sequences, "kv_tokens": options.sequences * context}
    with numballama.compile(
        path, device="cpu", threads=options.threads, activations=activations, context=context,
        **(many if options.sequences > 1 else {}),
    ) as model:  # fmt: skip
        prompts = [[*ids[:-1], 7 + number] for number in range(options.sequences)]

        def seconds(tokens: int) -> float:
            """Seconds from submitting all prompts until each has generated `tokens` tokens."""
            start, params = clock(), SamplingParams(temperature=0, max_tokens=tokens)
            for request in [model.token_engine.submit(each, params, reuse_prefix=False) for each in prompts]:
                assert len(list(request)) == tokens
            return clock() - start

        def once() -> tuple[float, float]:
            # apart: the engine generates the first sequences' tokens while it reads the last ones' prompts
            first = seconds(1)
            return first, seconds(options.tokens + 1) - first

        serve(once)


class Side:
    """A process that measures one model."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        if self._read() != "ready":
            sys.exit(f"{command[0]}: expected 'ready'")

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a side has ended with exit status {self._process.wait()}; see its output above")
        return line.strip()

    def measure(self) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        prompt, decode = json.loads(self._read())
        return prompt, decode

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of all sides, and ratios to llama.cpp: above 1 this package is faster."""
    numbers = [str(each) for each in (options.threads, options.prompt_tokens, options.tokens)]
    many = str(options.sequences)
    commands = {PEER: [options.llama_cpp, str(HERE / "peers" / "llama_cpp_bench.py"), model, *numbers, "--turns", many]}
    for activations in options.activations:
        words = ["--threads", numbers[0], "--prompt-tokens", numbers[1], "--tokens", numbers[2]]
        words += ["--sequences", many]
        commands[activations] = [sys.executable, __file__, model, "--worker", *words, "--activations", activations]
    sides = {name: Side(command) for name, command in commands.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for index in range(options.rounds):
        for name in list(sides)[:: 1 if index % 2 else -1]:
            times[name].append(sides[name].measure())
    for side in sides.values():
        side.close()
    found = {}
    for name, pairs in times.items():
        prompt, decode = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[name] = {
            "prompt_tokens_per_second": options.sequences * options.prompt_tokens / prompt,
            "decode_tokens_per_second": options.sequences * options.tokens / decode,
            "seconds": pairs,
        }
    for entry in found.values():
        for what in ("prompt", "decode"):
            key = f"{what}_tokens_per_second"
            entry[f"{what}_of_llama_cpp"] = entry[key] / found[PEER][key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--llama-cpp", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--activations", nargs="+", default=["f32", "int8"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    if not options.llama_cpp:
        parser.error("--llama-cpp PYTHON is missing")
    what = "processor time of one thread" if options.threads == 1 else f"the clock, {options.threads} threads"
    result: dict[str, Any] = {
        "what": what, "prompt_tokens": options.prompt_tokens, "tokens": options.tokens,
        "sequences": options.sequences, "rounds": options.rounds,
        "load_average": os.getloadavg()[0], "models": {},
    }  # fmt: skip
    print(f"{what}; tokens/s of prompt and decoding, ratios to {PEER}")
    for model in options.models:
        result["models"][Path(model).name] = found = compare(model, options)
        for name, entry in found.items():
            print(
                f"{Path(model).name:28} {name:10} {entry['prompt_tokens_per_second']:9.1f} "
                f"{entry['prompt_of_llama_cpp']:5.2f} {entry['decode_tokens_per_second']:9.1f} "
                f"{entry['decode_of_llama_cpp']:5.2f}",
                flush=True,
            )
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
