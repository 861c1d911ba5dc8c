"""Fusion passes and the planner: lifetimes, the arena, the checks of a plan, and its printed form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama import registry
from numballama.config import ModelConfig
from numballama.errors import Error, UnsupportedError
from numballama.fusion import FUSIONS, fuse
from numballama.graph import KVLayout, build
from numballama.ir import Graph, verify
from numballama.plan import ALIGNMENT, Plan, lower, verify_plan
from numballama.quantization.types import F32, KV_TYPES, WeightType
from tests.helpers.random_models import configs

SMALL = ModelConfig(16, 24, 2, 4, 2, 20, 8)


def llama(
    config: ModelConfig = SMALL, tokens: int = 1, logits: str = "last", kind: str = "f32", int8: bool = False
) -> Graph:
    types = {name: WeightType(kind, 32) if len(shape) == 2 else F32 for name, shape in config.weight_shapes().items()}
    return build(config, types, KVLayout.of(config, config.context), tokens, logits, int8)


# The arena


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph of ops that need nothing but their inputs: values of all sizes, read late, often, or never."""
    graph = Graph("random")
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 70)), min_size=1, max_size=3))
    live = [graph.input(f"in{index}", shape, "f32") for index, shape in enumerate(shapes)]
    for index in range(draw(st.integers(1, 25))):
        a = draw(st.sampled_from(live))
        kind = draw(st.sampled_from(["add", "swiglu", "last", "quantize"]))
        if kind == "quantize":
            _, scales = graph.add(kind, a, out=(f"q{index}", f"s{index}"), group=draw(st.integers(1, 9)))
            live.append(scales)
        elif kind == "last":
            live.append(graph.add(kind, a, out=f"v{index}"))
        else:
            b = draw(st.sampled_from([value for value in live if value.shape == a.shape]))
            live.append(graph.add(kind, a, b, out=f"v{index}"))
    computed = [name for op in graph.ops for name in op.outputs]
    graph.outputs = draw(st.lists(st.sampled_from(computed), min_size=1, max_size=3, unique=True))
    return graph


def needed(plan: Plan) -> list[set[str]]:
    """For each step the names of what must be in the arena: by definition, from the ops alone.

    An input lives throughout (a caller need not write it again); a value from the step that computes it to the last
    that reads it, or to the end when it is an output; scratch in its own step.
    """
    made = {name: index for index, step in enumerate(plan.steps) for name in step.op.outputs}
    live: list[set[str]] = []
    for index, step in enumerate(plan.steps):
        names = {value.name for value in plan.graph.values.values() if value.kind == "input"}
        names |= {value.name for value in step.scratch}
        for name, first in made.items():
            if plan.graph.values[name].kind == "state":
                continue
            reads = [later for later, other in enumerate(plan.steps) if name in other.op.inputs]
            last = len(plan.steps) - 1 if name in plan.graph.outputs else max([first, *reads])
            if first <= index <= last:
                names.add(name)
        live.append(names)
    return live


