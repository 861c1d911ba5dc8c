"""The command line: story, generate, chat, inspect, bench, export, doctor. Text on stdout, all else on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import __version__, progress
from ..errors import Error

if TYPE_CHECKING:
    from ..model import Model, Piece

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141
"""Exit codes: an error of ours; Ctrl-C and a closed pipe as shells report them. argparse ends with 2 on wrong usage."""

OPENINGS = {
    "once": "Once upon a time, there was a",
    "dragon": "Once there was a shy dragon who lived near the forest.",
    "rain": "It was a rainy day and Tom wanted to",
    "box": "One day, Mia found a little box in the garden.",
    "friends": "A frog and a mouse were best friends.",
    "moon": "Every night, the little owl looked at the moon.",
}
"""What `story --opening` offers."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = argparse.ArgumentParser(
        prog="numballama",
        description="LLaMA inference compiled from Python.",
        epilog="numballama COMMAND --help explains a command. Text goes to stdout, notes and progress to stderr.",
    )
    main.add_argument("--version", action="version", version=f"numballama {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    story = commands.add_parser(
        "story", help="tell a story", description="Tell a story, from an opening or from nothing."
    )
    opening = story.add_mutually_exclusive_group()
    opening.add_argument("prompt", nargs="?", help="the story's opening; without one the model begins itself")
    opening.add_argument("--opening", choices=OPENINGS, help="begin with one of these instead")
    story.add_argument(
        "--model",
        metavar="FILE",
        help="a model file, directory or hub id (default: the story model inside this package)",
    )
    _model_options(story)
    _sampling_options(story)
    story.add_argument("--length", type=int, default=400, metavar="N", help="at most this many tokens (default 400)")
    story.set_defaults(run=_story)

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt; prints the continuation only.",
        epilog='example: numballama generate llama2_7b.bin --tokenizer tokenizer.model "The sky is"',
    )
    generate.add_argument("model", help="a model file, directory or hub id")
    generate.add_argument("prompt", help="the text to continue; - reads it from stdin")
    _model_options(generate)
    _sampling_options(generate)
    generate.add_argument("--max-tokens", type=int, default=256, metavar="N", help="at most this many (default 256)")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation: in a terminal, or with a message a line from stdin and the answers on stdout.",
        epilog="In the conversation, /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.",
    )
    chat.add_argument("model", help="the model file")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--chat-template", metavar="FILE", help="a jinja2 template in place of the model's own")
    _model_options(chat)
    _sampling_options(chat)
    chat.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of an answer (default 1024)")
    chat.set_defaults(run=_chat)

    inspect = commands.add_parser(
        "inspect",
        help="show what a model file holds",
        description="Config, memory, tensors, graph and plan of a model file. No weights are read.",
    )
    inspect.add_argument(
        "model", nargs="?", help="a model file, directory or hub id (default: the story model inside this package)"
    )
    inspect.add_argument("--tokenizer", metavar="FILE", help="its file or directory, where the model has none")
    inspect.add_argument("--full", action="store_true", help="every layer, not only the first")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Prefill and decode speed, the share of this machine's memory bandwidth, time and memory.",
    )
    bench.add_argument(
        "model", nargs="?", help="a model file, directory or hub id (default: the story model inside this package)"
    )
    _model_options(bench)
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="length of the prompt (default 128)")
    bench.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="runs to take the median of (default 5)")
    bench.add_argument("--profile", action="store_true", help="also a time line of one decode step, kernel by kernel")
    bench.add_argument("--trace", metavar="FILE", help="write that time line as a Chrome trace (implies --profile)")
    bench.add_argument("--json", action="store_true", help="one JSON object instead of text")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser(
        "doctor",
        help="show what this machine offers",
        description="Packages, CPU, GPUs and the cache of compiled kernels: what was found, and what is missing.",
    )
    doctor.set_defaults(run=_doctor)

    export = commands.add_parser(
        "export",
        help="write a model in another format",
        description="Write a model in another format, its matrices in another type if asked for. Prints how far the "
        "numbers of each converted matrix moved: root mean squared error over root mean square.",
        epilog="example: numballama export ~/models/SmolLM2-135M smollm2.gguf --to gguf --quant q8_0",
    )
    export.add_argument("source", help="a model file, directory or hub id")
    export.add_argument("target", help="the file to write; for safetensors a directory")
    export.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="llama2c-v0, llama2c-v1, llama2c-v2, kuiper, kuiper-int8, gguf or safetensors",
    )
    export.add_argument(
        "--quant", metavar="TYPE", help="f32, f16, bf16, q8_0, q4_0 or int8, as the format allows (default: unchanged)"
    )
    export.add_argument("--tokenizer", metavar="FILE", help="to put beside the model, where the format can hold it")
    _silent_options(export)
    export.set_defaults(run=_export)
    return main


