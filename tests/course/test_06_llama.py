"""Solutions of docs/course/06-llama.md."""

from __future__ import annotations

import dataclasses

import numpy as np

from numballama.config import NAMED_SHAPES
from numballama.graph import KVLayout
from numballama.rope import rope_frequencies


def test_1_grouped_query_attention() -> None:
    config = NAMED_SHAPES["Llama-3.2-1B"]
    nbytes = 2 * config.n_layers * config.kv_dim * 8192 * 2  # keys and values, float16
    assert nbytes == 256 << 20  # 256 MiB
    kv = KVLayout.of(config, 8192, "f16")
    assert kv.nbytes == nbytes + 2 * config.n_layers * config.kv_dim * kv.page * 2  # and page 0, for padding
    assert 2 * config.n_layers * dataclasses.replace(config, n_kv_heads=32).kv_dim * 8192 * 2 == 4 * nbytes


def test_2_where_is_the_work() -> None:
    c = NAMED_SHAPES["Llama-2-7B"]
    matrices = c.n_layers * (4 * c.dim * c.dim + 3 * c.dim * c.hidden_dim) + c.vocab_size * c.dim
    position = 2 * matrices / (4 * c.q_dim * c.n_layers)
    assert 25_000 < position < 25_500  # far beyond the context of 4,096 that it was trained for


def test_3_positions() -> None:
    config = NAMED_SHAPES["stories15M"]
    frequencies = np.array(rope_frequencies(config, config.context))
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, config.head_dim))

    def rope(x: np.ndarray, position: int) -> np.ndarray:
        turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)  # a rotation of each pair
        return np.stack([turned.real, turned.imag], axis=1).reshape(-1)

    scores = [rope(q, m) @ rope(k, m - 5) for m in (5, 6, 100, 255)]
    assert np.allclose(scores, scores[0])
    assert not np.isclose(rope(q, 6) @ rope(k, 0), scores[0])
