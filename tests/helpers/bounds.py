"""Helpers for tests of kernels, models and the runtime: programs whose workers run one after the other, poisoned
memory, and the expected result of an op: the reference's value with a bound on the error of float32 arithmetic.

The bounds are those of rounding-error analysis (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3): a sum
of n products in any order is off by at most n·U·sum|a·b|, and a fused op's bound is carried through the ops it
replaced. So the tolerance of a comparison follows from its data; no number here is tuned to the results of a kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import numballama
from numballama.checkpoint import Weight
from numballama.cpu import backend as cpu
from numballama.cpu.backend import CpuBackend, CpuProgram
from numballama.cpu.compiler import compile_step
from numballama.cpu.executor import ADDRESS, MAX_TOKENS, OPERANDS
from numballama.ir import Graph, Op
from numballama.model import Model
from numballama.quantization import blocks, kv
from numballama.quantization.convert import convert, from_bf16, from_f16
from numballama.quantization.types import ACTIVATION_QUANT, BLOCKS, F32, KV_BLOCK, WeightType
from numballama.reference import ReferenceBackend, seen, visible_rows
from numballama.registry import find
from tests.helpers.gguf_files import random_blocks

U = 2.0**-24
"""Half the distance from 1 to the next float32: the largest relative error of one rounding."""
TINY = 2.0**-126
"""The smallest normal float32: below it rounding errors are absolute, not relative."""

Bounded = tuple[np.ndarray, np.ndarray]
"""A value, and the maximum error of another computation for each of its elements."""


# Programs


@cache
def _compile_once(function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    return compile_step(function, list(operands))


def cpu_backend(weights: Mapping[str, Weight] | None = None, workers: int = 1) -> CpuBackend:
    """A backend whose plans are for `workers` workers, which may be more than there are threads (see `run_workers`)."""
    backend = CpuBackend(weights or {})
    backend.workers = workers
    return backend


def compiled(backend: CpuBackend, graph: Graph, fusions: bool | Sequence[str] = True) -> CpuProgram:
    """`backend.program`, with each kernel compiled once in this process for the same operand types."""
    with mock.patch.object(cpu, "compile_step", lambda function, operands: _compile_once(function, tuple(operands))):
        return backend.program(graph, fusions)


_STEP = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)


def run_workers(program: CpuProgram, tokens: int, step: int, order: Sequence[int]) -> None:
    """Run one step of a program, its workers one after the other in this order: their shares do not depend on it."""
    row = program.table[step]
    function = _STEP(int(row[ADDRESS]))
    for worker in order:
        assert function(row[OPERANDS:].ctypes.data, worker, len(order), min(tokens, int(row[MAX_TOKENS]))) == 0


def as_weight(values: np.ndarray, kind: str = "f32", group: int = 0, misaligned: bool = False) -> Weight:
    """A weight with these elements; `misaligned` puts its bytes at an odd address and makes them read-only, as in a
    file."""
    if kind in BLOCKS and kind not in blocks.ENCODERS:  # numbers as large as these, but not these
        rng, count = np.random.default_rng(values.size), values.shape[1] // BLOCKS[kind][0]
        weight = random_blocks(kind, len(values), count, rng, size=float(np.std(values)))
    else:
        weight = convert(Weight(values.shape, F32, values), WeightType(kind, group))
    if not misaligned:
        return weight
    return Weight(weight.shape, weight.type, _odd(weight.data), None if weight.scales is None else _odd(weight.scales))


def _odd(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 1, np.uint8)
    copy = memory[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    copy.flags.writeable = False
    return copy


def poison(program: CpuProgram) -> None:
    """Fill the arena and the KV cache with 0xFF, not the page table: every float there is a NaN."""
    program.arena[:] = 0xFF
    for value in program.plan.graph.values.values():
        if value.kind == "state" and value.dtype != "i32":
            program.value(value.name).view(np.uint8)[...] = 0xFF


def poison_dead(program: CpuProgram, step: int) -> np.ndarray:
    """Fill all memory with 0xFF, except values that were computed before `step` and are needed in it or later.

    Returns which bytes of the arena `step` may write: those of its results and of its scratch.
    """
    dead, own = np.ones(program.arena.size, bool), np.zeros(program.arena.size, bool)
    for name, place in program.plan.placements.items():
        where = slice(place.offset, place.offset + place.nbytes)
        if name in program.inputs or place.first < step <= place.last:
            dead[where] = False
        elif place.first == step:
            own[where] = True
    program.arena[dead] = 0xFF
    return own


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy of a value's memory, with 16-bit formats as float32."""
    if dtype == "f16":
        return from_f16(array)
    return from_bf16(array) if dtype == "bf16" else array.copy()


