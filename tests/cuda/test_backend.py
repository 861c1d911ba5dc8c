"""The CUDA backend on a GPU, against the NumPy reference: kernels, whole models value by value, text, sampling, steps
that run ahead of the host, and memory.

    pytest -m gpu
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest tests/cuda/test_backend.py -k sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest tests/cuda/test_backend.py -k sanitize

Tests named sanitize run every kernel once on small shapes. Kernels for more tokens than `gemm.FEW` have their own
tests in test_cuda_gemm; here they run in whole models.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.cuda_host import graph_of, missing_packages
from tests.helpers.random_models import configs, save


def without_gpu() -> str:
    """Why nothing of this file can run here; empty if it can."""
    if reason := missing_packages():
        return reason
    from numballama import DeviceError
    from numballama.cuda.driver import Device

    try:
        Device("cuda")
    except DeviceError as error:
        return str(error)
    return ""


if _reason := without_gpu():
    pytest.skip(f"no GPU to test: {_reason}", allow_module_level=True)

pytestmark = pytest.mark.gpu

import numballama
from numballama import DeviceError, Error
from numballama.config import HALF_SPLIT, INTERLEAVED, NAMED_SHAPES, ModelConfig
from numballama.cuda import backend as cuda
from numballama.cuda import driver
from numballama.cuda.ops import gemm
from numballama.fusion import FUSIONS
from numballama.graph import KVLayout
from numballama.ir import Graph, Value
from numballama.model import Model
from numballama.quantization.convert import dequantize, to_bf16, to_f16
from numballama.reference import ReferenceBackend
from numballama.registry import find
from numballama.sampling import SamplerState
from numballama.session import Session
from tests.cuda.checks import (
    SHARE,
    Bench,
    Pair,
    bounds_of,
    candidates,
    check_argmax,
    check_draws,
    check_quantize,
    check_runs,
    check_whole_runs,
    close,
    draw,
    feed,
    poison,
    run_checked,
)
from tests.helpers.bounds import TOKENIZERS, as_weight, check_step, story_model
from tests.helpers.sampling import make_sampler
from tests.kernels.test_kernels_cpu import CASES, Case

SLACK = 8 << 20
"""Bytes of device memory that the driver may keep for itself: it takes code and bookkeeping in pieces of 2 MB."""
SHAPE = ModelConfig(64, 96, 2, 4, 2, 300, 64)
ROUNDED = 2.0**-5
"""Of the largest logit: what operands in 16 bits, as tensor cores take them, may change in a whole model."""


# Kernels


def projections(case: Case, x: Value, heights: tuple[int, int] | None = None) -> list[Value]:
    """Queries, keys and values as models have them: rows in pairs, as many keys as values, weights of one type."""
    q_rows, kv_rows = heights or (2 * case.draw(st.integers(1, 70)), 2 * case.draw(st.integers(1, 70)))
    return [
        case.graph.add("linear", x, case.weight(f"w{name}", rows, x.shape[1], kind=case.type), out=f"{name}_out")
        for name, rows in zip("qkv", (q_rows, kv_rows, kv_rows), strict=True)
    ]


def qkv(case: Case, normed: bool) -> Graph:
    x = case.x("x", case.rows, case.columns())
    return case.done(*[value.name for value in projections(case, case.norm(x) if normed else x)])


def norm_qkv_rope(case: Case) -> Graph:
    case.heads()
    width = case.kv_heads * case.head_dim
    x, angles = case.x("x", case.rows, case.columns()), case.angles()
    q, k, v = projections(case, case.norm(x), (width * case.shared, width))
    q, k = case.rope(q, angles), case.rope(k, angles)
    k_cache = case.write(k, "k_cache")
    case.write(v, "v_cache")
    case.graph.add("attention_scores", q, k_cache, case.positions, case.sequence, out="scores", window=0)
    return case.done("scores")


CPU_ONLY = ("quantize_q8_0", "quantize_q8_1", "quantize_q8_k")
CASES_HERE = {
    name: case for name, case in CASES.items() if not name.endswith("_blocks_int8") and name not in CPU_ONLY
} | {
    "qkv": (lambda case: qkv(case, False), ("qkv",)),
    "norm_qkv": (lambda case: qkv(case, True), ("qkv", "norm")),
    "norm_qkv_rope": (norm_qkv_rope, ("qkv", "rope_kv", "norm", "qkv_rope")),
}
"""The CPU's cases, but for int8 activations beside blocks, and those whose kernels want what every model has."""


