"""Tests of the CUDA kernels in the simulator, from their sources. Run by `test_simulator.py`, or by hand:

NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda/simulated_kernels.py -k argmax
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.cuda.simulator import WHOLE_BLOCKS, launch, simulation  # first: it replaces what kernels import
from tests.helpers.cuda_host import HostDevice, HostMemory, install

install(run=simulation.run, n_sms=2)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import cuda

from numballama import Error
from numballama.checkpoint import Weight
from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig, RopeScaling
from numballama.cuda import backend as cuda_backend
from numballama.cuda.intrinsics import griddepcontrol_wait
from numballama.cuda.kernels import decode_attention as attention_kernels
from numballama.cuda.kernels import sampling as sampling_kernels
from numballama.cuda.ops import attention, linear, sampling
from numballama.ir import Graph, Value
from numballama.model import Model
from numballama.quantization.convert import convert
from numballama.quantization.types import F32, WeightType
from numballama.reference import ReferenceBackend
from numballama.sampling import TEMPERATURE, SamplerTable, SamplingParams
from numballama.session import Session
from tests.cuda.checks import (
    Bench,
    Pair,
    Slots,
    bounds_of,
    candidates,
    check_argmax,
    check_draws,
    check_quantize,
    check_rows,
    check_runs,
    check_top_k,
    check_whole_runs,
    close,
    draw,
    expected,
    feed,
    poison,
)
from tests.helpers.bounds import as_weight, check_step
from tests.helpers.extent import EVERYTHING
from tests.helpers.sampling import make_sampler

if not WHOLE_BLOCKS:  # params.SAMPLING_THREADS is half the bins
    sampling_kernels.BIN_BITS, sampling_kernels.BINS = 9, 512

linear.EXACT = linear.FEW
"""The simulator has no tensor cores: `gemv` multiplies a few tokens here, and skinny_cases.py tests `skinny`."""

SMALL = ModelConfig(16, 24, 1, 4, 2, 20, 8)
BLOCKS = ModelConfig(64, 32, 1, 4, 2, 33, 8, rope_pairing=HALF_SPLIT)
"""Rows are whole blocks of 32, heads have 16 elements."""
ODD = ModelConfig(18, 7, 1, 3, 1, 11, 8, tied_embeddings=False)
"""Heads of 6 elements, which are not whole 16 bytes; rows of 18 and 7; an odd number of rows."""


@pytest.fixture(autouse=True)
def _processors() -> Iterator[None]:
    yield
    HostDevice.n_sms = 2


# Programs

EVERY_PROGRAM = [
    (SMALL, "f16", "bf16", True), (ODD, "f32", "f32", False), (ODD, "bf16", "f16", True),
    (BLOCKS, "q4_1", "f32", True), (BLOCKS, "q4_0", "f32", False),
]  # fmt: skip
"""What only NUMBALLAMA_TEST_ALL=1 tries, as each takes half a minute."""


@pytest.mark.parametrize(
    ("config", "kind", "kv", "fusions"),
    [
        (SMALL, "f32", "f32", True), (SMALL, "bf16", "f16", True), (SMALL, "int8", "f32", True),
        (BLOCKS, "q4_0", "f32", True), (BLOCKS, "q8_0", "bf16", True),
        (ODD, "f32", "f32", True), (ODD, "int8", "bf16", True),
        # unfused, linear layers are the same kernel without what is fused to it
        (SMALL, "bf16", "f16", False),
        *(EVERY_PROGRAM if EVERYTHING else []),
    ],
)  # fmt: skip
def test_every_value(config: ModelConfig, kind: str, kv: str, fusions: bool) -> None:
    """A prompt of 2 tokens by a program for 3, a step of one token; every value of each."""
    check_runs(Pair(config, kind, kv, seed=1), [2, 1], 3, fusions)


@pytest.mark.parametrize(
    ("pairing", "fusions"),
    [
        (INTERLEAVED, ["attention", "qkv", "rope_kv"]),
        (HALF_SPLIT, ["attention", "gate_up", "residual", "norm"]),
    ],
)
def test_some_fusions_and_biases(pairing: str, fusions: list[str]) -> None:
    config = ModelConfig(24, 20, 1, 3, 3, 30, 6, rope_pairing=pairing, qkv_bias=True)
    check_runs(Pair(config, seed=2, sequences=2), [2, 1], 3, fusions)


@pytest.mark.parametrize(("fusions", "head_dim"), [(False, 6), (True, 8)])
def test_a_window_and_normed_heads(fusions: bool, head_dim: int) -> None:
    """A token sees the last 3 positions, its own with them; queries and keys are normed head by head, and scaled."""
    scaling = RopeScaling("yarn", 4.0, original_context=9, attention_factor=1.5)
    config = ModelConfig(16, 12, 1, 2, 1, 9, 9, head_dim=head_dim, qk_norm=True, window=3, rope_scaling=scaling)
    check_runs(Pair(config, seed=3), [3, 1, 2, 1], 3, fusions)


@pytest.mark.parametrize("fusions", [False, True])
def test_int8_activations(fusions: bool) -> None:
    """Of groups that fit words of four, and of groups that do not, which are computed a number at a time."""
    check_runs(Pair(BLOCKS, "int8", group=16, int8_activations=True), [2, 1], 3, fusions)
    check_runs(Pair(ODD, "int8", group=5, int8_activations=True), [2, 1], 3, fusions)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_long_rows(kind: str) -> None:
    """Rows of several chunks, whose sums several warps share, and more rows than threads finish at once."""
    config = ModelConfig(640, 32, 1, 2, 1, 8, 4, head_dim=16)
    pair = Pair(config, kind)
    check_runs(pair, [1], 1, ["norm", "qkv", "gate_up", "residual", "attention", "rope_kv", "qkv_rope"])


def projections(graph: Graph, x: Value, weights: dict[str, Weight], *names: str) -> list[Value]:
    """A linear layer of x for each of some weights."""
    operands = [graph.weight(name, weights[name].shape, weights[name].type.name) for name in names]
    return [graph.add("linear", x, weight, out=f"{weight.name}_out") for weight in operands]


@pytest.mark.parametrize("fusions", [(), ("qkv", "gate_up", "residual")])
@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("q4_1", 96),
        ("q4_1", 2080),
        ("q4_k", 256),
        ("q4_k", 2304),
        ("q5_k", 2304),
        ("q6_k", 256),
        ("q6_k", 1280),
        ("q6_k", 1536),
    ],
)
def test_block_types(kind: str, columns: int, fusions: Sequence[str]) -> None:
    """Rows shorter than a chunk, and rows whose last one is part of a chunk; an odd number of them."""
    rng, rows = np.random.default_rng(columns), {"table": 5, "wq": 4, "wk": 2, "wv": 2, "w1": 3, "w3": 3, "w": 5}
    weights = {name: as_weight(rng.standard_normal((count, columns), np.float32), kind) for name, count in rows.items()}
    graph = Graph("blocks")
    table = graph.weight("table", weights["table"].shape, kind)
    ids = graph.input("ids", (2,), "i32")
    x, x_too, x_three = (graph.add("embedding", ids, table, out=name) for name in ("x", "x_too", "x_three"))
    made = projections(graph, x, weights, "wq", "wk", "wv")
    made.append(graph.add("swiglu", *projections(graph, x_too, weights, "w1", "w3"), out="hidden"))
    added = graph.input("residual", (2, 5), "f32"), *projections(graph, x_three, weights, "w")
    made.append(graph.add("add", *added, out="sums"))
    graph.outputs = [value.name for value in made]
    program = cuda_backend.CudaBackend(weights).program(graph, fusions)
    if fusions:
        assert {step.op.kind for step in program.plan.steps} == {"embedding", "qkv", "gate_up", "linear_add"}
    poison(program)
    program.inputs["ids"][:], program.inputs["residual"][:] = [4, 1], rng.standard_normal((2, 5), np.float32)
    program.run_inputs.send(2, 1)
    reference = ReferenceBackend(weights)
    with bounds_of(reference):
        for step in range(len(program.plan.steps)):
            check_step(program, step, 2, reference, lambda step=step: program.run(2, step, step + 1))


@pytest.mark.parametrize(("kind", "group", "columns"), [("int8", 512, 1024), ("q4_0", 0, 96), ("q6_k", 0, 256)])
def test_small_activations(kind: str, group: int, columns: int) -> None:
    """Those near the smallest float32 lose digits in fixed point, and do not become zeros."""
    rng, graph = np.random.default_rng(0), Graph("small")
    values = Weight((5, columns), F32, rng.standard_normal((5, columns), np.float32))
    weights = {"w": convert(values, WeightType(kind, group))}
    graph.outputs = [value.name for value in projections(graph, graph.input("x", (2, columns), "f32"), weights, "w")]
    program, reference = cuda_backend.CudaBackend(weights).program(graph), ReferenceBackend(weights)
    for small in ((1e-30, 1e-31), (1e-33, 1e-35)):
        poison(program)
        program.inputs["x"][:] = rng.standard_normal((2, columns)) * np.array(small)[:, None]
        program.run_inputs.send(2, 1)
        with bounds_of(reference):
            check_step(program, 0, 2, reference, lambda: program.run(2))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_lanes_that_copy_for_others(monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """Superblocks' scales are copied by some lanes for all; here a row has more stages than a ring."""
    monkeypatch.setattr(simulation, "asynchronous", asynchronous)
    monkeypatch.setattr(HostDevice, "n_sms", 1)
    rng, graph = np.random.default_rng(0), Graph("rows")
    weights = {"w": as_weight(rng.standard_normal((16, 12288), np.float32), "q4_k")}
    graph.outputs = [value.name for value in projections(graph, graph.input("x", (1, 12288), "f32"), weights, "w")]
    program, reference = cuda_backend.CudaBackend(weights).program(graph), ReferenceBackend(weights)
    poison(program)
    program.inputs["x"][:] = rng.standard_normal((1, 12288), np.float32)
    program.run_inputs.send(1, 1)
    with bounds_of(reference):
        check_step(program, 0, 1, reference, lambda: program.run(1))


