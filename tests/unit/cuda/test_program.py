"""Programs of the CUDA backend on a device that computes nothing: binding, variants of launches, runs and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from tests.helpers.cuda_host import converted, graph_of, install, missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.config import ModelConfig
from numballama.cuda.backend import CudaBackend
from numballama.cuda.launch import Array, Collective, Launch, Peers
from numballama.cuda.program import CudaProgram, bind_step, rows_to_exchange, tile_rows, write_tiles
from numballama.errors import Error
from numballama.graph import PAGE_TABLE, KVLayout
from numballama.parallel.shard import shard
from numballama.parallel.weights import divided
from numballama.sampling import SamplerTable, SamplingParams
from tests.helpers.random_models import random_checkpoint

CONFIG = ModelConfig(64, 96, 2, 8, 2, 40, 600)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches that were run."""
    launches: list[Any] = []
    install(run=launches.append, n_sms=132, patch=monkeypatch.setattr)
    return launches


def program_for(tokens: int) -> CudaProgram:
    weights = converted(random_checkpoint(CONFIG).weights, "q8_0")
    kv = KVLayout.of(CONFIG, CONFIG.context, "f16")
    return CudaBackend(weights).program(graph_of(CONFIG, weights, kv, tokens))


def test_a_run_launches_the_steps_that_it_is_asked_for(ran: list[Any]) -> None:
    program = program_for(1)
    program.inputs["positions"][:] = 0
    program.run(1)
    assert [launch.name for launch in ran] == [one.name for step in program.launches for one in step]
    ran.clear()
    program.run(1, 2, 4)
    assert [launch.name for launch in ran] == [one.name for step in program.launches[2:4] for one in step]
    assert program.entries == 2


def test_a_long_context_has_launches_of_its_own(ran: list[Any]) -> None:
    """From the variant's position on, and only attention changes."""
    program = program_for(1)
    assert program.variant_starts == [256]
    names = {}
    for position in (0, 255, 256, 599):
        program.inputs["positions"][:] = position
        ran.clear()
        program.run(1)
        names[position] = [launch.name for launch in ran]
    assert names[0] == names[255] and names[256] == names[599]
    changed = {pair for pair in zip(names[0], names[256], strict=True) if pair[0] != pair[1]}
    assert changed == {("attention_single_kernel", "attention_grouped_kernel")}


def test_how_many_rows_nccl_exchanges() -> None:
    assert [rows_to_exchange(rows, 512, 128, 2) for rows in (1, 128, 129, 256, 300, 512)] == [
        128, 128, 256, 256, 512, 512,
    ]  # fmt: skip
    assert [rows_to_exchange(rows, 600, 128, 2) for rows in (512, 513, 600)] == [512, 600, 600]
    assert [rows_to_exchange(rows, 20, 1, 4) for rows in (1, 2, 4, 5, 17, 20)] == [1, 4, 4, 16, 20, 20]


class Calls:
    """A communicator that notes its calls."""

    ranks = 2

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def all_reduce(self, source: int, out: int, count: int, stream: int) -> None:
        self.made.append(("all_reduce", count))

    def all_gather(self, source: int, out: int, count: int, stream: int) -> None:
        self.made.append(("all_gather", count))

    def gather_parts(self, source: int, parts: list[tuple[int, int]], stream: int) -> None:
        self.made.append(("gather_parts", *(count for _, count in parts)))

    def broadcast(self, where: int, count: int, stream: int) -> None:
        self.made.append(("broadcast", count))


