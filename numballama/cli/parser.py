"""argparse with examples in --help, and with errors that name the option or command that was meant."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

OTHER_COMMANDS = {
    "run": "generate or chat", "complete": "generate", "prompt": "generate", "talk": "chat", "server": "serve",
    "start": "serve", "api": "serve", "benchmark": "bench", "speed": "bench", "convert": "export",
    "quantize": "export", "quantise": "export", "info": "inspect", "show": "inspect", "check": "doctor",
    "diagnose": "doctor", "env": "doctor", "version": "--version",
}  # fmt: skip
"""What other programs call a command → ours."""
OTHER_OPTIONS = {
    "-n": "--max-tokens", "--length": "--max-tokens", "-c": "--context", "-t": "--threads", "-s": "--seed",
    "-q": "--quiet", "-V": "--version", "-v": "--version", "-ngl": "--device cuda", "--gpu": "--device cuda",
    "--cuda": "--device cuda", "--cpu": "--device cpu", "-sys": "--system", "--system-prompt": "--system",
    "-np": "--max-sequences", "--parallel": "--max-sequences", "-ctk": "--kv-dtype", "-ctv": "--kv-dtype",
    "--served-model-name": "--model-name", "-a": "--model-name", "--alias": "--model-name",
    "--ssl-certfile": "--tls-cert", "--ssl-keyfile": "--tls-key", "--outtype": "--dtype", "--type": "--dtype",
    "-r": "--repeats", "-o": "--output", "-f": "--input", "--imatrix": "--calibrate",
}  # fmt: skip
"""What other programs call an option → ours."""
WITHOUT_OPTION = {
    "-m": "model", "--model": "model", "--model-path": "model", "-hf": "model", "--hf-repo": "model", "-p": "prompt",
    "--prompt": "prompt", "--text": "prompt", "--infile": "source", "--outfile": "target", "-o": "target",
    "--output": "target",
}  # fmt: skip
"""What other programs have an option for → the argument that is given here without one."""


def whole_number(text: str) -> int:
    """The type of options for whole numbers."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}") from None


def number(text: str) -> float:
    """The type of options for numbers."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None


class Formatter(argparse.HelpFormatter):
    """argparse's, which keeps the lines of a text that has several."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # argparse does not count that commands are indented

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Without breaks at hyphens: --max-sequences stays one word."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return indent + text if "\n" in text else "\n".join(indent + line for line in self._split_lines(text, width))


class Parser(argparse.ArgumentParser):
    """A parser of the command line, or of one command. `examples` are whole commands that --help shows."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": Formatter, **options})
        self.examples = tuple(examples)
        self.register("type", int, whole_number)
        self.register("type", float, number)
        self._words: list[str] = []

    # What it shows

    def format_usage(self) -> str:
        """One line: options are in the list of --help."""
        required = [f"{a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in self._visible() if a.required]
        words = [self.prog, *required, "[options]", *(_positional(a) for a in self._actions if not a.option_strings)]
        return f"usage: {' '.join(words)}\n"

    def format_help(self) -> str:
        """What --help prints: argparse's text after a short usage, and the examples."""
        self.usage = self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        text = super().format_help()
        if self.examples:
            text += "\nexamples:\n" + "".join(f"  {example}\n" for example in self.examples)
        return text

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is sys.stdout:  # --help that cannot be written is an error
            file.write(message)
        else:
            super()._print_message(message, file)

    # What it refuses

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but refuses what is unknown: in the parser of the command whose word it is."""
        self._words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown[0])
        return parsed, unknown

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """argparse's abbreviations, except those of one or two letters: `--n 2` would mean `--norm-eps 2`."""
        if option_string.startswith("--") and len(option_string.partition("=")[0]) < len("--abc"):
            return []
        return super()._get_option_tuples(option_string)  # type: ignore[misc,no-any-return]

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 after four lines: usage, what is wrong, and an example."""
        message = message.replace("ignored explicit argument", "takes no value, found")
        if re.search("required|unknown command", message):  # an unknown option before may be why
            unknown = next(self._unknown_options(), None)
            message = message if unknown is None else self._unknown(unknown)
        example = f"example: {self.examples[0]}\n" if self.examples else ""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n{example}all options: {self.prog} --help\n")

    def refuse(self, word: str) -> NoReturn:
        """End for a word that is no option and no argument."""
        if word.partition("=")[0] in self._option_string_actions:  # argparse knows it elsewhere
            self.error(f"{word} stands after --, from where on no word is an option: put options before it")
        if _is_option(word):
            self.error(self._unknown(word))
        is_prompt = any(action.dest == "prompt" for action in self._actions)
        self.error(f"one word too many: {word!r}" + "; a text with spaces needs quotes" * is_prompt)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        hint = _nearest(str(value), choices)
        if isinstance(action, argparse._SubParsersAction):
            hint = OTHER_COMMANDS.get(str(value), hint)
            raise argparse.ArgumentError(
                None, f"unknown command {value!r}{_meant(hint)} (commands: {', '.join(choices)})"
            )
        raise argparse.ArgumentError(action, f"unknown {value!r}{_meant(hint)} (choose from {', '.join(choices)})")

    def _unknown(self, option: str) -> str:
        """The message for an option that this command does not have."""
        name = option.partition("=")[0]
        arguments = [action.dest for action in self._actions if not action.option_strings]
        if (place := WITHOUT_OPTION.get(name)) is not None:
            place = "source" if place == "model" and "source" in arguments else place
            if place in arguments:
                return f"unknown option {name}: the {place} is given without an option"
        if (command := self._command()) is not None and name in command._option_string_actions:
            return f"unknown option {name}: it belongs to {command.prog}, so it comes after that"
        return f"unknown option {name}{_meant(self._ours(name))}"

    def _ours(self, name: str) -> str | None:
        """Our option for one that is misspelt or another program's; None if there is none like it."""
        own = [option for action in self._visible() for option in action.option_strings]
        if (other := OTHER_OPTIONS.get(name)) is not None and other.split()[0] in own:
            return other
        from ..sampling import OTHER_NAMES
        from ..validation import OTHER_OPTIONS as OF_COMPILE

        meant = {**OF_COMPILE, **OTHER_NAMES}.get(name.lstrip("-").replace("-", "_"), "")
        if found := re.match(r"(\w+)", meant):
            option = f"--{found[1].replace('_', '-')}"
            if option in own:
                return option
        return _nearest("--" + name.lstrip("-").replace("_", "-").lower(), own) if len(name) > 2 else None

    def _visible(self) -> Iterator[argparse.Action]:
        return (a for a in self._actions if a.option_strings and a.help != argparse.SUPPRESS)

    def _unknown_options(self) -> Iterator[str]:
        """Options among the words that argparse does not know. Abbreviations are known."""
        for word in self._words:
            if word == "--" or (not _is_option(word) and self._command(word) is not None):
                return
            name = word.partition("=")[0]
            known = any(option == name or option.startswith(name) for option in self._option_string_actions)
            if _is_option(word) and not known:
                yield word

    def _command(self, name: str | None = None) -> Parser | None:
        """The parser of a command: of `name`, or of the first word that is a command."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names = self._words if name is None else [name]
                return next((action.choices[word] for word in names if word in action.choices), None)
        return None


def _positional(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return f"[{name}]" if action.nargs == "?" or not action.required else name


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not re.fullmatch(r"-\d.*", word)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    from difflib import get_close_matches

    known = list(known)
    lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lower, 1, 0.6)
    return lower[near[0]] if near else None


def _meant(hint: str | None) -> str:
    return "" if hint is None else f"; did you mean {hint}?"