def test_a_mixture_of_block_types() -> None:
    """The mixture of types in a Q4_K_M file: q, k and v are one operator although values have another type."""
    HostDevice.shared_limit = 227 << 10
    config = ModelConfig(256, 256, 1, 4, 1, 5, 4)
    pair = Pair(config, "q4_k_m")
    decode = pair.programs(1)[0]
    kinds = [step.op.kind for step in decode.plan.steps]
    assert {"norm_gate_up", "norm_qkv_rope"} <= set(kinds)
    check_runs(pair, [1], 1, True)


@pytest.mark.parametrize(("heads", "kv_heads", "kv"), [(5, 1, "f16"), (2, 2, "f32")])
def test_a_context_split_over_blocks(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, kv: str) -> None:
    """Parts of one key and more, and blocks that have none; five heads that share keys make three blocks."""
    for module in (attention, attention_kernels):
        monkeypatch.setattr(module, "SPLIT_FROM", 3)
        monkeypatch.setattr(module, "MIN_SPLIT_KEYS", 2)
    monkeypatch.setattr(attention, "_splits", lambda ctx, blocks, context: 4)
    pair = Pair(ModelConfig(4 * heads, 4, 1, heads, kv_heads, 9, 16, head_dim=8), "f32", kv)
    decode = pair.programs(1)[0]
    assert any(launch.variant_for(3).grid[2:] == (4,) for launches in decode.launches for launch in launches)
    check_runs(pair, [3, 1, 3, 1], 3, ["attention"])