def check_arena(plan: Plan) -> None:
    sizes = {
        value.name: value.nbytes for value in plan.graph.values.values() if value.dtype in ("f32", "i8", "i32", "f16")
    }
    sizes |= {value.name: value.nbytes for step in plan.steps for value in step.scratch}
    most = 0
    for names in needed(plan):
        owner: dict[int, str] = {}
        for name in names:
            place = plan.placements[name]
            assert place.nbytes == sizes[name] and place.offset % ALIGNMENT == 0
            assert place.offset >= 0 and place.offset + place.nbytes <= plan.arena_bytes
            for byte in range(place.offset, place.offset + place.nbytes):
                assert owner.setdefault(byte, name) == name, f"{name} and {owner[byte]} share byte {byte}"
        most = max(most, sum(sizes[name] for name in names))
    assert most <= plan.arena_bytes <= plan.unshared_bytes
    assert plan.unshared_bytes == sum(-(-place.nbytes // ALIGNMENT) * ALIGNMENT for place in plan.placements.values())


@given(graphs(), st.integers(1, 3))
@settings(max_examples=60)
def test_no_two_live_values_share_bytes(graph: Graph, workers: int) -> None:
    check_arena(lower(graph, "cpu", workers))


@given(
    configs(biases=True), st.integers(1, 5), st.sampled_from(["last", "all"]), st.booleans(), st.integers(1, 3),
    st.booleans() | st.sets(st.sampled_from(list(FUSIONS))).map(sorted),
)  # fmt: skip
@settings(max_examples=40)
def test_arena_of_models(
    config: ModelConfig, tokens: int, logits: str, int8: bool, workers: int, fusions: bool | list[str]
) -> None:
    graph = llama(config, tokens, logits, "int8" if int8 else "f32", int8)
    fused = fuse(graph, "cpu", fusions)
    verify(fused)
    plan = lower(fused, "cpu", workers)
    check_arena(plan)
    assert plan.tokens == tokens and plan.workers == workers


def test_sharing_saves_most_of_the_memory() -> None:
    """Of a model of many layers only a few values live at once: the arena does not grow with the layers."""
    deep = lower(fuse(llama(replace(SMALL, n_layers=12), 4), "cpu"), "cpu", 2)
    shallow = lower(fuse(llama(replace(SMALL, n_layers=3), 4), "cpu"), "cpu", 2)
    assert deep.arena_bytes == shallow.arena_bytes < deep.unshared_bytes / 4


def test_max_tokens_of_steps() -> None:
    """A step handles as many tokens as its values have; after `last` there is one."""
    plan = lower(fuse(llama(tokens=5), "cpu"), "cpu")
    kinds = [step.op.kind for step in plan.steps]
    assert [step.max_tokens for step in plan.steps[: kinds.index("last") + 1]] == [5] * (kinds.index("last") + 1)
    assert {step.max_tokens for step in plan.steps[kinds.index("last") + 1 :]} == {1}


def test_prefill_end_is_where_only_the_last_token_counts() -> None:
    prefill = lower(fuse(llama(tokens=4), "cpu"), "cpu")
    assert prefill.steps[prefill.prefill_end].op.kind == "last"
    written = {name for step in prefill.steps[: prefill.prefill_end] for name in step.op.outputs if "cache" in name}
    assert len(written) == 2 * SMALL.n_layers, "a run that stops at the head has filled the whole cache"
    for other in (llama(tokens=1), llama(tokens=4, logits="all")):
        plan = lower(fuse(other, "cpu"), "cpu")
        assert plan.prefill_end == len(plan.steps)


# verify_plan


def plan_of_one_chain() -> Plan:
    graph = Graph("chain")
    x = graph.input("x", (2, 40), "f32")
    for index in range(4):
        x = graph.add("add", x, x, out=f"v{index}")
    graph.outputs = [x.name]
    plan = lower(graph, "cpu")
    verify_plan(plan)
    return plan


def corrupted(change: Callable[[Plan], dict[str, Any]]) -> Plan:
    plan = plan_of_one_chain()
    return replace(plan, **change(plan))


def moved(plan: Plan, name: str, **changes: int) -> dict[str, Any]:
    return {"placements": {**plan.placements, name: replace(plan.placements[name], **changes)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: moved(p, "v1", offset=p.placements["v0"].offset), "v[01].*v[01].*share bytes"),
        (lambda p: moved(p, "v1", offset=p.placements["v0"].offset + 64), "share bytes"),
        (lambda p: moved(p, "v2", offset=p.placements["x"].offset), "share bytes"),  # inputs live to the end
        (lambda p: moved(p, "v1", offset=p.placements["v1"].offset + 4), "v1.*does not fit"),
        (lambda p: moved(p, "v1", nbytes=p.placements["v1"].nbytes - 4), "v1.*does not fit"),
        (lambda p: moved(p, "v1", offset=p.arena_bytes), "v1.*does not fit"),
        (lambda p: {"arena_bytes": max(q.offset + q.nbytes for q in p.placements.values()) - 1}, "does not fit"),
        (lambda p: moved(p, "v1", last=1), "v1 has no place in the arena in step 2"),
        (lambda p: moved(p, "v1", first=2), "v1 has no place in the arena in step 1"),
        (lambda p: moved(p, "x", first=1), "x has no place in the arena in step 0"),
        (lambda p: {"placements": {n: q for n, q in p.placements.items() if n != "v3"}}, "v3 has no place"),
        (lambda p: {"placements": {n: q for n, q in p.placements.items() if n != "x"}}, "x has no place"),
    ],
)
def test_verify_plan_finds(change: Callable[[Plan], dict[str, Any]], message: str) -> None:
    with pytest.raises(Error, match=message):
        verify_plan(corrupted(change))


def test_verify_plan_wants_a_place_for_scratch() -> None:
    plan = lower(fuse(llama(), "cpu"), "cpu", 2)
    scratch = next(value.name for step in plan.steps for value in step.scratch)
    with pytest.raises(Error, match=re.escape(scratch)):
        verify_plan(replace(plan, placements={n: q for n, q in plan.placements.items() if n != scratch}))


def test_an_output_lives_to_the_end() -> None:
    graph = Graph("early")
    x = graph.input("x", (1, 40), "f32")
    graph.add("add", x, x, out="early")
    for index in range(3):
        x = graph.add("add", x, x, out=f"v{index}")
    graph.outputs = ["early"]
    plan = lower(graph, "cpu")
    assert plan.placements["early"].last == 3
    assert plan.placements["v2"].last == 3 and plan.placements["v0"].last == 2
    verify_plan(plan)
    with pytest.raises(Error, match="share bytes"):
        verify_plan(replace(plan, **moved(plan, "v1", offset=plan.placements["early"].offset)))


def test_every_input_has_a_place_even_if_no_step_reads_it() -> None:
    graph = Graph("unused")
    x = graph.input("x", (1, 4), "f32")
    graph.input("unused", (3,), "i32")
    graph.outputs = [graph.add("add", x, x, out="y").name]
    assert lower(graph, "cpu").placements["unused"].nbytes == 12


def test_lower_verifies_the_graph() -> None:
    graph = llama()
    graph.ops.reverse()
    with pytest.raises(Error, match="not defined before its use"):
        lower(graph, "cpu")


# Kernels


def test_missing_kernel_names_op_types_and_what_exists() -> None:
    graph = Graph("missing")
    graph.add("linear", graph.input("x", (1, 4), "f32"), graph.weight("w", (3, 4), "q2_k"), out="y")
    graph.outputs = ["y"]
    with pytest.raises(
        UnsupportedError, match=r"no cpu kernel for linear\(f32, q2_k\).*'f32', \('f32', 'f16'.*'i8', 'f32', 'int8'"
    ):
        lower(graph, "cpu")
    with pytest.raises(UnsupportedError, match=r"no abacus kernel for linear.*nothing"):
        lower(graph, "abacus")


def test_a_kernel_without_a_window_is_not_used_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kernels", {key: list(found) for key, found in registry._kernels.items()})

    @registry.kernel("attention", "cpu", "f32", KV_TYPES, "i32", "i32", KV_TYPES)
    def blind(part, parts, tokens, q, k_cache, positions, sequences, v_cache, out):  # type: ignore[no-untyped-def]
        raise AssertionError("never compiled")

    for window in (0, 3):
        graph = fuse(llama(replace(SMALL, window=window)), "cpu")
        if window:
            with pytest.raises(UnsupportedError, match="cpu kernel blind has no sliding window"):
                lower(graph, "cpu")
        else:
            assert any(step.kernel.name == "blind" for step in lower(graph, "cpu").steps)


def test_fusions_leave_alone_what_has_no_kernel() -> None:
    """The reference registers no fused kernel, so that fusing for it changes nothing."""
    graph = llama()
    assert fuse(graph, "reference").ops == graph.ops


# Fusion passes

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
    "qkv_rope": {},  # the CPU has no kernel for what it makes
}


