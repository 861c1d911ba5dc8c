"""Which weights change their type, and to which, when a model is compiled with `dtype=…` or exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..checkpoint import LazyWeight, Weight
from ..config import ModelConfig
from ..errors import Error
from .convert import DEFAULT_GROUP, convert
from .types import FALLBACK_TYPE, TYPE_TRAITS, WeightType

DTYPES = ("f32", "f16", "bf16", "int8", "q8_0", "q4_0")
"""What `dtype` and `--quant` may be."""

Done = Callable[[str, Weight, Weight], None]
"""done(name, source, result), once a weight is converted"""


def weight_type(dtype: str, name: str, columns: int) -> WeightType:
    """The type of weight `name`, with rows of `columns` elements, for a user's `dtype`. Int8 groups divide rows if they
    can, which is faster.

    Raises `Error` if the rows are not whole blocks.
    """
    if dtype == "int8":
        groups = (DEFAULT_GROUP, DEFAULT_GROUP // 2)
        return WeightType("int8", next((group for group in groups if columns % group == 0), DEFAULT_GROUP))
    if columns % (block := TYPE_TRAITS[dtype].block_size):
        raise Error(
            f"{name} cannot become {dtype}: its rows of {columns} numbers are not a whole number of blocks of {block}; "
            "int8 takes any rows"
        )
    return WeightType(dtype)


def fallback_types(weights: Mapping[str, Weight]) -> dict[str, WeightType]:
    """Name → type to convert to, for the weights whose type has no kernels."""
    return {
        name: FALLBACK_TYPE[weight.type.name] for name, weight in weights.items() if weight.type.name in FALLBACK_TYPE
    }


def types_to_convert(
    config: ModelConfig, weights: Mapping[str, Weight], dtype: str | None, embeddings: bool = False
) -> dict[str, WeightType]:
    """Name → type to convert to, for the weights that a user's `dtype` concerns and that do not have it yet.

    These are the matrices of linear layers, and the embedding table if it is the classifier too or `embeddings` is
    set. Vectors stay float32. `dtype` None changes nothing.
    """
    if dtype is None:
        return {}
    return {
        name: weight_type(dtype, name, weight.shape[1])
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
            result = convert(whole, kind)
            self._done(name, whole, result)
            return result

        return LazyWeight(source.shape, kind, make)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
