"""The rule of every op: names of its inputs, outputs and attributes, and the shapes that follow from its inputs.

Plain ops are what a model's graph is declared with (`graph.py`); `reference.py` says in NumPy what each computes. Fused
ops are made by the passes of `fusion.py`, each from the plain ops that it replaces.

Shapes: T tokens of a run at most, R of them with logits, D the model's width, K and N a weight's columns and rows.

The KV cache is in pages: for each layer keys and values [pages, kv_heads, page, head_dim], where `page` is a number of
tokens. `page_table` i32[slots + 1, P] says where the pages of a sequence are: position p of the sequence in slot s is
in page `page_table[s, p // page]`, at place `p % page`. So a sequence has at most C = P · page tokens. `sequences`
gives the slot of each token. The last row of the table is for padding: it names page 0, which no sequence has.

A model that several ranks share has a graph for each rank (`parallel.shard`), and ops in which ranks exchange values.
All ranks run the same of these ops in the same order: each updates `exchange` and `arrivals`, and the next one reads
them. `exchange` f32[2, E] is memory that all ranks share: ranks write to its halves in turn, so that a rank may write
its next part while others still read this one. `arrivals` i32[ranks, workers, 16] counts how often each worker of each
rank has written its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .ir import Shaped, Shapes, Value, expect, fused_rule, rule
from .memory import ceil_div
from .quantization.types import ACTIVATION_QUANT, VEC_DOT_TYPE

Inputs = Sequence[Value]
Attrs = Mapping[str, Any]


@rule("embedding", inputs=("ids", "table"))
def _embedding(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """ids[T], table[V, D] → row ids[t] of the table for each token, [T, D]"""
    ids, table = inputs
    expect(ids.dtype == "i32" and len(ids.shape) == 1 and len(table.shape) == 2, "wants ids i32[T] and a table[V, D]")
    return [((ids.shape[0], table.shape[1]), "f32")]


@rule("rope_angles", inputs=("positions", "frequencies"), attrs=("scale",))
def _rope_angles(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """positions[T], frequencies[P] → cos, then sin, of position · frequency, both times scale, [T, 2P]"""
    positions, frequencies = inputs
    fits = positions.dtype == "i32" and len(frequencies.shape) == 1 and attrs["scale"] > 0
    expect(fits, "wants positions i32[T], frequencies[P] and a scale above 0")
    return [((positions.shape[0], 2 * frequencies.shape[0]), "f32")]


@rule("rmsnorm", inputs=("x", "weight"), attrs=("eps",))
def _rmsnorm(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, D], weight[D] → x / sqrt(mean(x²) + eps) · weight"""
    x, weight = inputs
    expect(x.dtype == "f32" and weight.shape == x.shape[1:] and attrs["eps"] >= 0, "wants x f32[T, D], weight[D], eps")
    return [(x.shape, "f32")]


@rule("head_norm", inputs=("x", "weight"), attrs=("eps",))
def _head_norm(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, heads · head_dim], weight[head_dim] → `rmsnorm` of each head of x"""
    x, weight = inputs
    expect(x.dtype == "f32" and len(x.shape) == 2 and attrs["eps"] >= 0, "wants x f32[T, heads · head_dim] and eps")
    expect(len(weight.shape) == 1 and x.shape[1] % weight.shape[0] == 0, "x must consist of heads as wide as weight")
    return [(x.shape, "f32")]


@rule("quantize", inputs=("x",), outputs=("out", "scales"), attrs=("group",))
def _quantize(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, D] → int8 x[T, D], and a scale for each `group` elements of a row, [T, ceil(D / group)]"""
    (x,) = inputs
    expect(x.dtype == "f32" and len(x.shape) == 2 and attrs["group"] > 0, "wants x f32[T, D] and a positive group")
    return [(x.shape, "i8"), ((x.shape[0], ceil_div(x.shape[1], attrs["group"])), "f32")]


