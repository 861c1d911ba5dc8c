"""`numballama inspect`: what a model file holds."""

from __future__ import annotations

import argparse
import json

from ..files import atomic_write
from .args import MODEL_HELP, STORY_MODEL, tokenizer_option
from .parser import Parser


def add_inspect(commands: argparse._SubParsersAction[Parser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what a model file holds",
        description="Config, memory, tensors, graph and plan of a model file. No weights are read.",
        examples=("numballama inspect", "numballama inspect model.gguf --full"),
    )
    inspect.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} ({STORY_MODEL})")
    tokenizer_option(inspect)
    inspect.add_argument(
        "--context", type=int, metavar="N", help="memory for a context of N tokens (default: the model's)"
    )
    inspect.add_argument(
        "--kv-dtype", metavar="TYPE", help="memory for a KV cache of this type: f32 (default), f16, bf16 or q8_0"
    )
    inspect.add_argument(
        "--dtype", metavar="TYPE", help="memory with linear weights converted to this type, as --dtype of generate"
    )
    inspect.add_argument(
        "--max-sequences", type=int, default=1, metavar="N", help="memory for N sequences at a time (default 1)"
    )
    inspect.add_argument("--full", action="store_true", help="every layer, not only the first")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    inspect.add_argument("--html", metavar="FILE", help="write a page for a browser, with drawings of graph and plan")
    inspect.set_defaults(run=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> None:
    from .. import inspect

    options = {name: getattr(arguments, name) for name in ("context", "kv_dtype", "dtype", "max_sequences")}
    inspection = inspect(arguments.model, arguments.tokenizer, **options)
    if arguments.html is not None:
        with atomic_write(arguments.html) as file:
            file.write(inspection.page().encode())
    if arguments.json:
        print(json.dumps(inspection.to_dict(), indent=2))
    elif arguments.html is None:
        print(inspection.report(arguments.full))