@pytest.mark.parametrize("name", CASES_HERE)
@given(data=st.data())
@settings(max_examples=20)
def test_kernel_agrees_with_reference(name: str, data: st.DataObject) -> None:
    """Random shapes and types of one operator, or of some that a pass joins."""
    build, passes = CASES_HERE[name]
    case = Case(data.draw)
    graph = build(case)
    assume(max(value.shape[0] for value in graph.values.values() if value.kind == "input") <= gemm.FEW)
    backend = cuda.CudaBackend(case.weights)
    try:
        program = backend.program(graph, passes)
        if name == "norm_qkv_rope":
            assert [step.op.kind for step in program.plan.steps] == [name, "attention_scores"]
        poison(program)
        for state, array in case.states.items():
            program.write(state, array)
        for operand, array in case.arrays.items():
            program.inputs[operand].view(np.uint8)[...] = 0xFF  # what lies after the run's tokens is nobody's
            program.inputs[operand][: case.tokens] = array[: case.tokens]
        program._inputs.send(case.tokens, program._made)
        reference = ReferenceBackend(case.weights)
        with bounds_of(reference):
            for step in range(len(program.plan.steps)):
                check_step(
                    program, step, case.tokens, reference, lambda step=step: program.run(case.tokens, step, step + 1)
                )
    finally:
        backend.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_argmax_of_special_rows(bench: Bench) -> None:
    x = np.random.default_rng(0).standard_normal((5, 40000)).astype(np.float32)
    x[0, [300, 39999, 20]] = 9
    x[1, 39999], x[1, 3] = np.nan, np.inf
    x[2] = -np.inf
    x[3, ::2] = x[3].max()
    check_argmax(bench, x)
    for columns in (1, 2, 255, 256, 257, 32000):
        check_argmax(bench, x[:1, :columns].copy())


@given(st.integers(1, 300), st.sampled_from([1, 3, 32, 64]), st.integers(0, 99))
@settings(max_examples=20)
def test_quantize_of_special_groups(bench: Bench, columns: int, group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, columns)).astype(np.float32) * np.float32(10.0) ** rng.integers(-40, 30, (3, columns))
    chosen = rng.random(x.shape) < 0.02
    x[chosen] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0], np.float32), chosen.sum())
    check_quantize(bench, x.astype(np.float32), group)


# Whole models


KINDS = ("f32", "f16", "bf16", "int8", "int8 activations")


def pair_of(drawn: dict[str, Any], **options: Any) -> Pair:
    config = ModelConfig(**{**vars(drawn["config"]), "rope_pairing": drawn["pairing"]})
    int8 = drawn["kind"] == "int8 activations"
    kind = "int8" if int8 else drawn["kind"]
    return Pair(config, kind, drawn["kv"], drawn["seed"], drawn["group"], int8_activations=int8, **options)


MODELS = st.fixed_dictionaries({
    "config": configs(biases=True),
    "pairing": st.sampled_from([INTERLEAVED, HALF_SPLIT]),
    "kind": st.sampled_from(KINDS),
    "group": st.sampled_from([1, 3, 16, 32, 64]),
    "kv": st.sampled_from(["f32", "f16", "bf16"]),
    "seed": st.integers(0, 1000),
})  # fmt: skip


@given(MODELS, st.booleans() | st.sets(st.sampled_from(list(FUSIONS))).map(sorted), st.data())
@settings(max_examples=30)
def test_every_value_of_prefill_and_decode(
    drawn: dict[str, Any], fusions: bool | list[str], data: st.DataObject
) -> None:
    pair = pair_of(drawn, sequences=data.draw(st.integers(1, 2)))
    chunk = data.draw(st.integers(2, gemm.FEW), "most tokens of a prefill")
    counts = [data.draw(st.integers(1, most)) for most in (chunk, chunk, 1, 1)]
    try:
        check_runs(pair, counts, chunk, fusions, data.draw(st.sampled_from(["last", "all"])))
    finally:
        pair.close()


WIDE = ModelConfig(256, 640, 2, 8, 2, 777, 600, rope_pairing=HALF_SPLIT)
"""Rows of several chunks, which warps share; heads of 32 numbers; blocks of all sizes fit."""
WHOLE_BLOCKS = ModelConfig(1280, 768, 1, 20, 4, 300, 600, rope_pairing=HALF_SPLIT)
"""Rows are whole blocks of 256; of the last two chunks of a row, part of one or none."""


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "kind", ["f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k", "q4_k_m", "all"]
)
def test_every_value_of_a_wider_model(kind: str, kv: str) -> None:
    """Also after 500 tokens, when several blocks share a context."""
    config = WHOLE_BLOCKS if kind in ("q4_k", "q6_k", "q4_k_m", "all") else WIDE
    pair = Pair(config, kind, kv, group=64)
    try:
        check_runs(pair, [8, 1, 3, 1], 8, True)
        program, reference = pair.programs(1)
        fill_cache(pair, program)
        for position in (255, 256, 511, 599):
            run_checked(program, reference, [position % config.vocab_size], position, 0, False)
    finally:
        pair.close()