@pytest.mark.parametrize(("kv", "head_dim"), [("f32", 68), ("q8_0", 192)])
def test_a_context_longer_than_the_ring(kv: str, head_dim: int) -> None:
    """A stage of the ring is used again, and the token's own key is in each place of it and behind."""
    pair = Pair(ModelConfig(4, 4, 1, 1, 1, 9, 16, head_dim=head_dim), "f32", kv)
    check_runs(pair, [2] + [1] * 11, 3, ["attention"])


@pytest.mark.parametrize("config", [SMALL, ODD])
def test_whole_runs(config: ModelConfig) -> None:
    """All steps in one launch of a graph: the logits of every token."""
    check_whole_runs(Pair(config), [3, 1, 4], 4, True)


def test_copies_that_are_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before sm_80, copies are complete at once."""
    monkeypatch.setattr(simulation, "asynchronous", False)
    check_runs(Pair(BLOCKS, "q8_0"), [2, 1], 2, True)


# Single kernels


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_argmax(bench: Bench) -> None:
    x = np.random.default_rng(0).standard_normal((4, 700)).astype(np.float32)
    x[0, [300, 650, 20]] = 9  # the first of equals
    x[1, 699], x[1, 3] = np.nan, np.inf
    x[2] = -np.inf
    check_argmax(bench, x)
    check_argmax(bench, np.array([[3.0]], np.float32))
    check_argmax(bench, np.full((1, 257), -np.inf, np.float32))


def test_quantize(bench: Bench) -> None:
    x = np.random.default_rng(0).standard_normal((2, 75)).astype(np.float32)
    x[0, :16] = 0
    x[0, 16:32] *= 1e-42  # below the normal numbers
    x[1, 20], x[1, 74], x[0, 40] = np.nan, np.inf, -np.inf
    check_quantize(bench, x, 16)
    check_quantize(bench, np.array([[0.5, -1.5, 2.5, 127.0], [-0.5, 1.5, -126.5, -127.0]], np.float32), 4)


# Sampling


LOGITS = np.random.default_rng(3).permutation(np.arange(40) * 0.17 - 4).astype(np.float32)
"""Forty logits, all in different bins of the histogram."""
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 7, "top_p": 1.0},
    {"top_k": 0, "top_p": 0.6, "temperature": 1.7},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.3},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    {"top_k": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters(bench: Bench, settings: dict[str, Any]) -> None:
    """Seeds for which the noise would choose a token that the filters leave out, and one for each of some they keep."""
    sampler = make_sampler(len(LOGITS), **settings)
    kept, chosen = candidates(LOGITS, sampler), {}
    assert 0 < len(kept) < len(LOGITS)
    for seed in range(3000):
        sampler.state[0] = seed
        free = make_sampler(len(LOGITS), sampler.settings[0, TEMPERATURE], 0, top_p=1.0, seed=seed)
        with_filters, lead = expected(LOGITS, sampler)
        if lead > 1e-3:
            chosen.setdefault((with_filters, expected(LOGITS, free)[0] in kept), seed)
    out = [seed for (_, inside), seed in chosen.items() if not inside]
    assert out
    for seed in [*out[:1], *(seed for (_, inside), seed in chosen.items() if inside)][:3]:
        check_draws(bench, LOGITS, seed=seed, **settings)


def test_equal_logits_and_the_first_of_them(bench: Bench) -> None:
    """Top-k among equals takes the first, as the search for the largest does."""
    logits = np.zeros(60, np.float32)
    logits[50:] = -1
    for seed in range(3):
        (token,), _ = draw(bench, logits, make_sampler(60, top_k=4, top_p=1.0, seed=seed))
        assert token < 4
    assert draw(bench, logits, make_sampler(60, temperature=0))[0] == [0]


@cuda.jit
def places_kernel(logits, border, count, out):
    sums = cuda.shared.array(sampling_kernels.BINS, np.int64)
    found = cuda.shared.array(2, np.int32)  # the simulator tells arrays apart by their line
    griddepcontrol_wait()
    place = sampling_kernels.rank_key_in_bin(logits, 0, out.size, logits[0], border[0], count[0], sums, found)
    for i in range(cuda.threadIdx.x, out.size, sampling_kernels.THREADS):
        out[i] = int(sampling_kernels.bin_of(logits[i], logits[0]) == border[0]) * (
            1 + int(sampling_kernels.rank_key(logits[i], i) <= place)
        )


CROWDS = st.lists(
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 0.003, 0.0030000002, -0.005, -31, -32, -40, -5e7, -np.inf])
    | st.floats(-0.0078125, 0.0078125, width=32) | st.floats(-100, -31, width=32),
    min_size=2, max_size=70,
)  # fmt: skip
"""Logits, many of them in one bin of the histogram, the first or the last."""


@pytest.fixture
def fewer_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small block, which the simulator runs thirty times as fast."""
    for name, value in {"THREADS": 32, "BIN_BITS": 6, "BINS": 64, "CANDIDATES": 4}.items():
        monkeypatch.setattr(sampling_kernels, name, value)
    monkeypatch.setattr(sampling, "THREADS", 32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CROWDS, st.data())