def kinds(graph: Graph) -> Counter[str]:
    return Counter(op.kind for op in graph.ops)


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
    pytest.importorskip("numba.cuda.core.targetconfig", reason="numba-cuda is not installed", exc_type=ImportError)
    found = kinds(fuse(llama(), "cuda"))
    assert found["norm_qkv_rope"] == 2 and not {"norm_qkv", "rope_kv_write"} & found.keys()


@pytest.mark.parametrize("off", [name for name in FUSIONS if name != "qkv_rope"])
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


def test_int8_activations_are_quantised_once_for_all_readers() -> None:
    graph = llama(kind="int8", int8=True)
    assert kinds(graph)["quantize"] == 4 * SMALL.n_layers + 1
    fused = fuse(graph, "cpu")
    verify(fused)
    assert kinds(fused)["qkv"] == kinds(fused)["gate_up"] == 2 and kinds(fused)["linear_add"] == 4


def test_unknown_pass() -> None:
    with pytest.raises(Error, match=r"unknown fusion magic; there are attention, qkv"):
        fuse(llama(), "cpu", ["qkv", "magic"])


def test_a_value_that_is_an_output_is_not_fused_away() -> None:
    graph = llama()
    scores = next(op.outputs[0] for op in graph.ops if op.kind == "attention_scores")
    graph.outputs.append(scores)
    fused = fuse(graph, "cpu")
    verify(fused)
    assert scores in fused.values and kinds(fused)["attention"] == SMALL.n_layers - 1


