"""Random models of any shape, and the folder of real models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from numballama.checkpoint import Checkpoint, Weight
from numballama.config import ModelConfig, RopeScaling
from numballama.export import WRITERS
from numballama.graph import KVLayout, build
from numballama.quantization.types import F32
from numballama.reference import ReferenceBackend
from tests.helpers.paging import give_pages

SMALL = ModelConfig(24, 10, 2, 6, 2, 11, 7, tied_embeddings=False)

MODELS = Path(
    os.environ.get("NUMBALLAMA_TEST_MODELS", Path(__file__).resolve().parents[2] / ".." / "shared" / "models")
).resolve()


def random_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    """A checkpoint of that shape, all float32: norms near 1 and rows of about unit length keep activations near 1."""
    rng = np.random.default_rng(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
        return Weight(shape, F32, values + np.float32(name.endswith("norm")))

    weights = {name: weight(name, shape) for name, shape in config.weight_shapes().items()}
    return Checkpoint(path=Path("random"), format="random", config=config, weights=weights)


def reference_logits(config: ModelConfig, weights: Mapping[str, Weight], ids: Sequence[int]) -> np.ndarray:
    """Logits after each token, by the NumPy reference, in a cache just long enough."""
    kv = KVLayout.of(config, len(ids))
    graph = build(config, {n: w.type for n, w in weights.items()}, kv, len(ids), "all")
    backend = ReferenceBackend(weights)
    program = backend.program(graph)
    give_pages(backend, kv)
    for name, values in (("ids", ids), ("positions", range(len(ids))), ("sequences", 0)):
        program.inputs[name][:] = values
    program.run(len(ids))
    return program.value("logits")


def save(folder: Path, name: str, config: ModelConfig = SMALL, seed: int = 0) -> tuple[Path, Checkpoint]:
    """Write a random model of that shape in a format of `WRITERS`; returns the file and what was written."""
    source = random_checkpoint(config, seed)
    path = folder / f"{name}.bin"
    WRITERS[name](path, config, source.weights)
    return path, source


@st.composite
def configs(draw: st.DrawFn, biases: bool = False) -> ModelConfig:
    """Small shapes of every kind: one head or many, 1 to 8 queries per key, odd sizes, tied or not, biases if asked."""
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 8))
    return ModelConfig(
        dim=n_heads * 2 * draw(st.integers(1, 4)),
        hidden_dim=draw(st.integers(1, 40)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=draw(st.integers(1, 50)),
        context=draw(st.integers(1, 30)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=biases and draw(st.booleans()),
    )


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    """`configs` with what architectures of the family add, in any combination."""
    config = draw(configs(biases=True))
    factor, original = st.sampled_from([1.0, 2.5, 8.0]), st.sampled_from([4, 16, 8192])
    scaling = st.builds(RopeScaling, st.sampled_from(["linear", "dynamic"]), factor)
    scaling |= st.builds(RopeScaling, st.just("llama3"), factor, original_context=original)
    head_dim, attention = draw(st.sampled_from([config.head_dim + 2, 4, 6])), st.sampled_from([1.0, 0.7, 1.5])
    rest = {"original_context": original, "attention_factor": attention}
    scaling |= st.builds(RopeScaling, st.just("yarn"), factor, **rest, beta_slow=st.sampled_from([0.25, 1.0]))
    factors = st.tuples(*[st.sampled_from([1.0, 1.5, 4.0])] * (head_dim // 2))
    scaling |= st.builds(RopeScaling, st.just("longrope"), factors=factors, long_factors=factors, **rest)
    return replace(
        config,
        head_dim=head_dim,
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 2, 3, 8, 100])),
        rope_theta=draw(st.sampled_from([1e4, 50.0])),
        rope_scaling=draw(st.none() | scaling),
    )
