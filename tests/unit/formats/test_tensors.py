"""A tensor of a file as a weight: matrices are views, vectors become float32, other types are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from numballama.errors import UnsupportedError
from numballama.files import map_file
from numballama.formats.safetensors import WEIGHT_TYPES
from numballama.formats.tensors import TensorInfo, view_weight
from numballama.quantization.types import BF16, F32


def test_matrices_are_views_and_vectors_are_float32(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0x4000, 0xC000, 0x0000, 0x3F00, 0x4040], "<u2")
    (tmp_path / "data").write_bytes(b"head" + bits.tobytes())
    file = map_file(tmp_path / "data")
    matrix = view_weight(TensorInfo(file, "m", "BF16", (2, 3), 4, 12), (2, 3), WEIGHT_TYPES)
    assert (matrix.shape, matrix.type) == ((2, 3), BF16)
    assert not matrix.data.flags.owndata and not matrix.data.flags.writeable
    np.testing.assert_array_equal(matrix.data, bits.reshape(2, 3))
    vector = view_weight(TensorInfo(file, "v", "BF16", (6,), 4, 12), (6,), WEIGHT_TYPES)
    assert (vector.shape, vector.type) == ((6,), F32)
    np.testing.assert_array_equal(vector.data, [1, 2, -2, 0, 0.5, 3])


def test_other_types_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8))
    info = TensorInfo(map_file(tmp_path / "data"), "w", "I64", (1,), 0, 8)
    with pytest.raises(UnsupportedError, match="tensor w has type I64; supported are F32, F16, BF16"):
        view_weight(info, (1,), WEIGHT_TYPES)
