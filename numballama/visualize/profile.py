"""A profile as tables: text for a pipe, rich for a terminal, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .html import COLOURS, bar, chip, escape, frame, heading, printable, table, text_table
from .parts import PARTS

if TYPE_CHECKING:
    from ..bench.profiler import Profile

PART_HEADINGS = ("part", "steps", "µs", "floor µs", "MB", "GB/s", "of memory", "share")
HEADINGS = ("step", "kernel", "count", "µs each", "MB", "GB/s", "of memory", "share")
UNKNOWN = "–"
SHORTEST_S = 5e-8
"""A step that takes fewer seconds is below the clock's resolution: its rate says nothing."""


def _title(profile: Profile) -> str:
    return f"one decode step of {profile.model} on {profile.device}, at position {profile.position:,}"


def _prompt(profile: Profile) -> str:
    if profile.prompt_s is None:
        return ""
    speed = profile.position / profile.prompt_s
    return f"prompt: {profile.position:,} tokens in {profile.prompt_s * 1e3:,.1f} ms, {speed:,.0f} tokens/s"


def _note(profile: Profile) -> str:
    if profile.bandwidth is None:
        memory = "The memory's bandwidth is unknown."
    else:
        memory = (
            f"The memory gives {_gigabytes(profile.bandwidth)} GB/s, measured here; the floor is the bytes at that "
            "rate. Above 100% caches help."
        )
    return f"{memory} Steps overlap, so the whole is not the sum."


def _speed(seconds: float, rate: float, fraction: float | None) -> tuple[str, str]:
    """GB/s and share of the bandwidth of a step of that many seconds."""
    return (UNKNOWN, UNKNOWN) if seconds < SHORTEST_S else (_gigabytes(rate), _percent(fraction))


def _gigabytes(rate: float) -> str:
    """A rate in GB/s, with three digits or more."""
    return f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.1f}"


def _percent(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{fraction:.0%}"


def _micros(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds * 1e6:,.2f}"


def _part_cells(profile: Profile) -> list[tuple[str, ...]]:
    """One line for each part of the model, then their sum, then the whole step as it runs."""
    cells: list[tuple[str, ...]] = [
        (
            part.part, f"{part.count}", _micros(part.seconds), _micros(part.floor_s), f"{part.nbytes / 1e6:,.2f}",
            *_speed(part.seconds / part.count, part.rate, part.bandwidth_fraction), f"{part.share:.1%}",
        )
        for part in profile.parts
    ]  # fmt: skip
    for name, seconds in (("sum", profile.sum_s), ("whole step", profile.whole_s)):
        rate = profile.nbytes / seconds
        cells.append((
            name, f"{len(profile.steps)}", _micros(seconds), _micros(profile.floor_s), f"{profile.nbytes / 1e6:,.2f}",
            _gigabytes(rate), _percent(profile.fraction(rate)), f"{seconds / profile.sum_s:.1%}",
        ))  # fmt: skip
    return cells


def _cells(profile: Profile) -> list[tuple[str, ...]]:
    """One line for each kind of step."""
    return [
        (
            kind.name, kind.kernel, f"{kind.count}", _micros(kind.seconds), f"{kind.nbytes / 1e6:,.2f}",
            *_speed(kind.seconds, kind.rate, kind.bandwidth_fraction), f"{kind.share:.1%}",
        )
        for kind in profile.kinds
    ]  # fmt: skip


def _about(profile: Profile) -> str:
    speed = f"{1 / profile.whole_s:,.0f} tokens/s"
    return f"{speed}; {_prompt(profile)}" if profile.prompt_s is not None else speed


def as_text(profile: Profile) -> str:
    """The tables for a pipe: columns of text."""
    parts = text_table(PART_HEADINGS, _part_cells(profile))
    steps = text_table(HEADINGS, _cells(profile), "ll")
    return "\n".join([printable(_title(profile)), _about(profile), "", *parts, "", *steps, "", _note(profile)])


def show(profile: Profile) -> None:
    """Print the tables on a terminal. A narrow one breaks names, not numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int, totals: int = 0) -> None:
        made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for index, each in enumerate(headings):
            made.add_column(each, overflow="fold", no_wrap=index >= left, justify="left" if index < left else "right")
        for index, cells in enumerate(rows):
            made.add_row(*cells, end_section=index == len(rows) - totals - 1)
        console.print(made)

    console = Console(highlight=False, markup=False)
    console.print(f"{printable(_title(profile))}\n{_about(profile)}\n")
    print_table(PART_HEADINGS, _part_cells(profile), 1, 2)
    console.print()
    print_table(HEADINGS, _cells(profile), 2)
    console.print(f"\n{_note(profile)}")


def as_html(profile: Profile) -> str:
    """The tables for a notebook, below a bar of all steps in order, as wide as they are long."""
    total = profile.sum_s
    steps = bar(
        (COLOURS[step.part], step.seconds / total, f"{step.index} {step.name}: {step.seconds * 1e6:,.2f} µs")
        for step in profile.steps
    )
    rows = [[escape(cell) for cell in cells] for cells in _part_cells(profile)]
    for cells in rows:
        cells[0] = (chip(cells[0]) if cells[0] in PARTS else "") + cells[0]
    kinds = [[escape(cell) for cell in cells] for cells in _cells(profile)]
    return frame(
        heading(_title(profile), _about(profile))
        + steps
        + table(PART_HEADINGS, rows, totals=2)
        + "<h4>steps by kind</h4>"
        + table(HEADINGS, kinds, "ll")
        + f'<div class="muted">{escape(_note(profile))}</div>'
    )
