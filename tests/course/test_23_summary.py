"""Solutions of docs/course/23-summary.md."""

from __future__ import annotations

import numpy as np
import pytest

import numballama
from numballama.checkpoint import Weight
from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.cpu import CpuBackend
from numballama.graph import KVLayout, build
from numballama.quantization.convert import dequantize
from numballama.quantization.types import F32
from numballama.reference import ReferenceBackend
from numballama.registry import kernel
from numballama.rope import rope_frequencies
from tests.course.story import checkpoint

TINY = ModelConfig(16, 24, 2, 4, 2, 40, 64)


def first_difference(weights: dict[str, Weight], ids: list[int]) -> str | None:
    """The first value that the CPU computes otherwise than the reference. Ops are run one by one, without fusion.

    A value's bytes are reused later, so each step is looked at as soon as it has run.
    """
    kv = KVLayout.of(TINY, 64)
    graph = build(TINY, dict.fromkeys(weights, F32), kv, tokens=len(ids), logits="all")
    programs = []
    for backend in (CpuBackend(weights), ReferenceBackend(weights)):
        program = backend.program(graph, False)  # type: ignore[attr-defined]
        backend.set_pages(0, 0, range(1, kv.pages))
        program.inputs["ids"][:], program.inputs["positions"][:] = ids, range(len(ids))
        programs.append(program)
    tested, reference = programs
    for index, op in enumerate(graph.ops):
        for program in programs:
            program.run(len(ids), index, index + 1, len(ids))
        for name in op.outputs:
            if graph.values[name].alias is None and not np.allclose(
                tested.value(name), reference.value(name), atol=1e-3
            ):
                return name
    return None


@pytest.mark.slow
def test_1_find_the_bug() -> None:
    rng = np.random.default_rng(0)
    weights = {
        name: Weight(shape, F32, rng.normal(len(shape) == 1, shape[-1] ** -0.5, shape).astype(np.float32))
        for name, shape in TINY.weight_shapes().items()
    }
    assert first_difference(weights, [3, 1, 4]) is None

    @kernel("swiglu", "cpu", "f32", "f32")
    def swiglu(worker, n_workers, tokens, gate, up, out):  # type: ignore[no-untyped-def]
        for t in range(worker, tokens, n_workers):
            for k in range(out.shape[1]):
                out[t, k] = gate[t, k] * up[t, k]

    assert first_difference(weights, [3, 1, 4]) == "layers.0.ffn_hidden"


class Framework:
    """A Llama in NumPy with a KV cache."""

    def __init__(self) -> None:
        self.config = checkpoint().config
        self.w = {name: dequantize(weight) for name, weight in checkpoint().weights.items()}
        self.frequencies = np.array(rope_frequencies(self.config, self.config.context))
        self.cache: dict[str, list[np.ndarray]] = {}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + self.config.norm_eps) * self.w[name]

    def rope(self, x: np.ndarray, position: int) -> np.ndarray:
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * position * self.frequencies)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def step(self, token: int, position: int) -> np.ndarray:
        c, w, x = self.config, self.w, self.w["tok_embeddings"][token]
        for layer in range(c.n_layers):
            p = f"layers.{layer}."
            h = self.norm(x, p + "attn_norm")
            q, k, v = ((w[p + name] @ h).reshape(-1, c.head_dim) for name in ("wq", "wk", "wv"))
            keys, values = self.cache.setdefault(p + "k", []), self.cache.setdefault(p + "v", [])
            keys.append(self.rope(k, position))
            values.append(v)
            shared = c.n_heads // c.n_kv_heads
            all_keys, all_values = (np.repeat(np.array(rows), shared, axis=1) for rows in (keys, values))
            scores = np.einsum("hd,phd->hp", self.rope(q, position), all_keys) / np.sqrt(c.head_dim)
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights = powers / powers.sum(axis=1, keepdims=True)
            x = x + w[p + "wo"] @ np.einsum("hp,phd->hd", weights, all_values).reshape(-1)
            h = self.norm(x, p + "ffn_norm")
            gate = w[p + "w1"] @ h
            x = x + w[p + "w2"] @ (gate / (1 + np.exp(-gate)) * (w[p + "w3"] @ h))
        return w["tok_embeddings"] @ self.norm(x, "norm")


@pytest.mark.slow
def test_2_your_own_framework() -> None:
    framework, tokenizer = Framework(), checkpoint().tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("The little dog")
    start = len(ids)
    for position in range(start + 11):
        logits = framework.step(ids[position], position)
        if position + 1 == len(ids):
            ids.append(int(logits.argmax()))
    with numballama.compile(None, device="cpu", context=64) as model:
        text = model.generate("The little dog", temperature=0, max_tokens=12)
    assert tokenizer.decode(ids) == f"The little dog{text}"


def floor(config: ModelConfig, weight_bytes: float, bandwidth: float, position: int = 0, kv_bytes: float = 2) -> float:
    """The most tokens per second for one sequence. Of an embedding that is not tied, one row is read."""
    layer = config.dim * (config.q_dim + 2 * config.kv_dim) + config.q_dim * config.dim
    layer += 3 * config.dim * config.hidden_dim
    weights = config.n_layers * layer + config.vocab_size * config.dim
    cache = 2 * config.n_layers * config.kv_dim * position
    return bandwidth / (weights * weight_bytes + cache * kv_bytes)


def test_3_the_floor() -> None:
    """The H200's memory has 4.8 TB/s by its data sheet; a copy reaches 4.1. The figures are README's."""
    measured = {
        ("TinyLlama-1.1B", 2.0): 1318, ("TinyLlama-1.1B", 8.5 / 8): 1606, ("TinyLlama-1.1B", 4.5 / 8): 2089,
        ("Llama-3.2-1B", 2.0): 1291, ("Llama-2-7B", 2.0): 290, ("Llama-2-7B", 8.5 / 8): 458,
    }  # fmt: skip
    for (name, weight_bytes), speed in measured.items():
        most = floor(NAMED_SHAPES[name], weight_bytes, 4.8e12)
        print(f"{name} {weight_bytes}: {speed / most:.0%}")
        assert speed < most