def fill_cache(pair: Pair, program: Any) -> None:
    """Random keys and values at every position."""
    rng = np.random.default_rng(7)
    for state in pair.cuda.states:
        numbers = rng.standard_normal(pair.kv.shape, dtype=np.float32)
        rounded = {"f32": lambda a: a, "f16": to_f16, "bf16": to_bf16}[pair.kv.dtype](numbers)
        program.write(state, rounded)


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (2, 2, 128), (5, 1, 80), (3, 1, 6)])
def test_a_long_context(kv: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """Attention over up to 9,000 positions, of one token and of five."""
    config = ModelConfig(32, 16, 1, heads, kv_heads, 50, 9000, head_dim=head_dim)
    pair = Pair(config, "f32", kv)
    try:
        for tokens in (1, 5):
            program, reference = pair.programs(tokens)
            fill_cache(pair, program)
            for position in (4095, 8191, 8192, 9000 - tokens):
                run_checked(program, reference, pair.ids(position, tokens), position, 0, False)
    finally:
        pair.close()


@pytest.mark.parametrize("head_dim", [6, 16, 64])
def test_a_sliding_window(head_dim: int) -> None:
    config = ModelConfig(32, 16, 2, 4, 2, 50, 700, head_dim=head_dim, window=300, qk_norm=True)
    pair = Pair(config, "f32", "f32")
    try:
        for tokens in (1, 5):
            program, reference = pair.programs(tokens)
            fill_cache(pair, program)
            for position in (0, 250, 298, 299, 300, 301, 690):
                run_checked(program, reference, pair.ids(position, tokens), position, 0, False)
    finally:
        pair.close()


@given(MODELS, st.data())
@settings(max_examples=20)
def test_fused_and_unfused_give_the_same(drawn: dict[str, Any], data: st.DataObject) -> None:
    """In whole runs, where kernels overlap; the runs of many tokens too."""
    drawn = {**drawn, "kind": drawn["kind"].partition(" ")[0], "kv": "f32"}
    pair = pair_of(drawn)
    tokens = min(data.draw(st.integers(1, 30)), pair.kv.context)
    results, ids = [], pair.ids(1, tokens)
    try:
        for fusions in (True, False):
            program, _ = pair.programs(tokens, "all", fusions)
            poison(program)
            feed(program, ids, 0)
            program.run(tokens)
            results.append(program.value("logits"))
    finally:
        pair.close()
    assert np.isfinite(results[1]).all()
    exact = tokens <= gemm.FEW or drawn["kind"] == "f32"
    close(results[0], results[1], "logits", SHARE if exact else ROUNDED)


@given(MODELS, st.data())
@settings(max_examples=20)
def test_prefill_in_chunks_equals_token_by_token(drawn: dict[str, Any], data: st.DataObject) -> None:
    """Logits of the last token: through chunks, one at a time, all at once, after a rewind; and the reference's."""
    drawn = {**drawn, "kind": drawn["kind"].partition(" ")[0], "kv": "f32"}
    pair = pair_of(drawn)
    context = pair.kv.context
    count = data.draw(st.integers(1, context))
    ids = pair.ids(2, count)
    decode, _ = pair.programs(1)
    chunked, _ = pair.programs(data.draw(st.integers(1, 12)))
    everything, reference = pair.programs(context, "all")
    try:
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
        for token in pair.ids(3, min(3, context - count)):
            session.step(token)
        session.truncate(kept)
        session.prefill(ids[kept:])
        results["rewound"] = session.logits.copy()
        feed(everything, ids, 0)
        everything.run(count)
        results["all"] = everything.value("logits")[count - 1].copy()
    finally:
        pair.close()
    feed(reference, ids, 0)
    reference.run(count)
    want = reference.value("logits")[-1]
    for name, got in results.items():
        close(got, want, name, SHARE if drawn["kind"] == "f32" or name == "steps" else ROUNDED)


@pytest.mark.parametrize(("kind", "kv", "most"), [
    ("f32", "f32", 1e-4), ("f32", "f16", 2.0**-9), ("bf16", "f16", 2.0**-6), ("f16", "f16", 2.0**-8),
    ("q8_0", "f16", 2.0**-7), ("q4_0", "bf16", 2.0**-5), ("int8", "f16", 2.0**-7),
    ("q4_1", "f16", 2.0**-7), ("q4_k", "f16", 2.0**-7), ("q6_k", "f16", 2.0**-7), ("q4_k_m", "f16", 2.0**-7),
])  # fmt: skip
def test_prompts_of_many_tokens(kind: str, kv: str, most: float) -> None:
    """300 tokens at once, on tensor cores where operands have 16 bits: the root mean square of the logits' error is a
    few roundings of the logits' own; then a step.
    """
    pair = Pair(WHOLE_BLOCKS if kind in ("q4_k", "q6_k", "q4_k_m") else WIDE, kind, kv, group=64)
    ids = pair.ids(4, 301)
    try:
        prompt, reference = pair.programs(300, "all")
        decode, _ = pair.programs(1)
        poison(prompt)
        feed(prompt, ids[:300], 0)
        prompt.run(300)
        got = prompt.value("logits")
        feed(decode, ids[300:], 300)
        decode.run(1)
        got = np.concatenate([got, decode.value("logits")])
    finally:
        pair.close()
    reference = pair.reference.program(pair.graph(301, "all"))
    feed(reference, ids, 0)
    reference.run(301)
    want = reference.value("logits")
    error = np.sqrt(((got - want) ** 2).mean(axis=1) / (want**2).mean(axis=1))
    assert error.max() < most, error.max()


def test_sessions_of_two_sequences_share_programs() -> None:
    """Their tokens come in turns, and neither sees the other's part of the cache."""
    pair = Pair(ModelConfig(16, 24, 2, 4, 2, 30, 12), seed=4, sequences=2)
    (decode, reference), (prompt, _) = pair.programs(1), pair.programs(4)
    poison(decode)
    sessions = [Session(decode, prompt, 12, 30, sequence) for sequence in (0, 1)]
    ids, got = [pair.ids(sequence, 11) for sequence in (0, 1)], []
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
                close(got[2 * (place - 6) + sequence], reference.value("logits")[0], f"sequence {sequence}, {place}")
    pair.close()


# Real models


def greedy(model: Model, count: int = 200) -> list[int]:
    return [piece.token for piece in model.stream(None, max_tokens=count, temperature=0)]


@pytest.mark.parametrize("dtype", [None, "f16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_greedy_tokens_and_logits_equal_the_reference(models: Path, name: str, dtype: str | None) -> None:
    oracle = story_model(models, name, device="reference", dtype=dtype)
    tokens = greedy(oracle)
    with compiled_story(models, name, dtype=dtype, kv_dtype="f32") as model:
        assert greedy(model) == tokens
        session, ids = model.session, [1, *tokens[:60]]
        want = oracle.logits(ids)
        session.truncate()
        for place, token in enumerate(ids):
            session.step(token)
            close(session.logits, want[place], f"logits {place}", 1e-4)
        close(model.logits(ids), want, "logits of all", 1e-4 if dtype is None else ROUNDED)


def compiled_story(models: Path, name: str, **options: Any) -> Model:
    return numballama.compile(models / f"{name}.bin", models / TOKENIZERS[name], device="cuda", **options)


@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_stories_begin_alike_with_a_cache_of_16_bits(models: Path, name: str) -> None:
    """The default: choices agree but where the reference hesitates by less than rounding makes."""
    oracle = story_model(models, name, device="reference")
    ids = [1, *greedy(oracle)]
    want = oracle.logits(ids)
    with compiled_story(models, name) as model:
        got = model.logits(ids)
    assert model.kv.dtype == "f16"
    error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
    assert error < 2.0**-7, error
    ordered = np.sort(want, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > 2 * np.abs(got - want).max()
    assert sure.mean() > 0.8 and (got.argmax(axis=1) == want.argmax(axis=1))[sure].all()


@pytest.mark.parametrize("dtype", [None, "f32", "q4_0"])
def test_the_packaged_model_equals_the_reference(dtype: str | None) -> None:
    with (
        numballama.compile(None, dtype=dtype, device="cuda", kv_dtype="f32") as model,
        numballama.compile(None, dtype=dtype, device="reference") as reference,
    ):
        tokens = greedy(model)
        assert len(tokens) == 200 or tokens[-1] == model.tokenizer.eos_id
        assert tokens == greedy(reference)


def test_two_thousand_steps_of_a_large_model() -> None:
    """TinyLlama-1.1B's shape with random bfloat16 weights, against float32 in PyTorch on the same card."""
    torch = pytest.importorskip("torch", reason="PyTorch, which computes the reference, is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch, which computes the reference, does not see the GPU")
    config = NAMED_SHAPES["TinyLlama-1.1B"]
    rng = np.random.default_rng(0)
    made: dict[tuple[int, ...], Any] = {}
    for shape in config.weight_shapes().values():
        if shape not in made:
            numbers = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
            made[shape] = as_weight(numbers, "bf16") if len(shape) == 2 else as_weight(1 + numbers, "f32")
    weights = {name: made[shape] for name, shape in config.weight_shapes().items()}
    steps, chosen = 2000, [0, 1, 2, 63, 64, 255, 256, 511, 1000, 1500, 1999]
    ids = rng.integers(0, config.vocab_size, steps).tolist()
    want = in_torch(torch, config, {shape: dequantize(w) for shape, w in made.items()}, ids, chosen)

    for kv, most in (("f32", 2e-3), ("f16", 2.0**-6)):
        backend = cuda.CudaBackend(weights)
        graph = graph_of(config, weights, KVLayout.of(config, 2048, kv), 1)
        decode = backend.program(graph)
        session = Session(decode, decode, 2048, config.vocab_size)
        try:
            for place, token in enumerate(ids):
                session.step(token)
                if place in chosen:
                    close(session.logits, want[chosen.index(place)], f"{kv}, step {place}", most)
        finally:
            backend.close()


def in_torch(
    torch: Any,
    config: ModelConfig,
    arrays: dict[tuple[int, ...], np.ndarray],
    ids: Sequence[int],
    chosen: Sequence[int],
) -> np.ndarray:
    """Logits at some positions of a Llama with interleaved RoPE, in float32, by PyTorch."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        by_shape = {shape: torch.from_numpy(np.array(array)).cuda() for shape, array in arrays.items()}
        of = {name: by_shape[shape] for name, shape in config.weight_shapes().items()}
        count, head = len(ids), config.head_dim
        angle = torch.arange(count, dtype=torch.float64)[:, None] * torch.tensor(
            [config.rope_theta ** (-2 * i / head) for i in range(head // 2)], dtype=torch.float64
        )
        cos, sin = angle.cos().float().cuda()[:, None], angle.sin().float().cuda()[:, None]

        def norm(x: Any, weight: Any) -> Any:
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * weight

        def rope(x: Any) -> Any:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        x = of["tok_embeddings"][torch.tensor(ids, device="cuda")]
        mask = torch.full((count, count), float("-inf"), device="cuda").triu(1)
        for layer in range(config.n_layers):
            p = f"layers.{layer}."
            h = norm(x, of[f"{p}attn_norm"])
            q, k, v = (
                (h @ of[f"{p}w{name}"].T).view(count, heads, head)
                for name, heads in (("q", config.n_heads), ("k", config.n_kv_heads), ("v", config.n_kv_heads))
            )
            q, k = rope(q), rope(k)
            k, v = (y.repeat_interleave(config.n_heads // config.n_kv_heads, 1) for y in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5 + mask
            h = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(count, -1)
            x = x + h @ of[f"{p}wo"].T
            h = norm(x, of[f"{p}ffn_norm"])
            gate = h @ of[f"{p}w1"].T
            x = x + (gate * torch.sigmoid(gate) * (h @ of[f"{p}w3"].T)) @ of[f"{p}w2"].T
        x = norm(x[torch.tensor(list(chosen), device="cuda")], of["norm"])
        result: np.ndarray = (x @ of["output"].T).cpu().numpy()
        return result
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.cuda.empty_cache()


def test_two_models_on_one_card(models: Path) -> None:
    """Interleaved token by token, each tells its own story; closing one leaves the other."""
    with compiled_story(models, "stories260K", kv_dtype="f32") as other:
        with compiled_story(models, "stories15M", kv_dtype="f32") as model:
            alone = greedy(model, 40), greedy(other, 40)
            both = [
                (a.token, b.token)
                for a, b in zip(
                    model.stream(None, max_tokens=40, temperature=0),
                    other.stream(None, max_tokens=40, temperature=0), strict=True,
                )
            ]  # fmt: skip
            assert ([a for a, _ in both], [b for _, b in both]) == alone
        assert greedy(other, 40) == alone[1]


# Sampling


LOGITS = np.random.default_rng(3).permutation(np.linspace(-6, 3, 50)).astype(np.float32)
"""Fifty, each in a bin of the histogram of its own."""
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 0, "top_p": 1.0, "temperature": 1.0},
    {"top_k": 0, "top_p": 1.0, "temperature": 3.0},
    {"top_k": 10, "top_p": 1.0, "temperature": 0.7},
    {"top_k": 0, "top_p": 0.7, "temperature": 1.5},
    {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
]


@pytest.mark.parametrize("settings_", SETTINGS, ids=str)
def test_the_distribution_of_20000_draws(bench: Bench, settings_: dict[str, Any]) -> None:
    """Chi-square against the exact probabilities after the filters, at a level of one in a million."""
    sampler = make_sampler(len(LOGITS), seed=11, **settings_)
    arrays = {name: bench.put(getattr(sampler, name)) for name in ("settings", "recent", "counts", "state")}
    following, on_device = bench.empty((1,), "i32"), bench.put(LOGITS.reshape(1, -1))
    launches = find("sample", "cuda", ["f32"]).function(bench.gpu, on_device, len(LOGITS), *arrays.values(), following)
    ((call,),) = bench.backend.ready([launches])
    observed = np.zeros(len(LOGITS), int)
    for _ in range(20000):
        call()
        observed[bench.get(following)[0]] += 1
    kept = sorted(candidates(LOGITS, sampler))
    weights = np.exp(LOGITS[kept].astype(np.float64) / sampler.settings[0])
    expected = 20000 * weights / weights.sum()
    assert observed.sum() == observed[kept].sum() == 20000
    order = np.argsort(expected)
    rare = order[: int(np.searchsorted(np.cumsum(expected[order]), 10)) + 1]  # together: for each of them too few
    groups = [rare, *([i] for i in order[len(rare) :])]
    counts = np.array([(observed[kept][group].sum(), expected[group].sum()) for group in groups])
    if len(counts) > 1:
        statistic, k = ((counts[:, 0] - counts[:, 1]) ** 2 / counts[:, 1]).sum(), len(counts) - 1
        assert statistic < k * (1 - 2 / (9 * k) + 4.75 * (2 / (9 * k)) ** 0.5) ** 3  # Wilson and Hilferty, 1931


@pytest.mark.parametrize("vocab", [50, 5000, 128256])
@pytest.mark.parametrize("settings_", SETTINGS, ids=str)
def test_draws_follow_the_noise(bench: Bench, settings_: dict[str, Any], vocab: int) -> None:
    """The token with the largest logit / temperature + noise, of those that the CPU's filters keep."""
    if vocab > len(LOGITS):
        logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32) * 3
        logits = np.sort(logits)[::-1].copy() if vocab > 100000 else logits
        if settings_["top_p"] < 1 and not settings_["top_k"]:
            pytest.skip("without top-k, top-p takes or leaves whole bins of the histogram")
    else:
        logits = LOGITS
    check_draws(bench, logits, times=20, seed=5, **settings_)


def test_greedy_penalties_and_padding(bench: Bench) -> None:
    best = int(LOGITS.argmax())
    assert draw(bench, LOGITS, make_sampler(50, temperature=0))[0] == [best]
    assert draw(bench, LOGITS, make_sampler(50, top_k=1, seed=3), times=5)[0] == [best] * 5
    check_draws(bench, LOGITS, times=100, temperature=0, repeat_penalty=1.5)
    check_draws(bench, LOGITS, times=100, temperature=1.0, repeat_penalty=1.3, seed=8)
    padded = np.concatenate([LOGITS, np.full(14, 99, np.float32)])
    tokens, _ = draw(bench, padded, make_sampler(50, temperature=50.0, top_k=0, top_p=1.0, seed=1), times=300)
    assert min(tokens) >= 0 and max(tokens) < 50 and len(set(tokens)) > 40
    assert draw(bench, padded, make_sampler(50, temperature=0))[0] == [best]


def test_logits_that_are_no_numbers(bench: Bench) -> None:
    for bad in (np.nan, np.inf):
        broken = LOGITS.copy()
        broken[17] = bad
        assert draw(bench, broken, make_sampler(50, seed=4))[0] == [-1]
    assert draw(bench, broken, make_sampler(50, temperature=0))[0] == [17]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    path, _ = save(tmp_path, "llama2c-v0", SHAPE)
    with numballama.compile(path, device="cuda", kv_dtype="f32") as made:
        yield made


def told(model: Model, sampler: SamplerState, count: int, prompt: Sequence[int] = (1, 5, 9)) -> list[int]:
    """Tokens after a prompt, from an empty cache."""
    model.session.truncate()
    tokens: list[Any] = [model.session.prefill(list(prompt), sampler)]
    while len(tokens) < count:
        tokens.append(model.session.step(tokens[-1], sampler))
    return tokens


def test_seeds(model: Model) -> None:
    first = told(model, make_sampler(300, seed=1), 40)
    assert told(model, make_sampler(300, seed=1), 40) == first
    assert len({tuple(told(model, make_sampler(300, seed=seed), 20)) for seed in range(5)}) == 5
    cold = told(model, make_sampler(300, temperature=0), 40)
    assert told(model, make_sampler(300, top_k=1, seed=9), 40) == cold
    assert told(model, make_sampler(300, temperature=0, repeat_penalty=1.0), 40) == cold
    assert len(set(told(model, make_sampler(300, temperature=0, repeat_penalty=50.0), 40))) > len(set(cold))


def test_a_nan_in_the_weights_is_an_error(model: Model) -> None:
    told(model, make_sampler(300, seed=1), 3)
    backend = model._backend
    backend.device.make_current()
    backend.device.fill(backend.weights.operands["norm"].address, 0xFF, 4)
    for sampler in (
        make_sampler(300, temperature=0),
        make_sampler(300, seed=1),
        make_sampler(300, temperature=0, repeat_penalty=2.0),
    ):
        model.session.truncate()
        with pytest.raises(Error, match="not numbers"):
            model.session.prefill([1, 2], sampler)
        with pytest.raises(Error, match="not numbers"):
            model.session.step(3, sampler)


# Steps that are under way before the host knows their tokens


def reference_logits(model: Model, tokens: Sequence[int]) -> np.ndarray:
    backend = ReferenceBackend(model.weights)
    program = backend.program(model._build(len(tokens), "all"))
    feed(program, tokens, 0)
    program.run(len(tokens))
    return program.value("logits")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "repeat_penalty": 1.4}], ids=str)
