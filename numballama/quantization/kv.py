"""Types of the KV cache in NumPy: what a float32 becomes when it is written, and what a cache's memory holds."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..memory import ceil_div, round_up
from .activations import quantize_activations
from .convert import from_bf16, from_f16, to_bf16, to_f16
from .types import KV_BLOCK, KVType

Floats = npt.NDArray[np.float32]


def split_q8_0(
    memory: npt.NDArray[np.uint8], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]:
    """The quants, in the cache's shape, and the float16 scales [.., blocks of a row] in the memory of a q8_0 cache."""
    count = math.prod(shape)
    scales = memory[count:].view(np.uint16).reshape(*shape[:-1], ceil_div(shape[-1], KV_BLOCK))
    return memory[:count].view(np.int8).reshape(shape), scales


def _of_elements(scales: Floats, columns: int) -> Floats:
    """Scales of blocks [.., blocks] repeated for the elements [.., columns] of a row."""
    return np.repeat(scales, KV_BLOCK, axis=-1)[..., :columns]


def stored(memory: npt.NDArray[np.generic], shape: tuple[int, ...], dtype: KVType) -> Floats:
    """What a cache's memory holds, float32 in the cache's shape."""
    if dtype == "q8_0":
        quants, scales = split_q8_0(memory.reshape(-1).view(np.uint8), shape)
        return np.multiply(quants, _of_elements(from_f16(scales), shape[-1]), dtype=np.float32)
    if dtype == "f32":
        return memory.astype(np.float32).reshape(shape)
    return (from_f16 if dtype == "f16" else from_bf16)(memory.view(np.uint16).reshape(shape))


def has_largest_f16(values: npt.NDArray[np.generic]) -> bool:
    """Whether values of a float16 cache, its bits or float32, hold ±65,504: what is beyond float16 became that."""
    if values.dtype == np.uint16:
        return bool(((values.view(np.uint16) & 0x7FFF) == 0x7BFF).any())
    return bool((np.abs(values.astype(np.float32)) == 65504).any())


def round_to(x: Floats, dtype: KVType) -> Floats:
    """Float32 [.., head_dim] as a cache of this type holds them. Finite numbers stay finite: what is beyond the type
    becomes its largest number.

    q8_0 is ggml's quantize_row_q8_0 with a float16 scale. A block with NaN or infinity becomes NaN.
    """
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "f16":
        return from_f16(to_f16(x))
    if dtype == "bf16":
        return from_bf16(to_bf16(x))
    if dtype == "q8_0":
        columns = x.shape[-1]
        padded = np.zeros((x.size // columns, round_up(columns, KV_BLOCK)), np.float32)  # zeros change no scale
        padded[:, :columns] = x.reshape(-1, columns)
        quants, scales, _ = quantize_activations("q8_0", padded)
        factors = _of_elements(from_f16(to_f16(scales)), columns)
        return np.multiply(quants[:, :columns], factors, dtype=np.float32).reshape(x.shape)
    return x
