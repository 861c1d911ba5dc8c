"""Which weights are converted, to which type and how, when a model is compiled with `dtype=…` or exported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from .. import memory, progress
from ..checkpoint import Weight
from ..config import ModelConfig
from ..errors import Error
from .convert import DEFAULT_GROUP, convert
from .types import FALLBACK_TYPE, TYPE_TRAITS, WeightType

Dtype = Literal["f32", "f16", "bf16", "int8", "q8_0", "q4_0"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""Values of `dtype=` and `--dtype`."""

MIXTURES = ("q4_k", "q5_k", "q6_k")
"""Types of exports that are mixtures, as llama.cpp's Q4_K_M, Q5_K_M and Q6_K."""
_ODD_ROWS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""The type of a mixture → that of a matrix whose rows are not whole blocks of 256, as in llama.cpp."""


def weight_type(dtype: str, name: str, columns: int) -> WeightType:
    """The type of weight `name`, with rows of `columns` elements, for a user's `dtype`. Int8 groups divide rows if
    possible, which is faster.

    Raises `Error` if the rows are not whole blocks.
    """
    if dtype == "int8":
        groups = (DEFAULT_GROUP, DEFAULT_GROUP // 2)
        return WeightType("int8", next((group for group in groups if columns % group == 0), DEFAULT_GROUP))
    if columns % (block := TYPE_TRAITS[dtype].block_size):
        raise Error(
            f"{name} cannot become {dtype}: its rows of {columns} elements are not a whole number of blocks of "
            f"{block}; int8 takes any rows"
        )
    return WeightType(dtype)


def mixture_type(mixture: str, config: ModelConfig, name: str, columns: int) -> WeightType:
    """The type of weight `name`, with rows of `columns` elements, in a mixture: the rules of llama.cpp's Q4_K_M, Q5_K_M
    and Q6_K. The classifier is q6_k, and so are wv and w2 (attn_v and ffn_down in llama.cpp) in half of the layers.
    """
    classifier = "tok_embeddings" if config.tied_embeddings else "output"
    parts = name.split(".")
    if name == classifier or (parts[-1] in ("wv", "w2") and _has_more_bits(int(parts[1]), config.n_layers)):
        mixture = "q6_k"
    if columns % TYPE_TRAITS[mixture].block_size:
        mixture = _ODD_ROWS[mixture]
    return WeightType(mixture if columns % TYPE_TRAITS[mixture].block_size == 0 else "f16")


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def fallback_types(weights: Mapping[str, Weight]) -> dict[str, WeightType]:
    """Name → type to convert to, for the weights whose type has no kernels."""
    return {
        name: FALLBACK_TYPE[weight.type.name] for name, weight in weights.items() if weight.type.name in FALLBACK_TYPE
    }


def types_to_convert(
    config: ModelConfig, weights: Mapping[str, Weight], dtype: str | None, embeddings: bool = False
) -> dict[str, WeightType]:
    """Name → type to convert to, for the weights that a user's `dtype` applies to and that do not have it yet.

    These are the matrices of linear layers, and the embedding table if it is the classifier too or `embeddings` is
    set. Vectors stay float32. `dtype` None changes nothing.
    """
    if dtype is None:
        return {}
    types = {
        name: mixture_type(dtype, config, name, weight.shape[1])
        if dtype in MIXTURES
        else weight_type(dtype, name, weight.shape[1])
        for name, weight in weights.items()
        if len(weight.shape) == 2 and (name != "tok_embeddings" or config.tied_embeddings or embeddings)
    }
    return {name: kind for name, kind in types.items() if weights[name].type.name != kind.name}


def convert_weights(config: ModelConfig, weights: Mapping[str, Weight], dtype: Dtype | None) -> Mapping[str, Weight]:
    """The weights, with those of linear layers converted to `dtype`. A tied classifier converts the embedding too.

    Weights of a type that no backend has kernels for are converted in any case. Raises `Error` where the memory for the
    converted weights is missing.
    """
    targets = fallback_types(weights) | types_to_convert(config, weights, dtype)
    if not targets:
        return weights
    converted = dict(weights)
    what = dtype or ", ".join(dict.fromkeys(target.name for target in targets.values()))
    hint = "leave dtype= out to use the file's own types" if dtype else "use a file of another quantisation"
    size = sum(target.nbytes(math.prod(weights[name].shape)) for name, target in targets.items())
    memory.require_available(size, f"a copy of the linear weights as {what}", hint)
    with progress.progress_bar(f"converting to {what}") as report:
        for done, (name, target) in enumerate(targets.items()):
            report(name, done, len(targets))
            converted[name] = convert(weights[name], target)
    return converted
