"""The pass that makes a rank's graph: what ranks compute, where they exchange values, how it composes with fusions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.config import ModelConfig
from numballama.errors import Error, UnsupportedError
from numballama.fusion import FUSIONS, fuse
from numballama.graph import KVLayout, build
from numballama.ir import Graph, Op, verify
from numballama.ops import CELL
from numballama.parallel.shard import Shard, shard, verify_ranks
from numballama.parallel.shares import Shares
from numballama.plan import lower
from numballama.quantization.types import F32, WeightType
from tests.helpers.graphs import kinds, llama

CONFIG = ModelConfig(64, 96, 2, 8, 4, 50, 8, tied_embeddings=False)


def types_of(config: ModelConfig, kind: str = "f32", group: int = 0) -> dict[str, WeightType]:
    shapes = config.weight_shapes() | {"output": (config.vocab_size, config.dim)}
    return {name: WeightType(kind, group) if len(shape) == 2 else F32 for name, shape in shapes.items()}


def shards(config: ModelConfig = CONFIG, ranks: int = 2, tokens: int = 3, **options: str) -> list[Shard]:
    types = types_of(config)
    whole = types if not config.tied_embeddings else {name: types[name] for name in config.weight_shapes()}
    graph = build(config, whole, KVLayout.of(config, config.context), tokens, **options)  # type: ignore[arg-type]
    shares = Shares.of(config, whole, ranks)
    return [shard(graph, types, shares, rank, workers=3) for rank in range(ranks)]


def made_by(graph: Graph, name: str) -> Op:
    return next(op for op in graph.ops if name in op.outputs)


def test_one_rank_has_the_same_graph() -> None:
    graph = llama()
    only = shard(graph, {}, Shares.of(CONFIG, types_of(CONFIG), 1), 0)
    assert only.graph is graph and set(only.layouts.values()) == {"whole"}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_what_a_rank_computes(ranks: int) -> None:
    for rank, part in enumerate(shards(ranks=ranks)):
        values = part.graph.values
        verify(part.graph)
        assert values["layers.1.wq"].shape == (64 // ranks, 64) and values["layers.1.wo"].shape == (64, 64 // ranks)
        assert values["layers.1.wk"].shape == (8 * max(4 // ranks, 1), 64)
        assert values["layers.1.w1"].shape == (96 // ranks, 64) and values["layers.1.w2"].shape == (64, 96 // ranks)
        assert values["layers.0.k_cache"].shape[1] == max(4 // ranks, 1), "each rank caches its own heads"
        assert values["tok_embeddings"].shape == (50, 64) and values["norm"].shape == (64,)
        assert values["logits"].shape == (1, 50) and part.graph.outputs == ["logits", "next"]
        assert values["exchange"].shape[0] == 2 and values["arrivals"].shape == (ranks, 3, CELL)
        assert f"rank {rank} of {ranks}" in part.graph.name
    rows = [part.graph.values["output"].shape[0] for part in shards(ranks=ranks)]
    assert sum(rows) == 50 and [made_by(part.graph, "logits").attrs["begin"] for part in shards(ranks=ranks)] == [
        sum(rows[:rank]) for rank in range(ranks)
    ]


def test_a_layer_has_two_sums_and_the_logits_are_gathered() -> None:
    for part in shards(ranks=4):
        found = [op.kind for op in part.graph.ops if op.kind.startswith("all_")]
        assert found == ["all_reduce"] * 4 + ["all_gather"]
        order = [name for op in part.graph.ops if op.kind.startswith("all_") for name in (op.inputs[1], op.outputs[1])]
        assert order[1:-1:2] == order[2::2], "each exchange reads the memory that the one before has updated"
        halves = [op.attrs["half"] for op in part.graph.ops if op.kind == "all_reduce"]
        assert halves == [1, 0, 1, 0], "also the last one and the first of the next run are different"
        assert max(map(part.graph.ops.index, (op for op in part.graph.ops if op.kind == "all_reduce"))) < (
            part.graph.first("rows")
        ), "a run without logits has them all"


def test_rank_0_adds_residual_and_bias() -> None:
    """Added on each rank, they would be in the sum as often as there are ranks."""
    first, second = shards(replace(CONFIG, o_bias=True, mlp_bias=True))
    for out, before in (("layers.0.x_mid", "x"), ("layers.0.x_out", "layers.0.x_mid")):
        summed, other = made_by(first.graph, out), made_by(second.graph, out)
        added = made_by(first.graph, summed.inputs[0])
        assert (summed.kind, other.kind, added.kind) == ("all_reduce", "all_reduce", "add") and added.inputs[
            0
        ] == before
        assert made_by(first.graph, added.inputs[1]).kind == "bias"
        assert made_by(second.graph, other.inputs[0]).kind == "linear"
    assert kinds(second.graph)["add"] == 0 and "layers.0.bo" not in second.graph.values
    assert second.names["layers.0.attn_projected_biased"] == "layers.0.attn_projected"


LAYER = {"norm_qkv": 2, "rope_kv_write": 2, "attention": 2, "norm_gate_up": 2, "all_reduce": 4}
REST = {"rope_angles": 1, "embedding": 1, "norm_linear": 1, "rows": 1, "all_gather": 1, "argmax": 1}


def test_fusions_find_the_same_ops_on_every_rank() -> None:
    """The residual's addition is joined with the linear op on rank 0, where it stands before the sum over ranks."""
    import numballama.cpu.ops
    import numballama.cuda.ops  # noqa: F401 (both register their kernels)

    first, *others = (part.graph for part in shards(ranks=4, tokens=3))
    assert kinds(fuse(first, "cpu")) == LAYER | REST | {"linear_add": 4}
    assert all(kinds(fuse(other, "cpu")) == LAYER | REST | {"linear": 4} for other in others)
    on_cuda = [kinds(fuse(graph, "cuda")) for graph in (first, *others)]
    assert all(found["norm_qkv_rope"] == 2 and found["all_reduce"] == 0 for found in on_cuda)
    assert on_cuda[0]["linear_add_all_reduce"] == 4 and all(other["linear_all_reduce"] == 4 for other in on_cuda[1:])
    for graph in (first, *others):
        fused = fuse(graph, "cpu")
        verify(fused)
        assert not any(part.kind.startswith("all_") for op in fused.ops for part in op.body), "sums stay steps"


