"""Compare numballama on the CPU with its peers in one run: each program once per round, medians over the rounds.

python benchmarks/cpu.py MODEL TOKENIZER --llama2c ./run --llama-cpp PYTHON MODEL.gguf --out benchmarks/results/…json

`--llama2c` is karpathy/llama2.c's run, built with `gcc -Ofast -fopenmp -march=native run.c -lm`; `--llama-cpp` an
interpreter that has llama-cpp-python, and the same weights as GGUF (peers/make_gguf.py). Either may be left out.
Other programs may slow the machine down: compare figures of one run only. Also measured, in new processes: the import,
the time from command to first token with cached kernels and with an empty cache, and peak memory. benchmarks/compare.py
compares two commits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = ("decode_tokens_per_second", "prefill_tokens_per_second")


def command(*words: object, **environment: str) -> str:
    """The standard output of a program. Raises `CalledProcessError` if it fails."""
    done = subprocess.run(
        [str(word) for word in words], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return done.stdout or done.stderr


def numballama(options: argparse.Namespace) -> dict[str, Any]:
    """Run `numballama bench` in a separate process."""
    words = ("--threads", options.threads, "--prompt-tokens", options.prompt_tokens, "--tokens", options.tokens)
    words += ("--activations", options.activations)
    return json.loads(command(sys.executable, "-m", "numballama", "bench", options.model, *words, "--json"))


def llama2c(options: argparse.Namespace) -> dict[str, Any]:
    """The tokens/s that llama2.c reports itself; it reads a prompt token by token."""
    steps = options.prompt_tokens + options.tokens
    words = (options.llama2c, options.model, "-z", options.tokenizer_bin, "-t", 0, "-n", steps)
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
    )
    found = re.search(r"achieved tok/s: ([\d.]+)", done.stderr)
    assert found, done.stderr
    return {"decode_tokens_per_second": float(found[1])}


def llama_cpp(options: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp, run by the interpreter that has llama-cpp-python."""
    interpreter, gguf = options.llama_cpp
    words = (gguf, options.threads, options.prompt_tokens, options.tokens, *(["--no-repack"] * options.no_repack))
    return json.loads(command(interpreter, HERE / "peers" / "llama_cpp_bench.py", *words))


def first_token_s(options: argparse.Namespace, cache: str) -> float:
    """Seconds from the command to the first character of its story."""
    words = [
        "story",
        "--model",
        options.model,
        "--tokenizer",
        options.tokenizer,
        "--length",
        "40",
        "--temperature",
        "0",
    ]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "numballama", *words, "--threads", str(options.threads)],
        env=os.environ | {"NUMBALLAMA_CACHE": cache},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), "no text came"
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def peak_memory_bytes(options: argparse.Namespace, cache: str) -> int:
    """Peak resident bytes of a process that compiles the model and tells a story."""
    program = (
        "import sys, numballama; from numballama.memory import peak_bytes\n"
        "m = numballama.compile(sys.argv[1], sys.argv[2]); m.generate('Once', max_tokens=200, temperature=0)\n"
        "print(peak_bytes())"
    )
    return int(command(sys.executable, "-c", program, options.model, options.tokenizer, NUMBALLAMA_CACHE=cache))


def import_s() -> float:
    """Seconds that `import numballama` takes beyond the interpreter's own start."""
    program = "import time; t = time.perf_counter(); import numballama; print(time.perf_counter() - t)"
    return float(command(sys.executable, "-c", program))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokenizer")
    parser.add_argument("--tokenizer-bin", help="the tokenizer as llama2.c reads it")
    parser.add_argument("--llama2c", metavar="RUN")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--no-repack", action="store_true", help="keep llama.cpp from repacking weights (AMX crashes)")
    parser.add_argument("--activations", default="f32", help="of numballama: f32, or int8 as llama.cpp has them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)

    programs = {"numballama": numballama}
    if options.llama2c:
        programs["llama2.c"] = llama2c
    if options.llama_cpp:
        programs["llama.cpp"] = llama_cpp
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for name in [*programs] * (options.rounds + 1):
        rounds[name].append(programs[name](options))
    medians = {
        name: {key: statistics.median(r[key] for r in results[1:]) for key in FIGURES if key in results[0]}
        for name, results in rounds.items()
    }
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as cold:
        first_token_s(options, warm)
        result = {
            "what": "CPU, one run beside the peers",
            "model": Path(options.model).name,
            "threads": options.threads,
            "rounds": options.rounds,
            "medians": medians,
            "ratio_decode": {
                name: medians["numballama"][FIGURES[0]] / figures[FIGURES[0]] for name, figures in medians.items()
            },
            "import_s": statistics.median(import_s() for _ in range(5)),
            "first_token_cached_s": statistics.median(first_token_s(options, warm) for _ in range(5)),
            "first_token_empty_cache_s": first_token_s(options, cold),
            "peak_memory_bytes": {
                "cached": peak_memory_bytes(options, warm),
                "model_file": Path(options.model).stat().st_size,
            },
            "bandwidth_bytes_per_second": statistics.median(
                r["memory_bandwidth_bytes_per_second"] for r in rounds["numballama"][1:]
            ),
            "machine": rounds["numballama"][0]["machine"],
            "commit": command("git", "-C", HERE, "describe", "--always", "--dirty").strip(),
            "all": rounds,
        }
    with tempfile.TemporaryDirectory() as empty:
        result["peak_memory_bytes"]["empty_cache"] = peak_memory_bytes(options, empty)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "all"}, indent=1))


if __name__ == "__main__":
    main()
