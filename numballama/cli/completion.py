"""`numballama completion SHELL`: a script with which a shell completes commands, options and files.

Why a script and not argcomplete: that starts `numballama` at each press of Tab, and a start takes half a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import get_args

from ..errors import Error
from .parser import Parser

SHELLS = ("bash", "zsh", "fish", "tcsh")
FILES = ("model", "source", "target", "kl")
"""Arguments that may name a file; so do options with the metavar FILE."""


def add_completion(commands: argparse._SubParsersAction[Parser]) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script with which a shell completes commands",
        description="Print a script with which a shell completes commands, options and files. Write it to where the "
        "shell looks for such scripts, and again after an update of numballama.",
        examples=(
            "numballama completion bash > ~/.local/share/bash-completion/completions/numballama",
            "numballama completion zsh > ~/.zfunc/_numballama",
            "numballama completion fish > ~/.config/fish/completions/numballama.fish",
        ),
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}")
    completion.set_defaults(run=run_completion)


def run_completion(arguments: argparse.Namespace) -> None:
    print(script(arguments.parser, arguments.shell))


def script(parser: Parser, shell: str) -> str:
    """The script for a shell. Raises `Error` without the package shtab."""
    try:
        import shtab
    except ImportError:
        raise Error('completion needs shtab: pip install "numballama[completion]"') from None
    choices = _choices()
    for command, action in _actions(parser):
        if action.dest in choices:
            action.choices = choices.get(f"{command} {action.dest}", choices[action.dest])
        elif action.metavar == "FILE" or action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def _choices() -> dict[str, Sequence[str]]:
    """Argument → values that a shell offers, of one command or of all. The command checks them when it runs."""
    from ..export import QUANTS, WRITERS
    from ..quantization.policy import DTYPES
    from ..quantization.types import KV_TYPES, ActivationType

    return {
        "device": ("auto", "cpu", "cuda", "reference"),
        "dtype": DTYPES,
        "export dtype": tuple(dict.fromkeys(name for names in QUANTS.values() for name in names)),
        "kv_dtype": KV_TYPES,
        "activations": get_args(ActivationType),
        "to": tuple(WRITERS),
    }


def _actions(parser: Parser, name: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """(command, argument) of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, own in action.choices.items():
                yield from _actions(own, command)
        yield name, action
