"""Products of bytes where sums in 16 bits are nearest to their end: the largest quants with the largest activations."""

from __future__ import annotations

import numpy as np
import pytest

from numballama.checkpoint import Weight
from numballama.ir import Graph
from numballama.quantization.types import BLOCKS, TYPE_TRAITS, VEC_DOT_TYPE, WeightType
from numballama.reference import ReferenceBackend
from tests.helpers.bounds import compiled, cpu_backend


@pytest.mark.parametrize("name", [pytest.param("q4_1", marks=pytest.mark.slow), "q6_k", "q8_0"])
def test_extreme_products_are_exact(name: str) -> None:
    """All quants are the same and largest or smallest, and so are all activations; scales are 1.

    Results are integers below 2^24, so float32 holds them exactly, in any order of sums.
    """
    size, nbytes = BLOCKS[name]
    rows = []
    for byte in (0x00, 0xFF, 0x7F, 0x80):
        block = np.full(nbytes, byte, np.uint8).view(TYPE_TRAITS[name].record)
        block["d"] = np.float16(1).view(np.uint16)
        if name == "q4_1":
            block["m"] = 0
        if name == "q6_k":
            block["scales"] = 1
        rows.append(np.tile(block.view(np.uint8), 256 // size))
    weight = Weight((len(rows), 256), WeightType(name), np.array(rows))
    x = np.repeat(np.array([[127], [-127], [127], [-127], [1]], np.float32), 256, axis=1)
    x[2:4, ::2] *= -1
    graph = Graph("case")
    rounded = graph.add(f"quantize_{VEC_DOT_TYPE[name]}", graph.input("x", x.shape, "f32"), out=("q", "s", "sums"))
    graph.add("linear", *rounded, graph.weight("w", weight.shape, name), out="y")
    graph.outputs = ["y"]
    wanted = ReferenceBackend({"w": weight}).program(graph)
    program = compiled(cpu_backend({"w": weight}), graph)
    for tokens in (1, 5):  # a row at a time, and by panels
        for one in (program, wanted):
            one.inputs["x"][:] = x
            one.run(tokens)
        np.testing.assert_array_equal(program.value("y")[:tokens], wanted.value("y")[:tokens])
    assert np.abs(wanted.value("y")).max() >= 256 * 127 * (15 if name == "q4_1" else 31)