def _model_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model")
    group.add_argument("--tokenizer", metavar="FILE", help="its file or directory, where the model has none")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N, or reference (NumPy, slow)")
    group.add_argument(
        "--dtype", help="convert the linear weights: f32, f16, bf16, int8, q8_0 or q4_0 (default: as the file has them)"
    )
    group.add_argument(
        "--context", type=int, metavar="N", help="length of the KV cache in tokens (default: the model's)"
    )
    group.add_argument("--kv-dtype", help="type of the KV cache: f32 (default of the CPU), f16 (of a GPU) or bf16")
    group.add_argument(
        "--activations",
        default="f32",
        help="f32 (default), or int8: round them where weights are quantised, as llama.cpp does (CPU)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU workers (default: all)")
    _silent_options(group)


def _silent_options(group: argparse._ActionsContainer) -> None:
    """What some files leave unsaid, and --quiet."""
    group.add_argument("--rope-pairing", help="interleaved or half, where the file does not say")
    group.add_argument("--rope-theta", type=float, metavar="X", help="RoPE's base, where the file does not say")
    group.add_argument("--norm-eps", type=float, metavar="X", help="epsilon of the norms, where the file does not say")
    group.add_argument("--quiet", action="store_true", help="no notes and no progress on stderr")


def _sampling_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default 0.8)")
    group.add_argument(
        "--top-k", type=int, default=40, metavar="N", help="choose among the N likeliest; 0 off (default 40)"
    )
    group.add_argument(
        "--top-p", type=float, default=0.95, metavar="X", help="among the likeliest that sum to X (0.95)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="drop what is X times less likely than the best"
    )
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="above 1 avoids recent tokens")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def _load(arguments: argparse.Namespace) -> Model:
    from .. import compile

    names = ("tokenizer", "device", "dtype", "context", "kv_dtype", "threads", "rope_pairing", "rope_theta", "norm_eps")
    return compile(arguments.model, **{name: getattr(arguments, name) for name in (*names, "activations")})


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {n: getattr(arguments, n) for n in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")}


def _show(pieces: Iterable[Piece], out: TextIO) -> None:
    """Print pieces as they come, then on a terminal how fast that was. Ctrl-C keeps what is there."""
    count, started, last = 0, time.perf_counter(), None
    try:
        for last in pieces:
            count += 1
            out.write(last.text)
            out.flush()
    finally:
        out.write("\n")
        out.flush()
        if last is not None and count > 1:
            seconds = time.perf_counter() - started
            progress.info(f"\n{count} tokens in {seconds:.2f} s, {last.tokens_per_second:,.0f} tokens/s")


def _story(arguments: argparse.Namespace) -> None:
    opening = OPENINGS[arguments.opening] if arguments.opening else arguments.prompt
    with _load(arguments) as model:
        pieces = model.stream(opening, max_tokens=arguments.length, **_sampling(arguments))
        sys.stdout.write(opening or "")
        _show(pieces, sys.stdout)


def _generate(arguments: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with _load(arguments) as model:
        options = {**_sampling(arguments), "max_tokens": arguments.max_tokens, "stop": arguments.stop}
        _show(model.stream(prompt, **options), sys.stdout)


def _chat(arguments: argparse.Namespace) -> None:
    template = None
    if arguments.chat_template is not None:
        try:
            template = Path(arguments.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise Error(f"{arguments.chat_template}: cannot be read: {error}") from None
    with _load(arguments) as model:
        from .chat import converse

        converse(model.chat(arguments.system, template), {**_sampling(arguments), "max_tokens": arguments.max_tokens})


def _inspect(arguments: argparse.Namespace) -> None:
    from .. import inspect

    found = inspect(arguments.model, arguments.tokenizer)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found.report(arguments.full))


def _export(arguments: argparse.Namespace) -> None:
    from ..export import export_model

    names = ("tokenizer", "rope_pairing", "rope_theta", "norm_eps")
    options = {name: getattr(arguments, name) for name in names}
    done = export_model(arguments.source, arguments.target, arguments.to, arguments.quant, **options)
    print(done)
    for note in () if arguments.quiet else done.notes:  # what is lost on the way is worth a line in a log as well
        print(note, file=sys.stderr)


def _bench(arguments: argparse.Namespace) -> None:
    with _load(arguments) as model:
        from ..bench import trace
        from ..bench.benchmark import bench
        from ..bench.profiler import profile, require_plan

        profiled = arguments.profile or arguments.trace is not None
        if profiled:
            require_plan(model)
        measured = bench(model, arguments.prompt_tokens, arguments.tokens, arguments.repeats)
        result = measured.to_dict()
        if profiled:
            position = arguments.prompt_tokens + arguments.tokens // 2
            found = profile(model, position, measured.memory_bandwidth_bytes_per_second or 0.0)
            result["profile"] = found.to_dict()
            if arguments.trace is not None:
                trace.write_trace(found, arguments.trace)
    print(json.dumps(result, indent=2) if arguments.json else measured.as_text())
    if profiled and not arguments.json:
        print()
        if sys.stdout.isatty():
            trace.show(found)
        else:
            print(trace.as_text(found))


def _doctor(arguments: argparse.Namespace) -> None:
    from .doctor import examine

    print(examine())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = parser().parse_args(arguments)
    progress.quiet = getattr(parsed, "quiet", False)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that lacks a character shows another, and the story goes on
    command: Callable[[argparse.Namespace], None] = parsed.run
    try:
        command(parsed)
    except Error as error:
        print(f"numballama: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return BROKEN_PIPE
    return 0