def rank_program(calls: Calls, rank: int, tokens: int, logits: str = "rows") -> CudaProgram:
    """A program of one of two ranks whose values NCCL exchanges, for up to 5 rows with logits."""
    weights = converted(random_checkpoint(CONFIG).weights, "q8_0")
    shares, own = divided(CONFIG, weights, 2, False)
    kv = KVLayout.of(CONFIG, CONFIG.context, "f16", slots=5)
    graph = graph_of(CONFIG, weights, kv, tokens, logits)
    part = shard(graph, {name: weight.type for name, weight in own[rank].items()}, shares, rank)
    backend, link, no = CudaBackend(own[rank]), cast("Any", calls), Array(256, (2, 1, 1), "i32")
    backend.join(Peers(rank, no, no, no, shares.vocab, Array(256, (3,), "i64"), 0, communicator=link))
    return backend.program(part.graph)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_values_nccl_exchanges(ran: list[Any], rank: int) -> None:
    """No linear step adds up over ranks. NCCL exchanges rows up to a power of two, and the rows that have logits."""
    calls = Calls()
    program = rank_program(calls, rank, 512)
    kinds = [step.op.kind for step in program.plan.steps]
    assert kinds.count("all_reduce") == 2 * CONFIG.n_layers and kinds.count("all_gather") == 1
    assert ("linear_add" in kinds) == (rank == 0) and not [kind for kind in kinds if kind.endswith("_all_reduce")]
    assert {type(launch) for step in program.launches for launch in step} == {Launch, Collective}
    program.inputs["positions"][:] = np.arange(512)
    for tokens, rows, count, of_rows in ((100, 1, 128, 1), (120, 1, 128, 1), (200, 3, 256, 4), (512, 5, 512, 5)):
        calls.made.clear()
        program.run(tokens, rows=rows)
        assert calls.made == [
            *[("all_reduce", count * CONFIG.dim)] * 4, ("gather_parts", of_rows * 20, of_rows * 20),
        ]  # fmt: skip
    assert len(program._graphs) == 3, "runs of 100 and 120 tokens have one graph"


def test_decoding_exchanges_its_rows_by_nccl(ran: list[Any]) -> None:
    """A program for single tokens has one graph. One row of equal parts needs no kernel that puts them together."""
    calls = Calls()
    program = rank_program(calls, 1, 4, "all")
    program.run(3, rows=3)
    assert calls.made == [("all_reduce", 4 * CONFIG.dim)] * 4 + [("gather_parts", 80, 80)]
    assert "join_columns_kernel" in [launch.name for launch in ran]
    calls.made.clear(), ran.clear()
    program = rank_program(calls, 1, 1)
    program.run(1)
    assert calls.made == [("all_reduce", CONFIG.dim)] * 4 + [("all_gather", 20)]
    assert "join_columns_kernel" not in [launch.name for launch in ran]


def test_graphs_with_nccl_are_captured_by_all_ranks_at_once(ran: list[Any]) -> None:
    """When they first run: rank 0 prepares before the others."""
    program = rank_program(Calls(), 0, 4, "all")
    program.backend.prepare(program)
    assert not program._graphs
    table = SamplerTable(5, CONFIG.vocab_size)
    program.submit(4, 4, table)
    with_nccl = {key for key, made in captured(program).items() if any(name.startswith("nccl") for name in made)}
    assert len(with_nccl) == 2 and ("receive", 4, 4) in with_nccl
    assert captured(program)["receive", 4, 4] == ["nccl_broadcast", "advance_kernel"]
    for params in (SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=1.0, seed=1, logprobs=2)):
        for slot in range(4):
            table.assign(slot, params)
        program.inputs["sequences"][:] = range(4)
        before = len(captured(program))
        program.submit(4, 4, table)
        assert len(captured(program)) == before + 1, "another way to sample needs no other graph with NCCL"
    other = rank_program(calls := Calls(), 1, 4, "all")
    other.submit(4, 4, None)
    assert {*captured(other)} == with_nccl
    assert calls.made[-1] == ("broadcast", 4)


def captured(program: CudaProgram) -> dict[Any, list[str]]:
    """Names of what each graph has."""
    graphs: dict[Any, Any] = dict(program._graphs)
    return {key: [launch.name for launch in graph._launches] for key, graph in graphs.items()}


@pytest.mark.parametrize(("tokens", "begin", "end"), [(0, 0, None), (5, 0, None), (1, 3, 2), (1, -1, None), (1, 0, 99)])
def test_runs_that_do_not_exist(ran: list[Any], tokens: int, begin: int, end: int | None) -> None:
    program = program_for(4)
    with pytest.raises(Error, match=f"cannot run {tokens} tokens of 4, steps {begin} to"):
        program.run(tokens, begin, end)
    assert not ran


