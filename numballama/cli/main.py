"""The command line. Text goes to stdout, everything else to stderr. Each command is a module of this package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__, progress
from ..errors import Error
from ..host.interrupts import INTERRUPTED
from .bench import add_bench
from .chat import add_chat
from .doctor import add_doctor
from .export import add_export
from .generate import add_generate, add_story
from .inspect import add_inspect

FAILED, BROKEN_PIPE = 1, 141
"""Exit codes: an `Error`; a closed pipe, as shells report it. Ctrl-C is `INTERRUPTED`. Wrong usage ends with argparse's
2."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    main = argparse.ArgumentParser(
        prog="numballama",
        description="LLaMA inference compiled from Python.",
        epilog="numballama COMMAND --help explains a command. Text goes to stdout, notes and progress to stderr.",
    )
    main.add_argument("--version", action="version", version=f"numballama {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_story, add_generate, add_chat, add_inspect, add_bench, add_doctor, add_export):
        add(commands)
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = parser().parse_args(arguments)
    progress.quiet = getattr(parsed, "quiet", False)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
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
