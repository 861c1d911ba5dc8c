"""Notes and progress bars on stderr, if it is a terminal. Otherwise nothing is printed; notes go to the log only."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("numballama")

DELAY_S = 0.7
"""Seconds after which a bar appears."""

quiet = False
"""Set by --quiet: no notes and no bars, even on a terminal."""


def _is_shown() -> bool:
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


def info(text: str) -> None:
    """Log a note; on a terminal also print it to stderr."""
    log.info(text)
    if _is_shown():
        print(text, file=sys.stderr, flush=True)


Report = Callable[[str, int, int], None]
"""report(what, done, total)"""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A progress bar on stderr while the block runs. It appears only after `DELAY_S`."""
    if not _is_shown():
        yield lambda what, done, total: None
        return
    started = time.perf_counter()
    shown: list[Any] = []

    def report(what: str, done: int, total: int) -> None:
        if not shown and time.perf_counter() - started > DELAY_S:
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
