"""`numballama bench`: speed and memory."""

from __future__ import annotations

import argparse
import json
import sys

from .args import MODEL_HELP, STORY_MODEL, hidden_alias, load, model_options
from .parser import Parser


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Prefill and decode speed, the share of this machine's memory bandwidth, time and memory.",
        examples=(
            "numballama bench --prompt-tokens 64 --max-tokens 32",
            "numballama bench model.gguf --dtype q8_0 --json",
        ),
    )
    bench.add_argument("model", nargs="?", help=f"{MODEL_HELP} ({STORY_MODEL})")
    model_options(bench)
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="length of the prompt (default 128)")
    bench.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    hidden_alias(bench, "--tokens", "max_tokens", type=int)
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="runs to take the median of (default 5)")
    bench.add_argument("--profile", action="store_true", help="also a time line of one decode step, kernel by kernel")
    bench.add_argument("--trace", metavar="FILE", help="write that time line as a Chrome trace (implies --profile)")
    bench.add_argument("--json", action="store_true", help="one JSON object instead of text")
    bench.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> None:
    if arguments.trace is not None:
        from ..files import require_folder

        require_folder(arguments.trace)
    with load(arguments) as model:
        from ..bench import trace
        from ..bench.benchmark import bench
        from ..bench.profiler import profile, require_plan
        from ..visualize.profile import show

        profiled = arguments.profile or arguments.trace is not None
        if profiled:
            require_plan(model)
        measured = bench(model, arguments.prompt_tokens, arguments.max_tokens, arguments.repeats)
        result = measured.to_dict()
        if profiled:
            position = arguments.prompt_tokens + arguments.max_tokens // 2
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
