"""Cases for the operators that prompts run on a GPU: linear layers and attention of many tokens, on tensor cores.

`Emulated` runs the kernels' PTX in NumPy, `Real` runs their machine code on a GPU:

    python -m tests.cuda.gemm_cases 9.0      # emulated, for one compute capability (a process has only one)
    python -m tests.cuda.gemm_cases          # on the GPU

The bound on errors is that of rounding the operands to 16 bits (`within`) and of float32 sums; nothing in it is tuned.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np

import numballama.cuda.ops  # noqa: F401 (registers the kernels)
from numballama import registry
from numballama.cuda.ops import skinny
from numballama.cuda.program import write_tiles
from numballama.kernel_cache import cuda_cache_directory
from numballama.quantization.convert import convert
from numballama.quantization.types import F32
from tests.cuda.emulator import Memory, Program, from_16, round_16, run
from tests.cuda.kept_ptx import compiled
from tests.cuda.older_cards import kinds_of, left_out
from tests.helpers.bounds import U, as_weight
from tests.helpers.paging import shuffled_table
from tests.helpers.repacked import memory_of

QUANTISED = ("int8", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
ROUNDING = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8} | dict.fromkeys(QUANTISED, 2.0**-10)
"""Relative error of a product of an activation and a weight that are rounded to the 16-bit type of the tensor cores.
float16 and bfloat16 weights are exact, quantised ones become float16 (2^-11 for each factor).
"""
UNTOUCHED = np.float32(-77.5)
"""Value that results are filled with before a case. Rows of padding tokens must keep it."""


def within(x: np.ndarray, weight: np.ndarray, kind: str) -> np.ndarray:
    """Bound on the error of each element of x · weightᵀ: [T, K] and [N, K] give [T, N].

    Rounding is relative down to the smallest normal float16. Below that it is 2^-25, of x after its row was scaled to
    2^14.
    """
    x, weight = np.abs(x.astype(np.float64)), np.abs(weight.astype(np.float64))
    n = x.shape[1]
    error = (ROUNDING[kind] * (1 + 2.0**-10) + (n + 8) * U) * (x @ weight.T)
    if kind not in ("f32", "bf16"):
        error += 2.0**-38 * x.max(axis=1, keepdims=True) * weight.sum(axis=1)
    if kind in QUANTISED:
        error += 2.0**-25 * x.sum(axis=1, keepdims=True)
    return error + 1e-37


class Emulated:
    """A machine that runs launches in NumPy, by the PTX emulator."""

    programs: dict[Any, Program] = {}  # noqa: RUF012

    def __init__(self, capability: tuple[int, int], tokens: int, wgmma: bool = False) -> None:
        from numballama.cuda.launch import LaunchContext

        self.capability, self.memory = capability, Memory()
        limit = {(7, 5): 64 << 10, (8, 0): 163 << 10}.get(capability, 227 << 10)
        counts, tiles = np.array([tokens], np.int32), np.zeros((2, 2), np.int32)
        self.ctx = LaunchContext(
            132, limit, self.put(counts, "i32"), self.put(tiles, "i32"), self.zeros, wgmma, capability >= (9, 0)
        )
        self.executed: dict[str, int] = {}

    def zeros(self, count: int) -> Any:
        return self.put(np.zeros(count, np.int32), "i32")

    def put(self, array: np.ndarray, dtype: str) -> Any:
        from numballama.cuda.launch import Array

        return Array(self.memory.put(array), array.shape, dtype)

    def get(self, array: Any, dtype: Any) -> np.ndarray:
        return self.memory.get(array.address, array.shape, dtype)

    def program_of(self, launch: Any) -> Program:
        """A launch's kernel, compiled and parsed."""
        key = launch.specialization
        if key not in self.programs:
            code, ptx = compiled(key, self.capability)
            older = self.capability < (9, 0)  # test_assembly.py has their limits
            lean = (
                ".kernels.gemm",
                ".kernels.prefill_attention",
                ".kernels.wgmma_attention",
                *(() if older else (".kernels.skinny",)),
            )
            if key.source[0].endswith(lean):
                left = code.stack_bytes, code.local_bytes
                assert left == (0, 0), f"{launch.name}: bytes of stack and local memory {left}"
            self.programs[key] = Program(ptx)
        return self.programs[key]

    def execute(self, launches: Sequence[Any]) -> None:
        for launch in launches:
            self.run(launch)

    def run(self, launch: Any, preceding: Event | None = None) -> None:
        """Run a launch. `preceding` is set when the launch before it has ended, if it had not."""
        from numballama.cuda.launch import Array, TensorMap

        arguments = [
            self.memory.put_map(a) if isinstance(a, TensorMap) else a.address if isinstance(a, Array) else a
            for a in launch.arguments.values()
        ]
        counts = run(
            self.program_of(launch), self.memory, launch.grid, launch.threads, arguments, launch.shared_bytes,
            max(1, launch.cluster), preceding,
        )  # fmt: skip
        self.executed = {k: self.executed.get(k, 0) + counts.get(k, 0) for k in self.executed | counts}


