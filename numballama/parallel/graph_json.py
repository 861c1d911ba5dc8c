"""A graph as JSON, for a rank in another process. It holds numbers and names only: reading it runs no code."""

from __future__ import annotations

import json

from ..errors import Error
from ..ir import Graph, Op, Value, verify


def dump_graph(graph: Graph) -> bytes:
    """A graph that has not been fused, as JSON. Raises `Error` for one that has."""
    if fused := next((op for op in graph.ops if op.body), None):
        raise Error(f"{fused.kind} is a fused op: a rank fuses its own graph")
    content = {
        "name": graph.name,
        "values": [[v.name, v.shape, v.dtype, v.kind, v.alias] for v in graph.values.values()],
        "ops": [[op.kind, op.inputs, op.outputs, dict(op.attrs)] for op in graph.ops],
        "outputs": graph.outputs,
        "constants": {name: list(map(float, elements)) for name, elements in graph.constants.items()},
    }
    return json.dumps(content, separators=(",", ":")).encode()


def load_graph(text: bytes) -> Graph:
    """The graph of `dump_graph`, verified."""
    content = json.loads(text)
    graph = Graph(content["name"])
    for name, shape, dtype, kind, alias in content["values"]:
        graph.values[name] = Value(name, tuple(shape), dtype, kind, alias)
    graph.ops = [Op(kind, tuple(inputs), tuple(outputs), attrs) for kind, inputs, outputs, attrs in content["ops"]]
    graph.outputs, graph.constants = content["outputs"], content["constants"]
    verify(graph)
    return graph
