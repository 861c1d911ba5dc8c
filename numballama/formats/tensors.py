"""Position and type of a tensor in a file, and a weight that is a view of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import Weight
from ..errors import FormatError, UnsupportedError
from ..files import MappedFile
from ..quantization.convert import convert
from ..quantization.types import F32, WeightType


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file, in C order: `nbytes` bytes from byte `offset`. `type` is the format's name of it."""

    file: MappedFile
    name: str
    type: str
    shape: tuple[int, ...]
    """Outermost dimension first."""
    offset: int
    nbytes: int

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

    `types` maps the format's types to ours and to the elements of `Weight.data`. Raises `UnsupportedError` for a type
    that is not among them.
    """
    if info.type not in types:
        raise UnsupportedError(
            f"{info.file.path}: tensor {info.name[:100]} has type {info.type}; supported are {', '.join(types)}"
        )
    kind, element = types[info.type]
    data = np.frombuffer(info.file.data, element, info.nbytes // np.dtype(element).itemsize, info.offset)
    weight = Weight(shape, kind, data.reshape(shape[0], -1) if len(shape) == 2 else data)
    return weight if len(shape) == 2 else convert(weight, F32)
