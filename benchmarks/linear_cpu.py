"""Time the linear operator on the CPU, alone, on one core: GFLOP/s for types of weights and numbers of tokens.

python benchmarks/linear_cpu.py [--shape 5632x2048] [--types f32 q4_0 …] [--tokens 1 4 16 64] [--activations int8]

The time is the processor's for this thread, the least of several runs: other programs on the machine disturb it less
than the clock. Blocks are random bits.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from make_random import random_blocks

from numballama.checkpoint import Weight
from numballama.cpu.backend import CpuBackend, CpuProgram
from numballama.ir import Graph
from numballama.quantization.convert import convert
from numballama.quantization.types import BLOCKS, F32, VEC_DOT_TYPE, WeightType

SECONDS, RUNS = 0.7, 5
"""Least time of a measurement, in seconds, and least number of its runs."""


def random_weight(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Weight:
    """A weight of a type, with random elements."""
    if kind in BLOCKS:
        return random_blocks(kind, shape, rng)
    return convert(Weight(shape, F32, rng.standard_normal(shape, np.float32)), WeightType(kind))


def product(weight: Weight, tokens: int, int8: bool) -> tuple[CpuProgram, int]:
    """A program that multiplies, and the step that does it: with int8 activations it is the second."""
    graph, kind = Graph("product"), weight.type.name
    x = graph.input("x", (tokens, weight.shape[1]), "f32")
    inputs = graph.add(f"quantize_{VEC_DOT_TYPE[kind]}", x, out=("q", "s", "sums")) if int8 else (x,)
    graph.add("linear", *inputs, graph.weight("w", weight.shape, kind), out="y")
    graph.outputs = ["y"]
    program = CpuBackend({"w": weight}, threads=1).program(graph)
    program.inputs["x"][:] = np.random.default_rng(1).standard_normal((tokens, weight.shape[1]))
    program.run(tokens)
    return program, int(int8)


def seconds(program: CpuProgram, tokens: int, step: int) -> float:
    """The least processor time of a run."""
    times: list[float] = []
    while len(times) < RUNS or sum(times) < SECONDS:
        start = time.thread_time()
        program.run(tokens, step)
        times.append(time.thread_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="5632x2048", help="rows and columns of the weight")
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_1", "q4_k", "q6_k", "q8_0"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 16, 64])
    parser.add_argument("--activations", default="f32", choices=["f32", "int8"])
    options = parser.parse_args()
    rows, columns = map(int, options.shape.split("x"))
    print(f"GFLOP/s, {options.shape}, {options.activations} activations, at {options.tokens} tokens")
    for kind in options.types:
        weight = random_weight(kind, (rows, columns), np.random.default_rng(0))
        program, step = product(weight, max(options.tokens), options.activations == "int8")
        rates = [2e-9 * rows * columns * tokens / seconds(program, tokens, step) for tokens in options.tokens]
        print(f"{kind:5}", *(f"{rate:7.1f}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
