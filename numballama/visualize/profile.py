"""A profile as tables: text for a pipe, rich for a terminal, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .html import COLOURS, bar, chip, escape, frame, heading, printable, table, text_table
from .parts import PARTS

if TYPE_CHECKING:
    from ..bench.profiler import PartTime, Profile, StepKind

PART_HEADINGS = ("part", "steps", "µs", "floor µs", "MB", "GB/s", "of memory", "share")
HEADINGS = ("step", "kernel", "count", "µs each", "MB", "GB/s", "of memory", "share")
PROMPT_PART_HEADINGS = ("part", "steps", "µs", "MB", "GB/s", "GFLOP/s", "share")
PROMPT_HEADINGS = ("step", "kernel", "count", "µs each", "MB", "GB/s", "GFLOP/s", "share")
UNKNOWN = "–"
SHORTEST_S = 5e-8
"""A step that takes fewer seconds is below the clock's resolution: its rate says nothing."""


def _title(profile: Profile) -> str:
    if profile.tokens > 1:
        first = profile.position + 1 - profile.tokens
        return f"a run of {profile.tokens:,} tokens of the prompt, positions {first:,} to {profile.position:,}"
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
    note = f"{memory} Steps overlap, so the whole is not the sum."
    if profile.ranks == 1:
        return note
    return (
        f"{note} Steps, bytes and memory are those of rank 0 of {profile.ranks}, each step alone. Communication is the "
        "time of all exchanges, one after the other with nothing in between: the least that it takes, since ranks also "
        "wait for each other. Each exchange has an equal part of it."
    )


def _gigaflops(rate: float) -> str:
    """Operations a second in GFLOP/s; unknown where none are counted."""
    return f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.1f}" if rate else UNKNOWN


def _rates(profile: Profile, of: PartTime | StepKind, seconds: float) -> tuple[str, str]:
    """GB/s, and the share of the bandwidth or in a prompt GFLOP/s, of a step of that many seconds."""
    if seconds < SHORTEST_S:
        return UNKNOWN, UNKNOWN
    second = _gigaflops(of.operations_per_second) if profile.tokens > 1 else _percent(of.bandwidth_fraction)
    return _gigabytes(of.rate), second


def _gigabytes(rate: float) -> str:
    """A rate in GB/s, with three digits or more."""
    return f"{rate / 1e9:,.0f}" if rate >= 1e11 else f"{rate / 1e9:.1f}"


def _percent(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{fraction:.0%}"


def _micros(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds * 1e6:,.2f}"


def _part_cells(profile: Profile) -> list[tuple[str, ...]]:
    """One line for each part of the model, then their sum, then the whole as it runs."""

    def floor(seconds: float | None) -> tuple[str, ...]:
        """In a prompt arithmetic is the limit, and not the memory."""
        return () if profile.tokens > 1 else (_micros(seconds),)

    cells: list[tuple[str, ...]] = [
        (
            part.part, f"{part.count}", _micros(part.seconds), *floor(part.floor_s), f"{part.nbytes / 1e6:,.2f}",
            *_rates(profile, part, part.seconds / part.count), f"{part.share:.1%}",
        )
        for part in profile.parts
    ]  # fmt: skip
    whole = "whole run" if profile.tokens > 1 else "whole step"
    for name, seconds in (("sum", profile.sum_s), (whole, profile.whole_s)):
        rate, operations = profile.nbytes / seconds, profile.operations / seconds
        cells.append((
            name, f"{len(profile.steps)}", _micros(seconds), *floor(profile.floor_s), f"{profile.nbytes / 1e6:,.2f}",
            _gigabytes(rate), _gigaflops(operations) if profile.tokens > 1 else _percent(profile.fraction(rate)),
            f"{seconds / profile.sum_s:.1%}",
        ))  # fmt: skip
    return cells


def _cells(profile: Profile) -> list[tuple[str, ...]]:
    """One line for each kind of step."""
    return [
        (
            kind.name, kind.kernel, f"{kind.count}", _micros(kind.seconds), f"{kind.nbytes / 1e6:,.2f}",
            *_rates(profile, kind, kind.seconds), f"{kind.share:.1%}",
        )
        for kind in profile.kinds
    ]  # fmt: skip


def _about(profile: Profile) -> str:
    speed = f"{1 / profile.whole_s:,.0f} tokens/s"
    return f"{speed}; {_prompt(profile)}" if profile.prompt_s is not None else speed


def as_text(profile: Profile) -> str:
    """The tables for a pipe: columns of text."""
    parts = text_table(PART_HEADINGS, _part_cells(profile))
    lines = [printable(_title(profile)), _about(profile), "", *parts, ""]
    lines += [*text_table(HEADINGS, _cells(profile), "ll"), "", _note(profile)]
    if (run := profile.prompt) is not None:
        lines += ["", _title(run), "", *text_table(PROMPT_PART_HEADINGS, _part_cells(run)), ""]
        lines += text_table(PROMPT_HEADINGS, _cells(run), "ll")
    return "\n".join(lines)


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
    if (run := profile.prompt) is not None:
        console.print(f"\n{_title(run)}\n")
        print_table(PROMPT_PART_HEADINGS, _part_cells(run), 1, 2)
        console.print()
        print_table(PROMPT_HEADINGS, _cells(run), 2)


def as_html(profile: Profile) -> str:
    """The tables for a notebook, below bars of all steps in order, as wide as they are long."""
    content = (
        heading(_title(profile), _about(profile))
        + _bar(profile)
        + _html_parts(PART_HEADINGS, _part_cells(profile))
        + _html_kinds(HEADINGS, _cells(profile))
        + f'<div class="muted">{escape(_note(profile))}</div>'
    )
    if (run := profile.prompt) is not None:
        content += (
            f"<h4>{escape(_title(run))}</h4>"
            + _bar(run)
            + _html_parts(PROMPT_PART_HEADINGS, _part_cells(run))
            + _html_kinds(PROMPT_HEADINGS, _cells(run))
        )
    return frame(content)


def _bar(profile: Profile) -> str:
    return bar(
        (COLOURS[step.part], step.seconds / profile.sum_s, f"{step.index} {step.name}: {step.seconds * 1e6:,.2f} µs")
        for step in profile.steps
    )


def _html_parts(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [[escape(cell) for cell in line] for line in cells]
    for row in rows:
        row[0] = (chip(row[0]) if row[0] in PARTS else "") + row[0]
    return table(headings, rows, totals=2)


def _html_kinds(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return "<h4>steps by kind</h4>" + table(headings, [[escape(cell) for cell in line] for line in cells], "ll")