@pytest.mark.parametrize(
    ("biases", "fused"), [({}, [1, 1]), ({"o_bias": True}, [0, 1]), ({"mlp_bias": True}, [1, 0])], ids=str
)
@pytest.mark.parametrize("without", ["", "residual", "all_reduce"])
def test_all_ranks_fuse_the_same_sums(biases: dict[str, bool], fused: list[int], without: str) -> None:
    """A rank would wait for ever for one that adds up the same values by another kernel."""
    import numballama.cuda.ops  # noqa: F401 (it registers kernels)

    passes = [name for name in FUSIONS if name != without]
    for part in shards(replace(CONFIG, **biases), 2):  # type: ignore[arg-type]
        sums = [op.kind for op in fuse(part.graph, "cuda", passes).ops if op.kind.endswith("all_reduce")]
        assert [kind != "all_reduce" for kind in sums] == ([0] * 4 if without == "all_reduce" else 2 * fused), sums


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@given(st.sets(st.sampled_from(list(FUSIONS))).map(sorted), st.integers(0, 3), st.sampled_from(["rows", "all"]))
def test_any_fusions_of_a_rank_make_a_plan(device: str, passes: list[str], rank: int, logits: str) -> None:
    import numballama.cpu.ops
    import numballama.cuda.ops  # noqa: F401 (they register kernels)

    part = shards(replace(CONFIG, tied_embeddings=True), 4, logits=logits)[rank]
    plan = lower(fuse(part.graph, device, passes), device, 2)
    text = str(plan)
    assert f"plan of llama, 3 tokens, rank {rank} of 4 on {device}" in text and text.count("all_reduce") == 4
    assert plan.prefill_end < len(plan.steps) or logits == "all"
    assert plan.steps[plan.sampling_start].op.kind == "argmax"


def test_a_tied_classifier_is_rows_of_the_embedding() -> None:
    first, second = shards(replace(CONFIG, tied_embeddings=True))
    assert first.graph.values["output"].shape == second.graph.values["output"].shape == (25, 64)
    assert made_by(first.graph, "x").inputs == ("ids", "tok_embeddings")


def test_layers_seen_through_the_classifier_are_shared_too() -> None:
    config = CONFIG
    graph = build(config, types_of(config), KVLayout.of(config, 8), 3, "all", lens=True)
    part = shard(graph, types_of(config), Shares.of(config, types_of(config), 2), 1)
    assert kinds(part.graph)["all_gather"] == 2 and part.graph.values["layers.0.lens_logits"].shape == (3, 50)


def test_int8_activations_are_split_in_their_groups() -> None:
    types = types_of(CONFIG, "int8", 16)
    graph = build(CONFIG, types, KVLayout.of(CONFIG, 8), 1, "rows", int8_activations=True)
    shares = Shares.of(CONFIG, types, 2, int8_activations=True)
    part = shard(graph, types, shares, 0)
    assert kinds(part.graph)["quantize"] == kinds(graph)["quantize"]
    smaller = types | {"layers.1.w2": WeightType("int8", 8)}  # as `part_type` says where a group is cut
    with pytest.raises(UnsupportedError, match=re.escape("cannot share layers.1.w2 with int8 activations: it is cut")):
        shard(graph, smaller, shares, 0)


def test_a_fused_graph_is_refused() -> None:
    import numballama.cpu.ops  # noqa: F401 (registers its kernels)

    with pytest.raises(Error, match=r"is a fused op: shard a graph before its ops are fused"):
        shard(fuse(llama(CONFIG), "cpu"), types_of(CONFIG), Shares.of(CONFIG, types_of(CONFIG), 2), 0)