def test_a_launch_function_with_another_parameter(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the function, the parameter, and what the operator has."""
    program = program_for(1)
    step = next(step for step in program.plan.steps if step.op.kind == "norm_qkv_rope")
    op = replace(step.op, attrs={name: value for name, value in step.op.attrs.items() if name != "eps"})
    with pytest.raises(Error, match=r"norm_qkv_rope has a parameter eps, but norm_qkv_rope has no .*; it has "):
        bind_step(
            replace(step, op=op), program.plan.graph, program.ctx, program.values | program.backend.weights.operands
        )


def test_a_closed_model(ran: list[Any]) -> None:
    program = program_for(1)
    program.backend.close()
    with pytest.raises(Error, match="closed"):
        program.run(1)
    with pytest.raises(Error, match="closed"):
        program.value("logits")


def test_inputs_are_sent_as_they_were(ran: list[Any]) -> None:
    """Also when more runs follow than there are pinned copies: each run has its own inputs."""
    program = program_for(4)
    for turn in range(2 * program.run_inputs.PINNED_COPIES + 1):
        program.inputs["ids"][:] = turn
        program.run_inputs.send(3, 1)
        out = np.empty(4, np.int32)
        program.backend.device.read(program.array("ids").address, out)
        assert out.tolist() == [turn] * 4
        program.backend.device.read(program.run_inputs.tokens.address, out[:1])
        assert out[0] == 3


def test_a_page_of_the_cache_is_copied(ran: list[Any]) -> None:
    """Keys and values of each layer, of that page alone, without the page table."""
    backend = program_for(1).backend
    caches = [state for name, state in backend.states.items() if name != PAGE_TABLE]
    assert len(caches) == 2 * CONFIG.n_layers
    held = []
    for number, state in enumerate(caches):
        bits = np.arange(np.prod(state.shape)).reshape(state.shape).astype(np.uint16) + np.uint16(number)
        backend.device.write(state.address, bits.ctypes.data, bits.nbytes)
        held.append(bits)
    backend.device.synchronize()
    for page in (0, 2, caches[0].shape[0] - 1):
        for found, bits in zip(backend.cache_page(page), held, strict=True):
            np.testing.assert_array_equal(found, bits[page])


@pytest.mark.parametrize(("capability", "rows"), [((8, 9), 64), ((9, 0), 128), ((12, 0), 64)])
def test_a_runs_rows_in_tiles(capability: tuple[int, int], rows: int) -> None:
    """Neighbours of a sequence share tiles, as many as the card's kernel takes; others are single rows."""
    assert tile_rows(capability) == rows
    positions, sequences = np.array([*range(300), 7, *range(50, 52), 9]), np.array([0] * 300 + [1] + [2] * 2 + [1])
    out = np.full((305, 2), -1, np.int32)
    write_tiles(positions, sequences, rows, out)
    starts = list(range(0, 300, rows))
    tiles, singles = out[1 : 1 + out[0, 0]].tolist(), out[len(out) - out[0, 1] :].tolist()
    of_chunk = [[first, min(rows, 300 - first)] for first in starts]
    assert sorted(tiles) == [*of_chunk, [301, 2]]
    assert singles == [[303, 1], [300, 1]]
    seen = [positions[first] for first, _ in tiles]
    assert seen == sorted(seen, reverse=True), "those with most keys first"


@pytest.mark.parametrize("count", [2, 128, 129, 300])
def test_a_prompt_alone_in_tiles(count: int) -> None:
    out = np.full((301, 2), -1, np.int32)
    write_tiles(np.arange(40, 40 + count), np.full(count, 3), 128, out)
    firsts = list(range(0, count, 128))
    assert out[0].tolist() == [len(firsts), 0]
    assert out[1 : 1 + len(firsts)].tolist() == [[first, min(128, count - first)] for first in reversed(firsts)]
    assert (out[1 + len(firsts) :] == -1).all()
