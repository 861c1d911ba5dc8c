"""The command line, called in this process."""

from __future__ import annotations

from typing import Any, NamedTuple

from numballama.cli.main import main


class Called(NamedTuple):
    """The result of a call: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def call(capsys: Any, *words: object) -> Called:
    """Call `main` with these words. Wrong usage and --help end with their exit code, as in a process."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = int(end.code or 0)
    return Called(code, *capsys.readouterr())