def _quantized(activation: str, shape: tuple[int, ...]) -> list[Shaped]:
    """Shapes and dtypes of x of this shape as an activation type of `ACTIVATION_QUANT`."""
    group, run, sums = ACTIVATION_QUANT[activation]
    expect(len(shape) == 2 and shape[1] % group == 0, f"wants x[T, D] in whole groups of {group}")
    return [(shape, "i8"), ((shape[0], shape[1] // group), "f32"), ((shape[0], shape[1] // run), sums)]


def _quantize_as(activation: str) -> Shapes:
    """x[T, D] → int8 x[T, D], the scale of each group, and sums over runs of the int8 x: see `ACTIVATION_QUANT`"""

    def shapes(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
        (x,) = inputs
        expect(x.dtype == "f32", "wants x f32[T, D]")
        return _quantized(activation, x.shape)

    return shapes


for _activation in ACTIVATION_QUANT:
    rule(f"quantize_{_activation}", inputs=("x",), outputs=("out", "scales", "sums"))(_quantize_as(_activation))

ACTIVATIONS = (("x",), ("xq", "xs"), ("xq", "xs", "sums"))
"""Operands of a linear op that stand for x: float32; int8 in groups, with scales; or the results of `quantize_q8_…`."""


def _linear_inputs(before: Sequence[str], after: Sequence[str] = ()) -> tuple[tuple[str, ...], ...]:
    return tuple((*activations, *before, *after) for activations in ACTIVATIONS)


@rule("linear", inputs=_linear_inputs(("weight",)), attrs=("group",), optional=("group",))
def _linear(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, K], weight[N, K] → x · weightᵀ, [T, N].

    An int8 weight may take xq[T, K] and xs[T, ceil(K / group)], the results of `quantize`; a weight of blocks, the
    three results of the `quantize_…` that its type wants (`VEC_DOT_TYPE`). `group` is optional: an int8 weight carries
    it.
    """
    x, weight = inputs[0], inputs[-1]
    expect((x.dtype == "i8") == (len(inputs) > 2), "wants (x, weight), (xq, xs, weight) or (xq, xs, sums, weight)")
    if len(inputs) == 4:
        expect(weight.dtype in VEC_DOT_TYPE, f"weights of {weight.dtype} have no sums")
        activation = VEC_DOT_TYPE[weight.dtype]
        given = [(value.shape, value.dtype) for value in inputs[:3]]
        expect(
            given == _quantized(activation, x.shape),
            f"a weight of {weight.dtype} wants x as quantize_{activation} makes it",
        )
    elif x.dtype == "i8":
        scales = (x.shape[0], ceil_div(x.shape[1], attrs["group"]))
        expect(inputs[1].shape == scales, "wants one scale for each group of x")
    expect(len(weight.shape) == 2 and x.shape[1] == weight.shape[1], "x[T, K] must fit weight[N, K]")
    return [((x.shape[0], weight.shape[0]), "f32")]


@rule("bias", inputs=("x", "weight"))
def _bias(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, N], weight[N] → x + weight"""
    x, weight = inputs
    expect(x.dtype == "f32" and weight.shape == x.shape[1:], "wants x f32[T, N] and bias[N]")
    return [(x.shape, "f32")]


@rule("rope", inputs=("x", "angles"), attrs=("head_dim", "interleaved"))
def _rope(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, heads · head_dim], angles[T, head_dim] → x, each pair of a head's dimensions rotated by its angle"""
    x, angles = inputs
    expect(x.shape[1] % attrs["head_dim"] == 0, "x must consist of whole heads")
    expect(angles.shape == (x.shape[0], attrs["head_dim"]), "wants angles[T, head_dim]")
    return [(x.shape, "f32")]


_WHERE = ("positions", "sequences", "page_table")


def _expect_where(tokens: int, positions: Value, sequences: Value, page_table: Value) -> None:
    expect(positions.shape == sequences.shape == (tokens,), "wants a position and a sequence for each token")
    expect(page_table.dtype == "i32" and len(page_table.shape) == 2, "wants a page table i32[slots + 1, P]")


@rule("kv_write", inputs=("x", "cache", *_WHERE), inplace={"out": "cache"})
def _kv_write(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, kv_heads · head_dim], cache, positions[T], sequences[T], page_table → the cache, updated"""
    x, cache, *where = inputs
    expect(len(cache.shape) == 4 and x.shape[1] == cache.shape[1] * cache.shape[3], "x must fit the cache's heads")
    _expect_where(x.shape[0], *where)
    return [(cache.shape, cache.dtype)]


@rule("attention_scores", inputs=("q", "k_cache", *_WHERE), attrs=("window",))
def _attention_scores(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """q[T, heads · head_dim], keys, positions, sequences, page_table → q · k / sqrt(head_dim), [T, heads, C].

    A score is -inf where a token does not see a key: after the token's position and, if `window` > 0, at its
    position - window and before.
    """
    q, cache, *where = inputs
    heads, rest = divmod(q.shape[1], cache.shape[3])
    expect(rest == 0 and heads % cache.shape[1] == 0, "q's heads must be a multiple of the cache's")
    expect(attrs["window"] >= 0, "wants a window, 0 for none")
    _expect_where(q.shape[0], *where)
    return [((q.shape[0], heads, where[2].shape[1] * cache.shape[2]), "f32")]


@rule("softmax", inputs=("x",))
def _softmax(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, …, n] → exp(x) / sum(exp(x)) over the last dimension"""
    return [(inputs[0].shape, "f32")]


@rule("attention_values", inputs=("weights", "v_cache", *_WHERE), attrs=("window",))
def _attention_values(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """probabilities[T, heads, C], values, positions, sequences, page_table → the weighted sum of the values that a
    token sees (see `attention_scores`), [T, heads · head_dim]"""
    weights, cache, *where = inputs
    _expect_where(weights.shape[0], *where)
    expect(weights.shape[2] == where[2].shape[1] * cache.shape[2], "probabilities must cover a sequence's pages")
    expect(attrs["window"] >= 0, "wants a window, 0 for none")
    return [((weights.shape[0], weights.shape[1] * cache.shape[3]), "f32")]


@rule("swiglu", inputs=("gate", "up"))
def _swiglu(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """gate[T, H], up[T, H] → gate · sigmoid(gate) · up"""
    gate, up = inputs
    expect(gate.shape == up.shape, "gate and up must have one shape")
    return [(gate.shape, "f32")]


@rule("add", inputs=("a", "b"))
def _add(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """a, b → a + b"""
    a, b = inputs
    expect(a.shape == b.shape, "a and b must have one shape")
    return [(a.shape, "f32")]


@rule("rows", inputs=("x", "rows"))
def _rows(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, D], rows[R] → row rows[r] of x for each r, [R, D]"""
    x, rows = inputs
    expect(rows.dtype == "i32" and len(rows.shape) == 1, "wants the numbers of rows, i32[R]")
    return [((rows.shape[0], x.shape[1]), "f32")]


EXCHANGE = ("exchange", "arrivals")
"""Names of the memory that ranks share: what they exchange, and counts of it."""
_EXCHANGED = {"exchange_out": "exchange", "arrivals_out": "arrivals"}
CELL = 16
"""Elements of an entry of `arrivals`: 64 bytes, so that each has a cache line."""
STOPPED = 1
"""Int64 element of `arrivals` that is not 0 once the ranks are to stop. Element 0 of each entry counts."""


def _exchanged(x: Value, exchange: Value, arrivals: Value, rank: int, needed: int) -> list[Shaped]:
    """Shapes of the memory of all ranks, updated. `needed` is how many numbers of a token all ranks exchange."""
    expect(x.dtype == "f32" and len(x.shape) == 2, "wants x f32[T, D]")
    expect(exchange.dtype == "f32" and len(exchange.shape) == 2 and exchange.shape[0] == 2, "wants exchange f32[2, E]")
    expect(exchange.shape[1] >= needed, f"wants an exchange of {needed} numbers at least, for one token of all ranks")
    expect(
        arrivals.dtype == "i32" and len(arrivals.shape) == 3 and arrivals.shape[2] == CELL,
        f"wants arrivals i32[ranks, workers, {CELL}]",
    )
    expect(0 <= rank < arrivals.shape[0], f"wants a rank below {arrivals.shape[0]}")
    return [(exchange.shape, exchange.dtype), (arrivals.shape, arrivals.dtype)]


@rule(
    "all_reduce",
    inputs=("x", *EXCHANGE),
    outputs=("out", *_EXCHANGED),
    attrs=("rank", "half"),
    optional=("half",),
    inplace=_EXCHANGED,
)
def _all_reduce(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, D] of each rank → their sum in the order of ranks, [T, D], the same bits on every rank

    A kernel that counts no exchanges uses half number `half` of the memory: those of neighbouring sums alternate, those
    of the last one and of the next run's first too. A sum without it is not fused.
    """
    expect(attrs.get("half", 0) in (0, 1), "wants half 0 or 1")
    x, exchange, arrivals = inputs
    needed = arrivals.shape[0] * x.shape[-1]
    return [(x.shape, "f32"), *_exchanged(x, exchange, arrivals, attrs["rank"], needed)]


@rule(
    "all_gather",
    inputs=("x", *EXCHANGE),
    outputs=("out", *_EXCHANGED),
    attrs=("rank", "begin", "columns"),
    inplace=_EXCHANGED,
)
def _all_gather(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, n] of each rank → all of them side by side, [T, columns]; this rank's are columns [begin, begin + n)"""
    x, exchange, arrivals = inputs
    begin, columns = attrs["begin"], attrs["columns"]
    expect(begin >= 0 and begin + x.shape[-1] <= columns, f"x must lie within {columns} columns, from {begin} on")
    return [((x.shape[0], columns), "f32"), *_exchanged(x, exchange, arrivals, attrs["rank"], columns)]


@rule("argmax", inputs=("x",))
def _argmax(inputs: Inputs, attrs: Attrs) -> list[Shaped]:
    """x[T, V] → the index of each row's largest element (the first of equals), i32[T]"""
    return [(inputs[0].shape[:1], "i32")]


# Fused ops: their operands in the order in which `fusion.py` gives them.

_QKV, _GATE_UP = ("wq", "wk", "wv"), ("w1", "w3")
_CACHES = {"k_cache_out": "k_cache", "v_cache_out": "v_cache"}

fused_rule("linear_add", inputs=_linear_inputs(("weight", "residual")), attrs=("group",), optional=("group",))
fused_rule(
    "linear_all_reduce",
    inputs=("x", "weight", *EXCHANGE),
    outputs=("out", *_EXCHANGED),
    attrs=("rank", "half"),
    inplace=_EXCHANGED,
)
fused_rule(
    "linear_add_all_reduce",
    inputs=("x", "weight", "residual", *EXCHANGE),
    outputs=("out", *_EXCHANGED),
    attrs=("rank", "half"),
    inplace=_EXCHANGED,
)
fused_rule("qkv", inputs=_linear_inputs(_QKV), outputs=("q", "k", "v"), attrs=("group",), optional=("group",))
fused_rule("gate_up", inputs=_linear_inputs(_GATE_UP), attrs=("group",), optional=("group",))
fused_rule("norm_linear", inputs=("x", "norm", "weight"), attrs=("eps",))
fused_rule("norm_qkv", inputs=("x", "norm", *_QKV), outputs=("q", "k", "v"), attrs=("eps",))
fused_rule("norm_gate_up", inputs=("x", "norm", *_GATE_UP), attrs=("eps",))
fused_rule("attention", inputs=("q", "k_cache", *_WHERE, "v_cache"), attrs=("window",))
fused_rule(
    "rope_kv_write",
    inputs=("q", "angles", "k", "k_cache", *_WHERE, "v", "v_cache"),
    outputs=("out", *_CACHES),
    attrs=("head_dim", "interleaved"),
    inplace=_CACHES,
)
fused_rule(
    "norm_qkv_rope",
    inputs=("x", "norm", *_QKV, "angles", "k_cache", *_WHERE, "v_cache"),
    outputs=("out", *_CACHES),
    attrs=("eps", "head_dim", "interleaved"),
    inplace=_CACHES,
)