def graph_with(*ops: tuple[str, tuple[str, ...], str], **shapes: tuple[int, ...]) -> Graph:
    """A graph of ops (kind, inputs, output) over weights and inputs of these shapes."""
    graph = Graph("odd")
    for name, shape in shapes.items():
        declare = graph.input if name in ("x", "n") else graph.weight
        declare(name, shape, "i32" if name == "n" else "f32")
    for kind, inputs, out in ops:
        graph.add(kind, *(graph.values[name] for name in inputs), out=out)
    graph.outputs = [ops[-1][2]]
    return graph


ODD: Mapping[str, Graph] = {
    "y is hidden on a rank, and an op that reads it needs it whole": graph_with(
        ("linear", ("x", "w1"), "y"), ("rows", ("y", "n"), "z"), x=(2, 64), w1=(96, 64), n=(1,)
    ),
    "y is hidden on a rank, and an op that reads it needs it heads": graph_with(
        ("linear", ("x", "w1"), "y"), ("softmax", ("y",), "z"), x=(2, 64), w1=(96, 64)
    ),
    "nothing says how wq is split where its input is hidden": graph_with(
        ("linear", ("x", "w1"), "y"), ("linear", ("y", "wq"), "z"), x=(2, 64), w1=(96, 64), wq=(64, 96)
    ),
    "nothing says how norm is split where its input is whole": graph_with(
        ("linear", ("x", "norm"), "y"), x=(2, 64), norm=(64, 64)
    ),
    "w2 is split by columns, and its input is whole": graph_with(("linear", ("x", "w2"), "y"), x=(2, 96), w2=(64, 96)),
    "nothing says how b1 is split where its input is heads": graph_with(
        ("linear", ("x", "wq"), "y"), ("bias", ("y", "b1"), "z"), x=(2, 64), wq=(64, 64), b1=(64,)
    ),
    "z is partial on a rank, and an op that reads it needs it whole": graph_with(
        ("linear", ("x", "w1"), "y"), ("linear", ("y", "w2"), "z"), x=(2, 64), w1=(96, 64), w2=(64, 96)
    ),
    "its inputs are partial and partial, a sum and a whole value are needed": graph_with(
        ("linear", ("x", "w1"), "y"), ("linear", ("y", "w2"), "z"), ("add", ("z", "z"), "two"),
        x=(2, 64), w1=(96, 64), w2=(64, 96),
    ),
}  # fmt: skip
"""Message → a graph that no rule says how to split."""


@pytest.mark.parametrize("message", ODD)
def test_a_graph_that_cannot_be_split_says_which_value(message: str) -> None:
    types = types_of(CONFIG) | dict.fromkeys(("w1", "w2", "wq", "norm"), F32)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        shard(ODD[message], types, Shares.of(CONFIG, types_of(CONFIG), 2), 0)


def without(part: Shard, kind: str) -> Graph:
    """A graph without its last op of this kind."""
    last = max(index for index, op in enumerate(part.graph.ops) if op.kind == kind)
    return part.graph.replace_ops([op for index, op in enumerate(part.graph.ops) if index != last])


def test_ranks_that_would_wait_for_each_other_are_refused() -> None:
    first, second = shards(tokens=1)
    verify_ranks([first.graph, second.graph])
    with pytest.raises(Error, match="ranks exchange 5, 4 values, not equally many"):
        verify_ranks([first.graph, without(second, "all_reduce")])
    with pytest.raises(Error, match=r"ranks exchange different values: rank 0: .* = all_reduce.*; rank 1: "):
        verify_ranks([second.graph, first.graph])
    wide, wider = (shards(replace(CONFIG, vocab_size=vocab), tokens=1) for vocab in (50, 52))
    with pytest.raises(Error, match=r"ranks exchange different values: rank 0: logits"):
        verify_ranks([wide[0].graph, wider[1].graph])
    uneven = Graph("uneven")
    x, exchange = uneven.input("x", (1, 20), "f32"), uneven.state("exchange", (2, 50), "f32")
    arrivals = uneven.state("arrivals", (1, 1, CELL), "i32")
    uneven.add("all_gather", x, exchange, arrivals, out=("y", "e", "a"), rank=0, begin=10, columns=50)
    with pytest.raises(Error, match="the parts of ranks do not cover all columns once"):
        verify_ranks([uneven])


def test_exchanges_have_one_order() -> None:
    """Two that read the same memory could run in any order, on each rank in another."""
    graph = Graph("twice")
    x, exchange = graph.input("x", (1, 4), "f32"), graph.state("exchange", (2, 8), "f32")
    arrivals = graph.state("arrivals", (2, 1, CELL), "i32")
    for number in range(2):
        graph.add("all_reduce", x, exchange, arrivals, out=(f"y{number}", f"e{number}", f"a{number}"), rank=0)
    with pytest.raises(Error, match="reads exchange, which e0 has updated"):
        verify(graph)
