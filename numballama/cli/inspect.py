"""`numballama inspect`: what a model file holds."""

from __future__ import annotations

import argparse
import json

from .args import MODEL_HELP, STORY_MODEL, tokenizer_option
from .parser import Parser


def add_inspect(commands: argparse._SubParsersAction[Parser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what a model file holds",
        description="Config, memory, tensors, graph and plan of a model file. No weights are read.",
        examples=("numballama inspect", "numballama inspect model.gguf --full"),
    )
    inspect.add_argument("model", nargs="?", help=f"{MODEL_HELP} ({STORY_MODEL})")
    tokenizer_option(inspect)
    inspect.add_argument("--full", action="store_true", help="every layer, not only the first")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    inspect.set_defaults(run=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> None:
    from .. import inspect

    inspection = inspect(arguments.model, arguments.tokenizer)
    print(json.dumps(inspection.to_dict(), indent=2) if arguments.json else inspection.report(arguments.full))
