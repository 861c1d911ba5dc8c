"""Options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import Error
from ..files import read_all
from ..sampling import DEFAULTS, SamplingParams
from .parser import whole_number

if TYPE_CHECKING:
    from ..model import Model

_T = TypeVar("_T")

STORY_MODEL = "default: the story model inside this package"
MODEL_HELP = "a model file, directory or hub id (owner/name, owner/name:Q4_K_M)"

MODEL_OPTIONS = (
    "tokenizer", "device", "dtype", "context", "kv_dtype", "threads", "rope_pairing", "rope_theta", "norm_eps",
    "activations", "batch_invariant", "gpus",
)  # fmt: skip
"""Arguments of `compile` that are options of the same name."""

SAMPLING_HELP = {
    "max_tokens": "generate at most N tokens; -1: until the context is full",
    "temperature": "0 always takes the likeliest token, higher is more random",
    "top_k": "choose among the N likeliest tokens; 0: off",
    "top_p": "choose among the likeliest tokens that sum to X; 1: off",
    "min_p": "drop tokens less likely than X times the likeliest; 0: off",
    "repetition_penalty": "above 1 makes recent tokens less likely",
    "seed": "the same seed gives the same text; -1: a random one",
    "stop": "end before this text; may be repeated",
    "ignore_eos": "go on after an end-of-sequence token",
    "special": "special tokens spelled out in the prompt (<|im_end|>) are tokens, not text",
}
"""Fields of `SamplingParams` that are options, with their help."""


def model_options(command: argparse.ArgumentParser, **others: dict[str, Any]) -> None:
    """Add the options that `load` passes to `compile`. `others` replace what the options dtype, context, threads and
    gpus are by default: help, type and default.
    """
    group = command.add_argument_group("model")
    tokenizer_option(group)
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N, or reference (NumPy, slow)")
    cards: dict[str, Any] = {"type": int, "default": 1, "metavar": "N"}
    cards |= {"help": "GPUs that share the model, from --device on (default 1)"}
    group.add_argument("--gpus", **cards | others.get("gpus", {}))
    dtypes = "convert the linear weights: f32, f16, bf16, int8, q8_0 or q4_0 (default: as the file has them)"
    group.add_argument("--dtype", **{"help": dtypes, "metavar": "TYPE"} | others.get("dtype", {}))
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    size = number | {"help": "size of the KV cache in tokens (default: the model's)"}
    group.add_argument("--context", **size | others.get("context", {}))
    group.add_argument(
        "--kv-dtype",
        metavar="TYPE",
        help="type of the KV cache: f32 (default on CPUs), f16 (default on GPUs), bf16 or q8_0",
    )
    group.add_argument(
        "--activations",
        default="f32",
        metavar="TYPE",
        help="f32 (default), or int8: round them where weights are quantised, as llama.cpp does (CPU)",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same bits alone and beside other sequences, by one family of kernels; prompts take longer",
    )
    workers = number | {"help": "CPU workers (default: all)"}
    group.add_argument("--threads", **workers | others.get("threads", {}))
    config_options(group)


def tokenizer_option(group: argparse._ActionsContainer) -> None:
    group.add_argument("--tokenizer", metavar="FILE", help="its file or directory, for a model without one")


def config_options(group: argparse._ActionsContainer) -> None:
    """Add options for values that some model files lack, and --quiet."""
    group.add_argument(
        "--rope-pairing",
        metavar="KIND",
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
            whole = types[name].startswith("int")
            kind = _max_tokens if name == "max_tokens" else int if whole else float
            metavar = "N" if whole else "X"
            text += "" if default is None else f" (default {default:g})"
            group.add_argument(option, type=kind, default=default, metavar=metavar, help=text)
    hidden_alias(group, "--repeat-penalty", "repetition_penalty", type=float)


def _max_tokens(text: str) -> int | None:
    """A number of tokens; -1, as in llama.cpp, is no limit."""
    number = whole_number(text)
    return None if number == -1 else number


def listed(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """The type of an option that takes a list: values with commas between them, each read by `kind`."""

    def read(text: str) -> list[_T]:
        return [kind(each) for each in text.split(",")]

    read.__name__ = f"{kind.__name__},…"  # argparse names it: "invalid int,… value"
    return read


def in_place_of(positional: argparse.Action) -> type[argparse.Action]:
    """An option with which a positional argument need not be given. With nargs="?" it could not follow an option."""

    class InPlaceOf(argparse.Action):
        def __call__(
            self, parser: object, namespace: argparse.Namespace, values: object, option: object = None
        ) -> None:
            positional.required = False
            setattr(namespace, self.dest, values)

    return InPlaceOf


def hidden_alias(group: argparse._ActionsContainer, option: str, dest: str, **options: Any) -> None:
    """Accept the old name of an option, hidden in --help."""
    group.add_argument(option, dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The `SamplingParams` of the sampling options. Raises `Error` for a value out of range."""
    return SamplingParams(**{name: getattr(arguments, name) for name in SAMPLING_HELP})


def load(arguments: argparse.Namespace, **options: Any) -> Model:
    """Compile `arguments.model` with the model options. `options` are arguments of `compile` beside or instead."""
    from .. import compile

    return compile(arguments.model, **{name: getattr(arguments, name) for name in MODEL_OPTIONS} | options)


# Chat templates


def template_options(command: argparse.ArgumentParser) -> None:
    """Add --chat-template and --template-arg."""
    group = command.add_argument_group("chat template")
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a file in jinja2 in place of the model's own template, or the name of one of the model's (tool_use)",
    )
    group.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable for the template, the value in JSON (enable_thinking=false); may be repeated",
    )


