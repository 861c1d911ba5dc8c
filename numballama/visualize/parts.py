"""Which part of a model a weight or an op belongs to. Tables and drawings group by these parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..ir import Graph, Op

EMBEDDING, ATTENTION, FEED_FORWARD, CLASSIFIER, OTHER = "embedding", "attention", "feed-forward", "classifier", "other"
COMMUNICATION = "communication"
PARTS = (EMBEDDING, ATTENTION, FEED_FORWARD, CLASSIFIER, COMMUNICATION, OTHER)
"""In the order of a table. "other" is what belongs to no part, such as the angles of RoPE, which all layers share.
"communication" is what ranks that share a model exchange.
"""

EXCHANGES = ("all_reduce", "all_gather")
"""Ops in which ranks exchange values."""
_PART_OF = {
    "tok_embeddings": EMBEDDING,
    **dict.fromkeys(["attn_norm", "wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "q_norm", "k_norm"], ATTENTION),
    **dict.fromkeys(["ffn_norm", "w1", "w2", "w3", "b1", "b2", "b3"], FEED_FORWARD),
    **dict.fromkeys(("norm", "output"), CLASSIFIER),
}
"""Name of a weight, without its layer → its part. A table that is the classifier too counts as the embedding."""
_IN_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer of a value, by its name; None outside the layers."""
    found = _IN_LAYER.match(name)
    return None if found is None else int(found[1])


def short_name(name: str) -> str:
    """The name without its layer: "wq" for "layers.3.wq"."""
    return _IN_LAYER.sub("", name, count=1)


def part_of_weight(name: str) -> str:
    """The part of a weight, by its name."""
    return _PART_OF.get(short_name(name), OTHER)


def is_exchange(op: Op) -> bool:
    """Whether ranks exchange values in an op, or in one that is fused into it."""
    return op.kind in EXCHANGES or any(map(is_exchange, op.body))


def parts_of_ops(graph: Graph) -> list[str]:
    """The part of each op: that of its weights or, for an op without weights, of the last of its inputs' ops.

    What ranks exchange is communication. Outside the layers, what reads the embedding table by token ids is the
    embedding, and all that comes after the layers is the classifier.
    """
    made: dict[str, tuple[int, str]] = {}  # value → index and part of the op that computes it
    parts: list[str] = []
    seen_layer = False
    for index, op in enumerate(graph.ops):
        layer = layer_of(op.outputs[0])
        seen_layer |= layer is not None
        if layer is None:
            part = EMBEDDING if op.kind == "embedding" else CLASSIFIER if seen_layer else OTHER
        else:
            part = _part_in_layer(graph, op, layer, made)
        parts.append(COMMUNICATION if is_exchange(op) else part)
        made |= dict.fromkeys(op.outputs, (index, part))
    return parts


def _part_in_layer(graph: Graph, op: Op, layer: int, made: dict[str, tuple[int, str]]) -> str:
    weights = [part_of_weight(name) for name in op.inputs if graph.values[name].kind == "weight"]
    if weights:
        return weights[0]
    inputs = [made[name] for name in op.inputs if name in made and layer_of(name) == layer]
    return max(inputs)[1] if inputs else OTHER


@dataclass
class PartBytes:
    """The weights of one part: number of parameters, and bytes by type."""

    part: str
    parameters: int = 0
    types: dict[str, int] = field(default_factory=dict)
    label: str = ""
    """What a table calls it, if not by the part's name."""

    @property
    def nbytes(self) -> int:
        return sum(self.types.values())


def bytes_by_part(weights: Iterable[tuple[str, str, tuple[int, ...], int]], tied: bool) -> list[PartBytes]:
    """The parts that have weights, in the order of `PARTS`. A weight is (name, type, shape, bytes).

    `tied`: the embedding table is the classifier too.
    """
    parts = {part: PartBytes(part) for part in PARTS}
    if tied:
        parts[EMBEDDING].label = "embedding, classifier"
        parts[CLASSIFIER].label = "last norm"
    for name, kind, shape, nbytes in weights:
        part = parts[part_of_weight(name)]
        part.parameters += math.prod(shape)
        part.types[kind] = part.types.get(kind, 0) + nbytes
    return [part for part in parts.values() if part.parameters]
