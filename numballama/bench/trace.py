"""A profile as a table of text, as a table for a terminal, and as a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

from ..files import atomic_write
from .profiler import Profile

HEADINGS = ("step", "kernel", "count", "µs each", "MB", "GB/s", "% of memory", "share")


def _title(profile: Profile) -> str:
    return f"one decode step of {profile.model} on {profile.device}, at position {profile.position:,}"


def _note(profile: Profile) -> str:
    return (
        f"% of memory: of the {profile.bandwidth / 1e9:,.0f} GB/s measured here; above 100% caches help. "
        "Steps overlap: the whole is not the sum."
    )


def _cells(profile: Profile) -> list[tuple[str, ...]]:
    """One line for each kind of step, then the sum, then the whole step."""
    cells: list[tuple[str, ...]] = [
        (
            kind.name, kind.kernel, f"{kind.count}", f"{kind.seconds * 1e6:,.2f}", f"{kind.nbytes / 1e6:,.2f}",
            f"{kind.rate / 1e9:,.0f}", f"{kind.bandwidth_fraction:.0%}", f"{kind.share:.1%}",
        )
        for kind in profile.kinds
    ]  # fmt: skip
    count, nbytes = f"{len(profile.steps)}", f"{profile.nbytes / 1e6:,.2f}"
    for name, seconds in (("sum", profile.sum_s), ("whole step, as it runs", profile.whole_s)):
        rate = profile.nbytes / seconds
        share = f"{seconds / profile.sum_s:.1%}"
        times = f"{seconds * 1e6:,.2f}", nbytes, f"{rate / 1e9:,.0f}", f"{rate / profile.bandwidth:.0%}"
        cells.append((name, "", count, *times, share))
    return cells


def as_text(profile: Profile) -> str:
    """The table for a pipe: columns of text."""
    cells = _cells(profile)
    widths = [max(len(line[i]) for line in (HEADINGS, *cells)) for i in range(len(HEADINGS))]

    def line(words: Sequence[str]) -> str:
        padded = [
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(words, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    body = [line(words) for words in cells]
    return "\n".join([_title(profile), line(HEADINGS), rule, *body[:-2], rule, *body[-2:], _note(profile)])


def show(profile: Profile) -> None:
    """Print the table on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(profile), caption=_note(profile), caption_justify="left")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
    *steps, total, whole = _cells(profile)
    for cells in steps:
        table.add_row(*cells)
    table.add_section()
    table.add_row(*total)
    table.add_row(*whole)
    Console().print(table)


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """The steps one after the other in Chrome's trace format, for chrome://tracing or ui.perfetto.dev."""
    names = {0: "whole step, as it runs", 1: "its steps, each measured by itself"}
    process = {"name": f"{profile.model} on {profile.device}"}
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": process},
        *({"name": "thread_name", "ph": "M", "pid": 1, "tid": n, "args": {"name": t}} for n, t in names.items()),
        _event(profile, "decode step", "whole", 0, 0.0, profile.whole_s, profile.nbytes),
    ]
    start = 0.0
    for step in profile.steps:
        event = _event(profile, step.name, step.kernel, 1, start, step.seconds, step.nbytes)
        event["args"] |= {"step": step.index, "kernel": step.kernel}
        if step.layer is not None:
            event["args"]["layer"] = step.layer
        events.append(event)
        start += step.seconds
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"position": profile.position}}


def _event(
    profile: Profile, name: str, category: str, thread: int, start: float, seconds: float, nbytes: int
) -> dict[str, Any]:
    """A complete event ("X"). `start` and `seconds` are in seconds; the format uses µs."""
    rate = nbytes / seconds
    return {
        "name": name, "cat": category, "ph": "X", "pid": 1, "tid": thread, "ts": start * 1e6, "dur": seconds * 1e6,
        "args": {
            "bytes": nbytes, "gigabytes_per_second": rate / 1e9,
            "percent_of_bandwidth": 100 * rate / profile.bandwidth,
        },
    }  # fmt: skip


def write_trace(profile: Profile, path: str | PathLike[str]) -> None:
    """Write the Chrome trace, whole or not at all. Raises `Error` if the file cannot be written."""
    with atomic_write(path) as file:
        file.write(json.dumps(chrome_trace(profile), indent=1).encode() + b"\n")