def test_reading_logits_between_steps(model: Model, options: dict[str, Any]) -> None:
    """What the host reads belongs to the last token that it was given, and reading changes nothing."""
    prompt = [1, 5, 9]
    want = told(model, make_sampler(300, **options), 30)
    sampler, session = make_sampler(300, **options), model.session
    logits = reference_logits(model, [*prompt, *want])
    session.truncate()
    tokens: list[Any] = [session.prefill(prompt, sampler)]
    while len(tokens) < 30:
        if len(tokens) % 4 == 2:
            for _ in range(2):
                close(session.logits, logits[len(prompt) + len(tokens) - 2], f"logits after {len(tokens)} tokens")
        tokens.append(session.step(tokens[-1], sampler))
    assert tokens == want


def test_rewinding_and_other_tokens(model: Model) -> None:
    """A rewind, and a token that was not drawn, begin anew from there."""
    prompt, session = [1, 5, 9], model.session
    want = told(model, make_sampler(300, temperature=0), 30)
    sampler = make_sampler(300, temperature=0)
    for back in (1, 2, 5, 20):
        session.truncate(len(prompt) + 29 - back)
        for place in range(29 - back, 29):
            assert session.step(want[place], sampler) == want[place + 1]
    other = (want[3] + 1) % 300
    fresh = told(model, make_sampler(300, temperature=0), 5, [*prompt, *want[:3], other])
    session.truncate()
    session.prefill(prompt, sampler)
    for token in want[:3]:
        session.step(token, sampler)
    tokens = [session.step(other, sampler)]
    while len(tokens) < 5:
        tokens.append(session.step(tokens[-1], sampler))
    assert tokens == fresh


