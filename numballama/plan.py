"""`Graph` → `Plan`: chooses kernels, computes lifetimes and places every value in one arena."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

from . import registry
from .errors import Error
from .fusion import operand_types
from .ir import Graph, Op, Value, verify
from .memory import round_up
from .visualize.plan import draw_plan

ALIGNMENT = 64
"""Alignment of values in bytes: a cache line, and the widest vector register."""


@dataclass(frozen=True)
class Step:
    """An op with its kernel, for up to `max_tokens` tokens. `scratch` are arena values that only this step uses.

    A step with `of_rows` handles the rows that `rows` has picked: those with logits, not all of the run.
    """

    op: Op
    kernel: registry.Kernel
    max_tokens: int
    scratch: tuple[Value, ...]
    of_rows: bool = False


@dataclass(frozen=True)
class Placement:
    """Bytes [offset, offset + nbytes) of the arena, in use from step `first` to step `last`, both included."""

    offset: int
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """A graph lowered for one backend and for runs of up to `tokens` tokens."""

    graph: Graph
    backend: str
    tokens: int
    workers: int
    steps: tuple[Step, ...]
    placements: dict[str, Placement]
    arena_bytes: int

    @property
    def unshared_bytes(self) -> int:
        """Bytes that the arena would have if every value had a buffer of its own."""
        return sum(round_up(placement.nbytes, ALIGNMENT) for placement in self.placements.values())

    @property
    def prefill_end(self) -> int:
        """Index of the first step that only rows with logits need. A run without such rows stops there."""
        return self.graph.first("rows")

    @property
    def sampling_start(self) -> int:
        """Index of the step that a sampler replaces: the argmax at the end, or the number of steps if there is none."""
        return len(self.steps) - (self.steps[-1].op.kind == "argmax")

    def __str__(self) -> str:
        width = max(len(step.kernel.name) for step in self.steps)
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        lines = [f"plan of {self.graph.name} on {self.backend}, {workers}: {len(self.steps)} steps"]
        for index, step in enumerate(self.steps):
            places = []
            for name in (*step.op.outputs, *(value.name for value in step.scratch)):
                place = self.placements.get(name)
                where = f"@{place.offset}+{place.nbytes}" if place else f"in {self.graph.root(name)}"
                places.append(f"{name.rpartition('/')[2]} {where}")
            lines.append(f"  {index:4} {step.kernel.name:{width}} ({', '.join(step.op.inputs)}) → {', '.join(places)}")
        saved = 1 - self.arena_bytes / max(1, self.unshared_bytes)
        lines.append(
            f"  arena {self.arena_bytes:,} bytes; a buffer for each value: {self.unshared_bytes:,} ({saved:.0%} saved)"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<Plan of {self.graph.name} on {self.backend}: {len(self.steps)} steps, arena {self.arena_bytes:,} bytes>"
        )

    def _repr_html_(self) -> str:
        """The memory map as a drawing, and the steps as a table, for a notebook."""
        return draw_plan(self)


def lower(graph: Graph, backend: str, workers: int = 1, without: Collection[str] = ()) -> Plan:
    """Choose a kernel for every op and place every value. Verifies the graph and the plan.

    Scratch arrays of the names `without` have one element for each worker: their kernels do without them.

    Raises `UnsupportedError` where the backend has no kernel, `Error` where the graph is not well formed.
    """
    verify(graph)
    picked = _picked_rows(graph)
    steps = tuple(_step(graph, op, backend, workers, without, not picked.isdisjoint(op.outputs)) for op in graph.ops)
    lifetimes = _lifetimes(graph, steps)
    placements = _place(lifetimes)
    arena = max((place.offset + round_up(place.nbytes, ALIGNMENT) for place in placements.values()), default=0)
    inputs = [value.shape[0] for value in graph.values.values() if value.kind == "input"]
    tokens = max([*inputs, *(step.max_tokens for step in steps)])
    plan = Plan(graph, backend, tokens, workers, steps, placements, arena)
    verify_plan(plan)
    return plan


def _picked_rows(graph: Graph) -> set[str]:
    """The values that have a row for each row with logits: results of `rows`, and all that is computed from them."""
    picked: set[str] = set()
    for op in graph.ops:
        if op.kind == "rows" or not picked.isdisjoint(op.inputs):
            picked.update(op.outputs)
    return picked


def _step(graph: Graph, op: Op, backend: str, workers: int, without: Collection[str], of_rows: bool) -> Step:
    kernel = registry.find(op.kind, backend, operand_types(graph, op.inputs))
    shapes = [value.shape for value in graph.operands(op.inputs)]
    sizes = {
        name: (workers, 1) if name in without else tuple(shape(*shapes, workers=workers))
        for name, shape in kernel.scratch.items()
    }
    scratch = tuple(Value(f"{op.outputs[0]}/{name}", size, "f32", "temp") for name, size in sizes.items())
    moving = [value for value in graph.operands((*op.inputs, *op.outputs)) if value.kind in ("input", "temp")]
    if of_rows:
        moving = graph.operands(op.outputs)
    return Step(op, kernel, max(value.shape[0] for value in moving), scratch, of_rows)


def _lifetimes(graph: Graph, steps: Iterable[Step]) -> list[tuple[Value, int, int]]:
    """(value, first step, last step) of everything that lives in the arena.

    Inputs are written before step 0, and stay: a caller rewrites only what changes. Outputs are read after the last
    step.
    """
    steps = list(steps)
    end = len(steps) - 1
    last_use = {name: index for index, step in enumerate(steps) for name in step.op.inputs}
    lives = [(value, 0, end) for value in graph.values.values() if value.kind == "input"]
    for index, step in enumerate(steps):
        for value in graph.operands(step.op.outputs):
            if value.kind == "temp":
                last = end if value.name in graph.outputs else last_use.get(value.name, index)
                lives.append((value, index, last))
        lives += [(value, index, index) for value in step.scratch]
    return lives


def _place(lifetimes: Iterable[tuple[Value, int, int]]) -> dict[str, Placement]:
    """Offsets by first fit, largest values first (Pisarchyk and Lee, Efficient Memory Management, 2020)."""
    lifetimes = list(lifetimes)
    placed: dict[str, Placement] = {}
    alive: dict[int, dict[int, Placement]] = {}  # step → the values alive in it, by identity
    for value, first, last in sorted(lifetimes, key=lambda life: (-life[0].nbytes, life[1])):
        neighbours = {key: place for step in range(first, last + 1) for key, place in alive.get(step, {}).items()}
        offset = 0
        for other in sorted(neighbours.values(), key=lambda place: place.offset):
            if offset + round_up(value.nbytes, ALIGNMENT) <= other.offset:
                break
            offset = max(offset, other.offset + round_up(other.nbytes, ALIGNMENT))
        place = placed[value.name] = Placement(offset, value.nbytes, first, last)
        for step in range(first, last + 1):
            alive.setdefault(step, {})[id(place)] = place
    return {value.name: placed[value.name] for value, _, _ in lifetimes}


def verify_plan(plan: Plan) -> None:
    """Check that every value of every step has a place in the arena and that no two live values share bytes.

    Raises `Error` naming the values.
    """
    for index, step in enumerate(plan.steps):
        values = [v for v in plan.graph.operands((*step.op.inputs, *step.op.outputs)) if v.kind in ("input", "temp")]
        for value in (*values, *step.scratch):
            place = plan.placements.get(value.name)
            if place is None or not place.first <= index <= place.last:
                raise Error(f"plan: {value.name} has no place in the arena in step {index} ({step.op.kind})")
            if (
                place.nbytes < value.nbytes
                or place.offset % ALIGNMENT
                or place.offset + place.nbytes > plan.arena_bytes
            ):
                raise Error(f"plan: {value} does not fit its place {place} in an arena of {plan.arena_bytes} bytes")
    alive: dict[int, list[tuple[int, str]]] = {}
    for name, place in plan.placements.items():
        if place.nbytes:
            for index in range(place.first, place.last + 1):
                alive.setdefault(index, []).append((place.offset, name))
    for index, living in alive.items():
        for first, second in pairwise(name for _, name in sorted(living)):
            below, above = plan.placements[first], plan.placements[second]
            if below.offset + below.nbytes > above.offset:
                raise Error(f"plan: in step {index} {first} {below} and {second} {above} are alive and share bytes")
