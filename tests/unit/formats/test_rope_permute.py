"""Rows of q and k change their order between RoPE's pairings; all other rows stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig
from numballama.formats.rope_permute import row_order

CONFIG = ModelConfig(24, 16, 1, 4, 2, 40, 16, rope_pairing=HALF_SPLIT)


def test_the_order_by_hand() -> None:
    one_head = replace(CONFIG, dim=6, n_heads=1, n_kv_heads=1)
    order = row_order(one_head, "layers.0.wk", INTERLEAVED)
    assert order is not None and order.tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("name", ["wq", "wk", "bq", "bk", "q_norm", "k_norm"])
def test_there_and_back_is_the_identity(name: str) -> None:
    there = row_order(CONFIG, f"layers.0.{name}", INTERLEAVED)
    back = row_order(replace(CONFIG, rope_pairing=INTERLEAVED), f"layers.0.{name}", HALF_SPLIT)
    assert there is not None and back is not None
    assert not np.array_equal(there, np.arange(len(there)))
    np.testing.assert_array_equal(there[back], np.arange(len(there)))


@pytest.mark.parametrize("name", ["layers.0.wv", "layers.0.wo", "layers.0.attn_norm", "tok_embeddings", "norm"])
def test_other_rows_stay(name: str) -> None:
    assert row_order(CONFIG, name, INTERLEAVED) is None
    assert row_order(CONFIG, "layers.0.wq", HALF_SPLIT) is None
