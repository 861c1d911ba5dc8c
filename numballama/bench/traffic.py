"""The bytes that a step must move. Divided by the memory bandwidth, they give the minimum time of the step.

Counted are the weights and the part of the KV cache that the step reads, and what it writes to the KV cache.
Activations are not counted, because they stay in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..ir import Graph, Op, Value

if TYPE_CHECKING:
    from ..model import Model


def step_bytes(graph: Graph, op: Op, weight_nbytes: Callable[[str], int], position: int, tokens: int = 1) -> int:
    """Bytes that an op must move for `tokens` tokens of one sequence, the last of them at `position`.

    An embedding table counts as one row per token. `weight_nbytes` gives the bytes of a weight in the backend's layout.
    """
    writes = any(graph.values[name].kind == "state" for name in op.outputs)
    total = 0
    for value in graph.operands(op.inputs):
        if value.kind == "weight":
            nbytes = weight_nbytes(value.name)
            total += nbytes // value.shape[0] * tokens if op.kind == "embedding" else nbytes
        elif value.kind == "state":
            total += _state_bytes(value, tokens if writes else position + 1)
    return total


def _state_bytes(state: Value, positions: int) -> int:
    """Bytes of `positions` positions of a KV cache [pages, heads, page, head_dim]; of another state, all."""
    if len(state.shape) != 4:
        return state.nbytes
    pages, _, page, _ = state.shape
    return state.nbytes // (pages * page) * positions


def bytes_per_token(model: Model, position: int, sequences: int = 1) -> int:
    """Bytes that a decode step of `sequences` sequences, each at `position`, must move: the weights only once."""
    graph, weight_nbytes = model.program.graph, model.backend.weight_nbytes
    total = 0
    for op in graph.ops:
        again = weight_nbytes if op.kind == "embedding" else _none
        total += step_bytes(graph, op, weight_nbytes, position)
        total += step_bytes(graph, op, again, position) * (sequences - 1)
    return total


def _none(weight: str) -> int:
    return 0
