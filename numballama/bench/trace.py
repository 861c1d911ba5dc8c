"""A profile as a Chrome trace."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from ..files import atomic_write
from .profiler import Profile


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
        event["args"] |= {"step": step.index, "kernel": step.kernel, "part": step.part}
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
    arguments: dict[str, Any] = {"bytes": nbytes, "gigabytes_per_second": rate / 1e9}
    if (fraction := profile.fraction(rate)) is not None:
        arguments["percent_of_bandwidth"] = 100 * fraction
    return {
        "name": name, "cat": category, "ph": "X", "pid": 1, "tid": thread, "ts": start * 1e6, "dur": seconds * 1e6,
        "args": arguments,
    }  # fmt: skip


def write_trace(profile: Profile, path: str | PathLike[str]) -> None:
    """Write the Chrome trace, whole or not at all. Raises `Error` if the file cannot be written."""
    with atomic_write(path) as file:
        file.write(json.dumps(chrome_trace(profile), indent=1).encode() + b"\n")
