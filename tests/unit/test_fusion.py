"""Fusion passes: what each joins, that each can be switched off, and what must not be joined."""

from __future__ import annotations

from dataclasses import replace

import pytest

import numballama.cpu.ops
import numballama.cuda.ops  # noqa: F401 (both register their kernels)
from numballama.errors import Error
from numballama.fusion import FUSIONS, fuse
from numballama.ir import verify
from tests.helpers.graphs import SMALL, kinds, llama

CHANGES: dict[str, dict[str, int]] = {
    "attention": {"attention_scores": -2, "softmax": -2, "attention_values": -2, "attention": 2},
    "qkv": {"linear": -6, "qkv": 2},
    "gate_up": {"linear": -4, "swiglu": -2, "gate_up": 2},
    "residual": {"linear": -4, "add": -4, "linear_add": 4},
    "rope_kv": {"rope": -4, "kv_write": -4, "rope_kv_write": 2},
    "norm": {
        "rmsnorm": -1,
        "linear": -1,
        "norm_linear": 1,
    },  # alone it finds only the classifier: others read thrice, twice
    "all_reduce": {},  # one rank adds nothing up
    "qkv_rope": {},  # the CPU has no kernel for what it makes
}


def test_fusions_leave_alone_what_has_no_kernel() -> None:
    """The reference registers no fused kernel, so that fusing for it changes nothing."""
    graph = llama()
    assert fuse(graph, "reference").ops == graph.ops


def test_every_pass_is_counted() -> None:
    assert set(CHANGES) == set(FUSIONS)


@pytest.mark.parametrize("name", CHANGES)
def test_pass_alone(name: str) -> None:
    graph = llama()
    before, after = kinds(graph), kinds(fuse(graph, "cpu", [name]))
    change = {kind: after[kind] - before[kind] for kind in before | after if after[kind] != before[kind]}
    assert change == CHANGES[name]


def test_a_pass_without_a_kernel_leaves_the_graph_alone() -> None:
    """The CPU has none for `qkv_rope`; where there is one, a layer has a step less."""
    assert fuse(llama(), "cpu", True).ops == fuse(llama(), "cpu", [name for name in FUSIONS if name != "qkv_rope"]).ops
    found = kinds(fuse(llama(), "cuda"))
    assert found["norm_qkv_rope"] == 2 and not {"norm_qkv", "rope_kv_write"} & found.keys()


@pytest.mark.parametrize("off", [name for name in FUSIONS if name not in ("qkv_rope", "all_reduce")])
def test_pass_switched_off(off: str) -> None:
    """Without a pass the ops that it makes are gone, and every other pass still finds its own."""
    made = {"attention": "attention", "qkv": "qkv", "gate_up": "gate_up", "residual": "linear_add"}
    made |= {"rope_kv": "rope_kv_write", "norm": "norm_"}
    found = kinds(fuse(llama(), "cpu", [name for name in FUSIONS if name != off]))
    assert not any(
        kind.endswith(made[off]) or kind.startswith(made[off]) for kind in found if "attention_" not in kind
    ), found
    everything = kinds(fuse(llama(), "cpu"))
    assert sum(found.values()) > sum(everything.values())


def test_all_passes_and_none() -> None:
    graph = llama()
    assert fuse(graph, "cpu", False).ops == graph.ops == fuse(graph, "cpu", []).ops
    layer = {"norm_qkv": 2, "rope_kv_write": 2, "attention": 2, "linear_add": 4, "norm_gate_up": 2}
    assert kinds(fuse(graph, "cpu", True)) == {"rope_angles": 1, "embedding": 1, **layer, "norm_linear": 1, "argmax": 1}
    assert fuse(graph, "cpu", list(reversed(FUSIONS))).ops == fuse(graph, "cpu").ops, "passes run in their own order"


def test_biases_between_the_projections_do_not_hinder() -> None:
    fused = fuse(llama(replace(SMALL, qkv_bias=True)), "cpu")
    verify(fused)
    assert kinds(fused)["norm_qkv"] == 2 and kinds(fused)["bias"] == 6


def test_unknown_pass() -> None:
    with pytest.raises(Error, match=r"unknown fusion magic; choose from attention, qkv"):
        fuse(llama(), "cpu", ["qkv", "magic"])


def test_a_value_that_is_an_output_is_not_fused_away() -> None:
    graph = llama()
    scores = next(op.outputs[0] for op in graph.ops if op.kind == "attention_scores")
    graph.outputs.append(scores)
    fused = fuse(graph, "cpu")
    verify(fused)
    assert scores in fused.values and kinds(fused)["attention"] == SMALL.n_layers - 1