class Real:
    """A machine that runs launches on the GPU."""

    functions: dict[Any, Any] = {}  # noqa: RUF012

    def __init__(self, device: Any, tokens: int) -> None:
        from numballama.cuda.launch import LaunchContext

        self.device, self._owned = device, []  # type: ignore[var-annotated]
        counts, tiles = np.array([tokens], np.int32), np.zeros((2, 2), np.int32)
        self.ctx = LaunchContext(
            device.n_sms, device.shared_limit, self.put(counts, "i32"), self.put(tiles, "i32"), self.zeros,
            device.capability == (9, 0), device.capability >= (9, 0),
        )  # fmt: skip
        self.executed: dict[str, int] = {}

    def zeros(self, count: int) -> Any:
        return self.put(np.zeros(count, np.int32), "i32")

    def put(self, array: np.ndarray, dtype: str) -> Any:
        from numballama.cuda.driver import Memory as DeviceMemory
        from numballama.cuda.launch import Array

        array = np.ascontiguousarray(array)
        memory = DeviceMemory(self.device, array.nbytes, "a test")
        self._owned.append(memory)
        self.device.write(memory.address, array.ctypes.data, array.nbytes)
        self.device.synchronize()
        return Array(memory.address, array.shape, dtype)

    def get(self, array: Any, dtype: Any) -> np.ndarray:
        out = np.empty(array.shape, dtype)
        self.device.read(array.address, out)
        return out

    def calls(self, launches: Sequence[Any]) -> list[Any]:
        from numballama.cuda import compiler, driver

        made = []
        for launch in launches:
            key = launch.specialization
            if key not in self.functions:
                code = compiler.compile_kernel(key, self.device.capability, cuda_cache_directory())
                self.functions[key] = driver.LoadedKernel(self.device, code)
            made.append(driver.PreparedLaunch(self.device, self.functions[key], launch))
        return made

    def execute(self, launches: Sequence[Any]) -> None:
        for call in self.calls(launches):
            call()
        self.device.synchronize()


def upload(machine: Any, values: np.ndarray, kind: str, group: int = 32) -> tuple[Any, np.ndarray]:
    """(weight on the machine in the backend's layout, its elements in float32)."""
    from numballama.cuda.weights import layout_of

    weight = as_weight(values.astype(np.float32), kind, group if kind == "int8" else 0)
    layout = layout_of(weight)
    exact = convert(weight, F32).data.reshape(values.shape)
    return layout.operand(machine.put(memory_of(layout), "u8x").address), exact


def ones_on(machine: Any) -> Callable[[int], Any]:
    """A function n → n float32 on the machine, all 1."""
    return lambda count: machine.put(np.ones(count, np.float32), "f32")


def launches_of(machine: Any, op: str, types: Sequence[str], operands: Sequence[Any], outputs: Sequence[Any],
                **attrs: Any) -> list[Any]:  # fmt: skip
    """Launches of the kernel that the registry has for an op; scratch is filled with NaN."""
    found = registry.find(op, "cuda", types)
    shapes = [operand.shape for operand in operands]
    arguments = [*operands, *outputs]
    for name in found.parameters[1 + len(arguments) :]:
        if name in found.scratch:
            shape = found.scratch[name](*shapes, workers=machine.ctx.n_sms)
            arguments.append(machine.put(np.full(shape, np.nan, np.float32), "f32"))
        else:
            arguments.append(attrs[name])
    launches: list[Any] = found.function(machine.ctx, *arguments)
    return launches


