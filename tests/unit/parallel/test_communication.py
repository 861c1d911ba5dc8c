"""What exchanges cost: a graph of them alone, the same on all ranks, and the time of its runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import numballama
import numballama.cpu.ops  # registers the kernels
from numballama import loader, model
from numballama.errors import Error
from numballama.fusion import fuse
from numballama.ir import verify
from numballama.parallel import communication
from numballama.parallel.backend import ParallelBackend
from numballama.parallel.communication import exchanges_of, seconds_of_exchanges
from numballama.parallel.shard import Shard, verify_ranks
from numballama.plan import lower
from tests.helpers.graphs import llama
from tests.helpers.random_models import SMALL, save
from tests.unit.parallel.test_shard import CONFIG, shards


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "times"), [(1, 1), (5, 3)])
def test_only_exchanges_are_left(tokens: int, times: int, tied: bool) -> None:
    """Of a model of two layers: four sums and the logits, each time; the classifier once; the embedding once."""
    parts = shards(replace(CONFIG, tied_embeddings=tied), tokens=1)
    made = [exchanges_of(part.graph, tokens, times) for part in parts]
    verify_ranks(made)
    for part, graph in zip(parts, made, strict=True):
        verify(graph)
        counts = Counter(op.kind for op in graph.ops)
        assert counts["all_reduce"] == 4 * times and counts["all_gather"] == times
        assert {kind: counts[kind] for kind in ("embedding", "linear", "argmax")} == dict.fromkeys(
            ("embedding", "linear", "argmax"), 1
        )
        assert not {"kv_write", "attention_scores", "swiglu", "add"} & set(counts)
        assert graph.outputs == part.graph.outputs and graph.values["logits"].shape == (tokens, CONFIG.vocab_size)
        order = [op.kind for op in graph.ops if op.kind.startswith("all_")]
        assert order == (["all_reduce"] * 4 + ["all_gather"]) * times, "as in a step"
        assert len(lower(fuse(graph, "cpu"), "cpu").steps) <= len(graph.ops)


def test_a_graph_of_one_rank_is_refused() -> None:
    with pytest.raises(Error, match="has no exchanges: shard it for several ranks first"):
        exchanges_of(llama(), 1, 1)


class Clock:
    """Time that goes on by what runs cost: 3 seconds, and 2 for each `all_reduce`."""

    def __init__(self) -> None:
        self.now, self.runs = 0.0, Counter[int]()

    def perf_counter(self) -> float:
        return self.now

    def program(self, parts: list[Shard]) -> Timed:
        return Timed(self, sum(op.kind == "all_reduce" for op in parts[0].graph.ops))


class Timed:
    def __init__(self, clock: Clock, exchanges: int) -> None:
        self.clock, self.exchanges, self.pending = clock, exchanges, 0.0

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        assert (tokens, rows, begin, end) == (2, 2, 0, None)
        self.clock.runs[self.exchanges] += 1
        self.pending += 3 + 2 * self.exchanges  # the device does it later

    def value(self, name: str) -> np.ndarray:
        self.clock.now, self.pending = self.clock.now + self.pending, 0.0
        return np.zeros(2, np.int32)


def test_what_a_run_costs_besides_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(communication, "time", clock)
    assert seconds_of_exchanges(shards(tokens=1), 2, clock.program) == pytest.approx(2 * 4)  # type: ignore[arg-type]
    assert set(clock.runs) == {4, 4 * (1 + communication.TIMES)} and len(set(clock.runs.values())) == 1


def test_ranks_in_threads_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real model; for two tokens it takes another measurement. The model gives the same tokens afterwards."""
    path, checkpoint = save(tmp_path, "llama2c-v1", SMALL)

    def open_ranks(*given: object) -> ParallelBackend:
        return ParallelBackend("cpu", SMALL, checkpoint.weights, 2, 1)

    with monkeypatch.context() as patch:
        patch.setattr(model, "open_backend", open_ranks)
        two = numballama.compile(path, device="cpu")
    with two:
        before = two.logits([3, 1, 4])
        with two.exclusive():
            found = two.backend.time_exchanges(two.graph)
            assert found is not None and 0 < found < 1
            assert two.backend.time_exchanges(two.graph) == found, "measured once"
            assert two.backend.time_exchanges(two.graph, 2) != found
        np.testing.assert_array_equal(two.logits([3, 1, 4]), before)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_one_rank_exchanges_nothing(device: str) -> None:
    with numballama.compile(loader.STORY_MODEL, device=device) as one:
        assert one.backend.time_exchanges(one.graph) is None
