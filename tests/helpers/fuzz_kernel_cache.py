"""Damages files of the kernel cache: each load gives the right function, or none, and never a crash or a hang.

    python -m tests.helpers.fuzz_kernel_cache --cases 100000

A case damages the file of a small function, loads it in this process and compares results. What the cache finds goes
through Numba; of the rest, where Numba compiles, one in twenty does, up to the compilation.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from numba.core import registry

from numballama import kernel_cache
from numballama.cpu import compiler

SECONDS = 5.0
"""No load may compute longer."""
HANG_S = 120.0
"""A load that takes longer, computing or waiting, hangs: the process ends with a traceback."""


def remove(path: Path) -> None:
    """Remove whatever lies at a path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damage(rng: random.Random, path: Path, others: list[bytes]) -> None:
    """Do to a file what crashes, full disks, other programs and other versions do."""
    whole = path.read_bytes()
    at = rng.randrange(len(whole))
    kind = rng.randrange(13)
    remove(path)
    if kind == 0:
        path.write_bytes(whole[:at])
    elif kind == 1:
        path.write_bytes(bytes(len(whole)))
    elif kind == 2:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    elif kind == 3:
        path.write_bytes(whole[:at] + bytes(len(whole) - at))
    elif kind == 4:
        path.write_bytes(whole + rng.randbytes(rng.randrange(1, 5000)))
    elif kind == 5:
        path.write_bytes(rng.choice(others))
    elif kind == 6:
        path.write_bytes(whole[:at] + rng.choice(others)[at:])
    elif kind == 7:
        path.write_bytes(rng.randbytes(rng.randrange(0, 5000)))
    elif kind == 8:
        path.mkdir()
    elif kind == 9:
        os.mkfifo(path)
    elif kind == 10:
        path.symlink_to(path.with_name(rng.choice(["missing", path.name])))
    elif kind == 11:
        with open(path, "wb") as file:
            file.write(whole)
            file.truncate(kernel_cache.MAX_ENTRY_BYTES << rng.randrange(8))
    else:
        path.write_bytes(whole)


def _double(x):  # type: ignore[no-untyped-def]
    return 2 * x


def _negate(x):  # type: ignore[no-untyped-def]
    return -x


FUNCTIONS: dict[Any, Any] = {_double: lambda x: 2 * x, _negate: lambda x: -x}


def load(function: Any) -> Any:
    """A dispatcher for the function as a new process has it, with its code from the cache, or None."""
    dispatcher = compiler.jit(function)
    with mock.patch.object(dispatcher._compiler, "compile", side_effect=LookupError):
        try:
            dispatcher.compile("(int64,)")
        except LookupError:
            return None
    return dispatcher


def fuzz(cases: int, seed: int, folder: Path, seconds: float = 1e9) -> tuple[float, Counter[str]]:
    """Damage and load `cases` times, or for some seconds; returns the seconds and how the loads ended."""
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    here = mock.patch.object(kernel_cache, "cache_directory", return_value=folder)
    with here, mock.patch.object(kernel_cache, "_note"):
        context = registry.cpu_target.target_context
        paths, keys = {}, {}
        for function in FUNCTIONS:
            dispatcher = compiler.jit(function)
            dispatcher.compile("(int64,)")
            paths[function], keys[function] = dispatcher._cache._entry(dispatcher.signatures[0], context.codegen())
        whole = {function: path.read_bytes() for function, path in paths.items()}
        for case in range(cases):
            if time.perf_counter() - started > seconds:
                break
            rng = random.Random(f"{seed} {case}")
            function = rng.choice(list(FUNCTIONS))
            damage(rng, paths[function], list(whole.values()))
            began = time.process_time()
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                content = kernel_cache.load(paths[function], keys[function])
                found = None if content is None and case % 20 else load(function)
            what = f"seed {seed}, case {case}"
            assert (content is None) == (found is None), f"{what}: an entry that Numba cannot load"
            assert time.process_time() - began < SECONDS, f"{what}: a load took {time.process_time() - began:.1f} s"
            assert found is None or found(7) == FUNCTIONS[function](7), f"{what}: a wrong result"
            counts["compiled again" if found is None else "loaded"] += 1
            remove(paths[function])
            content = whole[function].split(b"\n", 2)[2]
            assert kernel_cache.store(paths[function], keys[function], content), what
    faulthandler.cancel_dump_traceback_later()
    return time.perf_counter() - started, counts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, counts = fuzz(given.cases, given.seed, Path(folder), given.seconds)
    print(f"{sum(counts.values()):,} cases in {seconds:.0f} s: {dict(counts)}; no crash, no hang, no wrong result")


if __name__ == "__main__":
    main()
