"""Products of bytes where sums in 16 bits are nearest to their end: the largest quants with the largest activations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from numballama.checkpoint import Weight
from numballama.ir import Graph
from numballama.quantization.types import BLOCKS, TYPE_TRAITS, VEC_DOT_TYPE, WeightType
from numballama.reference import ReferenceBackend
from tests.helpers.bounds import compiled, cpu_backend

ONE = [1] * 4 + [0] * 4 + [1] * 4
"""`scales` of a q4_k block whose scales are 1 and whose minimums are 0."""


def extreme_weight(name: str, scales: list[list[int]]) -> Weight:
    """Five rows of 256 elements, whose quants all have the same bits; rows of K-quants have these `scales` in turn."""
    size, nbytes = BLOCKS[name]
    rows = []
    for i, byte in enumerate((0x00, 0xFF, 0x7F, 0x80, 0xF0)):
        block = np.full(nbytes, byte, np.uint8).view(TYPE_TRAITS[name].record)
        for field in {"d", "m", "dmin"} & set(block.dtype.names or ()):
            block[field] = np.float16(field != "m").view(np.uint16)
        if scales:
            block["scales"] = scales[i % len(scales)]
        rows.append(np.tile(block.view(np.uint8), 256 // size))
    return Weight((len(rows), 256), WeightType(name), np.array(rows))


def products(weight: Weight) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(product on the CPU, of the reference) with the largest activations: row by row, and by panels."""
    x = np.repeat(np.array([[127], [-127], [127], [-127], [1]], np.float32), 256, axis=1)
    x[2:4, ::2] *= -1
    graph, name = Graph("case"), weight.type.name
    rounded = graph.add(f"quantize_{VEC_DOT_TYPE[name]}", graph.input("x", x.shape, "f32"), out=("q", "s", "sums"))
    graph.add("linear", *rounded, graph.weight("w", weight.shape, name), out="y")
    graph.outputs = ["y"]
    wanted = ReferenceBackend({"w": weight}).program(graph)
    program = compiled(cpu_backend({"w": weight}), graph)
    for tokens in (1, 2, 4, 5):
        for one in (program, wanted):
            one.inputs["x"][:] = x
            one.run(tokens)
        yield program.value("y")[:tokens].copy(), wanted.value("y")[:tokens].copy()


LARGEST = {"q4_0": 8, "q4_1": 15, "q4_k": 15, "q5_k": 31, "q6_k": 32, "q8_0": 128}
"""Block type → the largest magnitude of an element whose scale is 1."""


@pytest.mark.parametrize("name", ["q4_0", pytest.param("q4_1", marks=pytest.mark.slow), "q4_k", "q5_k", "q6_k", "q8_0"])
def test_extreme_products_are_exact(name: str) -> None:
    """All quants are the same and largest or smallest, and so are all activations; scales are 1.

    Results are integers below 2^24, so float32 holds them exactly, in any order of sums.
    """
    scales = {"q4_k": [ONE], "q5_k": [ONE], "q6_k": [[1] * 16]}.get(name, [])
    for got, want in products(extreme_weight(name, scales)):
        np.testing.assert_array_equal(got, want)
    assert np.abs(want).max() >= 256 * 127 * LARGEST[name]


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_extreme_scales(name: str) -> None:
    """With the largest scales and minimums too nothing is cut off."""
    scales = [[127] * 16, [-128] * 16, [127, -128] * 8] if name == "q6_k" else [[255] * 12, [255] * 8 + [15] * 4]
    for got, want in products(extreme_weight(name, scales)):
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
    assert np.abs(want).max() >= 256 * 127 * (31 * 127 if name == "q6_k" else 15 * 63) * 0.9
