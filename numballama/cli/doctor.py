"""`numballama doctor`: what this machine offers, whether CPU and GPU work, and what is missing."""

from __future__ import annotations

import argparse
import json
import os

from .. import kernel_cache
from ..errors import Error
from ..memory import format_bytes
from .parser import Parser


def add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what this machine offers, and what is missing",
        description="Check packages, limits of the container, CPU, GPU, and the caches of compiled kernels.",
        epilog="A kernel is compiled and run on each device; what does not work comes with the command that mends it. "
        "The exit status is 0 when the CPU works, with or without a GPU, and 1 when it does not.",
        examples=("numballama doctor", "numballama doctor --json > machine.json"),
    )
    how = doctor.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object instead of text")
    how.add_argument(
        "--clear-cache", action="store_true", help="remove all compiled kernels, so that they are compiled again"
    )
    doctor.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> None:
    if arguments.clear_cache:
        print(clear_cache())
        return
    from ..doctor.report import Report

    report = Report.make()
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.as_text())
    if not report.cpu.works:
        raise Error("the CPU does not work: the report says why")


def clear_cache() -> str:
    """Remove the compiled kernels of all versions, for CPU and GPU; returns what was done, a line for each folder."""
    roots = {kernel_cache.cache_root(numbas) for numbas in ("", os.environ.get("NUMBA_CACHE_DIR", ""))}
    lines = []
    for root in sorted(root for root in roots if root is not None):
        removed = kernel_cache.clear(root)
        if removed.problem:
            raise Error(f"{root}: not all compiled kernels could be removed: {removed.problem}")
        lines.append(f"removed {removed.entries:,} compiled kernels, {format_bytes(removed.nbytes)}, from {root}")
    return "\n".join(lines) or f"there is no cache: {kernel_cache.no_place()}"
