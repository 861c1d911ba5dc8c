"""Profile one decode step, and the run of the prompt before it: the time of each kernel and each part of the model.

Each step of the plan is measured by itself, as `Backend.time_steps` says. Neighbouring steps overlap in a real run, so
the sum of the steps is not the time of the whole: both are shown. The floor of a step, its minimum time, is the bytes
that it must move (`traffic.step_bytes`) divided by the measured bandwidth. A prompt of many tokens is limited by
arithmetic instead: its operations a second are shown.

Of several GPUs that share a model the steps are those of the first one. What the GPUs exchange takes as long as
`Backend.time_exchanges` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .. import progress
from ..errors import DeviceError, Error
from ..ir import Op
from ..visualize import profile as view
from ..visualize.parts import COMMUNICATION, OTHER, PARTS, layer_of, parts_of_ops, short_name
from .traffic import step_bytes, step_operations

if TYPE_CHECKING:
    from ..backend import Backend, Program
    from ..model import Model
    from ..parallel.processes import ProcessBackend

SHORTEST_S = 1e-9
"""Lower bound of the time of an exchange in seconds, so that a rate computed from it is finite."""
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "tok_embeddings", "output")
"""Short names of weights that tell steps of one op apart."""


@dataclass(frozen=True)
class StepTime:
    """A measured step of the plan. `layer` is None outside the layers. `weights` are short names, joined by spaces.
    `part` is the part of the model: one of `parts.PARTS`.
    """

    index: int
    op: str
    weights: str
    kernel: str
    layer: int | None
    seconds: float
    nbytes: int
    part: str = OTHER
    operations: int = 0
    """Multiplications and additions."""

    @property
    def name(self) -> str:
        """The op and, in parentheses, the weights that tell it from others of its kind."""
        return f"{self.op} ({self.weights})" if self.weights else self.op


@dataclass(frozen=True)
class StepKind:
    """All steps with the same name and kernel.

    `seconds` and `nbytes` are means of one step. `rate` is in bytes per second. `share` is the fraction of the time of
    all steps.
    """

    name: str
    kernel: str
    count: int
    seconds: float
    nbytes: float
    rate: float
    bandwidth_fraction: float | None
    """`rate` divided by the memory bandwidth, or the floor divided by the time: 1 is as fast as memory allows."""
    share: float
    operations_per_second: float = 0.0


@dataclass(frozen=True)
class PartTime:
    """All steps of a part of the model. `seconds`, `floor_s` and `nbytes` are sums; the others are as in `StepKind`."""

    part: str
    count: int
    seconds: float
    floor_s: float | None
    """Seconds that moving the bytes takes at the memory bandwidth."""
    nbytes: int
    rate: float
    bandwidth_fraction: float | None
    share: float
    operations_per_second: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A decode step measured at `position` of a context. Prints as a table; a notebook shows it with bars.

    `bandwidth` is the memory bandwidth in bytes per second, None where it could not be measured. `whole_s` is the time
    of the whole step in seconds, `prompt_s` that of the `position` tokens before it (None: there are none). `prompt` is
    the same of one run: the prompt's last tokens, as many as are computed together. Its `tokens` tells how many, its
    `position` is that of the last; None where the prompt has fewer than two.
    """

    model: str
    device: str
    position: int
    bandwidth: float | None
    whole_s: float
    steps: tuple[StepTime, ...]
    prompt_s: float | None = None
    tokens: int = 1
    prompt: Profile | None = None
    ranks: int = 1
    """Ranks that share the model. Steps, bytes and the bandwidth are those of rank 0."""

    @property
    def operations(self) -> int:
        """Multiplications and additions of all steps."""
        return sum(step.operations for step in self.steps)

    @property
    def sum_s(self) -> float:
        """Seconds of all steps, each measured by itself."""
        return sum(step.seconds for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes that the decode step must move."""
        return sum(step.nbytes for step in self.steps)

    @property
    def floor_s(self) -> float | None:
        """Seconds that moving these bytes takes at the memory bandwidth."""
        return self._floor(self.nbytes)

    def fraction(self, rate: float) -> float | None:
        """A rate, in bytes per second, divided by the memory bandwidth."""
        return rate / self.bandwidth if self.bandwidth else None

    def _floor(self, nbytes: float) -> float | None:
        return nbytes / self.bandwidth if self.bandwidth else None

    @property
    def kinds(self) -> list[StepKind]:
        """The steps by kind, in the order in which the kinds first occur."""
        kinds = []
        for (name, kernel), steps in _grouped((step.name, step.kernel) for step in self.steps):
            seconds, nbytes, operations = self._sums(steps)
            rate = nbytes / seconds
            kinds.append(StepKind(
                name, kernel, len(steps), seconds / len(steps), nbytes / len(steps), rate, self.fraction(rate),
                seconds / self.sum_s, operations / seconds,
            ))  # fmt: skip
        return kinds

    @property
    def parts(self) -> list[PartTime]:
        """The steps by part of the model, in the order of `PARTS`. Parts without a step are left out."""
        parts = []
        for part, steps in sorted(_grouped(step.part for step in self.steps), key=lambda group: PARTS.index(group[0])):
            seconds, nbytes, operations = self._sums(steps)
            rate = nbytes / seconds
            parts.append(PartTime(
                part, len(steps), seconds, self._floor(nbytes), nbytes, rate, self.fraction(rate),
                seconds / self.sum_s, operations / seconds,
            ))  # fmt: skip
        return parts

    def _sums(self, indices: Sequence[int]) -> tuple[float, int, int]:
        """(seconds, bytes, operations) of some steps."""
        steps = [self.steps[index] for index in indices]
        return (
            sum(step.seconds for step in steps), sum(step.nbytes for step in steps),
            sum(step.operations for step in steps),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; units are in the keys."""
        return {
            "model": self.model,
            "device": self.device,
            "position": self.position,
            "tokens": self.tokens,
            "ranks": self.ranks,
            "memory_bandwidth_bytes_per_second": self.bandwidth,
            "prompt_s": self.prompt_s,
            "whole_step_s": self.whole_s,
            "sum_of_steps_s": self.sum_s,
            "floor_s": self.floor_s,
            "bytes": self.nbytes,
            "operations": self.operations,
            "parts": [asdict(part) for part in self.parts],
            "rows": [asdict(kind) for kind in self.kinds],
            "steps": [asdict(step) for step in self.steps],
            "prompt": self.prompt.to_dict() if self.prompt else None,
        }

    def __str__(self) -> str:
        return view.as_text(self)

    def _repr_html_(self) -> str:
        """The tables, for a notebook."""
        return view.as_html(self)

    def __repr__(self) -> str:
        return f"<Profile of {self.model} on {self.device}: {len(self.steps)} steps, {self.whole_s * 1e6:,.0f} µs>"


_Key = TypeVar("_Key", bound=Hashable)


def _grouped(keys: Iterable[_Key]) -> list[tuple[_Key, list[int]]]:
    """Each key, in the order of their first occurrence, with the indices at which it stands."""
    groups: dict[_Key, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.items())


def profile(model: Model, prompt: int | Sequence[int], bandwidth: float | None) -> Profile:
    """Measure every step of one decode step after a prompt, and of the prompt's last run: token ids, or just how many.

    `bandwidth`, in bytes per second, is the memory's; None: unknown. Raises `Error` on the reference, which has no
    plan, and `ContextError` if no token fits after the prompt. Of several GPUs only the decode step is measured.
    """
    backend, ranks = model.backend, model.gpus
    weight_nbytes = backend.weight_nbytes if ranks == 1 else cast("ProcessBackend", backend).ranks[0].weight_nbytes
    bandwidth = bandwidth and bandwidth / ranks
    if isinstance(prompt, int):
        prompt = [token % model.config.vocab_size for token in range(1, prompt + 1)]
    position, prompt_s, of_prompt = len(prompt), None, None
    with model.exclusive() as session, progress.progress_bar("profile") as report:
        if position:
            report("prompt", 0, 3)
            for _ in range(2):  # the first run may read weights from the disk
                session.truncate()
                backend.synchronize()
                started = time.perf_counter()
                session.prefill(prompt)
                backend.synchronize()
                prompt_s = time.perf_counter() - started
        report("steps of a token", 1, 3)
        session.set_inputs(model.program, [0])
        if ranks == 1:
            steps, whole = _measure(backend, weight_nbytes, model.program, position)
        else:
            several = cast("ProcessBackend", backend)
            timed = several.program_to_time(model.program, model.graph)
            session.set_inputs(timed, [0])
            steps, _ = _measure(backend, weight_nbytes, timed, position)
            steps = _with_exchanges(steps, several.time_exchanges(model.graph))
            whole = several.seconds_of_run(model.program)
        program, name = session.prompt_program, model.path.name
        last = prompt[position - min(position, len(program.inputs["ids"])) :]
        if len(last) > 1 and ranks == 1:
            report("steps of the prompt", 2, 3)
            session.truncate(position - len(last))
            session.set_inputs(program, last)
            measured = _measure(backend, weight_nbytes, program, position - 1, len(last))
            of_prompt = Profile(name, backend.description, position - 1, bandwidth, measured[1], measured[0],
                                tokens=len(last))  # fmt: skip
    return Profile(
        name, backend.description, position, bandwidth, whole, steps, prompt_s, prompt=of_prompt, ranks=ranks
    )


def _with_exchanges(steps: tuple[StepTime, ...], seconds: float) -> tuple[StepTime, ...]:
    """The steps with a time for each exchange: an equal part of what all take together."""
    count = sum(step.part == COMMUNICATION for step in steps)
    return tuple(
        replace(step, seconds=max(seconds / count, SHORTEST_S)) if step.part == COMMUNICATION else step
        for step in steps
    )


def _measure(
    backend: Backend, weight_nbytes: Callable[[str], int], program: Program, position: int, tokens: int = 1
) -> tuple[tuple[StepTime, ...], float]:
    """The steps of a run of the first `tokens` inputs, the last of them at `position`, and seconds of the whole."""
    graph = program.graph
    sizes = [step_bytes(graph, op, weight_nbytes, position, tokens) for op in graph.ops]
    program.run(tokens)  # which kernels it takes may depend on the inputs
    kernels, weights = program.kernel_names(tokens), [_matrices(op) for op in graph.ops]
    times, whole = backend.time_steps(program, list(zip(weights, kernels, sizes, strict=True)), sizes, tokens)
    steps = zip(graph.ops, weights, kernels, times, sizes, parts_of_ops(graph), strict=True)
    return tuple(
        StepTime(
            index, op.kind, weight, kernel.removesuffix("_kernel"), layer_of(op.outputs[0]), seconds, nbytes, part,
            step_operations(graph, op, position, tokens),
        )
        for index, (op, weight, kernel, seconds, nbytes, part) in enumerate(steps)
    ), whole  # fmt: skip


def _matrices(op: Op) -> str:
    """Short names of an op's matrices."""
    return " ".join(name for name in map(short_name, op.inputs) if name in MATRICES)


def bandwidth_or_note(backend: Backend, notes: list[str]) -> float | None:
    """The memory's bandwidth in bytes per second. None, with a note, where too little memory is free to measure it."""
    try:
        return backend.measure_bandwidth()
    except DeviceError as error:
        if str(error) not in notes:
            notes.append(str(error))
        return None


def require_plan(model: Model) -> None:
    """Raise `Error` for a model that cannot be profiled, before anything is measured."""
    if model.program.plan is None:
        raise Error(f"the {model.device} has no plan whose steps could be timed; pass --device cpu or --device cuda")
