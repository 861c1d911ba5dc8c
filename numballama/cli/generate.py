"""`numballama generate` and `numballama story`: a text, printed as it is generated."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .. import progress
from ..errors import Error
from ..sampling import SamplingParams
from .args import (
    MODEL_HELP,
    STORY_MODEL,
    hidden_alias,
    in_place_of,
    load,
    model_options,
    sampling_options,
    sampling_params,
)
from .batch import run_batch
from .parser import Parser
from .streams import read_stdin

if TYPE_CHECKING:
    from ..generate import GenerationResponse

OPENINGS = {
    "once": "Once upon a time, there was a",
    "dragon": "Once there was a shy dragon who lived near the forest.",
    "rain": "It was a rainy day and Tom wanted to",
    "box": "One day, Mia found a little box in the garden.",
    "friends": "A frog and a mouse were best friends.",
    "moon": "Every night, the little owl looked at the moon.",
}
"""Choices of `story --opening`."""
STORY_DEFAULTS = SamplingParams(max_tokens=400)


def add_story(commands: argparse._SubParsersAction[Parser]) -> None:
    story = commands.add_parser(
        "story",
        help="tell a story",
        description="Tell a story, from an opening or from nothing.",
        examples=(
            "numballama story --temperature 0",
            'numballama story "Tom had a red boat." --seed 3 --max-tokens 100',
        ),
    )
    opening = story.add_mutually_exclusive_group()
    opening.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the story's opening; without one the model begins itself"
    )
    opening.add_argument("--opening", choices=OPENINGS, help="begin with one of these instead")
    story.add_argument("--model", metavar="FILE", help=f"{MODEL_HELP} ({STORY_MODEL})")
    model_options(story)
    sampling_options(story, STORY_DEFAULTS)
    hidden_alias(story, "--length", "max_tokens", type=int)
    story.set_defaults(run=run_story)


def add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt; prints the continuation only. Or answer all prompts of a file.",
        examples=(
            'numballama generate model.gguf "The sky is" --max-tokens 50',
            "numballama generate model.gguf - < prompt.txt",
            "numballama generate model.gguf --input prompts.jsonl --output answers.jsonl",
            'numballama generate llama2_7b.bin "The sky is" --tokenizer tokenizer.model',
        ),
    )
    generate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    prompt = generate.add_argument(
        "prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin; left out with --input"
    )
    batch = generate.add_argument_group("many prompts")
    batch.add_argument(
        "--input",
        metavar="FILE",
        action=in_place_of(prompt),
        help='JSON Lines: a text, or {"prompt" or "messages", "id", options such as "max_tokens"} a line; - is stdin',
    )
    batch.add_argument(
        "--output", metavar="FILE", help="JSON Lines to write; what it has already is not done again; - is stdout"
    )
    batch.add_argument(
        "--max-sequences", type=int, default=8, metavar="N", help="prompts answered at a time (default 8)"
    )
    model_options(generate)
    sampling_options(generate)
    generate.set_defaults(run=run_generate)


def run_story(arguments: argparse.Namespace) -> None:
    opening = OPENINGS[arguments.opening] if arguments.opening else arguments.prompt
    params = sampling_params(arguments)
    with load(arguments) as model:
        responses = model.stream(opening, params=params)
        sys.stdout.write(opening or "")
        show(responses, sys.stdout)


def run_generate(arguments: argparse.Namespace) -> None:
    if arguments.input or arguments.output:
        run_file(arguments)
        return
    prompt = read_stdin() if arguments.prompt == "-" else arguments.prompt
    params = sampling_params(arguments)
    with load(arguments) as model:
        show(model.stream(prompt, params=params), sys.stdout)


def run_file(arguments: argparse.Namespace) -> None:
    """Answer the prompts of a file. Raises `Error` after the last answer when some prompts were refused."""
    if arguments.prompt is not None or not (arguments.input and arguments.output):
        raise Error("--input and --output go together, and without a prompt")
    params = sampling_params(arguments)
    with load(arguments, max_sequences=arguments.max_sequences) as model:
        source = Path("/dev/stdin" if arguments.input == "-" else arguments.input)
        target = Path("/dev/stdout" if arguments.output == "-" else arguments.output)
        failed = run_batch(model, source, target, params)
    if failed:
        raise Error(f'{failed:,} prompts were refused: their lines of {arguments.output} have "error"')


def show(responses: Iterable[GenerationResponse], out: TextIO) -> None:
    """Print text as it is generated. On a terminal, print the speed after it. Text already printed survives Ctrl-C."""
    count, started, last = 0, time.perf_counter(), None
    try:
        for last in responses:
            count += 1
            out.write(last.text)
            out.flush()
    finally:
        out.write("\n")
        out.flush()
        if last is not None and count > 1:
            seconds = time.perf_counter() - started
            progress.info(f"\n{count} tokens in {seconds:.2f} s, {last.tokens_per_second:,.0f} tokens/s")