def test_the_end_of_the_context(model: Model) -> None:
    """The last steps of a full cache are those of a run that stops earlier; nothing is written beyond."""
    count = SHAPE.context - 3 + 1
    full = told(model, make_sampler(300, seed=2), count)
    assert len(model.session.tokens) == SHAPE.context
    with pytest.raises(numballama.ContextError):
        model.session.step(full[-1], make_sampler(300, seed=2))
    assert told(model, make_sampler(300, seed=2), count - 5) == full[:-5]
    logits = reference_logits(model, [1, 5, 9, *full[:-1]])
    told(model, make_sampler(300, seed=2), count)
    close(model.session.logits, logits[-1], "logits at the last place")


def test_another_sampler_mid_way(model: Model) -> None:
    want = told(model, make_sampler(300, temperature=0), 20)
    session = model.session
    for switch in (1, 2, 3, 7):
        second = make_sampler(300, temperature=0)
        told(model, make_sampler(300, seed=6), switch)
        session.truncate(3)
        tokens: list[Any] = want[:1]
        while len(tokens) < 20:
            tokens.append(session.step(tokens[-1], second))
        assert tokens == want


def test_streams_in_turns_and_ctrl_c(models: Path) -> None:
    """Each stream takes the cache over from the other; one that is given up leaves no trace."""
    with compiled_story(models, "stories260K", kv_dtype="f32") as model:
        prompts = "Once upon a time", "The little dog"
        want = [[piece.token for piece in model.stream(prompt, max_tokens=30, seed=3)] for prompt in prompts]
        streams = [model.stream(prompt, max_tokens=30, seed=3) for prompt in prompts]
        got: list[list[int]] = [[], []]
        for _ in range(10):
            for which, stream in enumerate(streams):
                got[which] += [next(stream).token for _ in range(3)]
        assert got == want
        for after in (1, 2, 7):
            stream = model.stream(prompts[0], max_tokens=30, seed=3)
            for _ in range(after):
                next(stream)
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
            assert [piece.token for piece in model.stream(prompts[1], max_tokens=30, seed=3)] == want[1]


