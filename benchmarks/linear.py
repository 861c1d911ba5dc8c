"""Time the linear operators on an NVIDIA GPU, alone: real shapes, types and numbers of tokens, beside the floor.

python benchmarks/linear.py [--shapes 4096x4096 …] [--types f16 q4_0 …] [--tokens 1 8 64 …] [--kernels gemv skinny gemm]

A measurement is a CUDA graph of the operator with several weights of the shape, one after the other, larger together
than the GPU's cache. It is replayed several times; the median is printed: microseconds, and the weights' bytes per
second. The weights' values are random bits, as speed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np

import numballama.cuda.ops  # noqa: F401 (registers the kernels)
from numballama import registry
from numballama.checkpoint import Weight
from numballama.cuda.compile_worker import compile_ahead
from numballama.cuda.compiler import compile_kernel
from numballama.cuda.driver import CudaGraph, Device, LoadedKernel, Memory, PreparedLaunch, Stopwatch
from numballama.cuda.launch import Array, Launch, LaunchContext, Matrix
from numballama.cuda.ops import linear
from numballama.cuda.weights import layout_of
from numballama.kernel_cache import cuda_cache_directory
from numballama.quantization.types import TYPE_TRAITS, WeightType

SHAPES = ["4096x4096", "12288x4096", "22016x4096", "4096x11008", "32000x4096", "2048x2048", "11264x2048", "2048x5632"]
TYPES = ["f16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k"]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128]
POOL_BYTES = 1 << 30
COUNT_BYTES = 400 << 20
"""Bytes of weights of a measurement, at least."""
ROUNDS = 7


def empty_weight(kind: str, rows: int, columns: int) -> Weight:
    """A weight whose layout is wanted, not its data."""
    traits = TYPE_TRAITS[kind]
    width = columns // traits.block_size * traits.block_bytes if traits.is_block else columns
    data = np.broadcast_to(np.zeros(1, traits.storage), (rows, width))
    scales = np.broadcast_to(np.zeros(1, np.float32), (rows * columns // 64,)) if kind == "int8" else None
    return Weight((rows, columns), WeightType(kind, 64 if kind == "int8" else 0), data, scales)


class Bench:
    """A GPU with a pool of memory that all weights lie in."""

    def __init__(self) -> None:
        self.device = Device()
        self.device.make_current()
        self.pool = Memory(self.device, POOL_BYTES, "weights")
        rng = np.random.default_rng(0)
        part = rng.standard_normal(1 << 24).astype(np.float16)
        for at in range(0, POOL_BYTES, part.nbytes):
            self.device.write(self.pool.address + at, part.ctypes.data, part.nbytes)
        self.device.synchronize()
        self.scratch = Memory(self.device, 1 << 30, "scratch")
        self.device.fill(self.scratch.address, 0, 1 << 30)
        self.loaded: dict[object, LoadedKernel] = {}
        self.watch = Stopwatch(self.device)
        self.owned: list[Memory] = []

    def array(self, values: np.ndarray, dtype: str) -> Array:
        memory = Memory(self.device, values.nbytes, "an operand")
        self.owned.append(memory)
        self.device.write(memory.address, values.ctypes.data, values.nbytes)
        self.device.synchronize()
        return Array(memory.address, values.shape, dtype)

    def zeros(self, count: int) -> Array:
        return self.array(np.zeros(count, np.int32), "i32")

    def launches(self, kind: str, shape: tuple[int, int], tokens: int, op: str) -> tuple[list[Launch], int, int]:
        """Launches of an operator with several weights, their bytes, and how often it is launched."""
        rows, columns = shape
        halves = 2 if op == "norm_gate_up" else 1
        layout = layout_of(empty_weight(kind, rows // halves, columns))
        count = max(halves, min(POOL_BYTES // layout.nbytes, -(-COUNT_BYTES // layout.nbytes))) // halves * halves
        weights = [layout.operand(self.pool.address + i * layout.nbytes) for i in range(count)]
        x = self.array(np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32), "f32")
        norm = self.array(np.ones(columns, np.float32), "f32")
        out = self.array(np.zeros((tokens, rows // halves), np.float32), "f32")
        counts, tiles = np.array([tokens], np.int32), np.zeros((1 + tokens, 2), np.int32)
        newer = self.device.capability >= (9, 0)
        ctx = LaunchContext(
            self.device.n_sms, self.device.shared_limit, self.array(counts, "i32"), self.array(tiles, "i32"),
            self.zeros, self.device.capability == (9, 0), newer,
        )  # fmt: skip
        types = ["f32", "f32", kind, kind] if halves == 2 else ["f32", kind]
        shapes = [x.shape, *([norm.shape] if halves == 2 else []), *[(rows // halves, columns)] * halves]
        found = registry.find(op, "cuda", types)
        (needed,) = found.scratch["workspace"](*shapes, workers=self.device.n_sms)
        workspace = Array(self.scratch.address, (needed,), "f32")
        assert workspace.nbytes <= self.scratch.nbytes
        made, nbytes = [], 0
        for i in range(0, count, halves):
            chosen = [w for w in weights[i : i + halves] if isinstance(w, Matrix)]
            nbytes += sum(w.nbytes for w in chosen)
            if halves == 2:
                made += linear.norm_gate_up(ctx, x, norm, chosen[0], chosen[1], out, workspace, 1e-5)
            else:
                made += linear.linear(ctx, x, chosen[0], out, workspace)
        return made, nbytes, count // halves

    def compile(self, launches: Sequence[Launch]) -> None:
        missing = [key for key in dict.fromkeys(launch.specialization for launch in launches) if key not in self.loaded]
        cache = cuda_cache_directory()
        ready = compile_ahead(missing, self.device.capability, cache)
        for i, key in enumerate(missing):
            code = ready.get(i) or compile_kernel(key, self.device.capability, cache)
            self.loaded[key] = LoadedKernel(self.device, code)

    def seconds(self, launches: Sequence[Launch]) -> float:
        """Median seconds of a replay."""
        self.compile(launches)
        graph = CudaGraph(
            self.device, [PreparedLaunch(self.device, self.loaded[one.specialization], one) for one in launches]
        )
        graph.replay()
        return statistics.median(self.watch.measure(graph.replay) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows and columns of a weight")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--op", default="linear", choices=["linear", "norm_gate_up"])
    parser.add_argument("--gemm-from", type=int, help="use the kernels for many tokens from this number on")
    arguments = parser.parse_args()
    if arguments.gemm_from is not None:
        linear.skinny.MOST = arguments.gemm_from - 1
    bench = Bench()
    cases = [
        (kind, shape, tokens) for kind in arguments.types for shape in arguments.shapes for tokens in arguments.tokens
    ]
    made = {}
    for kind, shape, tokens in cases:
        rows, columns = map(int, shape.split("x"))
        made[kind, shape, tokens] = bench.launches(kind, (rows, columns), tokens, arguments.op)
    bench.compile([launch for launches, _, _ in made.values() for launch in launches])
    print("us per operator (TB/s of weights) at", *arguments.tokens, "tokens")
    for kind in arguments.types:
        for shape in arguments.shapes:
            cells = []
            for tokens in arguments.tokens:
                launches, nbytes, count = made[kind, shape, tokens]
                seconds = bench.seconds(launches)
                cells.append(f"{1e6 * seconds / count:7.1f} ({nbytes / seconds / 1e12:4.2f})")
            print(f"{kind:5} {shape:12}", *cells, flush=True)


if __name__ == "__main__":
    main()
