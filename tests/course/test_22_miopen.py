"""Solutions of docs/course/22-miopen.md."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from numballama import ir, registry
from numballama.cpu import ops as cpu_ops  # noqa: F401 (registers the CPU's kernels)
from numballama.cuda import ops as cuda_ops  # noqa: F401 (registers the GPU's kernels)


class Solver(NamedTuple):
    source: str
    is_applicable: Callable[[int, int], bool]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


SOLVERS = {
    "plain": Solver("for k in range(columns): ...", lambda rows, columns: True),
    "blocks": Solver("for block in range(columns // 32): ...", lambda rows, columns: columns % 32 == 0),
}
Ranking = Sequence[tuple[float, str, str]]
"""(seconds, solver, digest of its source), the fastest first."""


def immediate(database: Mapping[tuple[int, int], Ranking], rows: int, columns: int) -> str:
    """The best stored solver that exists, is applicable and has not changed; else the first applicable one."""
    for _, name, digest in database.get((rows, columns), ()):
        solver = SOLVERS.get(name)
        if solver is not None and solver.digest == digest and solver.is_applicable(rows, columns):
            return name
    return next(name for name, solver in SOLVERS.items() if solver.is_applicable(rows, columns))


def entry(name: str, seconds: float = 1e-6) -> tuple[float, str, str]:
    return seconds, name, SOLVERS[name].digest


def test_1_applicability() -> None:
    damaged = {(4, 33): [entry("blocks")], (4, 64): [entry("blocks")]}
    assert immediate(damaged, 4, 64) == "blocks"
    assert immediate(damaged, 4, 33) == "plain"
    assert immediate({(4, 64): [(1e-6, "gone", "")]}, 4, 64) == "plain"


def test_2_stale_results() -> None:
    current, stale = [entry("blocks")], [(1e-6, "blocks", "the hash of an older source")]
    assert immediate({(4, 64): current}, 4, 64) == "blocks"
    assert immediate({(4, 64): stale}, 4, 64) == "plain"


def test_3_which_fusions() -> None:
    def types(names: Sequence[str]) -> list[str]:
        return ["i32" if name in ("positions", "sequences", "page_table", "arrivals") else "f32" for name in names]

    found = {}
    for op in (kind for kind, rule in ir.RULES.items() if rule.shapes is None):
        found[op] = [
            device
            for device in ("cpu", "cuda")
            if any(registry.has(op, device, types(names)) for names in ir.RULES[op].inputs)
        ]
    print(found)
    assert found["norm_qkv"] == ["cpu", "cuda"]
    assert found["norm_qkv_rope"] == ["cuda"]
    assert all(found.values()), "a fused op that no device has would never be made"
