"""Batches on a backend: decode rows and chunks of prompts mixed give what a session by hand gives.

`feeding` is the reference as a device that runs late: ids of FEED reach the program, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from numballama.backend import Backend, Program, open_backend
from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.engine.model_runner import SATURATED, ModelRunner
from numballama.engine.runner import Batch, Runner
from numballama.errors import Error
from numballama.graph import KVLayout, Logits, build
from numballama.ir import Graph
from numballama.quantization.types import F32, KVType
from numballama.sampling import FEED, SamplerTable, SamplingParams
from numballama.session import Session
from tests.helpers.cuda_host import on_a_gpu
from tests.helpers.paging import give_pages
from tests.helpers.random_models import random_checkpoint

CONFIG = ModelConfig(16, 24, 2, 4, 2, 60, 96)
WEIGHTS = random_checkpoint(CONFIG, 3).weights
TYPES = {name: weight.type for name, weight in WEIGHTS.items()}
CHUNK = 16
MIXED = 12
"""Rows of a mixture of few rows."""
PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.3, seed=5, top_k=0),
    SamplingParams(temperature=0, repetition_penalty=1.7),
    SamplingParams(temperature=1.3, seed=6, frequency_penalty=1.0),
    SamplingParams(temperature=1.3, seed=7, logprobs=2),
]


def make_runner(backend: Backend, slots: int, page: int = 8, made: list[int] | None = None) -> ModelRunner:
    """A runner whose page table is full, in random order. `made` collects the sizes of the programs made."""
    kv = KVLayout.of(CONFIG, CONFIG.context, "f32", slots, page=page)

    def graph_of(tokens: int, logits: Logits) -> Graph:
        return build(CONFIG, TYPES, kv, tokens, logits)

    def make(graph: Graph, report: Any) -> Program:
        if made is not None:
            made.append(len(graph.values["ids"].shape) and graph.values["ids"].shape[0])
        return backend.program(graph)

    runner = ModelRunner(backend, kv, SamplerTable(slots, CONFIG.vocab_size), graph_of, CHUNK, make)
    runner.compile(None)
    give_pages(backend, kv, seed=slots)
    return runner


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    opened = open_backend(request.param, WEIGHTS, 1)
    yield opened
    opened.close()


def by_hand(prompt: Sequence[int], params: SamplingParams, count: int) -> list[int]:
    """`count` tokens after a prompt, from a session of the reference."""
    runner = make_runner(open_backend("reference", WEIGHTS), 1)
    session = Session(runner.decode, runner.prompt, CONFIG.context, CONFIG.vocab_size)
    runner.table.assign(0, params, prompt)
    tokens = [session.prefill(prompt, runner.table)]
    while len(tokens) < count:
        assert tokens[-1] is not None
        tokens.append(session.step(tokens[-1], runner.table))
    return [token for token in tokens if token is not None]


def batch_of(decodes: Sequence[tuple[int, int]], chunks: Sequence[tuple[int, int, Sequence[int], bool]] = ()) -> Batch:
    """Rows of (slot, position), then chunks of (slot, first position, ids, whether the last row has logits)."""
    ids, positions, slots = [FEED] * len(decodes), [p for _, p in decodes], [slot for slot, _ in decodes]
    logits = list(range(len(decodes)))
    for slot, first, own, wanted in chunks:
        ids += own
        positions += range(first, first + len(own))
        slots += [slot] * len(own)
        logits += [len(ids) - 1] * wanted
    return Batch(*(np.array(each, np.int32) for each in (ids, positions, slots, logits)), len(decodes))


def prompt_of(slot: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(slot).integers(0, CONFIG.vocab_size, length)]


def run_mixed(runner: ModelRunner, slots: int, count: int) -> list[list[int]]:
    """Prompts that come one after the other, in chunks of 5 beside the decodes of those before; `count` tokens each."""
    prompts = [prompt_of(slot, 3 + 4 * slot) for slot in range(slots)]
    outputs: list[list[int]] = [[] for _ in prompts]
    known = [0] * slots
    while any(len(output) < count for output in outputs):
        decodes = [
            (slot, len(prompts[slot]) + len(output) - 1)
            for slot, output in enumerate(outputs)
            if 0 < len(output) < count
        ]
        sampled_by, chunks = [slot for slot, _ in decodes], []
        begun = next((slot for slot in range(slots) if known[slot] < len(prompts[slot])), None)
        if begun is not None:
            first, prompt = known[begun], prompts[begun]
            if not first:
                runner.start(begun, PARAMS[begun % len(PARAMS)], prompt, (), frozenset())
            known[begun] = min(first + 5, len(prompt))
            last = known[begun] == len(prompt)
            chunks.append((begun, first, prompt[first : known[begun]], last))
            sampled_by += [begun] * last
        tokens = runner.collect(runner.submit(batch_of(decodes, chunks))).tokens.tolist()
        assert len(tokens) == len(sampled_by)
        for slot, token in zip(sampled_by, tokens, strict=True):
            outputs[slot].append(token)
    return outputs


@pytest.mark.parametrize(("slots", "page"), [(1, 8), (3, 16), (5, 32), (5, 1)])
def test_mixed_batches_give_what_sessions_by_hand_give(backend: Backend, slots: int, page: int) -> None:
    found = run_mixed(make_runner(backend, slots, page), slots, 9)
    assert found == [by_hand(prompt_of(n, 3 + 4 * n), PARAMS[n % len(PARAMS)], 9) for n in range(slots)]


def test_it_is_a_runner(backend: Backend) -> None:
    runner: Runner = make_runner(backend, 3)
    assert (runner.max_sequences, runner.page, runner.pages_per_sequence) == (3, 8, 12)
    assert (runner.pages, runner.lookahead, runner.vocab_size) == (37, 0, 60)
    assert runner.max_tokens == CHUNK
    assert runner.programs == [runner.decode, runner.prompt]
    runner.prepare(None)
    assert len(runner.programs) == 2 + len([size for size in backend.decode_sizes if 1 < size < 4]), "made when needed"
    assert make_runner(open_backend("reference", WEIGHTS), 20).max_tokens == 20, "each sequence can have a row"


def test_a_batch_is_copied(backend: Backend) -> None:
    """And a chunk without logits gives no token."""
    runner = make_runner(backend, 2)
    prompt = prompt_of(0, 9)
    runner.start(1, PARAMS[0], prompt, (), frozenset())
    batch = batch_of([], [(1, 0, prompt[:5], False)])
    ticket = runner.submit(batch)
    batch.ids[:] = 0
    assert len(runner.collect(ticket).tokens) == 0
    batch = batch_of([], [(1, 5, prompt[5:], True)])
    ticket = runner.submit(batch)
    batch.ids[:], batch.slots[:] = 0, 0
    assert runner.collect(ticket).tokens.tolist() == by_hand(prompt, PARAMS[0], 1)


def test_a_sequence_resumes_after_its_output(backend: Backend) -> None:
    """In another slot, as after preemption: the same draws follow."""
    prompt = prompt_of(1, 7)
    for params in PARAMS:
        tokens = by_hand(prompt, params, 8)
        runner = make_runner(backend, 2)
        runner.start(1, params, prompt, tokens[:3], frozenset())
        found = runner.collect(runner.submit(batch_of([], [(1, 0, [*prompt, *tokens[:3]], True)]))).tokens.tolist()
        for count in range(4):
            found += runner.collect(runner.submit(batch_of([(1, len(prompt) + 3 + count)]))).tokens.tolist()
        assert found == tokens[3:]


def test_masks_and_stop_tokens_reach_the_sampler(backend: Backend) -> None:
    runner = make_runner(backend, 2)
    prompt = prompt_of(0, 4)
    (free,) = by_hand(prompt, PARAMS[0], 1)
    chunk = batch_of([], [(0, 0, prompt, True)])
    runner.start(0, PARAMS[0], prompt, (), frozenset())
    mask = np.zeros(2, np.uint32)
    mask[0] = 1 << 17
    runner.set_mask(0, mask)
    assert runner.collect(runner.submit(chunk)).tokens.tolist() == [17]
    runner.set_mask(0, None)
    assert runner.collect(runner.submit(chunk)).tokens.tolist() == [free]
    runner.start(0, PARAMS[0].override({"min_tokens": 1}), prompt, (), frozenset([free]))
    assert runner.collect(runner.submit(chunk)).tokens.tolist() != [free]
    with pytest.raises(Error, match="logit_bias: token 99"):
        runner.start(0, SamplingParams(logit_bias={99: 1.0}), prompt, (), frozenset())


def test_reset_forgets_the_runs_in_flight(backend: Backend) -> None:
    runner = make_runner(backend, 2)
    prompt = prompt_of(0, 4)
    runner.start(0, PARAMS[0], prompt, (), frozenset())
    runner.submit(batch_of([], [(0, 0, prompt, True)]))
    runner.reset()
    runner.start(0, PARAMS[0], prompt, (), frozenset())
    ticket = runner.submit(batch_of([], [(0, 0, prompt, True)]))
    assert runner.collect(ticket).tokens.tolist() == by_hand(prompt, PARAMS[0], 1)


class Late:
    """The reference as a device that runs a submit when it is collected, and reads the slots' last tokens itself."""

    def __init__(self, program: Any) -> None:
        self.program, self.inputs = program, program.inputs
        self.prefill_end = program.prefill_end
        self.run = program.run
        self.queue: list[Callable[[], Any]] = []

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        copies = {name: array.copy() for name, array in self.inputs.items()}

        def work() -> Any:
            for name, array in copies.items():
                self.inputs[name][:] = array
            ids, slots = self.inputs["ids"][:tokens], self.inputs["sequences"][:tokens]
            ids[:] = np.where(ids == FEED, table.last_token[slots], ids)
            return self.program.collect(self.program.submit(tokens, rows, table))

        self.queue.append(work)
        return len(self.queue)

    def collect(self, ticket: int) -> Any:
        return self.queue.pop(0)()


