"""The definition of every op, in NumPy: float32 values, sums in float64.

The reference interprets the graph as declared, without fusions, plan or arena. It keeps every value, so that a backend
can be compared value by value: a backend is right when it agrees with this file.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .checkpoint import Weight
from .errors import Error
from .graph import NOT_CACHED, PAGE_TABLE
from .host import environment, interrupts
from .ir import DTYPES, Graph, Op, Value
from .memory import available_bytes
from .quantization.activations import Quantized, quantize_activations
from .quantization.convert import dequantize, quantize_int8
from .quantization.kv import round_to
from .quantization.types import ACTIVATION_QUANT, BLOCKS, KV_TYPES, KVType
from .registry import find, kernel
from .sampling import Sampled, SamplerTable

if TYPE_CHECKING:
    from .backend import BackendName, Program
    from .quantization.types import ActivationType

ANY = "*"
F64_BUDGET = 1 << 30
"""Bytes of weights that are kept as float64. Larger models convert a weight each time it is used."""


@kernel("embedding", "reference", ANY, ANY)
def embedding(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[ids]


@kernel("rope_angles", "reference", ANY, ANY)
def rope_angles(positions: np.ndarray, frequencies: np.ndarray, scale: float) -> np.ndarray:
    angles = positions[:, None].astype(np.float64) * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * scale


@kernel("rmsnorm", "reference", ANY, ANY)
def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight


@kernel("head_norm", "reference", ANY, ANY)
def head_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return rmsnorm(x.reshape(-1, len(weight)), weight, eps).reshape(x.shape)


@kernel("quantize", "reference", ANY)
def quantize(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """In float32, as the definition is: rounding must not depend on the precision of the check."""
    rows = [quantize_int8(row, group) for row in x]
    return np.stack([q for q, _ in rows]), np.stack([s for _, s in rows])


@kernel("linear", "reference", ANY, ANY)
def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64, copy=False).T


@kernel("linear", "reference", "i8", ANY, ANY)
def linear_int8(xq: np.ndarray, xs: np.ndarray, weight: np.ndarray, group: int) -> np.ndarray:
    return linear(xq * np.repeat(xs.astype(np.float64), group, axis=1)[:, : xq.shape[1]], weight)


def _quantize_as(activation: str) -> Callable[[np.ndarray], Quantized]:
    def quantize(x: np.ndarray) -> Quantized:
        return quantize_activations(activation, x)

    return quantize


for _activation in ACTIVATION_QUANT:
    kernel(f"quantize_{_activation}", "reference", ANY)(_quantize_as(_activation))


class WithBlockMins(np.ndarray):
    """A dequantised weight [N, K] that also has the minimum of each block, `mins` [N, K / 32] (ggml's m of q4_1)."""

    mins: np.ndarray


@kernel("linear", "reference", "i8", ANY, ANY, ANY)
def linear_blocks_int8(xq: np.ndarray, xs: np.ndarray, sums: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Integer sums follow from xq. The sums of q8_1 were rounded, and multiply the minimums of q4_1's blocks."""
    group = xq.shape[1] // xs.shape[1]
    result = linear_int8(xq, xs, weight, group)
    if not isinstance(weight, WithBlockMins):
        return result
    exact = xs * xq.reshape(*xs.shape, group).sum(axis=2, dtype=np.float64)
    return result + (sums - exact) @ weight.mins.astype(np.float64).T


@kernel("bias", "reference", ANY, ANY)
def bias(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) + weight


@kernel("rope", "reference", ANY, ANY)
def rope(x: np.ndarray, angles: np.ndarray, head_dim: int, interleaved: int) -> np.ndarray:
    tokens, pairs = len(x), head_dim // 2
    heads = x.reshape(tokens, -1, head_dim).astype(np.float64)
    a, b = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, pairs), slice(pairs, None))
    cos, sin = angles[:, None, :pairs], angles[:, None, pairs:]
    out = np.empty_like(heads)
    out[..., a] = heads[..., a] * cos - heads[..., b] * sin
    out[..., b] = heads[..., a] * sin + heads[..., b] * cos
    return out.reshape(x.shape)


