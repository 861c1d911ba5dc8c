"""What a step must do: bytes to move, which divided by the memory bandwidth give its minimum time, and operations.

Counted are the weights and the part of the KV cache that the step reads, within the window if there is one, and what it
writes to the KV cache.
Activations are not counted, because they stay in the processor's caches, nor what several ranks exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..ir import Graph, Op, Value
from ..ops import EXCHANGE

if TYPE_CHECKING:
    from ..model import Model


def step_bytes(graph: Graph, op: Op, weight_nbytes: Callable[[str], int], position: int, tokens: int = 1) -> int:
    """Bytes that an op must move for `tokens` tokens of one sequence, the last of them at `position`.

    An embedding table counts as one row per token. `weight_nbytes` gives the bytes of a weight in the backend's layout.
    """
    writes = any(graph.values[name].kind == "state" for name in op.outputs)
    window, total = int(op.attrs.get("window") or 0), 0
    read = min(position + 1, window + tokens - 1) if window else position + 1
    for value in graph.operands(op.inputs):
        if value.kind == "weight":
            nbytes = weight_nbytes(value.name)
            total += nbytes // value.shape[0] * tokens if op.kind == "embedding" else nbytes
        elif value.kind == "state" and graph.root(value.name) not in EXCHANGE:
            total += _state_bytes(value, tokens if writes else read)
    return total


def step_operations(graph: Graph, op: Op, position: int, tokens: int = 1) -> int:
    """Multiplications and additions of an op for `tokens` tokens of one sequence, the last of them at `position`.

    Those of matrices are counted, and those of attention: of scores, and of weights times values. The others are few.
    """
    rows = min(tokens, graph.values[op.outputs[0]].shape[0])  # the classifier has only rows whose logits are wanted
    total = 0
    for value in graph.operands(op.inputs):
        if value.kind == "weight" and len(value.shape) == 2 and op.kind != "embedding":
            total += 2 * math.prod(value.shape) * rows
    if op.kind in ("attention", "attention_scores", "attention_values"):
        q = graph.values[op.inputs[0]] if op.kind != "attention_values" else graph.values[op.outputs[0]]
        window = int(op.attrs.get("window") or 0)
        seen = sum(min(p + 1, window or p + 1) for p in range(position + 1 - tokens, position + 1))
        total += (4 if op.kind == "attention" else 2) * math.prod(q.shape[1:]) * seen
    return total


def _state_bytes(state: Value, positions: int) -> int:
    """Bytes of `positions` positions of a KV cache [pages, heads, page, head_dim]; of another state, all."""
    if len(state.shape) != 4:
        return state.nbytes
    pages, _, page, _ = state.shape
    return state.nbytes // (pages * page) * positions


def bytes_per_token(model: Model, position: int, sequences: int = 1) -> int:
    """Bytes that a decode step of `sequences` sequences, each at `position`, must move: the weights only once.

    Those of all GPUs together, each of which reads its part of the weights and of the KV cache.
    """
    graph, weight_nbytes = model.program.graph, model.backend.weight_nbytes
    total = 0
    for op in graph.ops:
        again = weight_nbytes if op.kind == "embedding" else _none
        cached = step_bytes(graph, op, _none, position) * (model.gpus - 1)  # the other ranks have as many heads
        total += step_bytes(graph, op, weight_nbytes, position) + cached
        total += (step_bytes(graph, op, again, position) + cached) * (sequences - 1)
    return total


def _none(weight: str) -> int:
    return 0
