"""Solutions of docs/course/03-tensors.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from numballama.ir import nbytes_of


def strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    found = [itemsize]
    for extent in reversed(shape[1:]):
        found.insert(0, found[0] * extent)
    return tuple(found)


def address(base: int, strides: Sequence[int], index: Sequence[int]) -> int:
    return base + sum(stride * i for stride, i in zip(strides, index, strict=True))


def test_1_any_number_of_dimensions() -> None:
    cache = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    assert strides(cache.shape, 4) == cache.strides
    for index in product(*map(range, cache.shape)):
        assert address(0, cache.strides, index) == 4 * cache[index]  # the elements are their own flat indices


def is_contiguous(shape: Sequence[int], steps: Sequence[int], itemsize: int) -> bool:
    """Dimensions of one element do not matter: nobody takes a step along them."""
    wanted = strides(shape, itemsize)
    return all(n == 1 or step == right for n, step, right in zip(shape, steps, wanted, strict=True))


def test_2_contiguous() -> None:
    a = np.zeros((3, 4), np.float32)
    views = {"a[1:]": a[1:], "a[:, 1:]": a[:, 1:], "a.T": a.T, "a[:1].T": a[:1].T}
    found = {name: is_contiguous(view.shape, view.strides, 4) for name, view in views.items()}
    assert found == {name: view.flags.c_contiguous for name, view in views.items()}
    assert found == {"a[1:]": True, "a[:, 1:]": False, "a.T": False, "a[:1].T": True}


def test_3_bytes() -> None:
    """A row of 40 elements has two scales: the second block is short and has a scale of its own."""
    rows = 3 * 4 * 32
    assert nbytes_of((3, 4, 32, 40), "q8_0") == rows * (40 + 2 * 2)
    assert nbytes_of((3, 4, 32, 64), "q8_0") * 8 == rows * 64 * 8.5