def read(program: CpuProgram, name: str, tokens: int) -> np.ndarray:
    """The content of a value: all of a state, but of a temporary only the rows of the run's tokens."""
    value = program.plan.graph.values[name]
    array = program.value(name)
    if value.dtype == "q8_0":
        return kv.stored(array, value.shape, "q8_0")
    return stored(array if value.kind == "state" else array[: min(tokens, value.shape[0])], value.dtype)


@lru_cache(maxsize=8)  # the reference keeps a float64 copy of all weights
def shared_model(path: Path, tokenizer: Path | None = None, **options: Any) -> Model:
    """A compiled model that all tests of a run share: no test may close it."""
    return numballama.compile(path, tokenizer, **options)


TOKENIZERS = {"stories260K": "tok512.bin", "stories15M": "tokenizer_llama2.bin"}


def story_model(models: Path, name: str, **options: Any) -> Model:
    """`shared_model` of a real model of the folder, with its tokenizer."""
    return shared_model(models / f"{name}.bin", models / TOKENIZERS[name], **options)


# What an op means


def meaning(op: Op, operands: Mapping[str, np.ndarray], graph: Graph) -> dict[str, Bounded]:
    """The outputs of an op, by the reference's kernels over its body, each with its bound."""
    env: dict[str, Bounded] = {name: (array, np.zeros(array.shape)) for name, array in operands.items()}
    for part in op.body or [op]:
        arrays, errors = zip(*(env[name] for name in part.inputs), strict=True)
        if part.kind == "kv_write":
            arrays = (arrays[0], arrays[1].copy(), *arrays[2:])
        types = ["i8" if array.dtype == np.int8 else "f32" for array in arrays]
        result = find(part.kind, "reference", types).function(*arrays, **part.attrs)
        results = result if isinstance(result, tuple) else (result,)
        bounds = BOUNDS[part.kind](arrays, errors, results[0], part.attrs)
        if part.kind == "kv_write":
            bounds = _storage(bounds, results[0], graph.values[part.inputs[1]].dtype)
        for name, value, bound in zip(part.outputs, results, bounds if len(results) > 1 else (bounds,), strict=True):
            env[name] = (value, bound)
    return {name: env[name] for name in op.outputs}


Arrays = Sequence[np.ndarray]
BOUNDS: dict[str, Callable[[Arrays, Arrays, np.ndarray, Mapping[str, Any]], Any]] = {}


