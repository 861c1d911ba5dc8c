"""Which weights a request for another type is about, and their conversion: `compile(dtype=…)` and `export` share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..checkpoint import LazyWeight, Weight
from ..config import ModelConfig
from ..errors import Error
from . import convert as quant
from .types import BLOCKS, FALLBACK_TYPE, WeightType

TYPES = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0")
"""Names that `dtype` and `--quant` may be."""

Done = Callable[[str, Weight, Weight], None]
"""done(name, source, result), once a weight is converted"""


def target(dtype: str, name: str, columns: int) -> WeightType:
    """The weight type that a dtype means for rows of this length: int8 groups that fill a row are faster.

    Raises `Error` where blocks do not.
    """
    if dtype in BLOCKS and columns % (block := BLOCKS[dtype][0]):
        raise Error(
            f"{name} cannot become {dtype}: its rows of {columns} numbers are no whole number of blocks of {block}; "
            "int8 takes any rows"
        )
    if dtype != "int8":
        return WeightType(dtype)
    groups = (quant.DEFAULT_GROUP, quant.DEFAULT_GROUP // 2)
    return WeightType("int8", next((g for g in groups if columns % g == 0), quant.DEFAULT_GROUP))


def runnable(weights: Mapping[str, Weight]) -> dict[str, WeightType]:
    """Name → type of the weights that no backend runs as they are."""
    return {
        name: FALLBACK_TYPE[kind] for name, weight in weights.items() if (kind := weight.type.name) in FALLBACK_TYPE
    }


def targets(
    config: ModelConfig, weights: Mapping[str, Weight], dtype: str | None, embeddings: bool = False
) -> dict[str, WeightType]:
    """Name → type of the weights that `dtype` changes: those of linear layers, the embedding if it is the classifier
    as well or `embeddings` asks for it. Vectors stay float32; None changes nothing.
    """
    if dtype is None:
        return {}
    return {
        name: target(dtype, name, weight.shape[1])
        for name, weight in weights.items()
        if len(weight.shape) == 2
        and (name != "tok_embeddings" or config.tied_embeddings or embeddings)
        and weight.type.name != dtype
    }


class Converting(Mapping[str, Weight]):
    """Weights of which some are converted when a writer asks for their numbers, one at a time: never all in memory.

    `done` is called for every matrix whose numbers were asked for.
    """

    def __init__(self, weights: Mapping[str, Weight], types: Mapping[str, WeightType], done: Done) -> None:
        self._weights, self._types, self._done = weights, types, done

    def __getitem__(self, name: str) -> Weight:
        source = self._weights[name]
        kind = self._types.get(name, source.type)
        if len(source.shape) != 2:
            return source

        def make() -> Weight:
            whole = source.make() if isinstance(source, LazyWeight) else source
            result = quant.convert(whole, kind)
            self._done(name, whole, result)
            return result

        return LazyWeight(source.shape, kind, make)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