def test_the_places_that_top_k_keeps_of_a_bin(fewer_bins: None, crowd: list[float], data: st.DataObject) -> None:
    logits = np.array([0.016, *crowd], np.float32)
    bins = np.array([sampling_kernels.bin_of(x, logits[0]) for x in logits])
    border = data.draw(st.sampled_from(sorted(set(bins.tolist()), key=lambda b: -(bins == b).sum())), "bin")
    members = np.flatnonzero(bins == border)
    count = data.draw(st.integers(1, len(members)), "count")
    want = (bins == border).astype(np.int64)
    want[members[np.lexsort((members, -logits[members]))[:count]]] = 2
    got = launch(
        places_kernel, logits, np.array([border], np.int64), np.array([count], np.int64),
        np.zeros(len(logits), np.int64), threads=sampling_kernels.THREADS,
    )[-1]  # fmt: skip
    np.testing.assert_array_equal(got, want)


def test_top_k_among_more_than_are_ranked(bench: Bench) -> None:
    logits = np.random.default_rng(8).choice(np.array([0, -0.004, -50, -60], np.float32), 2200)
    check_top_k(bench, logits, 2100, 1)


def test_top_k_among_more_than_four(bench: Bench, fewer_bins: None) -> None:
    rng = np.random.default_rng(9)
    logits = rng.choice(np.array([2, 1.9995, 1.999, 0.5, -0.004, -0.005], np.float32), 60)
    for top_k in (3, 17, 40, 59):
        check_top_k(bench, logits, top_k, 4)
    # top-p takes whole bins, but of what top-k leaves
    equals = np.zeros(60, np.float32)
    for seed in range(9):
        (token,), _ = draw(bench, equals, make_sampler(60, top_k=5, top_p=0.9, seed=seed))
        assert token < 5
    few = np.array([2, *[1.9] * 3, *[1.7] * 40], np.float32)  # half of the first six's mass is that of the first four
    for seed in range(9):
        (token,), _ = draw(bench, few, make_sampler(44, 50.0, top_k=6, top_p=0.5, seed=seed))
        assert token < 4