class Feeding:
    """A backend with lookahead and programs for 1, 2 and 4 sequences."""

    lookahead, decode_sizes, mixed_tokens = 1, (1, 2, 4, 8), MIXED

    def __init__(self) -> None:
        self.reference = open_backend("reference", WEIGHTS)
        self.set_pages = self.reference.set_pages
        self.discarded = 0

    def program(self, graph: Graph) -> Late:
        return Late(self.reference.program(graph))

    def discard_runs(self) -> None:
        self.discarded += 1


@pytest.fixture
def feeding() -> Any:
    return Feeding()


def test_ids_of_feed_are_left_to_a_device_that_runs_late(feeding: Any) -> None:
    """The second run is submitted before the tokens of the first are known."""
    runner = make_runner(feeding, 3)
    prompts = [prompt_of(slot, 4 + slot) for slot in range(3)]
    for slot, prompt in enumerate(prompts):
        runner.start(slot, PARAMS[slot], prompt, (), frozenset())
    tickets = [runner.submit(batch_of([], [(slot, 0, prompt, True) for slot, prompt in enumerate(prompts)][:3]))]
    found: list[list[int]] = []
    for count in range(5):
        tickets.append(runner.submit(batch_of([(slot, len(ids) + count) for slot, ids in enumerate(prompts)])))
        found.append(runner.collect(tickets.pop(0)).tokens.tolist())
    found.append(runner.collect(tickets.pop(0)).tokens.tolist())
    want = [by_hand(prompt, PARAMS[slot], 6) for slot, prompt in enumerate(prompts)]
    assert [list(tokens) for tokens in zip(*found, strict=True)] == want
    runner.reset()
    assert feeding.discarded == 1


