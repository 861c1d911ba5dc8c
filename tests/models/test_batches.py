"""Many requests at random times give what each gives alone: whole random models behind the engine.

Slots and pages are few, so requests wait, share pages, and are preempted. Before every run the pages that hold nothing
are NaN. On the CPU one row alone and several rows have kernels that round differently; the requests are few enough and
their logits far enough apart that no token depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.backend import Backend, Program, open_backend
from numballama.config import ModelConfig
from numballama.engine.engine import Engine
from numballama.engine.model_runner import ModelRunner
from numballama.engine.request import Request, TokenEvent
from numballama.engine.runner import Batch
from numballama.errors import Error
from numballama.graph import PAGE_TABLE, KVLayout, Logits, build
from numballama.ir import Graph
from numballama.quantization.kv import split_q8_0
from numballama.quantization.types import KV_TYPES, KVType
from numballama.reference import ReferenceBackend
from numballama.sampling import SamplerTable, SamplingParams
from tests.helpers.bounds import compiled
from tests.helpers.extent import EVERYTHING
from tests.helpers.random_models import architectures, random_checkpoint

SETTINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.2, top_k=0, seed=11),
    SamplingParams(temperature=0, repetition_penalty=1.6),
    SamplingParams(temperature=0.8, top_k=10, top_p=0.9, frequency_penalty=0.7, seed=12),
    SamplingParams(temperature=1.0, seed=13, logprobs=1),
]


@dataclass(frozen=True)
class Wanted:
    """A request, and before which step it is submitted."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    reuse_prefix: bool = True
    salt: str | None = None


class PoisonedRunner(ModelRunner):
    """Fills pages that hold nothing with NaN before each run."""

    engine: Engine

    def submit(self, batch: Batch) -> int:
        self.poison(self.engine.scheduler.pages._free)
        return super().submit(batch)

    def poison(self, pages: Sequence[int]) -> None:
        for name, memory in self.backend.states.items():  # type: ignore[attr-defined]
            if name == PAGE_TABLE:
                continue
            if memory.ndim == 1:
                split_q8_0(memory, self.kv.shape)[1].view(np.uint16)[pages] = 0xFFFF
            elif memory.dtype == np.float32:
                memory[pages] = np.nan
            else:
                memory.view(np.uint16)[pages] = 0xFFFF