def test_numbers_that_are_none(bench: Bench) -> None:
    for bad in (np.nan, np.inf):
        broken = LOGITS.copy()
        broken[17] = bad
        sampler = make_sampler(len(broken), seed=4)
        assert draw(bench, broken, sampler)[0] == [-1]
        assert sampler.counts[0] == 0 and sampler.state[0] == 4
    assert draw(bench, broken, make_sampler(len(broken), temperature=0))[0] == [17]  # infinity is the largest number
    hidden = LOGITS.copy()
    hidden[::2] = -np.inf  # what never comes, never comes
    check_draws(bench, hidden, times=2, top_k=0, top_p=1.0, temperature=5.0, seed=1)


def test_a_penalty_and_a_padded_vocabulary(bench: Bench) -> None:
    logits = np.concatenate([LOGITS, np.full(10, 50, np.float32)])  # behind the vocabulary: never drawn
    best, n = int(LOGITS.argmax()), len(LOGITS)
    sampler = make_sampler(len(logits), 0, repeat_penalty=3.0, prompt=[best, best, 5], n_candidates=n)
    want, _ = expected(LOGITS, sampler)
    assert want != best
    assert draw(bench, logits, sampler)[0] == [want]
    assert [int(t) for t in sampler.recent[0, :4]] == [best, best, 5, want]


def test_rows_of_many_slots(bench: Bench, fewer_bins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_kernels, "CANDIDATES", 24)  # as many as the likeliest that can be asked for
    check_rows(bench, 45, 3)


