"""`numballama export`: a model in another format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import Error
from .args import MODEL_HELP, config_options, hidden_alias
from .parser import Parser

if TYPE_CHECKING:
    from ..importance import Importance


def add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a model in another format",
        description="Write a model in another format; --dtype converts its matrices. Prints the error of each "
        "converted matrix: root mean squared error over root mean square.",
        examples=(
            "numballama export model.gguf smaller.gguf --to gguf --dtype q4_0",
            "numballama export model.gguf folder --to safetensors --dtype f16",
            "numballama export model.gguf model-q4_k_m.gguf --to gguf --dtype q4_k --calibrate text.txt",
        ),
    )
    export.add_argument("source", metavar="SOURCE", help=MODEL_HELP)
    export.add_argument("target", metavar="TARGET", help="the file to write; for safetensors a directory")
    export.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="llama2c-v0, llama2c-v1, llama2c-v2, kuiper, kuiper-int8, gguf or safetensors",
    )
    export.add_argument(
        "--dtype",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q5_1, q5_0, q4_1, q4_0 or int8, as the format allows; q4_k, q5_k "
        "and q6_k are llama.cpp's Q4_K_M, Q5_K_M and Q6_K (default: unchanged)",
    )
    calibration = export.add_mutually_exclusive_group()
    calibration.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text like those that the model will read: K-quants, q5_0 and q5_1 weigh rounding errors by how "
        "large it makes each input (default: 16 short texts that the model writes itself)",
    )
    calibration.add_argument(
        "--no-calibrate", action="store_true", help="do not run the model: weigh the errors of all inputs alike"
    )
    hidden_alias(export, "--quant", "dtype")
    export.add_argument("--tokenizer", metavar="FILE", help="to put beside the model, where the format can hold it")
    config_options(export)
    export.set_defaults(run=run_export)


def run_export(arguments: argparse.Namespace) -> None:
    from ..export import export_model

    names = ("tokenizer", "rope_pairing", "rope_theta", "norm_eps")
    options = {name: getattr(arguments, name) for name in names}
    notes: list[str] = []
    importance = _importance(arguments, options, notes)
    target = arguments.target, arguments.to, arguments.dtype
    done = export_model(arguments.source, *target, importance=importance, **options)
    print(done)
    if not arguments.quiet:
        for note in (*notes, *done.notes):  # also without a terminal: a log should show what was lost
            print(note, file=sys.stderr)


def _importance(
    arguments: argparse.Namespace, options: dict[str, Any], notes: list[str]
) -> Callable[[], Importance | None] | None:
    """A function that runs the model on a text, by default its own, to learn how much its columns count. It returns
    None, with a note, for a model that writes no text. None for types that do not use it, and with --no-calibrate.
    """
    from ..bench.perplexity import read_text
    from ..files import require_folder
    from ..importance import OWN_TEXTS, OWN_TOKENS, WINDOW, measure, own_text
    from ..model import Model
    from ..quantization.search import SEARCHING

    given = arguments.calibrate is not None
    if arguments.dtype not in SEARCHING:
        if given:
            raise Error(f"--calibrate is for --dtype {', '.join(sorted(SEARCHING))}; found --dtype {arguments.dtype}")
        return None
    if arguments.no_calibrate:
        return None
    text = read_text(arguments.calibrate) if given else None
    room: dict[str, Any] = {} if given else {"max_sequences": OWN_TEXTS, "kv_tokens": OWN_TEXTS * 2 * OWN_TOKENS}

    def run() -> Importance | None:
        require_folder(arguments.target)
        try:
            with Model(arguments.source, device="cpu", context=WINDOW, **room, **options) as model:
                return measure(model, own_text(model) if text is None else text)
        except Error as error:
            if given:
                raise
            notes.append(f"the model wrote no text to calibrate with, so all inputs count alike: {error}")
            return None

    return run