def make_engine(backend: Backend, config: ModelConfig, kv: KVLayout, chunk: int) -> Engine:
    types = {name: weight.type for name, weight in backend.weights.items()}  # type: ignore[attr-defined]

    def graph_of(tokens: int, logits: Logits) -> Graph:
        return build(config, types, kv, tokens, logits)

    def make(graph: Graph, report: Any) -> Program:
        return backend.program(graph) if isinstance(backend, ReferenceBackend) else compiled(backend, graph)  # type: ignore[arg-type]

    runner = PoisonedRunner(backend, kv, SamplerTable(kv.slots, config.vocab_size), graph_of, chunk, make)
    runner.compile(None)
    runner.decode.run(1)  # the reference makes its cache when it is first used
    runner.poison(range(1, kv.pages))
    runner.engine = Engine(runner, context=config.context, mixed_tokens=max(kv.slots, chunk // 2))
    return runner.engine


def tokens_of(events: Sequence[TokenEvent], n: int) -> list[list[int]]:
    assert all(event.token >= 0 for event in events)
    return [[event.token for event in events if event.index == index] for index in range(n)]


def run_together(engine: Engine, wanted: Sequence[Wanted]) -> tuple[list[list[list[int]]], int]:
    """Tokens of each request, and how often one was preempted."""
    requests: dict[int, Request[TokenEvent]] = {}
    step = 0
    while len(requests) < len(wanted) or engine._has_work():
        for number, each in enumerate(wanted):
            if number not in requests and each.step <= step:
                requests[number] = engine.submit(
                    each.prompt, each.params, priority=each.priority, reuse_prefix=each.reuse_prefix, salt=each.salt
                )
        if engine._has_work():
            engine._step()
            engine.scheduler.pages.check()
        step += 1
        assert step < 5000
    assert engine.scheduler.pages.used == 0
    preemptions = sum(request.preemptions for request in requests.values())
    return [tokens_of(list(requests[number]), each.params.n) for number, each in enumerate(wanted)], preemptions


def run_alone(engine: Engine, wanted: Wanted) -> list[list[int]]:
    """From an empty cache, each of the n sequences by itself."""
    found = []
    for index in range(wanted.params.n):
        with engine.exclusive():
            pass
        seed = None if wanted.params.seed is None else wanted.params.seed + index
        events = list(engine.submit(wanted.prompt, wanted.params.override({"n": 1, "seed": seed})))
        found += tokens_of(events, 1)
    return found


@st.composite
def requests(draw: st.DrawFn, vocab: int, context: int, page: int) -> list[Wanted]:
    """Prompts that begin alike or not, of less than a page to several pages, at any time."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    common = [[int(token) for token in rng.integers(0, vocab, context)] for _ in range(2)]
    found = []
    for _ in range(draw(st.integers(2, 7))):
        length = draw(st.integers(1, max(1, min(context - 1, 2 * page + 5))))
        shared = draw(st.sampled_from([0, length // 2, length]))
        own = rng.integers(0, vocab, length - shared)
        params = draw(st.sampled_from(SETTINGS))
        found.append(
            Wanted(
                draw(st.integers(0, 25)),
                (*draw(st.sampled_from(common))[:shared], *map(int, own)),
                params.override(
                    {
                        "max_tokens": draw(st.sampled_from([1, 4, page + 3, None])),
                        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
                    }
                ),
                draw(st.integers(0, 2)),
                draw(st.sampled_from([True, True, False])),
                draw(st.sampled_from([None, None, "salt"])),
            )
        )
    return found


def check_batches(config: ModelConfig, device: str, dtype: KVType, page: int, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 4), "slots")
    each = -(-config.context // page)
    pages = data.draw(st.integers(each, max(each, slots * each)), "pages")
    kv = replace(KVLayout.of(config, config.context, dtype, slots, page=page), pages=pages + 1)
    weights = random_checkpoint(config, data.draw(st.integers(0, 50), "seed")).weights
    # a last bit that differs between families of kernels can be another byte of a quantised cache
    one_family = device == "cpu" and dtype == "q8_0"
    backend = open_backend(device, weights, data.draw(st.integers(1, 2), "workers"), one_family)
    engine = make_engine(backend, config, kv, data.draw(st.sampled_from([4, 9, 16]), "chunk"))
    wanted = data.draw(requests(config.vocab_size, config.context, page), "requests")
    together, _ = run_together(engine, wanted)
    assert together == [run_alone(engine, each) for each in wanted]


SMALL = ModelConfig(32, 48, 2, 4, 2, 80, 48)


@pytest.mark.parametrize("dtype", KV_TYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_preempted_requests_that_share_pages_equal_themselves_alone(device: str, dtype: KVType) -> None:
    """Nine sequences in three slots, in seven pages of 16 tokens: all that can happen does."""
    kv = replace(KVLayout.of(SMALL, SMALL.context, dtype, 3, page=16), pages=8)
    engine = make_engine(open_backend(device, random_checkpoint(SMALL, 1).weights, 2), SMALL, kv, 8)
    rng = np.random.default_rng(1)
    common = tuple(int(token) for token in rng.integers(0, 80, 20))
    wanted = [
        Wanted(0, common, SETTINGS[1].override({"max_tokens": 25})),
        Wanted(1, (*common, 3, 4), SETTINGS[0].override({"max_tokens": 26}), salt="salt"),
        Wanted(2, (*common[:17], 5), SETTINGS[3].override({"max_tokens": 20, "n": 3}), priority=1),
        Wanted(9, (7,), SETTINGS[2].override({"max_tokens": 40}), priority=-1),
        Wanted(12, common[:9], SETTINGS[4].override({"max_tokens": None}), reuse_prefix=False),
        Wanted(15, (*common[:16], 9, 9), SETTINGS[1].override({"max_tokens": 5, "n": 2})),
    ]
    together, preemptions = run_together(engine, wanted)
    assert preemptions > 0 and engine.scheduler.prefix_hits > 0
    assert together == [run_alone(engine, each) for each in wanted]


PAGES = [
    (dtype, page)
    for number, dtype in enumerate(KV_TYPES)
    for place, page in enumerate((16, 32, 64))
    if EVERYTHING or number % 3 == place
]
"""Types of the cache and lengths of its pages: by default every type and every length, not with each other."""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "page"), PAGES)
@pytest.mark.parametrize("device", ["cpu", "reference"])
@given(st.data())
@settings(max_examples=4)
def test_requests_at_random_times_equal_themselves_alone(
    device: str, dtype: KVType, page: int, data: st.DataObject
) -> None:
    check_batches(replace(SMALL, context=2 * page + 20), device, dtype, page, data)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "reference"])
@given(architectures(), st.data())
@settings(max_examples=40)
def test_any_architecture_behind_the_engine(device: str, config: ModelConfig, data: st.DataObject) -> None:
    page = data.draw(st.sampled_from([1, 3, 16]), "page")
    check_batches(config, device, "f32", page, data)


def test_a_wrong_page_is_noticed() -> None:
    """A page that is not where the table says holds NaN."""
    kv = KVLayout.of(SMALL, SMALL.context, "f32", 2, page=16)
    engine = make_engine(open_backend("reference", random_checkpoint(SMALL, 1).weights), SMALL, kv, 8)
    wanted = Wanted(0, tuple(range(20)), SamplingParams(temperature=0, max_tokens=20))
    assert len(run_alone(engine, wanted)[0]) == 20
    backend: Any = engine.runner.backend  # type: ignore[attr-defined]
    set_pages = backend.set_pages
    backend.set_pages = lambda slot, first, pages: set_pages(slot, first, pages if not first else [pages[0] % 5 + 1])
    with pytest.raises(Error, match="not numbers"):
        run_together(engine, [wanted])
