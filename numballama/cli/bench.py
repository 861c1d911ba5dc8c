"""`numballama bench`: speed and memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..files import atomic_write, require_folder
from ..validation import whole_number as at_least
from .args import MODEL_HELP, STORY_MODEL, hidden_alias, listed, load, model_options
from .parser import Parser, whole_number

if TYPE_CHECKING:
    from ..bench.benchmark import BenchResult
    from ..bench.sweep import Speed
    from ..model import Model


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Prefill and decode speed, the share of this machine's memory bandwidth, time and memory. Where an "
        "option takes N[,N], each combination of the lists is measured.",
        examples=(
            "numballama bench --prompt-tokens 64 --max-tokens 32",
            "numballama bench model.gguf --dtype q8_0 --json",
            "numballama bench model.gguf --profile",
            "numballama bench model.gguf --gpus 1,2",
            "numballama bench model.gguf --context 512,2048 --sequences 1,4,16 --csv speed.csv --svg speed.svg",
        ),
    )
    bench.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} ({STORY_MODEL})")
    numbers: dict[str, Any] = {"type": listed(whole_number), "metavar": "N[,N]"}
    model_options(bench, context=numbers, threads=numbers, gpus=numbers | {"default": [1]})
    bench.add_argument("--prompt-tokens", default=[128], help="length of the prompt (default 128)", **numbers)
    bench.add_argument("--sequences", default=[1], help="sequences that run at once (default 1)", **numbers)
    bench.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    hidden_alias(bench, "--tokens", "max_tokens", type=int)
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="runs to take the median of (default 5)")
    bench.add_argument(
        "--compare",
        choices=["llama.cpp"],
        help="also measure llama.cpp on the same GGUF file, one sequence (needs llama-cpp-python)",
    )
    bench.add_argument(
        "--profile",
        action="store_true",
        help="also where the time goes in a decode step and in the prompt: parts and kernels",
    )
    bench.add_argument("--trace", metavar="FILE", help="write the steps as a Chrome trace (implies --profile)")
    bench.add_argument("--json", action="store_true", help="one JSON object instead of text")
    bench.add_argument("--csv", metavar="FILE", help="write a line for each combination")
    bench.add_argument("--svg", metavar="FILE", help="write a picture of the speeds")
    bench.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> None:
    for path in (arguments.trace, arguments.csv, arguments.svg):
        if path is not None:
            require_folder(path)
    for name in (
        "gpus",
        "context",
        "threads",
        "prompt_tokens",
        "sequences",
        "max_tokens",
    ):  # before anything is measured
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                at_least(name, value, 1)
    if max(arguments.gpus) > 1:
        if arguments.compare:
            raise Error("--compare measures both on one GPU: leave out --gpus")
        from ..backend import choose_device

        choose_device(arguments.device, max(arguments.gpus))  # now: fewer GPUs are measured first
    lists = (arguments.gpus, arguments.context, arguments.threads, arguments.prompt_tokens, arguments.sequences)
    several = any(values is not None and len(values) > 1 for values in lists)
    if several or arguments.compare or arguments.csv or arguments.svg:
        _sweep(arguments)
    else:
        _once(arguments)


def _load(arguments: argparse.Namespace, context: int | None, threads: int | None, gpus: int) -> Model:
    return load(arguments, context=context, threads=threads, gpus=gpus, max_sequences=max(arguments.sequences))


def _sweep(arguments: argparse.Namespace) -> None:
    from ..bench.llama_cpp import require_llama_cpp
    from ..bench.sweep import Speed, sweep

    if arguments.profile or arguments.trace is not None:
        raise Error("--profile and --trace take one combination, without --compare, --csv and --svg")
    if arguments.compare:
        require_llama_cpp()  # before anything is measured
        if arguments.dtype is not None:
            raise Error("--compare runs the file as it is in both: leave out --dtype, or export a file of that type")

    def open_model(context: int | None, threads: int | None, gpus: int) -> Model:
        with contextlib.ExitStack() as closing:
            model = closing.enter_context(_load(arguments, context, threads, gpus))
            if arguments.compare:
                require_llama_cpp(model.path, model.device.startswith("cuda"))
            files.append(model.path)
            closing.pop_all()
        return model

    files: list[Path] = []
    results: list[BenchResult] = []
    speeds: list[Speed] = []
    try:
        for result in sweep(
            open_model,
            gpus=arguments.gpus,
            contexts=arguments.context or (None,),
            threads=arguments.threads or (None,),
            prompts=arguments.prompt_tokens,
            sequences=arguments.sequences,
            tokens=arguments.max_tokens,
            repeats=arguments.repeats,
        ):
            results.append(result)
            speeds.append(Speed.of(result))
        if arguments.compare:
            on_gpu = results[0].device.startswith("cuda")
            speeds = _beside_llama_cpp(speeds, files[0], on_gpu, arguments.repeats)
    finally:  # what was measured before an error is not lost
        if results:
            _show(arguments, results[0], speeds)


def _show(arguments: argparse.Namespace, first: BenchResult, speeds: list[Speed]) -> None:
    from ..bench.sweep import as_csv, as_scaling_table, as_table, draw, scaling, to_dict

    title = f"{first.model} on {first.device}, {', '.join(first.types)}"
    title += ", batch-invariant" if first.batch_invariant else ""
    if arguments.json:
        print(json.dumps(to_dict(first, speeds), indent=2))
    else:
        print(f"{title}\n{as_table(speeds)}")
        if found := scaling(speeds):
            print(f"\n{as_scaling_table(found)}")
    for path, text in ((arguments.csv, as_csv(speeds)), (arguments.svg, draw(speeds, title))):
        if path is not None:
            with atomic_write(path) as file:
                file.write(text.encode())


def _beside_llama_cpp(speeds: list[Speed], path: Path, gpu: bool, repeats: int) -> list[Speed]:
    """Each measurement of one sequence, followed by llama.cpp's."""
    from ..bench.llama_cpp import LlamaCpp

    with contextlib.closing(LlamaCpp(path, gpu)) as other:
        found: list[Speed] = []
        for ours in speeds:
            found.append(ours)
            if ours.sequences == 1:
                threads = 1 if gpu else ours.threads
                found.append(other.measure(ours.context, threads, ours.prompt_tokens, ours.tokens, repeats))
        return found


def _once(arguments: argparse.Namespace) -> None:
    context, threads = (values and values[0] for values in (arguments.context, arguments.threads))
    prompt_tokens, sequences = arguments.prompt_tokens[0], arguments.sequences[0]
    with _load(arguments, context, threads, arguments.gpus[0]) as model:
        from ..bench import trace
        from ..bench.benchmark import bench
        from ..bench.profiler import profile, require_plan
        from ..visualize.profile import show

        profiled = arguments.profile or arguments.trace is not None
        if profiled:
            require_plan(model)
        measured = bench(model, prompt_tokens, arguments.max_tokens, arguments.repeats, sequences)
        result = measured.to_dict()
        if profiled:
            position = prompt_tokens + arguments.max_tokens // 2
            found = profile(model, position, measured.memory_bandwidth_bytes_per_second)
            result["profile"] = found.to_dict()
            if arguments.trace is not None:
                trace.write_trace(found, arguments.trace)
    print(json.dumps(result, indent=2) if arguments.json else measured.as_text())
    if profiled and not arguments.json:
        print()
        if sys.stdout.isatty():
            show(found)
        else:
            print(found)
