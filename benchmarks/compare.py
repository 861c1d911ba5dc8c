"""Compare this checkout with another one on one machine in one run: decode and prompt speed of random models.

git worktree add ../before a9d2e4e
python benchmarks/compare.py --against ../before --out compare.json                  # the table of benchmarks/gpu.py
python benchmarks/compare.py --against ../before --device cpu --out compare-cpu.json

Each checkout runs in a separate process, with its own package on the path, and measures with its own
benchmarks/gpu.py: `random_checkpoint`, `compiled`, `seconds_of_decoding` and `seconds_of_prompt`, which every commit to
compare must have. Both hold the model at the same time and measure alternately, so a change in the machine's speed
affects both. Results are written after each model; a second call with the same --out measures only what is missing.
Peers and first-token times are not measured here: see benchmarks/gpu.py and benchmarks/cpu.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GPU_MODELS = (
    "stories15M:f32", "TinyLlama-1.1B:f32", "TinyLlama-1.1B:f16", "TinyLlama-1.1B:bf16", "TinyLlama-1.1B:q8_0",
    "TinyLlama-1.1B:int8", "TinyLlama-1.1B:q4_0", "Llama-3.2-1B:bf16", "Llama-2-7B:f16", "Llama-2-7B:q8_0",
    "Llama-2-7B:int8", "Llama-2-7B:q4_0",
)  # fmt: skip
CPU_MODELS = ("stories15M:f32", "TinyLlama-1.1B:q8_0")
LEAST = {"decode": 0.98, "prefill": 0.97}
"""Smallest ratio, this checkout's speed to the other's, that does not count as slower. It is the ratio of medians;
On a machine with other work, look at `ratio_of_best` in the JSON."""
SHORT = 8
"""Number of tokens before the timed decoding."""
ENOUGH_S, MOST_REPEATS = 0.25, 40
"""A measurement is repeated for `ENOUGH_S` seconds, but at most `MOST_REPEATS` times. Its median counts."""
TIMEOUT_S = 300


# In the process of a checkout


def worker(checkout: Path, model_name: str, device: str, tokens: int, prompt: int) -> None:
    """Compile the model and report it. Then measure what each line of stdin names, until stdin ends."""
    reply_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but replies goes to the pipe

    def reply(**found: Any) -> None:
        reply_to.write(json.dumps(found) + "\n")
        reply_to.flush()

    sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location("checkout_gpu", checkout / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    gpu = sys.modules["checkout_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    import numballama

    assert Path(numballama.__file__ or "").is_relative_to(checkout), f"{numballama.__file__} is not in {checkout}"
    checkpoint = gpu.random_checkpoint(*model_name.split(":"))
    config = checkpoint.config
    context = min(config.context, max(1024, prompt))
    ids = [(7919 * i + 13) % config.vocab_size for i in range(min(prompt, context))]
    tokens = min(tokens, context - SHORT - 2)
    with gpu.compiled(checkpoint, device, context) as model:
        actions: dict[str, Callable[[], float]] = {
            "decode": lambda: 1 / gpu.seconds_of_decoding(model, ids[:SHORT], tokens),
            "prefill": lambda: len(ids) / gpu.seconds_of_prompt(model, ids),
        }
        for action in actions.values():
            action()
        reply(load_s=model.load_s, tokens=tokens, prompt_tokens=len(ids))
        for line in sys.stdin:
            rates, start = [], time.perf_counter()
            while not rates or (time.perf_counter() - start < ENOUGH_S and len(rates) < MOST_REPEATS):
                rates.append(actions[line.strip()]())
            reply(rate=statistics.median(rates))


# In the process that compares


class Checkout:
    """A process that measures one model with one checkout."""

    def __init__(self, path: Path, model: str, options: argparse.Namespace) -> None:
        words = ["--worker", path, "--models", model, "--device", options.device]
        words += ["--tokens", options.tokens, "--prompt-tokens", options.prompt_tokens]
        others = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), others]) if others else str(path)}
        if options.threads:
            environment["NUMBA_NUM_THREADS"] = str(options.threads)
        command = [sys.executable, str(HERE / "compare.py"), *(str(word) for word in words)]
        self.path = path
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def read(self) -> dict[str, Any]:
        """The next reply. Raises `RuntimeError` if the process has ended or does not answer."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            raise RuntimeError(f"{self.path}: no answer within {TIMEOUT_S} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.path}: ended with exit status {self._process.wait()}; see its output above")
        found: dict[str, Any] = json.loads(line)
        return found

    def measure(self, what: str) -> float:
        """Tokens per second of "decode" or "prefill"."""
        assert self._process.stdin is not None
        self._process.stdin.write(what.encode() + b"\n")
        return float(self.read()["rate"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of both checkouts, and their ratio: above 1 this one is faster."""
    sides = {"this": options.this, "against": options.against}
    checkouts = {}
    try:
        for side, path in sides.items():
            checkouts[side] = Checkout(path, model, options)
        found: dict[str, Any] = {side: checkout.read() for side, checkout in checkouts.items()}
        rounds: dict[str, dict[str, list[float]]] = {what: {side: [] for side in sides} for what in LEAST}
        for index in range(options.rounds):
            for what, rates in rounds.items():
                for side in list(sides)[:: 1 if index % 2 else -1]:
                    rates[side].append(checkouts[side].measure(what))
    finally:
        for checkout in checkouts.values():
            checkout.close()
    for what, rates in rounds.items():
        medians = {side: statistics.median(values) for side, values in rates.items()}
        pairs = [new / old for new, old in zip(rates["this"], rates["against"], strict=True)]
        ratio = medians["this"] / medians["against"]
        found[what] = {
            f"{side}_tokens_per_second": median for side, median in medians.items()
        } | {
            "ratio": ratio, "ratio_of_best": max(rates["this"]) / max(rates["against"]),
            "ratio_of_rounds": [min(pairs), statistics.median(pairs), max(pairs)], "slower": ratio < LEAST[what],
            "rounds": rates,
        }  # fmt: skip
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{result['device']}, {result['this']['commit']} against {result['against']['commit']}, "
        f"medians of {result['rounds']} rounds, tokens/s",
        "",
        "| model | decode before | now | ratio (rounds) | prompt before | now | ratio (rounds) | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["models"].items():
        if "error" in found:
            lines.append(f"| {name} | failed: {found['error']} | | | | | | |")
            continue
        cells = [name]
        for what in LEAST:
            one = found[what]
            low, _, high = one["ratio_of_rounds"]
            before, now = one["against_tokens_per_second"], one["this_tokens_per_second"]
            cells += [f"{before:,.1f}", f"{now:,.1f}", f"{one['ratio']:.3f} ({low:.3f}–{high:.3f})"]
        slower = [what for what in LEAST if found[what]["slower"]]
        lines.append(f"| {' | '.join(cells)} | {'**slower: ' + ', '.join(slower) + '**' if slower else 'ok'} |")
    return "\n".join(lines)


def commit(path: Path) -> str:
    """The commit that is checked out in `path`; the folder's name outside a repository."""
    words = ["git", "-C", str(path), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return path.name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="PATH", help="the other checkout's folder")
    parser.add_argument("--this", type=Path, default=HERE.parent, metavar="PATH", help="default: this checkout")
    parser.add_argument("--models", nargs="+", metavar="SHAPE:TYPE", help="default: the device's table")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128, help="decoded in a measurement (default 128; CPU: 32)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="default 512; CPU: 128")
    parser.add_argument("--seconds", type=float, help="begin no further model after these; call again for the rest")
    parser.add_argument("--out", type=Path, help="JSON; models that it has already are not measured again")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    if options.device == "cpu":
        options.tokens = options.tokens if "--tokens" in words else 32
        options.prompt_tokens = options.prompt_tokens if "--prompt-tokens" in words else 128
    if options.worker:
        worker(options.worker, options.models[0], options.device, options.tokens, options.prompt_tokens)
        return
    if not options.against:
        parser.error("--against PATH is missing: the checkout to compare with")
    options.this, options.against = options.this.resolve(), options.against.resolve()
    for path in (options.this, options.against):
        if not (path / "benchmarks" / "gpu.py").is_file():
            parser.error(f"{path} has no benchmarks/gpu.py: it is no checkout of numballama")

    result: dict[str, Any] = {
        "what": "two checkouts, random weights", "device": options.device, "rounds": options.rounds,
        "this": {"commit": commit(options.this)}, "against": {"commit": commit(options.against)},
        "models": {},
    }  # fmt: skip
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        same = all(before[key] == result[key] for key in ("device", "this", "against"))
        if not same:
            parser.error(f"{options.out} compares other commits, or on another device; name another file")
        result["models"] = {name: found for name, found in before["models"].items() if "error" not in found}
    started = time.perf_counter()
    for model in options.models or (CPU_MODELS if options.device == "cpu" else GPU_MODELS):
        if model in result["models"]:
            continue
        begun = time.perf_counter()
        if options.seconds and begun - started > options.seconds:
            print(f"{model}: left for another call", file=sys.stderr)
            continue
        try:
            found = compare(model, options)
        except (OSError, RuntimeError) as error:  # the other models are compared all the same
            found = {"error": str(error)}
        found["took_s"] = time.perf_counter() - begun
        result["models"][model] = found
        if options.out:
            partial = options.out.with_name(options.out.name + ".new")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(options.out)
        ratios = found.get("error") or ", ".join(f"{what} {found[what]['ratio']:.3f}" for what in LEAST)
        print(f"{model}: {ratios} ({found['took_s']:.0f} s)", file=sys.stderr, flush=True)
    print(table(result))
    if not options.out:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
