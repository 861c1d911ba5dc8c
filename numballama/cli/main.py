"""The command line. Text goes to stdout, everything else to stderr. Each command is a module of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import __version__, progress
from ..errors import Error
from ..host.interrupts import INTERRUPTED
from . import streams
from .args import in_options, require_text
from .bench import add_bench
from .chat import add_chat
from .doctor import add_doctor
from .explain import add_explain
from .export import add_export
from .generate import add_generate, add_story
from .inspect import add_inspect
from .perplexity import add_perplexity
from .serve import add_serve

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

FAILED, BROKEN_PIPE = 1, 141
"""Exit codes: an `Error`; a closed pipe, as shells report it. Ctrl-C is `INTERRUPTED`. Wrong usage ends with argparse's
2."""


class _Parser(argparse.ArgumentParser):
    """argparse's, which tells when --help cannot be written."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    main: argparse.ArgumentParser = _Parser(
        prog="numballama",
        description="LLaMA inference compiled from Python.",
        epilog="numballama COMMAND --help explains a command. Text goes to stdout, notes and progress to stderr.",
    )
    main.add_argument("--version", action="version", version=f"numballama {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_story,
        add_generate,
        add_chat,
        add_serve,
        add_inspect,
        add_explain,
        add_bench,
        add_perplexity,
        add_doctor,
        add_export,
    ):
        add(commands)
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        streams.prepare()
        _run(parser().parse_args(arguments))
    except SystemExit:  # --help, --version, wrong usage
        if (code := _flush()) != 0:
            return code
        raise
    except Error as error:
        streams.say(f"numballama: {in_options(str(error))}")
        return _flush() or FAILED
    except KeyboardInterrupt:
        streams.say("interrupted")
        return INTERRUPTED
    except MemoryError:
        streams.say("numballama: memory is short: a smaller model, a smaller --context or fewer sequences take less")
        return _flush() or FAILED
    except OSError as error:
        return _failed(error)
    return _flush()


def _run(parsed: argparse.Namespace) -> None:
    progress.quiet = getattr(parsed, "quiet", False)
    require_text(parsed)
    command: Callable[[argparse.Namespace], None] = parsed.run
    command(parsed)


def _flush() -> int:
    """Write what is left of stdout; returns 0, or the exit code when that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return _failed(error)
    except (AttributeError, ValueError):  # it is closed, which has been said
        return FAILED
    return 0


def _failed(error: OSError) -> int:
    """Say in a line why a file or stdout cannot be used. A pipe that its reader closed is no error to tell."""
    if isinstance(error, BrokenPipeError):
        streams.abandon_stdout()
        return BROKEN_PIPE
    reason = error.strerror or error
    if error.filename is None:
        streams.abandon_stdout()
        streams.say(f"numballama: stdout cannot be written: {reason}")
    else:
        streams.say(f"numballama: {error.filename}: {reason}")
    return FAILED
