"""Random models that several ranks share, value by value beside one rank: GQA and MHA, biases, tied or not, all types.

First the reference: every value of all ranks together, put together or added, is that of one rank. Then the CPU: every
step of every rank agrees with the op's definition on the operands that the rank had, within the bounds of rounding, and
every exchange gives all ranks the same bits. So by induction every value of the CPU's ranks is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.checkpoint import Weight
from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig
from numballama.fusion import FUSIONS
from numballama.graph import KVLayout, build
from numballama.ir import Graph
from numballama.parallel.backend import ParallelBackend, ParallelProgram
from numballama.quantization.types import BLOCKS, LINEAR_TYPES, VEC_DOT_TYPE
from numballama.reference import COLLECTIVES, ReferenceBackend, ReferenceProgram, sequence_rows
from tests.helpers.bounds import as_weight, check_step, poison, poison_dead, read
from tests.helpers.paging import give_pages
from tests.helpers.random_models import random_checkpoint
from tests.models.test_model_values import SHARE, feed

ROUNDED_SHARE = 0.2
"""The same where activations are int8 or the cache has 16 bits: what is near a half may be rounded up by one rank and
down by several."""


@dataclass
class Shared:
    """A random model and how many ranks share it."""

    config: ModelConfig
    weights: dict[str, Weight]
    ranks: int
    kv: KVLayout
    int8: bool
    """Whether activations are int8."""
    seed: int

    def graph(self, tokens: int, logits: str, lens: bool = False) -> Graph:
        types = {name: weight.type for name, weight in self.weights.items()}
        activations = "int8" if self.int8 else "f32"
        return build(self.config, types, self.kv, tokens, logits, self.int8, activations, lens)  # type: ignore[arg-type]

    def backend(self, device: str, threads: int = 1) -> ParallelBackend:
        given = self.config, self.weights, self.ranks, threads
        return ParallelBackend(device, *given, int8_activations=self.int8)  # type: ignore[arg-type]

    @property
    def is_exact(self) -> bool:
        """Whether all arithmetic is in floats: then values agree closely."""
        return not self.int8 and self.kv.dtype == "f32"

    def ids(self, count: int) -> list[int]:
        return [int(n) for n in np.random.default_rng(self.seed).integers(0, self.config.vocab_size, count)]


HEADS = [(kv, group, ranks) for kv in (1, 2, 3, 4) for group in (1, 2, 4) for ranks in (1, 2, 3, 4)
         if kv % ranks == 0 or (ranks % kv == 0 and kv * group % ranks == 0)]  # fmt: skip
"""(KV heads, query heads of each, ranks) that fit."""


@st.composite
def shared_models(draw: st.DrawFn, caches: Sequence[str] = ("f32",), int8: bool = False) -> Shared:
    """Models with weights of any types, w2 and wo of one with blocks or of floats. Some have uneven shares."""
    kinds = [kind for kind in LINEAR_TYPES if not int8 or kind in (*VEC_DOT_TYPE, "int8")]
    kind, other = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    block = max(BLOCKS[each][0] if each in BLOCKS else 1 for each in (kind, other))
    group = draw(st.sampled_from([8, 32, 64] if int8 else [1, 3, 32, 64, 100]))
    if int8 and "int8" in (kind, other):
        block = max(block, group)
    kv_heads, shared, ranks = draw(st.sampled_from(HEADS))
    # columns of heads: a block for each KV head, or each of its queries if several ranks share it
    unit = block // shared if ranks <= kv_heads else block
    head_dim = max(unit, 2 * draw(st.integers(1, 4))) if block > 8 else max(block, 2 * draw(st.integers(1, 4)))
    config = ModelConfig(
        dim=block * draw(st.integers(1, 2)) if block > 8 else 8 * draw(st.integers(1, 4)),
        hidden_dim=block * draw(st.integers(ranks, ranks + 3)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=kv_heads * shared,
        n_kv_heads=kv_heads,
        vocab_size=draw(st.integers(ranks, 60)),
        context=draw(st.integers(4, 12)),
        head_dim=head_dim - head_dim % 2,
        rope_pairing=draw(st.sampled_from([INTERLEAVED, HALF_SPLIT])),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 3])),
    )
    seed = draw(st.integers(0, 1000))
    weights = random_checkpoint(config, seed).weights
    for number, (name, weight) in enumerate(weights.items()):
        if len(weight.shape) == 2:
            chosen = kind if number % 3 else other
            weights[name] = as_weight(weight.data, chosen, group if chosen == "int8" else 0)
    kv = KVLayout.of(config, config.context, draw(st.sampled_from(caches)), page=draw(st.sampled_from([1, 3, 16])))  # type: ignore[arg-type]
    return Shared(config, weights, ranks, kv, int8, seed)


EVERYTHING = shared_models() | shared_models(["f16", "bf16", "q8_0"]) | shared_models(int8=True)


def assert_near(got: np.ndarray, want: np.ndarray, share: float, what: str) -> None:
    """Assert that values differ by at most this share of the largest, with -inf in the same places."""
    assert got.shape == want.shape, f"{what}: {got.shape}, one rank has {want.shape}"
    numbers = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), numbers, err_msg=what)
    largest = np.abs(want[numbers]).max(initial=0)
    difference = np.abs(got[numbers].astype(np.float64) - want[numbers]).max(initial=0)
    assert difference <= share * largest + 1e-6, f"{what} is off by {difference / largest}"


@given(EVERYTHING, st.integers(2, 4), st.booleans())
@settings(max_examples=150)
def test_every_value_of_the_reference_is_that_of_one_rank(model: Shared, chunk: int, lens: bool) -> None:
    one, several = ReferenceBackend(model.weights), model.backend("reference")
    logits = "all" if lens else "rows"
    graphs = [model.graph(chunk, logits, lens), model.graph(1, "rows")]
    programs = [(graph, one.program(graph), several.program(graph)) for graph in graphs]
    for backend in (one, several):
        give_pages(backend, model.kv)
    ids = model.ids(model.config.context)
    share = SHARE if model.is_exact else ROUNDED_SHARE
    done = 0
    for (graph, single, parallel), count in zip([programs[0], *[programs[1]] * 2], (chunk, 1, 1), strict=True):
        if done + count > model.config.context:
            break
        assert isinstance(single, ReferenceProgram) and isinstance(parallel, ParallelProgram)
        for program in (single, parallel):
            feed(program, ids[done : done + count], done)  # type: ignore[arg-type]
            program.run(count, rows=count if lens else 1)
        done += count
        for name in (name for op in graph.ops for name in op.outputs):
            value = graph.values[name]
            want, got = single.value(name), parallel.value(name)
            if value.dtype in ("i8", "i32"):
                continue  # rounded to whole numbers, or chosen among near equals; the next values tell
            if value.kind == "state":
                where = one.states["page_table"], 0, model.kv.page, slice(0, done)
                pages, places = sequence_rows(*where)
                want, got = want[pages, :, places], got[pages, :, places]
            assert_near(got, want, share, f"{model.ranks} ranks: {name}")


@pytest.mark.slow
@given(EVERYTHING, st.booleans() | st.sets(st.sampled_from(list(FUSIONS))).map(sorted), st.integers(1, 2), st.data())
@settings(max_examples=40)
def test_every_value_of_every_rank_on_the_cpu(
    model: Shared, fusions: bool | list[str], threads: int, data: st.DataObject
) -> None:
    backend = model.backend("cpu", threads)
    chunk = data.draw(st.integers(2, 4), "tokens of the prompt")
    programs = [backend.program(model.graph(size, "rows"), fusions) for size in (chunk, 1)]
    give_pages(backend, model.kv)
    for program in programs[0].programs:
        poison_cache(program)
    references = [ReferenceBackend(own) for own in backend.of_ranks]
    ids = model.ids(chunk + 2)
    with ThreadPoolExecutor(model.ranks) as threads_of_ranks:
        done = 0
        for parallel, count in zip([programs[0], *[programs[1]] * 2], (chunk, 1, 1), strict=True):
            if done + count > model.config.context:
                break
            for program in parallel.programs:
                feed(program, ids[done : done + count], done)
            run_checked(parallel, references, count, threads_of_ranks)
            done += count
    backend.close()


def poison_cache(program: object) -> None:
    """As `poison`, but what ranks share is not a value: its counts must stay."""
    states = {name: program.value(name).copy() for name in ("arrivals",) if name in program.plan.graph.values}  # type: ignore[attr-defined]
    poison(program)  # type: ignore[arg-type]
    for name, content in states.items():
        program.value(name)[:] = content  # type: ignore[attr-defined]


def run_checked(
    parallel: ParallelProgram, references: Sequence[ReferenceBackend], tokens: int, threads: ThreadPoolExecutor
) -> None:
    """One run of all ranks, step by step: each rank up to its next exchange, then the exchange on all at once."""
    at = [0] * len(parallel.programs)
    while True:
        for rank, (program, reference) in enumerate(zip(parallel.programs, references, strict=True)):
            steps = program.plan.steps
            while at[rank] < len(steps) and steps[at[rank]].op.kind not in COLLECTIVES:
                poison_dead(program, at[rank])
                execute = partial(program.run, tokens, at[rank], at[rank] + 1)
                check_step(program, at[rank], tokens, reference, execute, rows=1)
                at[rank] += 1
        if all(step == len(program.plan.steps) for step, program in zip(at, parallel.programs, strict=True)):
            return
        ops = [program.plan.steps[step].op for step, program in zip(at, parallel.programs, strict=True)]
        count = 1 if parallel.programs[0].plan.steps[at[0]].of_rows else tokens
        parts = [read(program, op.inputs[0], count).copy() for op, program in zip(ops, parallel.programs, strict=True)]
        calls = [
            partial(program.run, tokens, step, step + 1) for step, program in zip(at, parallel.programs, strict=True)
        ]
        for future in [threads.submit(call) for call in calls]:
            future.result(30)
        if ops[0].kind == "all_gather":
            want = np.hstack(parts)
        else:
            want = parts[0]
            for part in parts[1:]:
                want = want + part
        for op, program in zip(ops, parallel.programs, strict=True):
            np.testing.assert_array_equal(read(program, op.outputs[0], count), want, err_msg=str(op))
        at = [step + 1 for step in at]
