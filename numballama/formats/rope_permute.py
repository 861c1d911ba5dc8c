"""Permutes rows of q and k from one RoPE pairing to the other, for formats that imply a pairing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..config import INTERLEAVED, ModelConfig


def row_order(config: ModelConfig, name: str, pairing: str) -> npt.NDArray[np.int64] | None:
    """Order of the rows of weight `name` for `pairing`: row i of the result is row order[i]. None if no row moves.

    Only projections, biases and norms of queries and keys change, because RoPE rotates these. From half-split to
    interleaved, dimension i of a head's first half and of its second half become neighbours.
    """
    heads = {"wq": config.n_heads, "bq": config.n_heads, "wk": config.n_kv_heads, "bk": config.n_kv_heads}
    heads |= {"q_norm": 1, "k_norm": 1}
    if pairing == config.rope_pairing or (count := heads.get(name.rpartition(".")[2])) is None:
        return None
    shape = (count, 2, -1) if pairing == INTERLEAVED else (count, -1, 2)
    order: npt.NDArray[np.int64] = np.arange(count * config.head_dim).reshape(shape).swapaxes(1, 2).reshape(-1)
    return order