@pytest.mark.parametrize(
    ("slots", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8])]
)
def test_programs_for_decoding_are_made_once_for_each_size(feeding: Any, slots: int, sizes: list[int]) -> None:
    made: list[int] = []
    runner = make_runner(feeding, slots, made=made)
    assert made == [1, CHUNK], "the others are made when they are needed"
    runner.prepare(None)
    few = min(max(MIXED, 2 * slots), CHUNK)  # a prompt has as many rows as those that decode beside it
    assert runner.mixed_tokens == few
    mixed = [few] if few < CHUNK else []
    assert sorted(made) == sorted([*sizes, *mixed, CHUNK])
    for rows in range(1, slots + 1):
        program: Any = runner._decode_program(rows)
        least = next((size for size in sizes if size >= rows), CHUNK)
        assert len(program.inputs["ids"]) == least and ("rows" in program.inputs) == (least == CHUNK)
    for rows in sorted({1, few, min(few + 1, CHUNK), CHUNK}):
        program = runner._mixed_program(rows)
        assert "rows" in program.inputs
        assert len(program.inputs["ids"]) == (few if mixed and rows <= few else CHUNK)
    assert len(made) == len(sizes) + len(mixed) + 1


def test_a_device_without_larger_sizes_decodes_in_the_program_of_chunks(backend: Backend) -> None:
    made: list[int] = []
    runner = make_runner(backend, 4, made=made)
    runner.prepare(None)
    assert made == [1, CHUNK]
    assert runner._decode_program(1) is runner.decode and runner._decode_program(2) is runner.prompt


