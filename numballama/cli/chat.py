"""`numballama chat`: a conversation on a terminal. Through a pipe, stdin has one message per line, and no commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .. import progress
from ..errors import Error
from ..sampling import CHAT_DEFAULTS, SamplingParams
from .args import (
    MODEL_HELP,
    in_options,
    in_place_of,
    load,
    model_options,
    read_template,
    sampling_options,
    sampling_params,
    template_arguments,
    template_options,
)
from .parser import Parser
from .remote import RemoteChat
from .streams import is_terminal, read_lines, say

if TYPE_CHECKING:
    from ..chat.conversation import Chat

HELP = """\
/reset           forget the conversation; the system message stays
/system [TEXT]   set the system message, or without TEXT show it; "/system none" removes it
/help            this list
/exit            end (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends with a backslash continues on the next one.
To send a message that begins with a slash, type a space before it."""


def add_chat(commands: argparse._SubParsersAction[Parser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation: on a terminal, or with one message per line on stdin and the answers on stdout.",
        epilog="On a terminal, /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.",
        examples=(
            'numballama chat model.gguf --system "Answer in one sentence."',
            "numballama chat --url http://127.0.0.1:8000",
            "numballama chat HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0",
        ),
    )
    model = chat.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; left out with --url")
    chat.add_argument(
        "--url",
        action=in_place_of(model),
        help="talk with the model of a server instead (http://127.0.0.1:8000); its key is $NUMBALLAMA_API_KEY",
    )
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    template_options(chat)
    model_options(chat)
    sampling_options(chat, CHAT_DEFAULTS)
    chat.set_defaults(run=run_chat)


def run_chat(arguments: argparse.Namespace) -> None:
    template, variables = read_template(arguments.chat_template), template_arguments(arguments)
    params = sampling_params(arguments)
    interactive = is_terminal()
    if arguments.url is not None:
        if arguments.model is not None:
            raise Error("--url takes the server's model: leave out the model file")
        run_repl(RemoteChat(arguments.url, arguments.system), params, interactive)
        return
    with load(arguments) as model:
        chat = model.chat(arguments.system, template=template, **variables)
        if interactive and chat.template.is_guess:
            progress.info(f"{model.path.name} has no chat template, so it may not answer. Used: {chat.template.name}.")
        run_repl(chat, params, interactive)


def run_repl(chat: Chat | RemoteChat, params: SamplingParams, interactive: bool) -> None:
    """Answer each line of stdin until it ends. On a terminal, some lines are commands, and an error or Ctrl-C ends only
    the turn. Through a pipe every line is a message, "/etc/passwd is what?" too.
    """
    if interactive:
        progress.info(_dim("/help lists the commands, Ctrl-D ends."))
    for line in _lines(interactive):
        try:
            if interactive and line.startswith("/"):
                if not handle_command(chat, line):
                    return
            elif line.strip():
                _answer(chat, line, params)
        except Error as error:
            if not interactive:
                raise
            say(f"numballama: {in_options(str(error))}")
        except KeyboardInterrupt:
            if not interactive:
                raise


def _lines(interactive: bool) -> Iterator[str]:
    """The messages of stdin. On a terminal, a backslash at the end of a line joins it with the next."""
    if not interactive:
        yield from read_lines()
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
        except UnicodeDecodeError as error:
            print(f"what was typed is not {error.encoding.upper()} text", file=sys.stderr)
            continue
        yield line


def _ask(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def handle_command(chat: Chat | RemoteChat, line: str) -> bool:
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
        print(f"there is no command {command}; /help lists them. A space in front makes it a message", file=sys.stderr)
    return True


def _answer(chat: Chat | RemoteChat, text: str, params: SamplingParams) -> None:
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
