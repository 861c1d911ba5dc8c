"""What a person sees while waiting: notes and progress bars on a terminal, nothing where no person looks."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("numballama")

PATIENCE_S = 0.7
"""A bar appears when something takes longer than this."""

quiet = False
"""Set by the command line's --quiet: no notes and no bars, even on a terminal."""


def _watched() -> bool:
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


def info(text: str) -> None:
    """Tell the person at the terminal, on stderr; elsewhere only the log hears it."""
    log.info(text)
    if _watched():
        print(text, file=sys.stderr, flush=True)


Report = Callable[[str, int, int], None]
"""report(what, done, total)"""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A progress bar on stderr for as long as the block runs; it appears only once the block has taken a moment."""
    if not _watched():
        yield lambda what, done, total: None
        return
    started = time.perf_counter()
    shown: list[Any] = []

    def report(what: str, done: int, total: int) -> None:
        if not shown and time.perf_counter() - started > PATIENCE_S:
            from rich.console import Console
            from rich.progress import Progress

            progress = Progress(console=Console(stderr=True), transient=True)
            progress.start()
            shown.extend([progress, progress.add_task(title, total=total)])
        if shown:
            shown[0].update(shown[1], completed=done, total=total, description=f"{title}: {what}")

    try:
        yield report
    finally:
        if shown:
            shown[0].stop()
