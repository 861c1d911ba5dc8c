"""Whole random models, one step at a time: every value that the CPU writes, the KV cache included, against the
reference.

After each step its op is compared on the operands that the CPU itself had, within the bounds of rounding (see
`tests.helpers.bounds`), and no other live byte may have changed: so by induction every value is right, whatever int8
activations or a 16-bit cache round. Where all arithmetic is float32, the value is also compared with that of the same
name in the reference's own run of the unfused graph. Before every step all bytes that hold no value the rest of the
plan needs are NaN, and the unwritten part of the KV cache from the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.checkpoint import Weight
from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig
from numballama.cpu.backend import CpuProgram
from numballama.fusion import FUSIONS
from numballama.graph import KVLayout, build
from numballama.quantization.convert import convert
from numballama.quantization.types import F32, WeightType
from numballama.reference import ReferenceBackend, ReferenceProgram, sequence_rows
from numballama.session import Session
from tests.helpers.bounds import check_step, compiled, cpu_backend, poison, poison_dead, read
from tests.helpers.paging import give_pages
from tests.helpers.random_models import architectures, random_checkpoint

TYPES = {"f32": F32, "f16": WeightType("f16"), "bf16": WeightType("bf16")}
SHARE = 1e-3
"""Largest difference of two right float32 computations of a whole model, as a fraction of a value's largest element.
Each op adds some 1e-7, norms of rows that nearly cancel magnify it (600 random models: 2e-5 at most). Wrong wiring
gives differences near 1.
"""


def converted(weights: Mapping[str, Weight], kind: str, group: int) -> dict[str, Weight]:
    """Matrices in another type, norms and biases as they are: what `compile(dtype=…)` and the int8 formats give."""
    target = WeightType("int8", group) if kind == "int8" else TYPES[kind]
    return {name: convert(w, target) if len(w.shape) == 2 else w for name, w in weights.items()}


def graph_of(
    config: ModelConfig, weights: Mapping[str, Weight], kv: KVLayout, tokens: int, logits: str, int8: bool
) -> Any:
    return build(config, {name: w.type for name, w in weights.items()}, kv, tokens, logits, int8)


def feed(program: CpuProgram | ReferenceProgram, ids: Sequence[int], start: int, sequence: int = 0) -> None:
    program.inputs["ids"][: len(ids)] = ids
    program.inputs["positions"][: len(ids)] = range(start, start + len(ids))
    program.inputs["sequences"][: len(ids)] = sequence
    if "rows" in program.inputs:
        program.inputs["rows"][0] = len(ids) - 1


def run_checked(
    program: CpuProgram, reference: ReferenceProgram, ids: Sequence[int], start: int, sequence: int, whole: bool
) -> None:
    """One run, step by step; with `whole` also of the reference, from its own beginning."""
    tokens, graph = len(ids), program.plan.graph
    feed(program, ids, start, sequence)
    if whole:
        feed(reference, ids, start, sequence)
        reference.run(tokens)
    for step, planned in enumerate(program.plan.steps):
        own = poison_dead(program, step)
        before = program.arena.copy()
        check_step(
            program, step, tokens, reference.backend, lambda step=step: program.run(tokens, step, step + 1), rows=1
        )
        np.testing.assert_array_equal(program.arena[~own], before[~own], err_msg=f"step {step} wrote to others' memory")
        for name in planned.op.outputs if whole else ():
            got, want = read(program, name, 1 if planned.of_rows else tokens), reference.values[name]
            if graph.values[name].dtype == "i32":
                continue  # argmax chooses among near equals; the op itself was compared above
            if graph.values[name].kind == "state":
                where = reference.backend.states["page_table"], sequence, got.shape[2], slice(0, start + tokens)
                pages, places = sequence_rows(*where)
                got, want = got[pages, :, places], want[pages, :, places]
            masked = np.isneginf(want)
            np.testing.assert_array_equal(np.isneginf(got), masked, err_msg=name)
            largest = np.abs(want[~masked]).max()
            difference = np.abs(got[~masked] - want[~masked]).max()
            assert difference <= SHARE * largest + 1e-6, (
                f"step {step} {planned.op.kind}: {name} off by {difference / largest}"
            )


def models(kinds: Sequence[str], caches: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({
        "config": architectures(),
        "pairing": st.sampled_from([INTERLEAVED, HALF_SPLIT]),
        "kind": st.sampled_from(kinds),
        "group": st.sampled_from([1, 3, 32, 64, 100]),
        "kv": st.sampled_from(caches),
        "seed": st.integers(0, 1000),
        "workers": st.integers(1, 2),
        "page": st.sampled_from([1, 3, 16, 32, 64]),
    })  # fmt: skip


FLOAT_MODELS = models(["f32", "f16", "bf16", "int8"], ["f32"])
"""Weights of any type, all arithmetic in float32."""
ROUNDING_MODELS = models(["f32", "int8", "int8 activations", "int8 activations"], ["f32", "f16", "bf16"])
"""Models with int8 activations or a 16-bit cache, or both."""


class Pair:
    """The CPU and the reference over one random model."""

    def __init__(self, drawn: Mapping[str, Any], sequences: int = 1) -> None:
        self.config: ModelConfig = replace(drawn["config"], rope_pairing=drawn["pairing"])
        self.int8 = drawn["kind"] == "int8 activations"
        kind = "int8" if self.int8 else drawn["kind"]
        self.weights = converted(random_checkpoint(self.config, drawn["seed"]).weights, kind, drawn["group"])
        page = drawn.get("page", 4)
        self.kv = KVLayout.of(self.config, self.config.context, drawn["kv"], sequences, page=page)
        self.cpu, self.reference = cpu_backend(self.weights, drawn["workers"]), ReferenceBackend(self.weights)
        self.floats = drawn["kv"] == "f32" and not self.int8

    def programs(self, tokens: int, logits: str, fusions: bool | Sequence[str]) -> tuple[CpuProgram, ReferenceProgram]:
        graph = graph_of(self.config, self.weights, self.kv, tokens, logits, self.int8)
        programs = compiled(self.cpu, graph, fusions), self.reference.program(graph)
        for backend in (self.cpu, self.reference):
            give_pages(backend, self.kv)
        return programs

    def ids(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, self.config.vocab_size, count)]


@pytest.mark.slow
@given(FLOAT_MODELS | ROUNDING_MODELS, st.booleans() | st.sets(st.sampled_from(list(FUSIONS))).map(sorted), st.data())
@settings(max_examples=100)
def test_every_value_of_prefill_and_decode(
    drawn: dict[str, Any], fusions: bool | list[str], data: st.DataObject
) -> None:
    pair = Pair(drawn, sequences=data.draw(st.integers(1, 2)))
    chunk = data.draw(st.integers(2, 9), "most tokens of a prefill")
    prefill = pair.programs(chunk, data.draw(st.sampled_from(["rows", "all"])), fusions)
    decode = pair.programs(1, "rows", fusions)
    rng = np.random.default_rng(drawn["seed"])
    poison(prefill[0])
    poison(decode[0])
    for sequence in range(pair.kv.slots):
        start = 0
        for programs, most in ((prefill, chunk), (prefill, chunk), (decode, 1), (decode, 1)):
            count = min(data.draw(st.integers(1, most)), pair.config.context - start)
            if count > 0:
                run_checked(*programs, pair.ids(rng, count), start, sequence, pair.floats)
                start += count


@pytest.mark.slow
@given(FLOAT_MODELS)
@settings(max_examples=15)
def test_fused_and_unfused_give_the_same(drawn: dict[str, Any]) -> None:
    pair = Pair(drawn)
    tokens = min(5, pair.config.context)
    ids, results = pair.ids(np.random.default_rng(1), tokens), []
    for fusions in (True, False):
        pair.cpu.states.clear()
        program, _ = pair.programs(tokens, "all", fusions)
        poison(program)
        feed(program, ids, 0)
        program.run(tokens)
        results.append(program.value("logits").copy())
    largest = np.abs(results[1]).max()
    assert np.isfinite(largest)
    assert np.abs(results[0] - results[1]).max() <= SHARE * largest


@pytest.mark.slow
@given(FLOAT_MODELS, st.data())
@settings(max_examples=20)
def test_prefill_in_chunks_equals_token_by_token(drawn: dict[str, Any], data: st.DataObject) -> None:
    """Logits of the last token: through chunks, one at a time, all at once, after a rewind; and those of the
    reference."""
    pair = Pair(drawn)
    context = pair.config.context
    count = data.draw(st.integers(1, context))
    ids = pair.ids(np.random.default_rng(2), count)
    decode, _ = pair.programs(1, "rows", True)
    chunked, _ = pair.programs(data.draw(st.integers(1, 8)), "rows", True)
    everything, reference = pair.programs(context, "all", True)
    for program in (decode, chunked, everything):
        poison(program)

    session = Session(decode, chunked, context, pair.config.vocab_size)
    session.prefill(ids)
    results = {"chunks": session.logits.copy()}
    session.truncate()
    for token in ids:
        session.step(token)
    results["steps"] = session.logits.copy()
    kept = data.draw(st.integers(0, count - 1), "kept by rewind")
    for token in pair.ids(np.random.default_rng(3), min(3, context - count)):
        session.step(token)
    session.truncate(kept)
    assert session.tokens == ids[:kept]
    session.prefill(ids[kept:])
    assert session.tokens == ids
    results["rewound"] = session.logits.copy()
    feed(everything, ids, 0)
    everything.run(count)
    results["all"] = everything.value("logits")[count - 1].copy()

    feed(reference, ids, 0)
    reference.run(count)
    want = reference.value("logits")[-1]
    for name, got in results.items():
        assert np.abs(got - want).max() <= SHARE * np.abs(want).max() + 1e-6, name


def test_sessions_of_two_sequences_share_programs() -> None:
    """Their tokens alternate, and neither reads the other's part of the cache."""
    config = ModelConfig(16, 24, 2, 4, 2, 30, 12)
    drawn = {"config": config, "pairing": INTERLEAVED, "kind": "f32", "group": 32, "kv": "f32", "seed": 4, "workers": 1}
    pair = Pair(drawn, sequences=2)
    (decode, reference), (prompt, _) = pair.programs(1, "rows", True), pair.programs(4, "rows", True)
    poison(decode)
    sessions = [Session(decode, prompt, config.context, config.vocab_size, sequence) for sequence in (0, 1)]
    ids = [pair.ids(np.random.default_rng(sequence), 11) for sequence in (0, 1)]
    got = []
    for session, own in zip(sessions, ids, strict=True):
        session.prefill(own[:6])
    for place in range(6, 11):
        for session, own in zip(sessions, ids, strict=True):
            session.step(own[place])
            got.append(session.logits.copy())
    for sequence, own in enumerate(ids):
        for place, token in enumerate(own):
            feed(reference, [token], place)
            reference.run(1)
            if place >= 6:
                want = reference.value("logits")[0]
                assert np.abs(got[2 * (place - 6) + sequence] - want).max() <= SHARE * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kv", "most"),
    [("f32", "f16", 2.0**-9), ("f32", "bf16", 2.0**-6), ("int8 activations", "f32", 2.0**-5)],
)
def test_rounding_on_the_way_stays_small(kind: str, kv: str, most: float) -> None:
    """What the reference does not round (16-bit caches), or rounds otherwise where float32 sums differ (int8
    activations): the root mean square of the logits' error is a few roundings, 2^-12, 2^-9 and 1/254, of the logits'
    own."""
    config = ModelConfig(64, 160, 3, 8, 2, 200, 40)
    pair = Pair({"config": config, "pairing": HALF_SPLIT, "kind": kind, "group": 32, "kv": kv, "seed": 1, "workers": 2})
    for fusions in (True, False):
        program, reference = pair.programs(40, "all", fusions)
        ids = pair.ids(np.random.default_rng(1), 40)
        for each in (program, reference):
            feed(each, ids, 0)
            each.run(40)
        got, want = program.value("logits"), reference.value("logits")
        error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
        assert error < most, error
        if kind == "f32":
            assert error > 0  # the cache is indeed of that type


def test_a_step_that_is_skipped_is_noticed() -> None:
    """When any single step of a plan is skipped, some comparison fails."""
    drawn = {
        "config": ModelConfig(16, 24, 1, 2, 1, 20, 8),
        "pairing": INTERLEAVED,
        "kind": "f32",
        "group": 32,
        "kv": "f32",
    }
    pair = Pair({**drawn, "seed": 0, "workers": 1})
    program, reference = pair.programs(3, "rows", True)
    for skipped in range(len(program.plan.steps)):
        poison(program)
        run = program.run

        def skipping(tokens: int, begin: int, end: int, skipped: int = skipped, run: Any = run) -> int:
            return 0 if begin == skipped else run(tokens, begin, end)

        program.run = skipping  # type: ignore[method-assign,assignment]
        with pytest.raises(AssertionError):
            run_checked(program, reference, [1, 2, 3], 0, 0, True)
        program.run = run  # type: ignore[method-assign]
