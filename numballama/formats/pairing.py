"""RoPE's two pairings as one permutation of rows: what a writer does for a format that implies the other one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..checkpoint import Weight
from ..config import INTERLEAVED, ModelConfig


def row_order(config: ModelConfig, name: str, pairing: str) -> npt.NDArray[np.int64] | None:
    """The rows of weight `name` in the order that `pairing` wants them in; None where they stay.

    Queries and keys are turned, so their projections, biases and norms are affected. Interleaved: dimension i of a
    head's first half and of its second become neighbours.
    """
    heads = {"wq": config.n_heads, "bq": config.n_heads, "wk": config.n_kv_heads, "bk": config.n_kv_heads}
    heads |= {"q_norm": 1, "k_norm": 1}
    if pairing == config.rope_pairing or (count := heads.get(name.rpartition(".")[2])) is None:
        return None
    shape = (count, 2, -1) if pairing == INTERLEAVED else (count, -1, 2)
    order: npt.NDArray[np.int64] = np.arange(count * config.head_dim).reshape(shape).swapaxes(1, 2).reshape(-1)
    return order


def reordered(config: ModelConfig, name: str, weight: Weight, pairing: str) -> Weight:
    """The weight for `pairing`: itself where nothing moves, else a copy, rows moved whole whatever their type.

    Rows must hold all of their numbers: int8 weights, whose scales lie beside, are converted first.
    """
    order = row_order(config, name, pairing)
    if order is None:
        return weight
    assert weight.scales is None
    return replace(weight, data=weight.data[order])
