"""Solutions of docs/course/10-kv-cache.md."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.engine.pages import BlockManager
from numballama.graph import KVLayout


def cache_bytes(config: ModelConfig, tokens: int, dtype: str, page: int = 32) -> int:
    """q8_0 keeps a float16 scale for each 32 numbers of a head, or fewer at its end."""
    pages = 1 + -(-tokens // page)  # page 0 is for padding
    row = {"f32": 4 * config.head_dim, "f16": 2 * config.head_dim}.get(dtype, 0)
    row = row or config.head_dim + 2 * -(-config.head_dim // 32)
    return 2 * config.n_layers * pages * page * config.n_kv_heads * row


@pytest.mark.parametrize("name", ["stories15M", "TinyLlama-1.1B", "Llama-2-7B"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_1_bytes(name: str, dtype: str) -> None:
    config = NAMED_SHAPES[name]
    for tokens in (1, 32, 1000):
        assert cache_bytes(config, tokens, dtype) == KVLayout.of(config, tokens, dtype).nbytes  # type: ignore[arg-type]


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    powers = np.exp(keys @ q / np.sqrt(len(q)))
    return powers / powers.sum() @ values


def test_2_pages_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 70, 16))
    q = rng.standard_normal(16)
    cache = np.full((2, 10, 32, 16), np.nan)
    table = rng.permutation(np.arange(1, 10))[:3]
    for position in range(70):
        for which, source in enumerate((keys, values)):
            cache[which, table[position // 32], position % 32] = source[position]
    gathered = cache[:, table].reshape(2, 96, 16)[:, :70]  # pages in the sequence's order, one after the other
    assert np.array_equal(attend(q, keys, values), attend(q, *gathered))


def test_3_eviction() -> None:
    """The first text was used last, so the second one is forgotten."""
    pages = BlockManager[str](5, 4)
    first, second = list(range(8)), list(range(50, 58))
    for text in (first, second):
        mine, node = pages.allocate(2), pages.match("", text).node
        for number in range(2):
            node = pages.enter(mine[number], node, text[4 * number : 4 * number + 4], "me")
            pages.publish(mine[number])
        pages.release(mine)
    found = pages.match("", [*first, 99]).pages  # one more token: the last never counts
    assert len(found) == 2
    pages.share(found)
    pages.release(found)
    pages.allocate(2)
    assert pages.match("", [*first, 99]).pages == found
    assert pages.match("", [*second, 99]).pages == []
