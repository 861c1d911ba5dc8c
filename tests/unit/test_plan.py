"""The planner: lifetimes, the arena, the checks of a plan, and its printed form."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama import registry
from numballama.config import ModelConfig
from numballama.errors import Error, UnsupportedError
from numballama.fusion import FUSIONS, fuse
from numballama.graph import Logits
from numballama.ir import Graph, verify
from numballama.plan import ALIGNMENT, Plan, lower, verify_plan
from numballama.quantization.types import KV_TYPES
from tests.helpers.graphs import SMALL, graphs, llama
from tests.helpers.random_models import configs

# The arena


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


@pytest.mark.slow
@given(graphs(), st.integers(1, 3))
@settings(max_examples=60)
def test_no_two_live_values_share_bytes(graph: Graph, workers: int) -> None:
    check_arena(lower(graph, "cpu", workers))


@pytest.mark.slow
@given(
    configs(biases=True), st.integers(1, 5), st.sampled_from(["rows", "all"]), st.booleans(), st.integers(1, 3),
    st.booleans() | st.sets(st.sampled_from(list(FUSIONS))).map(sorted),
)  # fmt: skip
@settings(max_examples=40)
def test_arena_of_models(
    config: ModelConfig, tokens: int, logits: Logits, int8: bool, workers: int, fusions: bool | list[str]
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
    """A step handles as many tokens as its values have; from `rows` on there is one."""
    plan = lower(fuse(llama(tokens=5), "cpu"), "cpu")
    kinds = [step.op.kind for step in plan.steps]
    first = kinds.index("rows")
    assert {(step.max_tokens, step.of_rows) for step in plan.steps[:first]} == {(5, False)}
    assert {(step.max_tokens, step.of_rows) for step in plan.steps[first:]} == {(1, True)}


def test_prefill_end_is_where_only_the_last_token_counts() -> None:
    prefill = lower(fuse(llama(tokens=4), "cpu"), "cpu")
    assert prefill.steps[prefill.prefill_end].op.kind == "rows"
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


def test_a_kernel_without_a_window_is_not_used_for_one() -> None:
    """It is refused where it is defined, whether or not a model has a window."""

    def blind(worker, n_workers, tokens, q, k_cache, positions, sequences, page_table, v_cache, out):  # type: ignore[no-untyped-def]
        raise AssertionError("never compiled")

    with pytest.raises(Error, match="cpu kernel blind for attention: attribute `window` changes the result"):
        registry.kernel("attention", "cpu", "f32", KV_TYPES, "i32", "i32", "i32", KV_TYPES)(blind)
    for window in (0, 3):
        plan = lower(fuse(llama(replace(SMALL, window=window)), "cpu"), "cpu")
        kernels = [step.kernel for step in plan.steps if step.op.kind == "attention"]
        assert len(kernels) == SMALL.n_layers and all("window" in kernel.named for kernel in kernels)


# What a person sees


def test_plan_prints_steps_offsets_and_savings() -> None:
    plan = lower(fuse(llama(), "cpu"), "cpu", 2)
    text = str(plan)
    lines = text.splitlines()
    assert lines[0] == f"plan of llama, 1 token on cpu, 2 workers: {len(plan.steps)} steps"
    assert str(lower(plan.graph, "cpu")).startswith("plan of llama, 1 token on cpu, 1 worker: ")
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
