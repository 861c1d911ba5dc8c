"""Storage types of weights: `TYPE_TRAITS` has every fact about them, and other tables are derived from it.

Names, ids, block layouts and field names are ggml's (`type_traits` in ggml.c, ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..memory import ceil_div


@dataclass(frozen=True)
class TypeTraits:
    """Facts about one storage type of weights."""

    name: str
    bits: int
    """Bits of a stored element, without scales."""
    block_size: int
    """Elements of a block. Rows are whole blocks."""
    record: np.dtype[Any]
    """One block in a file. `d`, `m` and `dmin` are float16 bits: the factor of the scales, the block's minimum, and the
    factor of the minimums."""
    gguf_id: int | None = None
    """Number of the type in a GGUF file."""
    ftype: int | None = None
    """`general.file_type` of a GGUF file whose matrices mostly have this type."""
    scale_group: int = 0
    """Elements that share a scale. 0: no scales or, for int8, see `WeightType.group`."""
    zero_point: int = 0
    """The unsigned quant that means 0: an element is scale · (quant - zero_point)."""
    has_min: bool = False
    """Each scale has a minimum beside it: an element is scale · quant + minimum."""
    codebook: tuple[int, ...] = ()
    """What the quants stand for, if not for themselves: an element is scale · codebook[quant]."""
    vec_dot_type: str | None = None
    """How int8 activations are quantised for a product with this type, a key of `ACTIVATION_QUANT`."""
    fallback: str | None = None
    """For a type without kernels: the type that a weight is converted to when a model is loaded."""

    @property
    def block_bytes(self) -> int:
        return self.record.itemsize

    @property
    def is_block(self) -> bool:
        """Whether scales lie in the data itself, as in GGUF's block types."""
        return self.record.names is not None

    @property
    def is_float(self) -> bool:
        return self.bits >= 16

    @property
    def storage(self) -> np.dtype[Any]:
        """Element type of `Weight.data`: blocks are bytes there."""
        return np.dtype(np.uint8) if self.is_block else self.record