def compare(what: str, got: np.ndarray, want: np.ndarray, error: np.ndarray, tokens: int) -> float:
    """The largest error as a fraction of its bound. Fails above 1, or if rows of padding tokens were written."""
    assert (got[tokens:] == UNTOUCHED).all(), f"{what}: rows of tokens beyond the run were written"
    assert np.isfinite(got[:tokens]).all(), f"{what}: not finite"
    ratio = np.abs(got[:tokens] - want[:tokens]) / (error[:tokens] + U * np.abs(want[:tokens]))
    worst = float(ratio.max())
    assert worst <= 1, (
        f"{what}: error is {worst:.3g} of the allowed one at {np.unravel_index(ratio.argmax(), ratio.shape)}"
    )
    return worst


def numbers(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    """Activations whose rows have very different magnitudes."""
    x = rng.standard_normal((tokens, columns)) * 10.0 ** rng.uniform(-1, 1, (tokens, 1))
    for row, size in ((1, 1e30), (3, 1e-30), (5, 0.0)):
        if row < tokens:
            x[row] *= size
    return x.astype(np.float32)


def normalised(x: np.ndarray, norm: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * norm


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(np.clip(-x, -700, 700)))


EPS = 1e-5


def linear(machine: Any, kind: str, T: int, K: int, N: int, tokens: int, residual: bool, normed: bool, group: int = 32,
           seed: int = 0) -> float:  # fmt: skip
    """linear, linear_add or norm_linear."""
    rng = np.random.default_rng(seed)
    x, norm = numbers(rng, T, K), (1 + 0.3 * rng.standard_normal(K)).astype(np.float32)
    if normed:
        x[1] = x[0]  # squares of 1e30 would be infinite
    matrix, w = upload(machine, rng.standard_normal((N, K)) * K**-0.5, kind, group)
    old = rng.standard_normal((T, N)).astype(np.float32)
    out = machine.put(np.full((T, N), UNTOUCHED), "f32")
    operands, types, op = [machine.put(x, "f32")], ["f32"], "linear"
    exact = x.astype(np.float64)
    if normed:
        operands, types, op = [*operands, machine.put(norm, "f32")], ["f32", "f32"], "norm_linear"
        exact = normalised(x, norm, EPS)
    operands, types = [*operands, matrix], [*types, kind]
    want, error = exact @ w.T.astype(np.float64), within(exact, w, kind if matrix.payload.dtype != "f32" else "f32")
    if normed:
        error += (K + 16) * U * (np.abs(exact) @ np.abs(w.T.astype(np.float64)))
    if residual:
        operands, types, op = [*operands, machine.put(old, "f32")], [*types, "f32"], "linear_add"
        want, error = want + old, error + U * np.abs(old)
    machine.execute(launches_of(machine, op, types, operands, [out], eps=EPS))
    return compare(f"{op} {kind}", machine.get(out, np.float32), want, error, tokens)


def gate_up(machine: Any, kind: str, T: int, K: int, N: int, tokens: int, normed: bool, group: int = 32) -> float:
    rng = np.random.default_rng(1)
    x, norm = rng.standard_normal((T, K)).astype(np.float32), (1 + 0.3 * rng.standard_normal(K)).astype(np.float32)
    (m1, w1), (m3, w3) = (upload(machine, rng.standard_normal((N, K)) * 2 * K**-0.5, kind, group) for _ in range(2))
    out = machine.put(np.full((T, N), UNTOUCHED), "f32")
    exact = normalised(x, norm, EPS) if normed else x.astype(np.float64)
    gate, up = exact @ w1.T, exact @ w3.T
    e1, e3 = (within(exact, w, kind) + (K + 16) * U * (np.abs(exact) @ np.abs(w.T)) for w in (w1, w3))
    want = silu(gate) * up
    # |d silu| <= 1.0999; the power of two is exact to two units, of an exponent that was rounded
    error = 1.1 * e1 * (np.abs(up) + e3) + np.abs(gate) * e3 + (16 + 2 * np.abs(gate)) * U * np.abs(want) + 1e-37
    given, types = ([machine.put(norm, "f32")], ["f32"]) if normed else ([], [])
    machine.execute(launches_of(
        machine, "norm_gate_up" if normed else "gate_up", ["f32", *types, kind, kind],
        [machine.put(x, "f32"), *given, m1, m3], [out], eps=EPS,
    ))  # fmt: skip
    return compare(f"gate_up {kind}", machine.get(out, np.float32), want, error, tokens)


def qkv_rope(machine: Any, kind: str, T: int, K: int, heads: tuple[int, int], head_dim: int, interleaved: int,
             cache: str, tokens: int, values: str = "") -> float:  # fmt: skip
    """norm_qkv_rope; with `values` their weight has this type."""
    rng = np.random.default_rng(2)
    x, norm = rng.standard_normal((T, K)).astype(np.float32), (1 + 0.3 * rng.standard_normal(K)).astype(np.float32)
    rows = [heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim]
    kinds = kind, kind, values or kind
    weights = [
        upload(machine, rng.standard_normal((n, K)) * K**-0.5, each) for n, each in zip(rows, kinds, strict=True)
    ]
    context, half = T + 7, head_dim // 2
    angle = rng.uniform(0, 6, (T, half))
    angles = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    positions, sequences = rng.permutation(context)[:T].astype(np.int32), rng.integers(0, 2, T).astype(np.int32)
    page, columns = 8, -(-context // 8)
    table = shuffled_table(2, columns)
    empty = np.full((1 + 2 * columns, heads[1], page, head_dim), UNTOUCHED)
    stored = empty if cache == "f32" else round_16(empty, cache)
    q = machine.put(np.full((T, rows[0]), UNTOUCHED), "f32")
    caches = [machine.put(stored, cache) for _ in range(2)]
    types = ["f32", "f32", *kinds, "f32", cache, "i32", "i32", "i32", cache]
    operands = [
        machine.put(x, "f32"), machine.put(norm, "f32"), *(m for m, _ in weights), machine.put(angles, "f32"),
        caches[0],
        machine.put(positions, "i32"), machine.put(sequences, "i32"), machine.put(table, "i32"), caches[1],
    ]  # fmt: skip
    machine.execute(launches_of(
        machine, "norm_qkv_rope", types, operands, [q], eps=EPS, head_dim=head_dim, interleaved=interleaved
    ))  # fmt: skip
    exact, worst = normalised(x, norm, EPS), 0.0
    for which, (_, w) in enumerate(weights):
        value = exact @ w.T.astype(np.float64)
        error = within(exact, w, kind) + (K + 16) * U * (np.abs(exact) @ np.abs(w.T.astype(np.float64)))
        if which < 2:
            split = (T, -1, half, 2) if interleaved else (T, -1, 2, half)
            a, b = np.moveaxis(value.reshape(split), 3 if interleaved else 2, 0)
            both = np.sum(np.abs(value.reshape(split)), axis=3 if interleaved else 2)
            both_errors = np.sum(error.reshape(split), axis=3 if interleaved else 2)
            cos, sin = angles[:, None, :half].astype(np.float64), angles[:, None, half:].astype(np.float64)
            turned = [a * cos - b * sin, a * sin + b * cos]
            value = np.stack(turned, axis=3 if interleaved else 2).reshape(value.shape)
            error = np.stack([both_errors + 4 * U * both] * 2, axis=3 if interleaved else 2).reshape(value.shape)
        if which == 0:
            worst = max(worst, compare(f"q {kind}", machine.get(q, np.float32), value, error, tokens))
            continue
        got = machine.get(caches[which - 1], stored.dtype)
        got = got.astype(np.float64) if cache == "f32" else from_16(got, cache)
        if cache != "f32":
            error = error + ROUNDING[cache] * (np.abs(value) + error) + 2.0**-25
        written = np.zeros(got.shape, bool)
        lines = np.empty((tokens, rows[1]))
        for t in range(tokens):
            at = table[sequences[t], positions[t] // page], slice(None), positions[t] % page
            written[at] = True
            lines[t] = got[at].reshape(-1)
        assert (got[~written] == UNTOUCHED).all(), "places of the cache that belong to no token of the run were written"
        worst = max(worst, compare(f"{'kv'[which - 1]} {kind}", lines, value[:tokens], error[:tokens], tokens))
    return worst


def attention(machine: Any, cache: str, T: int, heads: tuple[int, int], head_dim: int, context: int,
              positions: Sequence[int], sequences: Sequence[int], tokens: int, page: int = 32,
              window: int = 0, exact: bool = False) -> float:  # fmt: skip
    """Attention with NaN in all keys and values that no token may see: in free pages, in page 0, in a page's rest.
    `exact`: queries and weights are float32 in the products, too.
    """
    rounding = 0 if exact else ROUNDING[cache]
    rng = np.random.default_rng(3)
    together = heads[0] // heads[1]
    q = rng.standard_normal((T, heads[0] * head_dim)).astype(np.float32)
    slots, columns = max(sequences) + 1, -(-context // page)
    shape = (slots, heads[1], columns * page, head_dim)
    bits = [round_16(rng.standard_normal(shape).astype(np.float32), cache) for _ in "kv"]
    keys, values = (from_16(part, cache) for part in bits)
    where, whose, table = np.array(positions, np.int32), np.array(sequences, np.int32), shuffled_table(slots, columns)
    tiles = np.full((1 + T, 2), -1, np.int32)
    write_tiles(where[:tokens], whose[:tokens], 128 if machine.ctx.wgmma else 64, tiles)
    machine.ctx = replace(machine.ctx, tiles=machine.put(tiles, "i32"))
    pages = [np.full((1 + slots * columns, heads[1], page, head_dim), 0xFFFF, part.dtype) for part in bits]
    for s in range(slots):
        seen = max((p for p, o in zip(positions[:tokens], sequences[:tokens], strict=True) if o == s), default=-1) + 1
        at = np.arange(seen)
        for part, paged in zip(bits, pages, strict=True):
            paged[table[s, at // page], :, at % page] = np.moveaxis(part[s, :, :seen], 1, 0)
    out = machine.put(np.full((T, heads[0] * head_dim), UNTOUCHED), "f32")
    types = ["f32", cache, "i32", "i32", "i32", cache]
    operands = [machine.put(q, "f32"), machine.put(pages[0], cache), machine.put(where, "i32"),
                machine.put(whose, "i32"), machine.put(table, "i32"), machine.put(pages[1], cache)]  # fmt: skip
    launches = launches_of(machine, "attention", types, operands, [out], window=window)
    wanted = [*["chunks"] * bool(tiles[0, 0]), *["single rows"] * bool(tiles[0, 1])]
    longest = int(where[:tokens].max())
    launches = [launch.variant_for(longest) for launch in launches]
    machine.execute([launch for launch in launches if launch.only_for is None or launch.only_for in wanted])
    want, error = np.zeros((T, heads[0], head_dim)), np.zeros((T, heads[0], head_dim))
    for t in range(tokens):
        for h in range(heads[0]):
            seen = slice(max(0, where[t] + 1 - window) if window else 0, where[t] + 1)
            k, v = keys[whose[t], h // together, seen], values[whose[t], h // together, seen]
            query = q[t, h * head_dim : (h + 1) * head_dim].astype(np.float64) / head_dim**0.5
            score = k @ query
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            # queries are rounded, then weights; a weight's error is its score's, and the sum's
            off = (rounding + (head_dim + 16) * U) * (np.abs(k) @ np.abs(query))
            shift = np.expm1(2 * off.max())
            want[t, h] = weight @ v
            error[t, h] = (shift + rounding + (len(k) + 16) * U) * (1 + shift) * (weight @ np.abs(v)) + 2.0**-24
    got, want, error = machine.get(out, np.float32), want.reshape(T, -1), error.reshape(T, -1)
    return compare(f"attention {cache}", got, want, error, tokens)


def not_finite(machine: Any, kind: str, T: int = 12, K: int = 64) -> float:
    """A NaN or an infinity in x shows in its row of the result, and in no other row."""
    N, rng = 16, np.random.default_rng(4)
    x = rng.standard_normal((T, K)).astype(np.float32)
    x[2, 5], x[7, 0] = np.nan, np.inf
    matrix, _ = upload(machine, rng.standard_normal((N, K)), kind)
    out = machine.put(np.full((T, N), UNTOUCHED), "f32")
    machine.execute(launches_of(machine, "linear", ["f32", kind], [machine.put(x, "f32"), matrix], [out]))
    got = machine.get(out, np.float32)
    bad = ~np.isfinite(got)
    assert bad[[2, 7]].all() and not np.delete(bad, [2, 7], axis=0).any(), "a not_finite row shows elsewhere"
    return 0.0


Case = tuple[str, int, Callable[[Any], float]]


def cases(kinds: Container[str]) -> list[Case]:
    """All cases of these types, of weights or of the KV cache: (name, tokens of the run, check)."""
    made: list[Case] = []

    def add(name: str, tokens: int, check: Callable[..., float], kind: str, *arguments: Any, **named: Any) -> None:
        if kind in kinds:
            made.append((name, tokens, lambda machine: check(machine, kind, *arguments, tokens=tokens, **named)))

    for kind in ("f16", "bf16", "f32", "q8_0", "q4_0", "int8"):
        # a second tile of columns: quantised weights are multiplied by the kernel of float16
        tiles = 2 if kind in ("f16", "bf16", "f32") else 1
        add(f"linear {kind}", 18, linear, kind, 20, 96, 68 * tiles, residual=False, normed=False)
        add(f"norm_linear {kind}", 12, linear, kind, 12, 64, 40, residual=False, normed=True)
        add(f"gate_up {kind}", 9, gate_up, kind, 10, 128, 36 * tiles, normed=True)
    add("linear q4_1", 18, linear, "q4_1", 20, 96, 68, residual=False, normed=False)
    add("norm_linear q4_1", 12, linear, "q4_1", 12, 64, 40, residual=False, normed=True)
    for kind in ("q4_k", "q5_k", "q6_k"):
        add(f"linear {kind}", 18, linear, kind, 20, 256, 68, residual=True, normed=False)
        add(f"norm_linear {kind}, some of the last record", 12, linear, kind, 12, 1280, 40, residual=False, normed=True)
        add(f"gate_up {kind}", 9, gate_up, kind, 10, 768, 36, normed=True)
    add("linear f16, more tiles of tokens, residual", 131, linear, "f16", 140, 72, 20, residual=True, normed=False)
    add("linear bf16, more steps than stages", 30, linear, "bf16", 30, 712, 20, residual=True, normed=False)
    add("linear f16, odd sizes", 11, linear, "f16", 11, 37, 10, residual=True, normed=False)
    add("linear f32, odd sizes", 70, linear, "f32", 75, 37, 131, residual=True, normed=False)
    add("linear int8, odd groups", 9, linear, "int8", 12, 36, 20, residual=False, normed=True, group=12)
    add("linear, a run of few tokens", 2, linear, "f16", 300, 64, 130, residual=False, normed=False)
    add("gate_up f16, odd sizes", 10, gate_up, "f16", 10, 40, 67, normed=False)
    for kind, heads, head_dim, interleaved, cache in (
        ("f16", (4, 2), 64, 0, "f16"), ("bf16", (3, 1), 48, 1, "bf16"), ("q8_0", (2, 1), 96, 0, "f16"),
        ("q4_1", (2, 1), 64, 0, "f16"), ("f16", (1, 1), 128, 1, "f32"), ("f32", (2, 1), 32, 0, "f16"),
        ("f16", (1, 1), 160, 0, "f16"),
    ):  # fmt: skip
        add(f"qkv {kind}, heads of {head_dim}", 21, qkv_rope, kind, 23, 64, heads, head_dim, interleaved, cache)
    add("qkv q4_k and q6_k", 12, qkv_rope, "q4_k", 12, 256, (4, 2), 64, 0, "f16", values="q6_k")
    once, two = [0] * 70, [0] * 40 + [1] * 30
    for cache, heads in (("f16", (4, 2)), ("bf16", (2, 1))):
        add(f"attention {cache}, 64", 66, attention, cache, 70, heads, 64, 140, list(range(50, 120)), once)
        add(
            f"attention {cache}, 128",
            70,
            attention,
            cache,
            70,
            (2, 1),
            128,
            140,
            list(range(60, 100)) + list(range(30)),
            two,
        )
    add("attention, heads of 80", 69, attention, "f16", 70, (2, 2), 80, 140, list(range(70)), once)
    add("attention, heads of 8, any order", 10, attention, "f16", 12, (2, 1), 8, 40,
        [3, 1, 2, 0, 9, 8, 7, 6, 5, 4, 0, 0],
        [0] * 5 + [1] * 2 + [0] * 5)  # fmt: skip
    # chunks of three prompts between rows of others, as in a step of an engine
    chunks = [(2, range(70, 150)), (0, [99]), (4, range(5)), (1, [3]), (3, range(31, 33)), (5, [148])]
    where = [position for _, chunk in chunks for position in chunk]
    whose = [sequence for sequence, chunk in chunks for _ in chunk]
    for cache, page in (("f16", 16), ("bf16", 64)):
        add(f"attention {cache}, mixed, pages of {page}", 90, attention, cache, 96, (2, 1), 64, 150,
            where + [0] * (96 - len(where)), whose + [0] * (96 - len(where)), page=page)  # fmt: skip
    # rows alone, of sequences of any length, with groups of heads that share keys
    add("attention bf16, rows of 128", 3, attention, "bf16", 3, (9, 1), 128, 100, [63, 5, 94], [0, 1, 2])
    add("attention f16, rows in splits", 2, attention, "f16", 3, (2, 1), 64, 700, [600, 5, 0], [0, 1, 2])
    for kind in ("f16", "bf16", "f32"):
        made.append((f"not_finite numbers, {kind}", 12, lambda machine, kind=kind: not_finite(machine, kind)))  # type: ignore[misc]
    return made


def in_parts(machine: Any) -> float:
    """A quantised weight that is dequantised in several parts."""
    from numballama.cuda.ops import gemm

    before, gemm.MAX_EXPANDED = gemm.MAX_EXPANDED, 128 * 64
    try:
        machine.ctx = replace(machine.ctx)
        worst = linear(machine, "q8_0", 10, 64, 140, 10, False, False)
        return max(worst, gate_up(machine, "q4_0", 10, 64, 140, 10, True))
    finally:
        gemm.MAX_EXPANDED = before


def check_all(machine_of: Callable[[int], Any], to_check: Sequence[Case]) -> dict[str, str]:
    """Run cases. Returns case → what went wrong."""
    wrong: dict[str, str] = {}
    for name, tokens, check in to_check:
        start = time.perf_counter()
        machine = machine_of(tokens)
        try:
            worst = check(machine)
        except AssertionError as error:
            wrong[name] = str(error)
            print(f"{name}: WRONG: {error}", flush=True)
            continue
        print(f"{name}: {worst:.3f} of the bound, {time.perf_counter() - start:.1f} s", flush=True)
    return wrong


def without_wgmma(machine: Any) -> Any:
    """The machine, which says that it has no wgmma: it runs the kernels of other cards."""
    machine.ctx = replace(machine.ctx, wgmma=False)
    return machine


def machine_maker(arguments: Sequence[str]) -> Callable[[int], Any]:
    """(tokens of a run) → a machine: emulated for the capability that is the first argument, else the GPU."""
    if arguments:
        major, minor = map(int, arguments[0].split("."))
        return lambda tokens: Emulated((major, minor), tokens)
    from numballama.cuda.driver import Device

    real = Device()
    return lambda tokens: Real(real, tokens)


if __name__ == "__main__":
    skinny.MOST = 1  # so that few tokens, which are quick to emulate, run here
    machine_of = machine_maker(sys.argv[1:])
    failed: dict[str, str] = {}
    found = [case for case in cases(kinds_of(sys.argv[1:], ROUNDING)) if case[0] not in left_out(sys.argv[1:])]
    if machine_of(1).ctx.wgmma:  # on the GPU: its own kernels, then those of newer cards
        failed = check_all(machine_of, found)
    failed |= check_all(lambda tokens: without_wgmma(machine_of(tokens)), [*found, ("in pieces", 10, in_parts)])
    sys.exit(len(failed) > 0)