def test_an_interrupt_while_a_token_is_awaited(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled_story(models, "stories260K", kv_dtype="f32") as model:
        want = model.generate("Once upon a time", max_tokens=40, temperature=0)
        awaited, left = cuda.CudaProgram._await, [12]

        def interrupted(program: Any, number: int) -> int:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return awaited(program, number)

        monkeypatch.setattr(cuda.CudaProgram, "_await", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            model.generate("Once upon a time", max_tokens=40, temperature=0)
        assert want.startswith(caught.value.text) and caught.value.text  # type: ignore[attr-defined]
        assert model.generate("Once upon a time", max_tokens=40, temperature=0) == want


# Memory and devices


@pytest.fixture
def card() -> driver.Device:
    gc.collect()
    device = driver.Device("cuda")
    device.make_current()
    return device


def test_close_gives_the_memory_back(card: driver.Device, tmp_path: Path) -> None:
    """By the driver's own figure, at once."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(1024, 4096, 4, 8, 8, 8192, 2048))
    numballama.compile(path, device="cuda", context=16).close()  # what the driver keeps for good, it has now
    gc.collect()
    before = card.free_bytes
    model = numballama.compile(path, device="cuda", kv_dtype="f32")
    taken = before - card.free_bytes
    assert taken >= model._checkpoint.nbytes + model.kv.nbytes
    assert abs(taken - model._backend.memory_bytes) < 16 << 20
    model.close()
    assert before - card.free_bytes < SLACK


@pytest.mark.parametrize(("owner", "name"), [(cuda.CudaBackend, "prepare"), (cuda.CudaBackend, "program"),
                                             (driver.Device, "write"), (driver.Function, "__init__")])  # fmt: skip
def test_an_exception_gives_the_memory_back(
    card: driver.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """At once, while its traceback still holds every object: a notebook keeps it."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(1024, 4096, 4, 8, 8, 8192, 512))
    numballama.compile(path, device="cuda", context=16).close()
    gc.collect()
    before, left, method = card.free_bytes, [4 if name != "prepare" else 1], getattr(owner, name)
    if name == "program":
        left = [2]

    def failing(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise MemoryError("a test's")
        return method(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(MemoryError, match="a test's") as caught:
            numballama.compile(path, device="cuda")
    assert before - card.free_bytes < SLACK
    assert caught.value is not None
    with numballama.compile(path, device="cuda") as model:
        assert np.isfinite(model.logits([1, 2])).all()


def test_a_hundred_models_one_after_the_other(card: driver.Device, tmp_path: Path) -> None:
    """The driver keeps some MB for good now and then; what models left behind would grow all the time."""
    path, _ = save(tmp_path, "llama2c-v0", SHAPE)
    want, free = None, []
    for turn in range(100):
        with numballama.compile(path, device="cuda") as model:
            logits = model.logits([1, 2, 3])
            model.session.prefill([1, 2, 3], make_sampler(300, seed=1))
        want = logits if want is None else want
        np.testing.assert_array_equal(logits, want)
        if turn % 19 == 4:
            gc.collect()
            free.append(card.free_bytes)
    taken = -np.diff(free)
    assert len(taken) == 5 and np.median(taken) <= 0, f"bytes in every 19 models: {taken}"
    assert taken.sum() < 4 * SLACK


def test_a_cell_that_is_run_again_and_again(card: driver.Device, tmp_path: Path) -> None:
    """`model = compile(…)`, never closed: the model before goes when its name is taken, or with the next collection."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(512, 1024, 2, 8, 8, 4096, 512))
    for turn in range(12):
        model = numballama.compile(path, device="cuda")
        assert model.logits([1]).shape == (1, 4096)
        if turn == 1:
            gc.collect()
            before = card.free_bytes
    gc.collect()
    assert before - card.free_bytes < SLACK
    model.close()


def test_running_takes_no_memory(card: driver.Device, model: Model) -> None:
    told(model, make_sampler(300, seed=1), 5)
    told(model, make_sampler(300, temperature=0), 5)
    before = card.free_bytes
    told(model, make_sampler(300, seed=2), 60)
    told(model, make_sampler(300, temperature=0), 60)
    assert card.free_bytes == before


def test_a_token_is_one_launch(model: Model) -> None:
    for sampler in (make_sampler(300, seed=1), make_sampler(300, temperature=0)):
        told(model, sampler, 10)
        before, steps = model._decode.entries, 50
        tokens = told(model, sampler, steps)
        assert len(tokens) == steps
        assert model._decode.entries - before <= steps + cuda.AHEAD


@pytest.mark.parametrize("device", ["cuda:99", "cuda:", "cuda:x", "cuda:-1", "cudax"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(DeviceError):
        numballama.compile(None, device=device)


def test_a_model_that_does_not_fit(card: driver.Device, tmp_path: Path) -> None:
    """It is said before anything is computed, and nothing of it stays."""
    path, _ = save(tmp_path, "llama2c-v0", ModelConfig(64, 64, 1, 32, 32, 64, 64))
    before, needed = card.free_bytes, 2 * 64 * 2  # bytes of keys and values of a token
    with pytest.raises(DeviceError, match=r"KV cache takes .* are free"):
        numballama.compile(path, device="cuda", context=2 * card.total_bytes // needed)
    assert before - card.free_bytes < SLACK


# For compute-sanitizer: every kernel once


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fusions", [False, True])
def test_sanitize_models(kind: str, fusions: bool) -> None:
    config = ModelConfig(64, 96, 1, 4, 2, 77, 40, qkv_bias=not fusions, qk_norm=not fusions)
    pair = Pair(config, kind, "f32" if kind == "f32" else "f16", sequences=2)
    check_runs(pair, [5, 1, 8, 1], 8, fusions)
    # tensor cores take 16-bit activations; of those of bfloat16 eight bits count
    check_whole_runs(pair, [20, 1], 20, fusions, {"f32": SHARE, "bf16": 2**-6}.get(kind, 2**-8))
    pair.close()


def test_sanitize_other_shapes() -> None:
    """Odd sizes, heads of six numbers, int8 activations, a context in parts."""
    for config, kind, kv, int8 in (
        (ModelConfig(18, 7, 1, 3, 1, 11, 8, tied_embeddings=False), "f16", "bf16", False),
        (ModelConfig(64, 32, 1, 4, 4, 33, 8), "int8", "f32", True),
    ):
        pair = Pair(config, kind, kv, group=16, int8_activations=int8)
        check_runs(pair, [3, 1], 4, True)
        pair.close()
    pair = Pair(ModelConfig(32, 16, 1, 4, 2, 20, 600), "f32", "f16")
    program, reference = pair.programs(1)
    fill_cache(pair, program)
    run_checked(program, reference, [1], 590, 0, False)
    pair.close()


def test_sanitize_sampling(bench: Bench) -> None:
    check_draws(bench, LOGITS, times=2, seed=1)
    check_draws(bench, LOGITS, times=1, seed=1, top_k=0, top_p=0.8)
    check_draws(bench, LOGITS, times=2, seed=1, repeat_penalty=1.3, top_k=0, top_p=1.0, min_p=0.1)
    pair = Pair(ModelConfig(16, 16, 1, 2, 1, 40, 12))
    (decode, _), (prompt, _) = pair.programs(1), pair.programs(2)
    for sampler in (make_sampler(40, seed=1), make_sampler(40, temperature=0)):
        session = Session(decode, prompt, 12, 40)
        token = session.prefill([1, 2], sampler)
        for _ in range(5):
            token = session.step(int(token or 0), sampler)
    pair.close()
