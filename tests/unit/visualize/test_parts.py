"""Parts of a model: every weight and every op has one, before and after fusion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from numballama.config import ModelConfig
from numballama.fusion import fuse
from numballama.ir import Graph
from numballama.visualize.parts import (
    ATTENTION,
    CLASSIFIER,
    EMBEDDING,
    FEED_FORWARD,
    OTHER,
    bytes_by_part,
    layer_of,
    part_of_weight,
    parts_of_ops,
    short_name,
)
from tests.helpers.graphs import SMALL, llama

EVERYTHING = replace(SMALL, tied_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)


def test_every_weight_of_every_config_has_a_part() -> None:
    parts = {name: part_of_weight(name) for name in EVERYTHING.weight_shapes()}
    assert OTHER not in parts.values()
    assert parts["layers.1.q_norm"] == parts["layers.0.bo"] == ATTENTION and parts["layers.1.b3"] == FEED_FORWARD
    assert parts["tok_embeddings"] == EMBEDDING and parts["norm"] == parts["output"] == CLASSIFIER
    assert part_of_weight("layers.0.router") == OTHER


def test_names() -> None:
    assert layer_of("layers.12.wq") == 12 and layer_of("x") is None and layer_of("a.layers.1.b") is None
    assert short_name("layers.12.wq") == "wq" and short_name("norm") == "norm"


@pytest.mark.parametrize("config", [SMALL, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("int8", [False, True])
def test_ops_without_weights_belong_where_their_inputs_do(config: ModelConfig, int8: bool) -> None:
    graph = llama(config, tokens=3, kind="int8", int8=int8)
    parts = {op.outputs[0]: part for op, part in zip(graph.ops, parts_of_ops(graph), strict=True)}
    q = "q_normed_rope" if config.qk_norm else "q_rope"
    for name in (q, "k_cache'", "scores", "probabilities", "attn_out", "x_mid"):
        assert parts[f"layers.1.{name}"] == ATTENTION
    for name in ("ffn_in", "gate", "ffn_hidden", "x_out"):
        assert parts[f"layers.1.{name}"] == FEED_FORWARD
    assert parts["x"] == EMBEDDING and parts["angles"] == OTHER
    assert parts["final"] == parts["logits"] == parts["next"] == parts["x_rows"] == CLASSIFIER


def test_a_fused_op_is_of_the_part_of_the_ops_that_it_replaces() -> None:
    graph = llama(EVERYTHING, tokens=3)
    before = {name: part for op, part in zip(graph.ops, parts_of_ops(graph), strict=True) for name in op.outputs}
    fused: Graph = fuse(graph, "cpu")
    joined = 0
    for op, part in zip(fused.ops, parts_of_ops(fused), strict=True):
        assert {before[name] for inner in (op.body or (op,)) for name in inner.outputs} == {part}
        joined += bool(op.body)
    assert joined == 7


def test_bytes_by_part() -> None:
    weights = [
        ("tok_embeddings", "q8_0", (10, 4), 44),
        ("layers.0.wq", "q4_0", (4, 4), 9),
        ("layers.1.wq", "q4_0", (4, 4), 9),
        ("layers.0.attn_norm", "f32", (4,), 16),
        ("norm", "f32", (4,), 16),
    ]
    embedding, attention, last = bytes_by_part(weights, tied=True)
    assert (embedding.label, last.label) == ("embedding, classifier", "last norm")
    assert attention.parameters == 36 and attention.types == {"q4_0": 18, "f32": 16} and attention.nbytes == 34
    assert not any(part.label for part in bytes_by_part(weights, tied=False))
