"""Options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from ..sampling import DEFAULTS, SamplingParams

if TYPE_CHECKING:
    from ..model import Model

STORY_MODEL = "default: the story model inside this package"
MODEL_HELP = "a model file, directory or hub id"

MODEL_OPTIONS = (
    "tokenizer", "device", "dtype", "context", "kv_dtype", "threads", "rope_pairing", "rope_theta", "norm_eps",
    "activations",
)  # fmt: skip
"""Arguments of `compile` that are options of the same name."""

SAMPLING_HELP = {
    "max_tokens": "generate at most N tokens",
    "temperature": "0 always takes the likeliest token, higher is more random",
    "top_k": "choose among the N likeliest tokens; 0: off",
    "top_p": "choose among the likeliest tokens that sum to X; 1: off",
    "min_p": "drop tokens less likely than X times the likeliest; 0: off",
    "repetition_penalty": "above 1 makes recent tokens less likely",
    "seed": "the same seed gives the same text",
    "stop": "end before this text; may be repeated",
    "ignore_eos": "go on after the end of the text",
    "special": "special tokens spelled out in the prompt are tokens",
}
"""Fields of `SamplingParams` that are options, with their help."""


def model_options(command: argparse.ArgumentParser) -> None:
    """Add the options that `load` passes to `compile`."""
    group = command.add_argument_group("model")
    tokenizer_option(group)
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N, or reference (NumPy, slow)")
    group.add_argument(
        "--dtype", help="convert the linear weights: f32, f16, bf16, int8, q8_0 or q4_0 (default: as the file has them)"
    )
    group.add_argument("--context", type=int, metavar="N", help="size of the KV cache in tokens (default: the model's)")
    group.add_argument("--kv-dtype", help="type of the KV cache: f32 (default on the CPU), f16 (on a GPU), bf16 or q8_0")
    group.add_argument(
        "--activations",
        default="f32",
        help="f32 (default), or int8: round them where weights are quantised, as llama.cpp does (CPU)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU workers (default: all)")
    config_options(group)


def tokenizer_option(group: argparse._ActionsContainer) -> None:
    group.add_argument("--tokenizer", metavar="FILE", help="its file or directory, for a model without one")


def config_options(group: argparse._ActionsContainer) -> None:
    """Add options for values that some model files lack, and --quiet."""
    group.add_argument(
        "--rope-pairing",
        help="interleaved (llama.cpp: normal) or half (neox), for a file that does not say",
    )
    group.add_argument("--rope-theta", type=float, metavar="X", help="RoPE's base, for a file that does not say")
    group.add_argument("--norm-eps", type=float, metavar="X", help="epsilon of the norms, for a file that does not say")
    group.add_argument("--quiet", action="store_true", help="no notes and no progress on stderr")


def sampling_options(command: argparse.ArgumentParser, defaults: SamplingParams = DEFAULTS) -> None:
    """Add an option for each field in SAMPLING_HELP. Its default is the value in `defaults`."""
    group = command.add_argument_group("sampling")
    types = {field.name: str(field.type) for field in dataclasses.fields(SamplingParams)}
    for name, text in SAMPLING_HELP.items():
        option, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        if types[name] == "bool":
            group.add_argument(option, action="store_true", help=text)
        elif name == "stop":
            group.add_argument(option, action="append", default=[], metavar="TEXT", help=text)
        else:
            kind, metavar = (int, "N") if types[name].startswith("int") else (float, "X")
            text += "" if default is None else f" (default {default:g})"
            group.add_argument(option, type=kind, default=default, metavar=metavar, help=text)
    hidden_alias(group, "--repeat-penalty", "repetition_penalty", type=float)


def hidden_alias(group: argparse._ActionsContainer, option: str, dest: str, **options: Any) -> None:
    """Accept the old name of an option, hidden in --help."""
    group.add_argument(option, dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The `SamplingParams` of the sampling options. Raises `Error` for a value out of range."""
    return SamplingParams(**{name: getattr(arguments, name) for name in SAMPLING_HELP})


def load(arguments: argparse.Namespace) -> Model:
    """Compile `arguments.model` with the model options."""
    from .. import compile

    return compile(arguments.model, **{name: getattr(arguments, name) for name in MODEL_OPTIONS})