# What a person sees


def test_plan_prints_steps_offsets_and_savings() -> None:
    plan = lower(fuse(llama(), "cpu"), "cpu", 2)
    text = str(plan)
    lines = text.splitlines()
    assert lines[0] == f"plan of llama, 1 token on cpu, 2 workers: {len(plan.steps)} steps"
    for index, (line, step) in enumerate(zip(lines[1:-1], plan.steps, strict=True)):
        assert line.split()[:2] == [str(index), step.kernel.name]
        for name in step.op.outputs:
            if name in plan.placements:
                assert f"{name} @{plan.placements[name].offset}+{plan.placements[name].nbytes}" in line
            else:
                assert f"{name} in {plan.graph.root(name)}" in line
    saved = 1 - plan.arena_bytes / plan.unshared_bytes
    assert f"arena {plan.arena_bytes:,} bytes" in lines[-1] and f"({saved:.0%} saved)" in lines[-1]
    assert str(len(plan.steps)) in repr(plan)


def rectangles(svg: str) -> Sequence[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}rect")


@given(graphs())
@settings(max_examples=25)
def test_svg_has_a_rectangle_a_value_inside_the_picture(graph: Graph) -> None:
    plan = lower(graph, "cpu")
    background, *found = rectangles(plan._repr_svg_())
    assert len(found) == len(plan.placements)
    for rectangle, name in zip(found, plan.placements, strict=True):
        x, y, w, h = (float(rectangle.attrib[key]) for key in ("x", "y", "width", "height"))
        assert w > 0 and h > 0 and x >= 0 and x + w <= float(background.attrib["width"]) + 0.2
        assert y > -1 and y + h <= float(background.attrib["height"])
        title = rectangle.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and (title.text or "").startswith(f"{name}:")


def test_svg_escapes_names() -> None:
    graph = Graph("<&>")
    x = graph.input("a<b>&\"'", (1, 4), "f32")
    graph.outputs = [graph.add("add", x, x, out="</title>").name]
    assert len(rectangles(lower(graph, "cpu")._repr_svg_())) == 3
