"""Position and type of a tensor in a file, and a weight that is a view of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..checkpoint import LazyWeight, Weight
from ..errors import FormatError, UnsupportedError
from ..files import MappedFile
from ..quantization.convert import convert
from ..quantization.types import F32, WeightType


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: `nbytes` bytes from byte `offset`, in C order if it has no `strides`. `type` is the format's
    name of it.
    """

    file: MappedFile
    name: str
    type: str
    shape: tuple[int, ...]
    """Outermost dimension first."""
    offset: int
    nbytes: int
    strides: tuple[int, ...] = ()
    """Elements from one index to the next, for each dimension, of a tensor in another order."""

    def wrong_shape(self, expected: object) -> FormatError:
        """The error for a tensor whose shape is not the one that the model's config asks for."""
        where = f"tensor {self.name}"
        return FormatError(
            "a tensor has the wrong shape", path=self.file.path, where=where, expected=expected, found=self.shape
        )


def view_weight(
    info: TensorInfo, shape: tuple[int, ...], types: Mapping[str, tuple[WeightType, type[np.generic] | np.dtype[Any]]]
) -> Weight:
    """The tensor as a weight of `shape`: a matrix as a view of the file, a vector, which is small, as float32.

    float64, which no kernel computes with, becomes float32 when the data is asked for, and a matrix in another order is
    copied then. `types` maps the types of the format to ours and to the elements in the file. Raises
    `UnsupportedError` for a type that is not among them.
    """
    if info.type not in types:
        raise UnsupportedError(
            f"{info.file.path}: tensor {info.name[:100]} has type {info.type}; supported are {', '.join(types)}"
        )
    kind, element = types[info.type]
    data = np.frombuffer(info.file.data, element, info.nbytes // np.dtype(element).itemsize, info.offset)
    if info.strides:
        data = as_strided(data, shape, [stride * data.itemsize for stride in info.strides], writeable=False)
    elif len(shape) == 2:
        data = data.reshape(shape[0], -1)
    if element is np.float64:
        return LazyWeight(shape, F32, lambda: _narrowed(data, shape), cache=True)
    if info.strides and len(shape) == 2:
        return LazyWeight(shape, kind, lambda: Weight(shape, kind, np.ascontiguousarray(data)), cache=True)
    weight = Weight(shape, kind, np.ascontiguousarray(data) if info.strides else data)
    return weight if len(shape) == 2 else convert(weight, F32)


def _narrowed(data: npt.NDArray[np.float64], shape: tuple[int, ...]) -> Weight:
    with np.errstate(over="ignore", invalid="ignore"):  # values that float32 does not have become infinite
        return Weight(shape, F32, data.astype(np.float32, order="C"))
