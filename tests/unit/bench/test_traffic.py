"""The bytes that a step must move, and its operations. test_profiler.py counts those of a whole model by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import numballama
from numballama import model
from numballama.bench.traffic import bytes_per_token, step_bytes, step_operations
from numballama.ir import Graph, Op
from numballama.parallel.backend import ParallelBackend
from tests.helpers.graphs import SMALL, llama
from tests.helpers.random_models import save
from tests.unit.parallel.test_shard import shards

KV_ROW = 4 * SMALL.kv_dim


def of(graph: Graph, kind: str, position: int = 5, tokens: int = 1) -> int:
    op: Op = graph.ops[graph.first(kind)]
    return step_bytes(graph, op, lambda name: 4 * math.prod(graph.values[name].shape), position, tokens)


def test_weights_are_read_whole_and_the_embedding_by_rows() -> None:
    graph = llama(tokens=3)
    assert of(graph, "linear") == of(graph, "linear", tokens=3) == 4 * SMALL.q_dim * SMALL.dim
    assert of(graph, "rmsnorm") == 4 * SMALL.dim
    assert of(graph, "embedding") == 4 * SMALL.dim and of(graph, "embedding", tokens=3) == 3 * 4 * SMALL.dim


def test_the_cache_is_written_for_new_tokens_and_read_up_to_the_position() -> None:
    """And the page table, of 4 bytes an entry, is read whole by each: it has two rows of one page."""
    graph = llama(tokens=3)
    table = graph.values["page_table"]
    assert table.shape == (2, 1) and table.nbytes == 8
    assert of(graph, "kv_write") == KV_ROW + 8 and of(graph, "kv_write", tokens=3) == 3 * KV_ROW + 8
    assert of(graph, "attention_scores", position=5) == of(graph, "attention_values", position=5) == 6 * KV_ROW + 8


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    """Three tokens up to position 6 with a window of 2 see positions 3 to 6."""
    graph = llama(tokens=3)
    for kind in ("attention_scores", "attention_values"):
        op = graph.ops[graph.first(kind)]
        for window, position, tokens, seen in ((2, 6, 3, 4), (2, 6, 1, 2), (9, 6, 3, 7), (0, 6, 3, 7)):
            windowed = replace(op, attrs={**op.attrs, "window": window})
            assert step_bytes(graph, windowed, lambda name: 0, position, tokens) == seen * KV_ROW + 8


def test_activations_cost_nothing() -> None:
    assert of(llama(), "softmax") == of(llama(), "add") == 0


def test_exchanges_between_ranks_cost_nothing() -> None:
    """Their memory is much larger than what they exchange, and nothing of it is read from the main memory."""
    for part in shards(tokens=1):
        assert of(part.graph, "all_reduce") == of(part.graph, "all_gather") == 0


def test_ranks_together_read_the_cache_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, checkpoint = save(tmp_path, "llama2c-v1")

    def open_ranks(*given: object) -> ParallelBackend:
        return ParallelBackend("cpu", checkpoint.config, checkpoint.weights, 2, 1)

    with numballama.compile(path, device="cpu", max_sequences=3) as one:
        monkeypatch.setattr(model, "open_backend", open_ranks)
        with numballama.compile(path, device="cpu", max_sequences=3) as two:
            two.gpus = 2
            for sequences in (1, 3):
                of_one, of_two = (
                    bytes_per_token(each, 20, sequences) - bytes_per_token(each, 10, sequences) for each in (one, two)
                )
                assert (
                    of_one == of_two == 10 * sequences * 2 * 4 * checkpoint.config.n_layers * checkpoint.config.kv_dim
                )


def test_operations_are_those_of_matrices_and_of_the_keys_that_each_token_sees() -> None:
    """Of three tokens the first ends at position 4 and sees five keys; the classifier has one row."""
    graph = llama(tokens=3)

    def operations(kind: str, position: int = 6, tokens: int = 3) -> int:
        return step_operations(graph, graph.ops[graph.first(kind)], position, tokens)

    assert operations("linear") == 3 * 2 * SMALL.q_dim * SMALL.dim
    assert operations("linear", tokens=1) == 2 * SMALL.q_dim * SMALL.dim
    for kind in ("attention_scores", "attention_values"):
        assert operations(kind) == 2 * SMALL.q_dim * (5 + 6 + 7)
    for kind in ("embedding", "rmsnorm", "add", "softmax", "kv_write"):
        assert operations(kind) == 0
    op = graph.ops[graph.first("attention_scores")]
    assert step_operations(graph, replace(op, attrs={**op.attrs, "window": 6}), 6, 3) == 2 * SMALL.q_dim * (5 + 6 + 6)