def test_more_likeliest_tokens_than_are_ranked(bench: Bench, fewer_bins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits in one bin: of the likeliest tokens those with the smaller ids are listed."""
    monkeypatch.setattr(sampling_kernels, "CANDIDATES", 24)
    table = SamplerTable(1, 60)
    table.assign(0, SamplingParams(temperature=0, logprobs=20))
    for logits in (np.zeros((1, 60)), np.where(np.arange(60) % 3, -0.001, 0.001)[None], np.full((1, 60), -np.inf)):
        result = Slots(bench, table, 1).sample(logits, [0])
        finite = np.isfinite(logits.max())
        want = np.lexsort((np.arange(60), -logits[0]))[:20] if finite else np.full(20, -1)
        assert result.top_ids[0].tolist() == want.tolist() and np.isnan(result.logprobs[0]) != finite


# Sessions


def test_a_session_that_runs_ahead() -> None:
    """Steps are put into the stream before the host knows their tokens: what it reads, rewinds to or asks for next is
    as if they were not.
    """
    HostDevice.n_sms = 1
    config, context = ModelConfig(8, 8, 1, 2, 1, 12, 9), 9
    pair = Pair(config, scale=2.0)
    (decode, _), (prompt, _) = pair.programs(1), pair.programs(2)
    session = Session(decode, prompt, context, 12)
    ids = pair.ids(5, 3)

    def told(sampler: SamplerTable, count: int, read_at: Sequence[int] = ()) -> list[int]:
        session.truncate()
        tokens: list[Any] = [session.prefill(ids, sampler)]
        while len(tokens) < count:
            if len(tokens) in read_at:
                logits = session.logits.copy()
                close(logits, logits_after([*ids, *tokens[:-1]]), f"logits before token {len(tokens)}")
            tokens.append(session.step(tokens[-1], sampler))
        return tokens

    reference = pair.reference.program(pair.graph(1))

    def logits_after(tokens: Sequence[int]) -> np.ndarray:
        for place, token in enumerate(tokens):
            feed(reference, [token], place)
            reference.run(1)
        return reference.value("logits")[0]

    greedy = told(make_sampler(12, temperature=0), 7)
    assert [int(logits_after([*ids, *greedy[:count]]).argmax()) for count in range(7)] == greedy
    assert len(session.tokens) == context  # the last steps did not go beyond it
    assert told(make_sampler(12, temperature=0), 6, read_at=(2, 4)) == greedy[:6]
    session.truncate(5)  # in the middle of what was computed ahead
    assert session.step(greedy[2], make_sampler(12, temperature=0)) == greedy[3]
    drawn = told(make_sampler(12, seed=3), 3)
    assert told(make_sampler(12, seed=3), 3, read_at=(2,)) == drawn


def test_a_nan_in_the_model_is_an_error() -> None:
    pair = Pair(SMALL)
    decode, _ = pair.programs(1)
    session = Session(decode, pair.programs(4)[0], 8, 20)
    session.prefill([1, 2])
    norm = pair.cuda.weights.operands["norm"]
    pair.cuda.device.fill(norm.address, 0xFF, 4)
    for sampler in (make_sampler(20, temperature=0), make_sampler(20, seed=1)):
        with pytest.raises(Error, match="not numbers"):
            session.step(3, sampler)


# The checks themselves


def test_comparisons_can_fail() -> None:
    """Leaving out the kernel of any step makes a comparison fail."""
    pair = Pair(SMALL)
    program, _ = pair.programs(1)
    for step in range(len(program.plan.steps)):
        calls, program.prepared_launches[step] = program.prepared_launches[step], []
        with pytest.raises(AssertionError):
            check_runs_of(pair, program)
        program.prepared_launches[step] = calls
        program._graphs.clear()
    check_runs_of(pair, program)
    with pytest.raises(AssertionError):
        close(np.zeros(3), np.ones(3), "nothing")


def check_runs_of(pair: Pair, program: Any) -> None:
    from tests.cuda.checks import run_checked

    poison(program)
    run_checked(pair, program, pair.reference.program(pair.graph(1)), [1], 0, 0, True)


# What is taken is given back


def count_down(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int) -> None:
    """Make a method fail at its nth call."""
    before, left = getattr(owner, name), [calls]

    def failing(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError(f"{name} fails")
        return before(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(("owner", "name"), [(HostMemory, "__init__"), (HostDevice, "write"), (HostDevice, "fill")])
def test_memory_is_given_back_whatever_fails(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Memory is freed at once, while the exception still holds references to every object."""
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM")  # a user who has it set gets an error
    with pytest.raises(MemoryError):  # what the test itself leaves behind is there now
        raise MemoryError
    for calls in (*range(12), *(12 << i for i in range(12))):
        gc.collect()
        before = {entry for entry in HostMemory.live if entry[2] != "pinned memory"}
        model = None
        with monkeypatch.context() as patch:
            count_down(patch, owner, name, calls)
            try:
                model = Model(None, device="cuda", context=16)
            except MemoryError as error:
                kept = error
                left = {entry for entry in HostMemory.live if entry[2] != "pinned memory"} - before
                assert not left, f"call {calls} of {name}: {sorted(entry[2] for entry in left)}"
                del kept
        if model is not None:
            assert model.backend.memory_bytes > 6_000_000
            model.close()
            assert {entry for entry in HostMemory.live if entry[2] != "pinned memory"} == before
            assert calls > 5
            return
    raise AssertionError(f"{name} is called very often")
