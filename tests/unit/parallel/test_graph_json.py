"""A graph that goes to another process as JSON is the same graph there."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

import numballama.cpu.ops  # noqa: F401 (registers the kernels of fused ops)
from numballama.errors import Error
from numballama.fusion import fuse
from numballama.ir import Graph
from numballama.parallel.graph_json import dump_graph, load_graph
from tests.helpers.graphs import graphs, llama
from tests.unit.parallel.test_shard import shards


def assert_same(graph: Graph) -> None:
    again = load_graph(dump_graph(graph))
    assert str(again) == str(graph) and again.values == graph.values and again.outputs == graph.outputs
    assert again.ops == graph.ops and {n: list(c) for n, c in graph.constants.items()} == again.constants


@given(graphs())
def test_any_graph_comes_back(graph: Graph) -> None:
    assert_same(graph)


def test_graphs_of_ranks_come_back() -> None:
    for part in shards(ranks=4, tokens=3):
        assert_same(part.graph)


def test_fused_ops_are_refused() -> None:
    with pytest.raises(Error, match="is a fused op: a rank fuses its own graph"):
        dump_graph(fuse(llama(), "cpu"))


def test_a_graph_that_was_damaged_is_not_run() -> None:
    content = json.loads(dump_graph(llama()))
    content["ops"].pop(0)
    with pytest.raises(Error, match="angles is not defined before its use"):
        load_graph(json.dumps(content).encode())
