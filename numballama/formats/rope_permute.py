"""RoPE's two pairings as one permutation of rows: what a writer does for a format that implies the other one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..config import INTERLEAVED, ModelConfig


def row_order(config: ModelConfig, name: str, pairing: str) -> npt.NDArray[np.int64] | None:
    """The rows of weight `name` in the order that `pairing` wants them in; None where they stay.

    Queries and keys are turned, so their projections, biases and norms are affected. Interleaved: dimension i of a
    head's first half and of its second become neighbours. A row moves whole, whatever its type.
    """
    heads = {"wq": config.n_heads, "bq": config.n_heads, "wk": config.n_kv_heads, "bk": config.n_kv_heads}
    heads |= {"q_norm": 1, "k_norm": 1}
    if pairing == config.rope_pairing or (count := heads.get(name.rpartition(".")[2])) is None:
        return None
    shape = (count, 2, -1) if pairing == INTERLEAVED else (count, -1, 2)
    order: npt.NDArray[np.int64] = np.arange(count * config.head_dim).reshape(shape).swapaxes(1, 2).reshape(-1)
    return order
