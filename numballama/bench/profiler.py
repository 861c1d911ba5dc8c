"""Profile one decode step: the time of each kernel, and how close it is to the minimum that the memory allows.

Each step of the plan is measured by itself, as `Backend.time_steps` says. Neighbouring steps overlap in a real run, so
the sum of the steps is not the time of the whole: both are shown. The minimum time of a step is the bytes that it must
move (`traffic.step_bytes`) divided by the measured bandwidth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..ir import Op
from .traffic import step_bytes

if TYPE_CHECKING:
    from ..model import Model

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "tok_embeddings", "output")
"""Short names of weights that tell steps of one op apart."""


@dataclass(frozen=True)
class StepTime:
    """A measured step of the plan. `layer` is None outside the layers. `weights` are short names, joined by spaces."""

    index: int
    op: str
    weights: str
    kernel: str
    layer: int | None
    seconds: float
    nbytes: int

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
    bandwidth_fraction: float
    """`rate` divided by the memory bandwidth: 1 is as fast as memory allows."""
    share: float


@dataclass(frozen=True)
class Profile:
    """A decode step measured at `position` of a context.

    `bandwidth` is the memory bandwidth in bytes per second. `whole_s` is the time of the whole step in seconds.
    """

    model: str
    device: str
    position: int
    bandwidth: float
    whole_s: float
    steps: tuple[StepTime, ...]

    @property
    def sum_s(self) -> float:
        """Seconds of all steps, each measured by itself."""
        return sum(step.seconds for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes that the decode step must move."""
        return sum(step.nbytes for step in self.steps)

    @property
    def kinds(self) -> list[StepKind]:
        """The steps by kind, in the order in which the kinds first occur."""
        groups: dict[tuple[str, str], list[StepTime]] = {}
        for step in self.steps:
            groups.setdefault((step.name, step.kernel), []).append(step)
        kinds = []
        for (name, kernel), steps in groups.items():
            seconds, nbytes = sum(step.seconds for step in steps), sum(step.nbytes for step in steps)
            rate = nbytes / seconds
            kinds.append(StepKind(
                name, kernel, len(steps), seconds / len(steps), nbytes / len(steps), rate, rate / self.bandwidth,
                seconds / self.sum_s,
            ))  # fmt: skip
        return kinds

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; units are in the keys."""
        return {
            "model": self.model,
            "device": self.device,
            "position": self.position,
            "memory_bandwidth_bytes_per_second": self.bandwidth,
            "whole_step_s": self.whole_s,
            "sum_of_steps_s": self.sum_s,
            "bytes": self.nbytes,
            "rows": [asdict(kind) for kind in self.kinds],
            "steps": [asdict(step) for step in self.steps],
        }


def profile(model: Model, position: int, bandwidth: float) -> Profile:
    """Measure every step of one decode step, after `position` tokens of context.

    `bandwidth`, in bytes per second, is the memory's. Raises `Error` on the reference, which has no plan, and
    `ContextError` if the position is outside the context.
    """
    program, backend = model.program, model.backend
    graph = model.plan.graph
    with model.exclusive() as session:
        if position:
            session.prefill([token % model.config.vocab_size for token in range(1, position + 1)])
        session.set_inputs(program, [0])
        sizes = [step_bytes(graph, op, backend.weight_nbytes, position) for op in graph.ops]
        kernels = program.kernel_names()
        described = [_describe(op) for op in graph.ops]
        kinds = [(weights, *rest) for (weights, _), *rest in zip(described, kernels, sizes, strict=True)]
        times, whole = backend.time_steps(program, kinds, sizes)
    steps = tuple(
        StepTime(index, op.kind, weights, kernel.removesuffix("_kernel"), layer, seconds, nbytes)
        for index, (op, (weights, layer), kernel, seconds, nbytes) in enumerate(
            zip(graph.ops, described, kernels, times, sizes, strict=True)
        )
    )
    return Profile(model.path.name, backend.description, position, bandwidth, whole, steps)


def _describe(op: Op) -> tuple[str, int | None]:
    """Short names of an op's matrices, and its layer."""
    layers = (name.split(".")[1] for name in (*op.inputs, *op.outputs) if name.startswith("layers."))
    layer = next(layers, None)
    matrices = [name.rpartition(".")[2] for name in op.inputs if "/" not in name]
    return " ".join(name for name in matrices if name in MATRICES), None if layer is None else int(layer)


def require_plan(model: Model) -> None:
    """Raise `Error` for a model that cannot be profiled, before anything is measured."""
    if model.program.plan is None:
        raise Error(f"the {model.device} has no plan whose steps could be timed; pass --device cpu or --device cuda")
