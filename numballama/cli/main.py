"""The command line. Text goes to stdout, everything else to stderr. Each command is a module of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .. import __version__, progress
from ..errors import Error
from ..host.interrupts import INTERRUPTED
from . import streams
from .args import in_options, require_text
from .bench import add_bench
from .chat import add_chat
from .completion import add_completion
from .doctor import add_doctor
from .explain import add_explain
from .export import add_export
from .generate import add_generate, add_story
from .inspect import add_inspect
from .parser import Parser
from .perplexity import add_perplexity
from .serve import add_serve

FAILED, WRONG_USAGE, BROKEN_PIPE = 1, 2, 141
"""Exit codes: an `Error`; argparse's; a closed pipe, as shells report it. Ctrl-C is `INTERRUPTED`."""


FIRST_STEPS = """\
numballama runs Llama models, compiled from Python. To begin:

  numballama story            a story by the small model inside this package; nothing is downloaded
  numballama doctor           whether CPU and GPU work here, and what is missing
  numballama inspect MODEL    what a model file holds
  numballama chat MODEL       a conversation with a model
  numballama serve MODEL      a server with OpenAI's interface, and a page to chat on

MODEL is a file (GGUF and others), a directory, or a name on the Hugging Face hub such as
HuggingFaceTB/SmolLM2-135M-Instruct, which pip install "numballama[hub]" downloads.

numballama --help lists all commands, numballama COMMAND --help explains one.
"""
"""What `numballama` alone prints."""


def parser() -> Parser:
    """The parser of the whole command line."""
    main = Parser(
        prog="numballama",
        description="LLaMA inference compiled from Python. Text goes to stdout, notes and progress to stderr.",
        epilog="numballama COMMAND --help explains a command.",
        examples=("numballama story", "numballama chat --help"),
    )
    main.add_argument("--version", action="version", version=f"numballama {__version__}", help="print the version")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_story, add_generate, add_chat, add_serve, add_inspect, add_explain, add_perplexity, add_bench, add_doctor,
        add_export, add_completion,
    ):  # fmt: skip
        add(commands)
    main.set_defaults(parser=main)  # of which `completion` writes a script
    return main


def _words(arguments: Sequence[str] | None) -> list[str]:
    """The words of the command line. `numballama help story` is `numballama story --help`. None shows how to begin."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        streams.say(FIRST_STEPS.rstrip())
        raise SystemExit(WRONG_USAGE)
    return [*words[1:], "--help"] if words[0] == "help" else words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        streams.prepare()
        _run(parser().parse_args(_words(arguments)))
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
