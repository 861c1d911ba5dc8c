"""`numballama explain`: what a model computes for a text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from ..explain.explanation import LOGPROBS
from ..files import atomic_write, require_folder
from .args import MODEL_HELP, SAMPLING_HELP, load, model_options
from .parser import Parser
from .streams import read_stdin

if TYPE_CHECKING:
    from ..model import Model
    from ..parallel.backend import RanksBackend


def add_explain(commands: argparse._SubParsersAction[Parser]) -> None:
    explain = commands.add_parser(
        "explain",
        help="show what a model computes for a text",
        description="Each token's probability and the likeliest in its place, attention, and each layer's guess.",
        examples=(
            'numballama explain model.gguf "The capital of France is Paris."',
            "numballama explain owner/name:Q4_K_M - --layer 3 --head 1 --html page.html < text.txt",
        ),
    )
    explain.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    explain.add_argument("prompt", metavar="TEXT", help="the text to explain; - reads it from stdin")
    explain.add_argument(
        "--logprobs", type=int, default=LOGPROBS, metavar="N", help=f"likeliest tokens to show (default {LOGPROBS})"
    )
    explain.add_argument("--layer", type=int, metavar="N", help="layer whose attention is shown (default: the last)")
    explain.add_argument("--head", type=int, metavar="N", help="its head (default: the mean of all)")
    explain.add_argument("--no-lens", dest="lens", action="store_false", help="no guess of each layer: takes less time")
    explain.add_argument("--special", action="store_true", help=SAMPLING_HELP["special"].replace("prompt", "text"))
    explain.add_argument("--html", metavar="FILE", help="write a page instead")
    explain.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    model_options(explain)
    explain.set_defaults(run=run_explain)


def run_explain(arguments: argparse.Namespace) -> None:
    if arguments.html is not None:
        require_folder(arguments.html)
    text = read_stdin() if arguments.prompt == "-" else arguments.prompt
    with load(arguments) as model:
        given = model.require_tokenizer().encode(text, special=True) if arguments.special else text
        found = model.explain(
            given, arguments.logprobs, layer=arguments.layer, head=arguments.head, lens=arguments.lens
        )
        ranks = _ranks(model) if model.gpus > 1 else ""
    if arguments.html is not None:
        with atomic_write(arguments.html) as file:
            file.write(found.to_html().encode())
    if arguments.json:
        print(found.to_json())
    elif arguments.html is None:
        found.show()
        if ranks:
            print(f"\n{ranks}")


def _ranks(model: Model) -> str:
    """What the GPUs exchange, and the plan of the first one; of the layers only the first."""
    from ..inspection import first_layer
    from ..parallel.communication import exchanged_text

    shards = cast("RanksBackend", model.backend).shards(model.graph)
    lines = [f"attention and the guesses of layers are split over {model.gpus} GPUs: --gpus 1 shows them", ""]
    lines += [exchanged_text([shard.graph for shard in shards]), "", *first_layer(str(model.plan))]
    return "\n".join(lines)
