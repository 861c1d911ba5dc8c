"""`numballama chat`: a conversation on a terminal. Through a pipe, stdin has one message per line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import progress
from ..errors import Error
from ..sampling import CHAT_DEFAULTS, SamplingParams
from .args import MODEL_HELP, load, model_options, sampling_options, sampling_params

if TYPE_CHECKING:
    from ..chat.conversation import Chat

HELP = """\
/reset           forget the conversation; the system message stays
/system [TEXT]   set the system message, or without TEXT show it; "/system none" removes it
/help            this list
/exit            end (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends with a backslash continues on the next one."""


def add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation: on a terminal, or with one message per line on stdin and the answers on stdout.",
        epilog="In the conversation, /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.",
    )
    chat.add_argument("model", help=MODEL_HELP)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--chat-template", metavar="FILE", help="a jinja2 template in place of the model's own")
    model_options(chat)
    sampling_options(chat, CHAT_DEFAULTS)
    chat.set_defaults(run=run_chat)


def run_chat(arguments: argparse.Namespace) -> None:
    template = None
    if arguments.chat_template is not None:
        try:
            template = Path(arguments.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise Error(f"{arguments.chat_template}: cannot be read: {error}") from None
    params = sampling_params(arguments)
    with load(arguments) as model:
        run_repl(model.chat(arguments.system, template=template), params)


def run_repl(chat: Chat, params: SamplingParams) -> None:
    """Answer each line of stdin until it ends. On a terminal, an error or Ctrl-C ends only the turn."""
    interactive = sys.stdin.isatty()
    if interactive:
        progress.info(_dim("/help lists the commands, Ctrl-D ends."))
    for line in _lines(interactive):
        try:
            if line.startswith("/"):
                if not handle_command(chat, line):
                    return
            elif line.strip():
                _answer(chat, line, params)
        except Error as error:
            if not interactive:
                raise
            print(f"numballama: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise


def _lines(interactive: bool) -> Iterator[str]:
    """The messages of stdin. On a terminal, a backslash at the end of a line joins it with the next."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):  # importing it makes input() editable
        import readline  # noqa: F401
    while True:
        try:
            line = _ask("> ")
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{_ask('… ')}"
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit ends.", file=sys.stderr)
            continue
        yield line


def _ask(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def handle_command(chat: Chat, line: str) -> bool:
    """Run a line that begins with a slash. Returns False to end the conversation."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        chat.reset()
    elif command == "/system":
        if rest:
            chat.system = None if rest == "none" else rest
        else:
            print(chat.system or "there is no system message", file=sys.stderr)
    elif command == "/help":
        print(HELP, file=sys.stderr)
    else:
        print(f"there is no command {command}; /help lists them", file=sys.stderr)
    return True


def _answer(chat: Chat, text: str, params: SamplingParams) -> None:
    """Print the answer as it is generated. On a terminal, print token counts and speed after it."""
    before = chat.turn
    try:
        for response in chat.stream(text, params=params):
            sys.stdout.write(response.text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
        turn = chat.turn
        if turn is not None and turn is not before:
            ending = ""
            if turn.finish_reason is None:
                ending = ", stopped"
            elif turn.finish_reason == "length":
                ending = ", the context is full" if turn.stop_reason == "context" else ", cut at --max-tokens"
            progress.info(
                _dim(
                    f"{turn.prefilled_tokens:,} tokens read, {turn.reused_tokens:,} from the cache; {turn.tokens:,} "
                    f"written, {turn.tokens_per_second:,.1f} tokens/s{ending}"
                )
            )


def _dim(text: str) -> str:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain else f"\x1b[2m{text}\x1b[0m"
