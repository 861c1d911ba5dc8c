"""Makes `course` importable, and removes what a page or a solution registers after its test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    from course import simulator  # noqa: F401 (first: it replaces what kernels import)

from numballama import graph, ir, reference, registry  # noqa: F401
from numballama.cpu import ops as cpu_ops  # noqa: F401
from numballama.cuda import ops as cuda_ops  # noqa: F401 (all rules and kernels, before a test could register them)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    kernels = {key: list(entries) for key, entries in registry._kernels.items()}
    with ExitStack() as stack:
        for table in (ir.RULES, graph.LAYERS):
            stack.enter_context(patch.dict(table))  # type: ignore[arg-type]
        yield
    for key, entries in registry._kernels.items():
        entries[:] = kernels.get(key, [])  # a kernel for the same types had replaced the package's