def sequence_rows(page_table: np.ndarray, sequence: int, page: int, positions: slice) -> tuple[np.ndarray, np.ndarray]:
    """Pages of these positions of a sequence, and their places in the pages."""
    where = np.arange(positions.start, positions.stop)
    return page_table[sequence, where // page], where % page


@kernel("kv_write", "reference", ANY, "f32", ANY, ANY, ANY)
def kv_write(
    x: np.ndarray, cache: np.ndarray, positions: np.ndarray, sequences: np.ndarray, page_table: np.ndarray
) -> np.ndarray:
    heads = x.reshape(len(x), cache.shape[1], cache.shape[3])
    for t, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        page, place = divmod(position, cache.shape[2])
        cache[page_table[sequence, page], :, place] = heads[t]
    return cache


def _write_as(dtype: KVType) -> None:
    """Register `kv_write` for a cache of a type that rounds. It holds float32: what the type can store."""

    @kernel("kv_write", "reference", ANY, dtype, ANY, ANY, ANY)
    def kv_write_rounded(
        x: np.ndarray, cache: np.ndarray, positions: np.ndarray, sequences: np.ndarray, page_table: np.ndarray
    ) -> np.ndarray:
        heads = x.reshape(len(x), cache.shape[1], cache.shape[3])
        return kv_write(round_to(heads, dtype), cache, positions, sequences, page_table)


for _type in KV_TYPES:
    if _type != "f32":
        _write_as(_type)


def visible_rows(
    cache: np.ndarray, page_table: np.ndarray, sequence: int, position: int, window: int, heads: int
) -> np.ndarray:
    """What a token sees of a cache, float64 [positions, heads, head_dim]; query heads share a KV head."""
    pages, places = sequence_rows(page_table, sequence, cache.shape[2], seen(position, window))
    return np.repeat(cache[pages, :, places], heads // cache.shape[1], axis=1).astype(np.float64)


def seen(position: int, window: int) -> slice:
    """The positions that a token sees: itself and those before it; at most `window` positions if that is not 0."""
    return slice(max(position + 1 - window, 0) if window else 0, position + 1)


@kernel("attention_scores", "reference", ANY, ANY, ANY, ANY, ANY)
def attention_scores(
    q: np.ndarray,
    k_cache: np.ndarray,
    positions: np.ndarray,
    sequences: np.ndarray,
    page_table: np.ndarray,
    window: int,
) -> np.ndarray:
    head_dim = k_cache.shape[3]
    heads = q.reshape(len(q), -1, head_dim)
    out = np.full((*heads.shape[:2], page_table.shape[1] * k_cache.shape[2]), -np.inf)
    for t, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        keys = visible_rows(k_cache, page_table, sequence, position, window, heads.shape[1])
        out[t, :, seen(position, window)] = np.einsum("hd,phd->hp", heads[t], keys) / np.sqrt(head_dim)
    return out


@kernel("softmax", "reference", ANY)
def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@kernel("attention_values", "reference", ANY, ANY, ANY, ANY, ANY)
def attention_values(
    weights: np.ndarray,
    v_cache: np.ndarray,
    positions: np.ndarray,
    sequences: np.ndarray,
    page_table: np.ndarray,
    window: int,
) -> np.ndarray:
    out = np.zeros((*weights.shape[:2], v_cache.shape[3]))
    for t, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        values = visible_rows(v_cache, page_table, sequence, position, window, weights.shape[1])
        out[t] = np.einsum("hp,phd->hd", weights[t, :, seen(position, window)], values)
    return out.reshape(len(weights), -1)


@kernel("swiglu", "reference", ANY, ANY)
def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


@kernel("add", "reference", ANY, ANY)
def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) + b


@kernel("rows", "reference", ANY, ANY)
def rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return x[rows]


@kernel("all_reduce", "reference", ANY, ANY, ANY)
def all_reduce(
    x: Sequence[np.ndarray], exchange: np.ndarray, arrivals: np.ndarray, rank: int, half: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x are the operands of all ranks, in their order: this definition needs no memory to exchange them."""
    return np.sum([part.astype(np.float64) for part in x], axis=0), exchange, arrivals


@kernel("all_gather", "reference", ANY, ANY, ANY)
def all_gather(
    x: Sequence[np.ndarray], exchange: np.ndarray, arrivals: np.ndarray, rank: int, begin: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.concatenate(x, axis=1), exchange, arrivals


COLLECTIVES = ("all_reduce", "all_gather")
"""Ops in which ranks exchange values: x is a list, of the operand of each rank."""


@kernel("argmax", "reference", ANY)
def argmax(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x).any(axis=1), -1, x.argmax(axis=1))


class ReferenceProgram:
    """A graph with its operands, run op by op. Implements `backend.Program`."""

    def __init__(self, graph: Graph, backend: ReferenceBackend) -> None:
        self.graph, self.backend = graph, backend
        self.inputs = {v.name: np.zeros(v.shape, DTYPES[v.dtype]) for v in graph.values.values() if v.kind == "input"}
        self.values: dict[str, np.ndarray] = {}
        self.entries = 0
        self.plan = None
        self.prefill_end = graph.first("rows")

    def value(self, name: str) -> np.ndarray:
        """A value of the last run, for the run's tokens only."""
        return self.values[name]

    def kernel_names(self, tokens: int | None = None) -> list[str]:
        """Name of the function that computes each op."""
        return [self._function(op).__name__ for op in self.graph.ops]

    def run(self, tokens: int, begin: int = 0, end: int | None = None, rows: int = 1) -> None:
        """Interpret ops [begin, end) for the first `tokens` tokens, of which `rows` have logits.

        Raises `Error` for a rank's graph: the others must run at the same time (`run_ranks`).
        """
        for op in self.walk(tokens, begin, end, rows):
            raise Error(f"{op}: this is the graph of one rank, and the others do not run")

    def walk(self, tokens: int, begin: int, end: int | None, rows: int) -> Iterator[Op]:
        """Like `run`, but yields each op of `COLLECTIVES`, for the caller to compute."""
        if begin == 0:
            self.values = {name: array[: rows if name == "rows" else tokens] for name, array in self.inputs.items()}
        for op in self.graph.ops[begin:end]:
            if op.kind in COLLECTIVES:
                yield op
            else:
                self.compute(op, [self._operand(name) for name in op.inputs])

    def exchange(self, op: Op, x: Sequence[np.ndarray]) -> None:
        """Compute an op of `COLLECTIVES`. `x` has the operand of each rank."""
        self.compute(op, [x, *(self._operand(name) for name in op.inputs[1:])])

    def submit(self, tokens: int, rows: int, table: SamplerTable) -> int:
        """Interpret all ops and sample a token for each of `rows` rows."""
        self.run(tokens, 0, None, rows)
        return self.sample(rows, table)

    def sample(self, rows: int, table: SamplerTable) -> int:
        """Sample a token for each of `rows` rows of the last run's logits; returns the ticket."""
        slots = self.values["sequences"]
        if "rows" in self.inputs:
            slots = slots[self.values["rows"]]
        with interrupts.deferred():  # Numba may compile
            environment.import_numba()
            from .cpu.sampling import choose_tokens  # late: Numba takes time to import, and only a sampler needs it

            self._sampled = choose_tokens(table, self.values["logits"][:rows], slots[:rows])
        return 0

    def collect(self, ticket: int) -> Sampled:
        """What the last run sampled."""
        return self._sampled

    def _function(self, op: Op) -> Callable[..., Any]:
        return find(op.kind, self.backend.name, [self.graph.values[name].dtype for name in op.inputs]).function

    def compute(self, op: Op, operands: Sequence[Any]) -> None:
        """Compute an op of these operands and keep its results."""
        attrs: Mapping[str, Any] = op.attrs
        results = self._function(op)(*operands, **attrs)
        for name, result in zip(op.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            value = self.graph.values[name]
            self.values[name] = result if value.alias else result.astype(DTYPES[value.dtype], copy=False)

    def _operand(self, name: str) -> np.ndarray:
        value = self.graph.values[name]
        if value.kind == "weight":
            return self.backend.weight(name)
        if value.kind == "constant":
            return np.array(self.graph.constants[name], np.float32)
        if value.kind == "state":
            root = self.graph.root(name)
            return self.backend.state(root, value)
        return self.values[name]


def run_ranks(
    programs: Sequence[ReferenceProgram], tokens: int, begin: int, ends: Sequence[int | None], rows: int
) -> None:
    """Run the programs of all ranks, each up to its own end: op by op, and those of `COLLECTIVES` together.

    Raises `Error` unless all ranks have the same of them in the same order.
    """
    walks = [program.walk(tokens, begin, end, rows) for program, end in zip(programs, ends, strict=True)]
    while any(ops := [next(walk, None) for walk in walks]):
        together = [op for op in ops if op is not None]
        if len(together) < len(ops) or len({(op.kind, op.outputs) for op in together}) > 1:
            raise Error(f"ranks must exchange the same values: {'; '.join(map(str, ops))}")
        x = [program.values[op.inputs[0]] for program, op in zip(programs, together, strict=True)]
        for program, op in zip(programs, together, strict=True):
            program.exchange(op, x)


def _block_mins(weight: Weight) -> np.ndarray:
    """The minimum of each block of a q4_1 weight: the block's second float16."""
    blocks = weight.data.reshape(-1, BLOCKS["q4_1"][1])
    return blocks[:, 2:4].copy().view(np.float16).astype(np.float32).reshape(weight.shape[0], -1)


class ReferenceBackend:
    """Weights and KV cache of the reference."""

    name: ClassVar[BackendName] = "reference"
    prefill_chunk = 64
    default_kv_dtype: ClassVar[KVType] = "f32"
    activation_types: ClassVar[tuple[ActivationType, ...]] = ("f32", "int8")
    in_host_memory: ClassVar[bool] = True
    mixed_tokens: ClassVar[int] = 16
    lookahead: ClassVar[int] = 0
    decode_sizes: tuple[int, ...] = (1,)
    most_sequences: int | None = None
    workers = 1
    description = "reference"
    memory_bytes = failure = None

    def __init__(self, weights: Mapping[str, Weight], threads: int | None = None) -> None:
        self.weights = weights
        self.states: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self._converted: dict[str, np.ndarray] = {}
        small = 8 * sum(int(np.prod(w.shape)) for w in weights.values()) <= F64_BUDGET
        self._dtype = np.float64 if small else np.float32

    def machine(self) -> dict[str, dict[str, Any]]:
        """Empty: a report describes the host anyway."""
        return {}

    def weight_nbytes(self, name: str) -> int:
        """Bytes of a weight: as in the file."""
        return self.weights[name].nbytes

    def measure_bandwidth(self) -> None:
        """None: NumPy in float64 is too slow to say anything about the memory."""

    def time_steps(
        self, program: Program, kinds: Sequence[Hashable], nbytes: Sequence[int], tokens: int = 1
    ) -> tuple[list[float], float]:
        """Raises `Error`: there is no plan."""
        raise Error("the reference has no plan whose steps could be timed; pass --device cpu or --device cuda")

    def time_exchanges(self, graph: Graph, tokens: int = 1) -> None:
        """None: one rank has the model."""

    def free_bytes(self) -> int | None:
        """Bytes of host memory that are free."""
        return available_bytes()

    def discard_runs(self) -> None:
        """Does nothing: a run is done when `submit` returns."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def weight(self, name: str) -> np.ndarray:
        """A weight as float64, or as float32 if all weights together exceed F64_BUDGET."""
        if name not in self._converted:
            array: np.ndarray = dequantize(self.weights[name])
            if self._dtype == np.float64:
                array = array.astype(np.float64)
            if self.weights[name].type.name == "q4_1":
                array = with_mins = array.view(WithBlockMins)
                with_mins.mins = _block_mins(self.weights[name])
            if self._dtype == np.float32:
                return array
            self._converted[name] = array
        return self._converted[name]

    def state(self, name: str, value: Value) -> np.ndarray:
        """The memory of a state. A KV cache is float32 whatever its type; `kv_write` rounds to the type."""
        dtype = np.int32 if value.dtype == "i32" else np.float32
        return self.states.setdefault(name, np.zeros(value.shape, dtype))

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into a row of the page table, from entry `first` on."""
        self.states[PAGE_TABLE][slot, first : first + len(pages)] = pages

    def cache_page(self, page: int) -> Iterator[np.ndarray]:
        """Views of the keys and values of each layer in a page of the KV cache, float32."""
        return (state[page] for name, state in self.states.items() if name not in NOT_CACHED)

    def close(self) -> None:
        """Does nothing: memory is freed with the last reference to it."""

    def prepare(self, decode: Program, report: Callable[[str, int, int], None] | None = None) -> None:
        """Does nothing: the reference compiles nothing."""

    def program(
        self,
        graph: Graph,
        fusions: bool | Sequence[str] = True,
        report: Callable[[str, int, int], None] | None = None,
    ) -> ReferenceProgram:
        """A program that runs the graph as declared. `fusions` has no effect on the reference."""
        table = graph.values.get(PAGE_TABLE)
        if table is not None:
            self.state(PAGE_TABLE, table)
        return ReferenceProgram(graph, self)