def _huge(config: ModelConfig, names: Sequence[str], scale: float) -> dict[str, Weight]:
    """Random weights of which some are scaled, so that keys or values grow."""
    return {
        name: Weight(weight.shape, F32, weight.data * np.float32(scale if name in names else 1))
        for name, weight in random_checkpoint(config, 3).weights.items()
    }


@pytest.mark.parametrize("device", ["cpu", "reference", on_a_gpu("cuda")])
@pytest.mark.parametrize("kv_dtype", ["f16", "f32", "bf16", "q8_0"])
@pytest.mark.parametrize("scaled", [(), ("layers.0.wk",), ("layers.1.wv",), ("layers.0.wk", "layers.0.wv")])
def test_a_float16_cache_that_saturates_is_noted_once(device: str, kv_dtype: KVType, scaled: tuple[str, ...]) -> None:
    """The page of the first prompt's first positions is looked at after its run, on any device, and never again."""
    weights, notes, looked = _huge(CONFIG, scaled, 1e6), list[str](), list[int]()
    backend = open_backend(device, weights, 1)
    kv = KVLayout.of(CONFIG, CONFIG.context, kv_dtype, 2, page=8)
    cache_page = backend.cache_page
    backend.cache_page = lambda page: (looked.append(page), cache_page(page))[1]  # type: ignore[method-assign]

    def graph_of(tokens: int, logits: Logits) -> Graph:
        return build(CONFIG, TYPES, kv, tokens, logits)

    table = SamplerTable(2, CONFIG.vocab_size)
    runner = ModelRunner(backend, kv, table, graph_of, CHUNK, lambda graph, _: backend.program(graph), notes.append)
    runner.compile(None)
    runner.set_pages(0, 0, [1])  # of a request that is cancelled before it runs
    for slot, pages in ((1, [5, 3, 7]), (0, [4, 2, 6])):
        runner.set_pages(slot, 0, pages[:1])
        runner.set_pages(slot, 1, pages[1:])
        runner.start(slot, PARAMS[0], prompt_of(slot, 20), (), frozenset())
        runner.collect(runner.submit(batch_of((), [(slot, 0, prompt_of(slot, 20)[:12], False)])))
        assert looked == [5] * (slot == 0 and kv_dtype == "f16"), "a run without tokens is not waited for"
        runner.collect(runner.submit(batch_of((), [(slot, 12, prompt_of(slot, 20)[12:], True)])))
    assert looked == [5] * (kv_dtype == "f16")
    assert notes == [SATURATED] * (kv_dtype == "f16" and bool(scaled))
    if kv_dtype != "q8_0":
        parts = list(cache_page(5))
        assert len(parts) == 2 * CONFIG.n_layers and {part.shape for part in parts} == {kv.shape[1:]}
        assert all(part.any() for part in parts)
    backend.close()
