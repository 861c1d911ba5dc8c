"""`numballama perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import contextlib
import json

from ..errors import UnsupportedError
from ..quantization.policy import DTYPES
from .args import MODEL_HELP, listed, load, model_options
from .parser import Parser

DESCRIPTION = (
    "Perplexity of a text by llama.cpp's windows: the text is cut into windows of --context tokens, each begins with "
    "an empty cache, and the predictions of its second half are counted. Lower is better."
)


def add_perplexity(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser(
        "perplexity",
        help="measure how well a model predicts a text",
        description=DESCRIPTION,
        examples=(
            "numballama perplexity model.gguf text.txt --chunks 20",
            "numballama perplexity model.gguf text.txt --dtype f16,q8_0,q4_0",
            "numballama perplexity model-q4_0.gguf text.txt --kl model-f16.gguf --json",
        ),
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("file", metavar="FILE", help="a text in UTF-8, of some thousand words")
    dtypes = (
        "convert the linear weights: f32, f16, bf16, int8, q8_0 or q4_0; a list (f16,q8_0,q4_0) gives a table, with "
        "the KL divergence from the first"
    )
    model_options(
        command,
        dtype={"type": listed(str), "metavar": "TYPE[,TYPE]", "help": dtypes},
        context={"default": 512, "help": "tokens of a window (default 512, as llama.cpp's)"},
    )
    command.add_argument("--chunks", type=int, metavar="N", help="read N windows at most (default: all)")
    command.add_argument(
        "--kl",
        metavar="BASE",
        help="also the KL divergence from this model, a file, directory or hub id; both are in memory at once",
    )
    command.add_argument(
        "--json", action="store_true", help="JSON instead of text: an object, or a list for several types"
    )
    command.set_defaults(run=run_perplexity)


def run_perplexity(arguments: argparse.Namespace) -> None:
    from ..bench.perplexity import Perplexity, as_table, perplexity, read_text

    text = read_text(arguments.file)
    dtypes: list[str | None] = arguments.dtype or [None]
    for dtype in dtypes:  # before anything is measured
        if dtype not in (None, *DTYPES):
            raise UnsupportedError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPES)}")
    found: dict[str, Perplexity] = {}
    with contextlib.ExitStack() as opened:
        base = None
        if arguments.kl is not None:
            of_base = argparse.Namespace(**vars(arguments) | {"model": arguments.kl})
            base = opened.enter_context(load(of_base, dtype=None))
        for number, dtype in enumerate(dtypes):
            with contextlib.ExitStack() as closing:
                is_base = base is None and number < len(dtypes) - 1  # of those to come: it stays open
                model = (opened if is_base else closing).enter_context(load(arguments, dtype=dtype))
                found[dtype or ""] = perplexity(model, text, arguments.context, arguments.chunks, base)
                base = base or model
    if arguments.json:
        results = [{"dtype": dtype or None} | each.to_dict() for dtype, each in found.items()]
        print(json.dumps(results if len(dtypes) > 1 else results[0], indent=2))
    elif len(dtypes) > 1:
        print(as_table(found))
    else:
        print(next(iter(found.values())).as_text())