def _block(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[Any]:
    return np.dtype(list(fields))


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Codebook of iq4_nl and iq4_xs: closer together near 0, where most weights are."""

TYPE_TRAITS: dict[str, TypeTraits] = {
    traits.name: traits
    for traits in (
        TypeTraits("f32", 32, 1, np.dtype("<f4"), gguf_id=0, ftype=0),
        TypeTraits("f16", 16, 1, np.dtype("<u2"), gguf_id=1, ftype=1),
        TypeTraits("bf16", 16, 1, np.dtype("<u2"), gguf_id=30, ftype=32),
        TypeTraits("int8", 8, 1, np.dtype("i1")),
        TypeTraits(
            "q8_0", 8, 32, _block(("d", "<u2"), ("qs", "i1", 32)),
            gguf_id=8, ftype=7, scale_group=32, vec_dot_type="q8_0",
        ),
        TypeTraits(
            "q4_0", 4, 32, _block(("d", "<u2"), ("qs", "u1", 16)),
            gguf_id=2, ftype=2, scale_group=32, zero_point=8, vec_dot_type="q8_0",
        ),
        TypeTraits(
            "q4_1", 4, 32, _block(("d", "<u2"), ("m", "<u2"), ("qs", "u1", 16)),
            gguf_id=3, ftype=3, scale_group=32, has_min=True, vec_dot_type="q8_1",
        ),
        TypeTraits(
            "q5_0", 5, 32, _block(("d", "<u2"), ("qh", "u1", 4), ("qs", "u1", 16)),
            gguf_id=6, ftype=8, scale_group=32, zero_point=16, vec_dot_type="q8_0",
            fallback="q8_0",  # holds the same values
        ),
        TypeTraits(
            "q5_1", 5, 32, _block(("d", "<u2"), ("m", "<u2"), ("qh", "u1", 4), ("qs", "u1", 16)),
            gguf_id=7, ftype=9, scale_group=32, has_min=True, vec_dot_type="q8_1", fallback="f16",
        ),
        TypeTraits(
            "q2_k", 2, 256, _block(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<u2"), ("dmin", "<u2")),
            gguf_id=10, ftype=10, scale_group=16, has_min=True, vec_dot_type="q8_k", fallback="f16",
        ),
        TypeTraits(
            "q3_k", 3, 256, _block(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<u2")),
            gguf_id=11, ftype=12, scale_group=16, zero_point=4, vec_dot_type="q8_k",
            fallback="q6_k",  # holds the same values
        ),
        TypeTraits(
            "q4_k", 4, 256, _block(("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qs", "u1", 128)),
            gguf_id=12, ftype=15, scale_group=32, has_min=True, vec_dot_type="q8_k",
        ),
        TypeTraits(
            "q5_k", 5, 256,
            _block(("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)),
            gguf_id=13, ftype=17, scale_group=32, has_min=True, vec_dot_type="q8_k",
        ),
        TypeTraits(
            "q6_k", 6, 256, _block(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<u2")),
            gguf_id=14, ftype=18, scale_group=16, zero_point=32, vec_dot_type="q8_k",
        ),
        TypeTraits(
            "iq4_nl", 4, 32, _block(("d", "<u2"), ("qs", "u1", 16)),
            gguf_id=20, ftype=25, scale_group=32, codebook=_IQ4, vec_dot_type="q8_0",
            fallback="q8_0",  # holds the same values
        ),
        TypeTraits(
            "iq4_xs", 4, 256, _block(("d", "<u2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)),
            gguf_id=23, ftype=30, scale_group=32, codebook=_IQ4, vec_dot_type="q8_k",
            fallback="q8_0",  # holds the same values but for a scale that is rounded, as float16 would round each value
        ),
    )
}  # fmt: skip
"""Name → facts of the types that a weight may have in memory: floats, int8 (llama2.c's groups) and GGUF's blocks."""


@dataclass(frozen=True)
class WeightType:
    """The storage type of a weight.

    `name` is a key of `TYPE_TRAITS`. `group` is for "int8" only, whose float32 scales are in a separate array: one for
    every `group` consecutive elements of the flat tensor. The last group may be short.
    """

    name: str
    group: int = 0

    def __str__(self) -> str:
        return f"{self.name}/{self.group}" if self.group else self.name

    @property
    def traits(self) -> TypeTraits:
        return TYPE_TRAITS[self.name]

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` elements, scales included."""
        scales = ceil_div(numel, self.group) if self.group else 0
        return numel // self.traits.block_size * self.traits.block_bytes + 4 * scales


F32 = WeightType("f32")
F16 = WeightType("f16")
BF16 = WeightType("bf16")
Q8_0 = WeightType("q8_0")
Q4_0 = WeightType("q4_0")
Q4_1 = WeightType("q4_1")
Q4_K = WeightType("q4_k")
Q5_K = WeightType("q5_k")
Q6_K = WeightType("q6_k")

LINEAR_TYPES = tuple(name for name, traits in TYPE_TRAITS.items() if not traits.fallback)
"""Types for which every backend has kernels."""

KVType = Literal["f32", "f16", "bf16", "q8_0"]
KV_TYPES: tuple[KVType, ...] = get_args(KVType)
"""Types of the KV cache."""
FLOAT_KV_TYPES = tuple(name for name in KV_TYPES if TYPE_TRAITS[name].is_float)
"""Those of them whose elements are stored one by one."""
KV_BLOCK = TYPE_TRAITS["q8_0"].block_size
"""Elements along head_dim that share a scale in a q8_0 cache. The last of a head may be fewer."""

ActivationType = Literal["f32", "int8"]
"""Types of the activations of linear layers."""

BLOCKS = {name: (traits.block_size, traits.block_bytes) for name, traits in TYPE_TRAITS.items() if traits.is_block}
"""GGUF's block types → (elements of a block, its bytes)."""

FALLBACK_TYPE = {name: WeightType(traits.fallback) for name, traits in TYPE_TRAITS.items() if traits.fallback}
"""Types without kernels → the type that such a weight is converted to when a model is loaded."""

VEC_DOT_TYPE = {
    name: traits.vec_dot_type for name, traits in TYPE_TRAITS.items() if traits.vec_dot_type and not traits.fallback
}
"""Block types with kernels for int8 activations → how these activations are quantised, as in llama.cpp."""


class ActivationQuant(NamedTuple):
    """A way to quantise activations to int8."""

    group: int
    """Elements that share a scale."""
    sum_group: int
    """Elements per sum."""
    sum_dtype: str
    """"i32": the sum of int8 quants; "f32": this sum times the group's scale, rounded to float16."""


ACTIVATION_QUANT = {
    "q8_0": ActivationQuant(32, 32, "i32"),
    "q8_1": ActivationQuant(32, 32, "f32"),
    "q8_k": ActivationQuant(256, 16, "i32"),
}
"""ggml's name of a type of quantised activations → its sizes."""
