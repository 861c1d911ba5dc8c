"""The step table. Jobs of worker threads: test_workers. Whole runs in processes of their own: test_threads."""

from __future__ import annotations

import numpy as np

from numballama.cpu.executor import ADDRESS, MAX_TOKENS, OPERANDS
from numballama.ir import Graph
from tests.helpers.bounds import compiled, cpu_backend


def test_a_row_of_the_step_table() -> None:
    graph = Graph("one")
    x = graph.input("x", (5, 8), "f32")
    graph.outputs = [graph.add("softmax", graph.input("s", (5, 2, 8), "f32"), out="p").name]
    graph.add("add", x, x, out="y")
    program = compiled(cpu_backend(), graph)
    row = program.table[1]
    assert row[ADDRESS] != 0 and row[MAX_TOKENS] == 5
    x_address, y_address = program.value("x").ctypes.data, program.value("y").ctypes.data
    assert row[OPERANDS:].tolist()[:9] == [x_address, 5, 8, x_address, 5, 8, y_address, 5, 8]
    assert not row[OPERANDS + 9 :].any() and program.table.dtype == np.int64
