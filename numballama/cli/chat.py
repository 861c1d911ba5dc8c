"""`numballama chat`: a conversation in a terminal, or lines in and answers out through a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import progress
from ..errors import Error

if TYPE_CHECKING:
    from ..chat.conversation import Chat

HELP = """\
/reset           forget the conversation; the system message stays
/system [TEXT]   set the system message, or without TEXT show it; "/system none" takes it away
/help            this list
/exit            end (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends with a backslash goes on in the next one."""


def converse(chat: Chat, options: dict[str, Any]) -> None:
    """Answer line after line of stdin until it ends; on a terminal an error or Ctrl-C ends a turn only."""
    person = sys.stdin.isatty()
    if person:
        progress.info(_dim("/help lists the commands, Ctrl-D ends."))
    for line in _lines(person):
        try:
            if line.startswith("/"):
                if not _obey(chat, line):
                    return
            elif line.strip():
                _answer(chat, line, options)
        except Error as error:
            if not person:
                raise
            print(f"numballama: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not person:
                raise


def _lines(person: bool) -> Iterator[str]:
    """What is typed, or comes through the pipe, a message each."""
    if not person:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):  # it is what lets a line be edited
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


def _obey(chat: Chat, line: str) -> bool:
    """Run a command; False ends the conversation."""
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


def _answer(chat: Chat, text: str, options: dict[str, Any]) -> None:
    """Print the answer as it comes, then on a terminal the turn's figures."""
    before = chat.turn
    try:
        for piece in chat.stream(text, **options):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
        turn = chat.turn
        if turn is not None and turn is not before:
            ends = {"length": ", cut at --max-tokens", "context": ", the context is full", None: ", stopped"}
            progress.info(
                _dim(
                    f"{turn.prefilled_tokens:,} tokens read, {turn.reused_tokens:,} from the cache; {turn.tokens:,} "
                    f"written, {turn.tokens_per_second:,.1f} tokens/s{ends.get(turn.finish_reason, '')}"
                )
            )


def _dim(text: str) -> str:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain else f"\x1b[2m{text}\x1b[0m"