def text_of_file(path: str) -> str:
    """The text of a UTF-8 file, without its mark. Raises `Error` for one that is unreadable, no text or too large."""
    try:
        with open(path, "rb") as file:
            return read_all(file, path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise Error(f"{path}: cannot be read: {reason(error)}") from None


def read_template(argument: str | None) -> str | None:
    """The template of --chat-template: the text of a file, or a name. Raises `Error` for a file that is no text."""
    if argument is None or (re.fullmatch(r"[\w-]+", argument) and not Path(argument).exists()):
        return argument
    return text_of_file(argument).replace("\r\n", "\n")


def template_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Name → value of all --template-arg. Raises `Error` for one that is not NAME=VALUE.

    A value that is not JSON is a text. True, False and None are what they are in Python.
    """
    found: dict[str, Any] = {}
    for argument in arguments.template_arg:
        name, equals, value = argument.partition("=")
        if name in _NOT_VARIABLES:
            raise Error(f"--template-arg cannot set {name}: it is no variable of templates")
        if not equals or not name.isidentifier():
            raise Error(f"--template-arg must be NAME=VALUE, such as enable_thinking=false, found {argument!r}")
        try:
            found[name] = _PYTHON[value] if value in _PYTHON else json.loads(value)
        except (ValueError, RecursionError) as error:
            if value.lstrip()[:1] in ("{", "[", '"'):
                raise Error(f"--template-arg {name}: the value is not JSON: {error}") from None
            found[name] = value
    return found


_PYTHON = {"True": True, "False": False, "None": None}
_NOT_VARIABLES = ("messages", "system", "template", "add_generation_prompt", "self", "context")
"""Names that are no variables of a template, because chat sets them or Python has them."""


# Texts and errors


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be read, without its name: "No such file or directory"."""
    return getattr(error, "strerror", None) or str(error)


def require_text(arguments: argparse.Namespace) -> None:
    """Raise `Error` for an argument that is no text. The names of files may be any bytes."""
    for name in ("prompt", "system", "stop", "template_arg"):
        value = getattr(arguments, name, None)
        for text in value if isinstance(value, list) else [value]:
            try:
                (text or "").encode()
            except UnicodeEncodeError as error:
                byte = ord(error.object[error.start]) - 0xDC00
                where = "the prompt" if name == "prompt" else f"--{name.replace('_', '-')}"
                found = f"0x{byte:02x} at character {error.start}"
                raise Error(f"{where} is not valid text in this terminal's encoding: found {found}") from None


_PHRASES = {
    "None starts from the beginning-of-text token alone": "`numballama story --model …` begins without one",
    "reset() the chat": "begin a new conversation (/reset on a terminal)",
    "compile with a larger context=": "use a larger --context",
    "compile with context=": "use --context",
    "a smaller context=": "a smaller --context",
    " and explain() takes up to": ", explain takes up to",
    ", or read single values with values()": "",
    "compile(…, tokenizer=…), --tokenizer on the command line": "--tokenizer",
    "template= or --chat-template": "--chat-template",
}
"""What an error says to a Python program → what it says on the command line."""
_OPTIONS = "|".join(
    [
        *MODEL_OPTIONS,
        *SAMPLING_HELP,
        "prompt_tokens",
        "repeats",
        "chunks",
        "sequences",
        "max_sequences",
        "kv_tokens",
        "layer",
        "head",
    ]
)
_KEYWORD = re.compile(rf"(?<![^\s(:;,])({_OPTIONS})=(?:'([^' ]*)'|([\w.:/-]*))")
_SUBJECT = re.compile(rf"^({_OPTIONS})(?= (?:must be|\S+ is not supported|is not supported)\b)")


def in_options(message: str) -> str:
    """An error message with the command line's options in place of Python's arguments."""
    for phrase, ours in _PHRASES.items():
        message = message.replace(phrase, ours)
    message = _SUBJECT.sub(lambda found: _option(found[1]), message)
    return _KEYWORD.sub(lambda found: f"{_option(found[1])} {found[2] or found[3] or ''}".rstrip(), message)


_FIELD_PHRASES = {
    "use the method stream() in place of generate()": "leave it out, an answer is written when it is complete",
    "use prompt + model.generate(prompt)": "leave it out, an answer is what follows the prompt",
    "the prompt is empty; None starts from the beginning-of-text token alone": "the prompt is empty",
    "token ids must be a sequence of whole numbers": "prompt must be a text or a list of token ids",
    "a mapping or JSON text": "an object or JSON text",
    "must be True or False": "must be true or false",
    "unknown sampling option": "unknown field",
}
"""What an error says to a Python program → what it says of a line of JSON."""
_MODEL_KEYWORD = re.compile(rf"(?<![^\s(:;,])({'|'.join([*MODEL_OPTIONS, 'kv_tokens'])})=(?:'([^' ]*)'|([\w.:/-]*))")
_CONSTANTS = {"None": "null", "True": "true", "False": "false"}


def in_fields(message: str) -> str:
    """An error message about a line of JSON: its fields in place of Python's arguments, options where the model's are
    meant, and no names of classes.
    """
    for phrase, ours in [*_FIELD_PHRASES.items(), *_PHRASES.items()]:
        message = message.replace(phrase, ours)
    message = _MODEL_KEYWORD.sub(lambda found: f"{_option(found[1])} {found[2] or found[3] or ''}".rstrip(), message)
    message = re.sub(r" \((?:\w+Error)\)$", "", message)
    return re.sub(r"(?<=\bfound )(None|True|False)\b", lambda found: _CONSTANTS[found[1]], message)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