def bound(kind: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        BOUNDS[kind] = function
        return function

    return register


@bound("embedding")
@bound("rows")
@bound("argmax")
def _exact(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    return np.zeros(out.shape)


@bound("rope_angles")
def _angles(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    return np.full(out.shape, 2 * U * max(attrs["scale"], 1))  # computed in float64, rounded once


@bound("rmsnorm")
def _rmsnorm(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    assert not e[0].any()  # first of every fused op that has it
    return (x[0].shape[1] + 8) * U * np.abs(out) + TINY


@bound("head_norm")
def _head_norm(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    heads = [array.reshape(-1, len(x[1])) for array in (x[0], e[0], out)]
    return _rmsnorm([heads[0], x[1]], [heads[1], e[1]], heads[2], attrs).reshape(out.shape)


@bound("linear")
def _linear(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    a, w = x[0].astype(np.float64), np.abs(np.asarray(x[-1], np.float64))
    n = a.shape[1]
    if len(x) == 3:
        a *= np.repeat(x[1].astype(np.float64), attrs["group"], axis=1)[:, :n]
    if len(x) == 4:
        a *= np.repeat(x[1].astype(np.float64), n // x[1].shape[1], axis=1)
        # of scale · q + least the two products are rounded, each of which may be larger than their sum
        w = np.repeat(w.reshape(len(w), -1, 32).max(axis=2), 32, axis=1)
    return (n + 8) * U * (np.abs(a) @ w.T) + (1 + n * U) * e[0] @ w.T + n * TINY


@bound("bias")
@bound("add")
def _sum(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    return e[0] + e[1] + U * (np.abs(out) + e[0] + e[1]) * (e[0] + e[1] > 0)  # exact operands: one correct rounding


@bound("rope")
def _rope(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """A rotation mixes the two elements of a pair, and their errors, with factors of at most 1."""
    pairs = attrs["head_dim"] // 2
    shape, axis = ((len(x[0]), -1, pairs, 2), 3) if attrs["interleaved"] else ((len(x[0]), -1, 2, pairs), 2)

    def of_pair(numbers: np.ndarray) -> np.ndarray:
        numbers = np.abs(numbers.astype(np.float64)).reshape(shape)
        return np.broadcast_to(numbers.sum(axis=axis, keepdims=True), numbers.shape).reshape(out.shape)

    return of_pair(e[0]) + 4 * U * (of_pair(x[0]) + of_pair(e[0])) + TINY


@bound("kv_write")
def _kv_write(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    result = np.zeros(out.shape)
    heads = e[0].reshape(len(x[0]), out.shape[1], out.shape[3])
    for t, (sequence, position) in enumerate(zip(x[3], x[2], strict=True)):
        page, place = divmod(position, out.shape[2])
        result[x[4][sequence, page], :, place] = heads[t] + TINY * (e[0].any() > 0)
    return result


def _storage(error: np.ndarray, written: np.ndarray, dtype: str) -> np.ndarray:
    """Rounding to the cache's type: half a unit in the last of 11 (float16) or 8 (bfloat16) places, or in q8_0 half of
    the block's scale, which is rounded to float16. Others' places: none."""
    if dtype == "f32":
        return error
    if dtype == "q8_0":
        largest = np.abs(np.nan_to_num(written, posinf=0, neginf=0)) + error
        for first in range(0, written.shape[-1], KV_BLOCK):
            block = largest[..., first : first + KV_BLOCK]
            block[...] = block.max(axis=-1, keepdims=True)
        return error + largest * ((0.5 + 1e-4) / 127 + 2.0**-11) + 127 * 2.0**-25
    rounding, least = (2.0**-11, 2.0**-25) if dtype == "f16" else (2.0**-8, 2.0**-134)
    return error * (1 + rounding) + rounding * np.abs(np.nan_to_num(written)) + least


@bound("attention_scores")
def _scores(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    q, cache, positions, sequences, page_table = x[:5]
    head_dim = cache.shape[3]
    heads = np.abs(q.reshape(len(q), -1, head_dim).astype(np.float64))
    result = np.zeros(out.shape)
    for t, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        which = seen(position, attrs["window"])
        keys = np.abs(visible_rows(cache, page_table, sequence, position, attrs["window"], heads.shape[1]))
        result[t, :, which] = (head_dim + 8) * U * np.einsum("hd,phd->hp", heads[t], keys) / head_dim**0.5
    return result + TINY


@bound("softmax")
def _softmax(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    largest = x[0].max(axis=-1, keepdims=True)
    below = np.where(
        out > 0, largest - np.where(out > 0, x[0], 0), 0
    )  # the difference is rounded before the exponential
    shift = 2 * e[0].max(axis=-1, keepdims=True) + 2 * U * below.max(axis=-1, keepdims=True)
    return out * (np.expm1(shift) + (x[0].shape[-1] + 16) * U) + TINY


@bound("attention_values")
def _values(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    weights, cache, positions, sequences, page_table = x[:5]
    result = np.zeros((len(weights), weights.shape[1], cache.shape[3]))
    for t, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        n, which = position + 1, seen(position, attrs["window"])
        values = np.abs(visible_rows(cache, page_table, sequence, position, attrs["window"], weights.shape[1]))
        result[t] = np.einsum("hp,phd->hd", (n + 8) * U * weights[t, :, which] + e[0][t, :, which], values)
    return result.reshape(out.shape) + TINY


@bound("swiglu")
def _swiglu(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    gate, up = np.abs(x[0].astype(np.float64)), np.abs(x[1].astype(np.float64))
    slope = 1.1 * e[0]  # |d silu| <= 1.0999
    # below -88 the exponential overflows to infinity and the result to 0; it is at most 89 · exp(-88.7) < 2^-120
    return slope * (up + e[1]) + np.minimum(gate, np.abs(gate)) * e[1] + 16 * U * np.abs(out) + 2.0**-120 * (1 + up)


@bound("quantize")
def _quantize(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A division may become a product with a reciprocal: ratios within a few units of a half round either way."""
    n, group = x[0].shape[1], attrs["group"]
    largest = np.maximum.reduceat(np.abs(x[0].astype(np.float64)), np.arange(0, n, group), axis=1)
    scale = np.repeat(largest / 127, group, axis=1)[:, :n]
    ratio = np.abs(np.divide(x[0], scale, out=np.zeros(x[0].shape), where=scale > 0))
    tie = np.abs(ratio - np.floor(ratio) - 0.5) <= 8 * U * ratio + U
    return tie.astype(np.float64), 4 * U * largest / 127 + 2.0**-149


def _exactly_rounded(kind: str) -> Callable[..., tuple[np.ndarray, ...]]:
    """Rounding for weights of blocks is defined to the bit."""

    def bounds(x: Arrays, e: Arrays, out: np.ndarray, attrs: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        assert not e[0].any()
        group, run, _ = ACTIVATION_QUANT[kind]
        return tuple(np.zeros((len(out), out.shape[1] // every)) for every in (1, group, run))

    return bounds


BOUNDS |= {f"quantize_{kind}": _exactly_rounded(kind) for kind in ACTIVATION_QUANT}


def assert_within(got: np.ndarray, want: Bounded, what: str) -> None:
    """Assert that values are within their bound of the reference's, with infinities and NaNs in the same places."""
    value, error = want
    assert got.shape == value.shape, f"{what}: shape {got.shape}, not {value.shape}"
    with np.errstate(invalid="ignore"):
        fine = (
            (got == value)
            | (np.isnan(got) & np.isnan(value))
            | (np.abs(got - value.astype(np.float64)) <= error + U * np.abs(value))
        )
    if not fine.all():
        at = tuple(np.argwhere(~fine)[0])
        raise AssertionError(
            f"{what}{list(map(int, at))}: {got[at]}, reference {value[at]}, allowed {error[at]}; "
            f"{(~fine).sum()} numbers differ"
        )


LARGEST = {"f16": 65504.0, "bf16": float(from_bf16(np.array([0x7F7F], np.uint16))[0]), "q8_0": 127 * 65504.0}
"""The largest number of a cache's type, which stands for all finite numbers beyond it."""


def _saturated(want: Bounded, dtype: str) -> Bounded:
    """Bounds after what is finite and beyond the type became its largest number."""
    numbers, error = want
    return np.where(np.isfinite(numbers), np.clip(numbers, -LARGEST[dtype], LARGEST[dtype]), numbers), error


def check_step(
    program: CpuProgram,
    step: int,
    tokens: int,
    weights: ReferenceBackend,
    execute: Callable[[], object],
    rows: int | None = None,
) -> None:
    """Run one step by `execute` and compare all that it wrote with the op's definition on the operands as they
    were before. `rows` is how many tokens have logits, default all."""
    graph, op = program.plan.graph, program.plan.steps[step].op
    count = rows if rows is not None and program.plan.steps[step].of_rows else tokens
    operands: dict[str, np.ndarray] = {}
    for name in op.inputs:
        kind = graph.values[name].kind
        if kind == "weight":
            operands[name] = weights.weight(name)
        elif kind == "constant":
            operands[name] = np.array(graph.constants[name], np.float32)
        else:
            operands[name] = read(program, name, tokens if (op.kind, name) == ("rows", op.inputs[0]) else count)
    wanted = meaning(op, operands, graph)
    execute()
    for name, want in wanted.items():
        got = read(program, name, count)
        if graph.values[name].dtype in LARGEST:
            want = _saturated(want, graph.values[name].dtype)
        assert_within(got, want, f"step {step} {op.kind}: {name}")
