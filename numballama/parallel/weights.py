"""The part of a weight that a rank has: its rows as a view of the file, its columns as a copy of no more than them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..checkpoint import LazyWeight, Weight
from ..config import ModelConfig
from ..errors import Error
from ..memory import ceil_div
from ..quantization.convert import convert
from ..quantization.types import WeightType
from .shares import Part, Shares


def part_type(weight: Weight, part: Part) -> WeightType:
    """The type of a part. Only an int8 weight whose groups are cut gets another: smaller groups, of the same values."""
    group = weight.type.group
    if not group or part.axis is None or len(weight.shape) < 2:
        return weight.type
    columns = weight.shape[1]
    if part.axis == 0:
        cut = part.begin * columns % group != 0
        return WeightType(weight.type.name, math.gcd(group, columns)) if cut else weight.type
    return WeightType(weight.type.name, math.gcd(group, columns, part.begin, part.end))


def part_of(weight: Weight, part: Part) -> Weight:
    """A rank's part of a weight. A weight that is computed when it is read stays so.

    Rows are a view. Columns are copied when `data` is read, and then kept: kernels want whole rows. Raises `Error` for
    columns that do not begin and end at a block.
    """
    if part.axis is None:
        return weight
    shape = (*weight.shape[: part.axis], part.end - part.begin, *weight.shape[part.axis + 1 :])
    block = weight.type.traits.block_size
    if part.axis == len(weight.shape) - 1 and (part.begin % block or part.end % block):
        raise Error(f"columns {part.begin} to {part.end} of {weight} are not whole blocks of {block}")
    made = part_type(weight, part)
    if part.axis == 0 and not isinstance(weight, LazyWeight) and made == weight.type:
        return _cut(weight, part, shape, made)
    return LazyWeight(shape, made, lambda: _cut(weight, part, shape, made), cache=True)


def _cut(weight: Weight, part: Part, shape: tuple[int, ...], made: WeightType) -> Weight:
    whole = weight.data
    if part.axis == 0:
        data = whole[part.begin : part.end]
    else:
        per_column = whole.shape[1] / weight.shape[1]  # elements of `data`: for blocks, bytes
        data = np.ascontiguousarray(whole[:, round(part.begin * per_column) : round(part.end * per_column)])
    return Weight(shape, made, data, _scales(weight, part, made.group))


def _scales(weight: Weight, part: Part, group: int) -> np.ndarray | None:
    """The scales of an int8 weight's part, one for each `group` elements: those of the whole, or repeated."""
    scales = weight.scales
    if scales is None:
        return None
    rows, columns = weight.shape
    if part.axis == 0 and group == weight.type.group:
        return scales[part.begin * columns // group : ceil_div(part.end * columns, group)]
    begin, end = (part.begin, part.end) if part.axis == 0 else (0, rows)
    first, last = (0, columns) if part.axis == 0 else (part.begin, part.end)
    # `group` divides the old one and each row: every element of a new group has one scale
    starts = np.arange(begin, end)[:, None] * columns + np.arange(first, last, group)
    return np.ascontiguousarray(scales[starts // weight.type.group].reshape(-1))


def converted(weights: Mapping[str, Weight], targets: Mapping[str, WeightType], shares: Shares) -> dict[str, Weight]:
    """The weights, those of `targets` converted when a rank reads its part. What ranks have whole is kept, no other."""

    def convert_later(name: str, weight: Weight, target: WeightType) -> Weight:
        whole = shares.part(name, 0).axis is None
        return LazyWeight(weight.shape, target, lambda: convert(weight, target), cache=whole)

    return {
        name: convert_later(name, weight, targets[name]) if name in targets else weight
        for name, weight in weights.items()
    }


def rank_weights(weights: Mapping[str, Weight], shares: Shares, rank: int) -> dict[str, Weight]:
    """What a rank has of each weight, under the names of its graph.

    A classifier that is tied to the embedding table is "output": rows of the table, of which every rank has all.
    """
    parts = {name: part_of(weight, shares.part(name, rank)) for name, weight in weights.items()}
    if shares.config.tied_embeddings:
        parts["output"] = part_of(weights["tok_embeddings"], shares.part("output", rank))
    return parts


def divided(
    config: ModelConfig, weights: Mapping[str, Weight], ranks: int, int8_activations: bool
) -> tuple[Shares, list[dict[str, Weight]]]:
    """Who has what, and the weights of each rank. Raises `UnsupportedError` for a model that cannot be split so."""
    types = {name: weight.type for name, weight in weights.items()}
    shares = Shares.of(config, types, ranks, int8_activations)
    return shares, [rank_weights(weights, shares, rank) for rank in range(ranks)]
