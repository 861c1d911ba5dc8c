"""Real models on a GPU: texts and logits equal the reference's, and a large model's those of PyTorch."""

# ruff: noqa: E402
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import graph_of, require_gpu

require_gpu()

pytestmark = pytest.mark.gpu

import numballama
from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.cuda import backend as cuda
from numballama.graph import KVLayout
from numballama.quantization.convert import dequantize
from numballama.session import Session
from tests.cuda.checks import close
from tests.cuda.gpu import ROUNDED, compiled_story, greedy
from tests.helpers.bounds import as_weight, story_model


@pytest.mark.parametrize("dtype", [None, "f16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_greedy_tokens_and_logits_equal_the_reference(models: Path, name: str, dtype: str | None) -> None:
    oracle = story_model(models, name, device="reference", dtype=dtype)
    tokens = greedy(oracle)
    with compiled_story(models, name, dtype=dtype, kv_dtype="f32") as model:
        assert greedy(model) == tokens
        ids = [1, *tokens[:60]]
        want = oracle.logits(ids)
        with model.exclusive() as session:
            for place, token in enumerate(ids):
                session.step(token)
                close(session.logits, want[place], f"logits {place}", 1e-4)
        close(model.logits(ids), want, "logits of all", 1e-4 if dtype is None else ROUNDED)


@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_stories_begin_alike_with_a_cache_of_16_bits(models: Path, name: str) -> None:
    """The default: choices agree, except where the reference's two best logits are closer than rounding errors."""
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
        layout = KVLayout.of(config, 2048, kv)
        decode = backend.program(graph_of(config, weights, layout, 1))
        backend.set_pages(0, 0, range(1, layout.pages))
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
