"""`ModelConfig` → `Graph` → fused `Graph`: the model, declared once, and the passes that join its ops.

`llama_layer` and `build` read like the model, top to bottom. A pass replaces groups of ops by one op that a backend has
a kernel for; each can be left out, and the logits stay the same. `plan.py` lowers the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import registry
from .config import INTERLEAVED, ModelConfig
from .errors import Error
from .ir import DTYPES, Graph, Op, Value
from .quantization.types import VEC_DOT_TYPE, WeightType
from .rope import rope_frequencies
from .validation import strings


@dataclass(frozen=True)
class KVLayout:
    """Where keys and values lie: for each layer two arrays [sequences, n_kv_heads, context, head_dim].

    All positions of one head lie together, so that attention reads memory in one stream.
    """

    n_layers: int
    sequences: int
    n_kv_heads: int
    context: int
    head_dim: int
    dtype: str = "f32"

    @classmethod
    def of(cls, config: ModelConfig, context: int, dtype: str = "f32", sequences: int = 1) -> KVLayout:
        """The layout for a model, in `context` tokens."""
        return cls(config.n_layers, sequences, config.n_kv_heads, context, config.head_dim, dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the keys, or of the values, of one layer."""
        return (self.sequences, self.n_kv_heads, self.context, self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return 2 * self.n_layers * math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Builder:
    """A graph under construction, with what the layers of all architectures are made of."""

    def __init__(
        self,
        graph: Graph,
        config: ModelConfig,
        types: Mapping[str, WeightType],
        kv: KVLayout,
        tokens: int,
        int8_activations: bool,
        activations: str,
    ) -> None:
        self.graph, self.config = graph, config
        self._types, self._kv = types, kv
        self._rounded = dict(VEC_DOT_TYPE) if activations == "int8" else {}
        if int8_activations or activations == "int8":
            self._rounded["int8"] = ""
        self._shapes = config.weight_shapes()
        self._quantized: dict[tuple[str, str], tuple[Value, ...]] = {}
        self.ids = graph.input("ids", (tokens,), "i32")
        self._places = graph.input("positions", (tokens,), "i32"), graph.input("sequences", (tokens,), "i32")
        frequencies = graph.constant("rope_frequencies", rope_frequencies(config, kv.context))
        self._angles = graph.add("rope_angles", self._places[0], frequencies, out="angles")

    def weight(self, name: str) -> Value:
        """The weight that `config.weight_shapes()` lists under this name."""
        return self.graph.weight(name, self._shapes[name], self._types[name].name)

    def norm(self, x: Value, name: str, out: str) -> Value:
        """RMSNorm of whole rows by the weight `name`."""
        return self.graph.add("rmsnorm", x, self.weight(name), out=out, eps=self.config.norm_eps)

    def linear(self, x: Value, name: str, out: str) -> Value:
        """x · weightᵀ; x quantised first, once for all weights that want it so, where activations are to be int8."""
        graph, kind = self.graph, self._types[name]
        if kind.name not in self._rounded:
            return graph.add("linear", x, self.weight(name), out=out)
        attrs = {"group": kind.group} if kind.group else {}
        like = self._rounded[kind.name]
        key = (x.name, like or str(kind.group))
        if key not in self._quantized:
            names = [f"{x.name}_{like}{part}" for part in ("", "_scales", "_sums")]
            if not like:
                names = [f"{x.name}_q{kind.group}", f"{x.name}_scale{kind.group}"]
            self._quantized[key] = graph.add(f"quantize_{like}" if like else "quantize", x, out=names, **attrs)
        return graph.add("linear", *self._quantized[key], self.weight(name), out=out, **attrs)

    def project(self, x: Value, p: str, which: str, out: str, biased: bool = False) -> Value:
        """By the weight `p`w`which` of a layer whose names begin with `p`, and its bias."""
        y = self.linear(x, f"{p}w{which}", f"{p}{out}")
        return self.graph.add("bias", y, self.weight(f"{p}b{which}"), out=f"{p}{out}_biased") if biased else y

    def attend(self, q: Value, k: Value, v: Value, p: str) -> Value:
        """RoPE, the KV cache and attention: what each token's queries find, [T, n_heads · head_dim]."""
        graph, config = self.graph, self.config
        turn = {"head_dim": config.head_dim, "interleaved": int(config.rope_pairing == INTERLEAVED)}
        q, k = (graph.add("rope", y, self._angles, out=f"{y.name}_rope", **turn) for y in (q, k))
        k_cache, v_cache = (graph.state(f"{p}{name}_cache", self._kv.shape, self._kv.dtype) for name in "kv")
        k_cache = graph.add("kv_write", k, k_cache, *self._places, out=f"{p}k_cache'")
        v_cache = graph.add("kv_write", v, v_cache, *self._places, out=f"{p}v_cache'")
        window = config.window
        scores = graph.add("attention_scores", q, k_cache, *self._places, out=f"{p}scores", window=window)
        weights = graph.add("softmax", scores, out=f"{p}probabilities")
        return graph.add("attention_values", weights, v_cache, *self._places, out=f"{p}attn_out", window=window)


def llama_layer(b: Builder, x: Value, p: str) -> Value:
    """One layer of Llama, Mistral, Qwen2 or Qwen3, whose weights' names begin with `p`."""
    config, graph = b.config, b.graph
    h = b.norm(x, f"{p}attn_norm", f"{p}attn_in")
    q, k, v = (b.project(h, p, name, name, config.qkv_bias) for name in "qkv")
    if config.qk_norm:
        normed = {"eps": config.norm_eps}
        q = graph.add("head_norm", q, b.weight(f"{p}q_norm"), out=f"{p}q_normed", **normed)
        k = graph.add("head_norm", k, b.weight(f"{p}k_norm"), out=f"{p}k_normed", **normed)
    h = b.attend(q, k, v, p)
    x = graph.add("add", x, b.project(h, p, "o", "attn_projected", config.o_bias), out=f"{p}x_mid")

    h = b.norm(x, f"{p}ffn_norm", f"{p}ffn_in")
    gate, up = b.project(h, p, "1", "gate", config.mlp_bias), b.project(h, p, "3", "up", config.mlp_bias)
    h = graph.add("swiglu", gate, up, out=f"{p}ffn_hidden")
    return graph.add("add", x, b.project(h, p, "2", "ffn_projected", config.mlp_bias), out=f"{p}x_out")


LAYERS: dict[type[ModelConfig], Callable[[Builder, Value, str], Value]] = {ModelConfig: llama_layer}
"""Class of a model's config → what one of its layers computes. An architecture that a `ModelConfig` cannot describe has
a subclass of it, and a function here."""


def build(
    config: ModelConfig,
    types: Mapping[str, WeightType],
    kv: KVLayout,
    tokens: int = 1,
    logits: str = "last",
    int8_activations: bool = False,
    activations: str = "f32",
) -> Graph:
    """The graph of a model for up to `tokens` tokens a run.

    `types` maps each name of `config.weight_shapes()` to its type. `logits` is "last" (logits[1, vocab] of the run's
    last token, and `next`[1], its argmax) or "all" (logits[tokens, vocab]). With `int8_activations` the input of
    every int8 weight is quantised first, in the weight's groups; with `activations` "int8" that of every weight of
    blocks as well, as `VEC_DOT_TYPE` says.
    """
    graph = Graph(f"llama, {tokens} token{'s' if tokens > 1 else ''}")
    b = Builder(graph, config, types, kv, tokens, int8_activations, activations)
    x = graph.add("embedding", b.ids, b.weight("tok_embeddings"), out="x")
    for layer in range(config.n_layers):
        x = LAYERS[type(config)](b, x, f"layers.{layer}.")
    if logits == "last" and tokens > 1:
        x = graph.add("last", x, out="x_last")
    x = b.norm(x, "norm", "final")
    result = b.linear(x, "tok_embeddings" if config.tied_embeddings else "output", "logits")
    graph.outputs = [result.name]
    if logits == "last":
        graph.outputs.append(graph.add("argmax", result, out="next").name)
    return graph


# Fusion passes: each finds groups of ops, in graph order, that one kernel can do.

Groups = Iterable[tuple[str, list[Op]]]


def _producers(graph: Graph) -> dict[str, Op]:
    return {name: op for op in graph.ops for name in op.outputs}


def _only_reader(graph: Graph, readers: Mapping[str, list[Op]], op: Op, kind: str) -> Op | None:
    """The op of this kind that alone reads all that `op` computes, if there is one."""
    users = {id(user): user for name in op.outputs for user in readers[name]}
    if len(users) != 1 or any(name in graph.outputs for name in op.outputs):
        return None
    (user,) = users.values()
    return user if user.kind == kind else None


def _attention(graph: Graph) -> Groups:
    """Scores, softmax and the weighted sum: scores stay in a worker's scratch instead of the arena."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "attention_scores":
            softmax = _only_reader(graph, readers, op, "softmax")
            values = softmax and _only_reader(graph, readers, softmax, "attention_values")
            if softmax and values and op.inputs[2:] == values.inputs[2:]:
                yield "attention", [op, softmax, values]


def _qkv(graph: Graph) -> Groups:
    """Three linears of one input: one step instead of three."""
    for users in graph.consumers().values():
        linears = [op for op in users if op.kind == "linear"]
        if len(linears) == 3 and len({op.inputs[:-1] for op in linears}) == 1:
            yield "qkv", linears


def _gate_up(graph: Graph) -> Groups:
    """The two linears of a feed-forward network and SwiGLU between them."""
    made, readers = _producers(graph), graph.consumers()
    for op in graph.ops:
        if op.kind == "swiglu":
            pair = [made.get(name) for name in op.inputs]
            if (
                all(p and p.kind == "linear" and _only_reader(graph, readers, p, "swiglu") is op for p in pair)
                and len({p.inputs[:-1] for p in pair if p}) == 1
            ):
                yield "gate_up", [*(p for p in pair if p), op]


def _residual(graph: Graph) -> Groups:
    """A linear whose result is added to the residual stream."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "linear" and (add := _only_reader(graph, readers, op, "add")) and add.inputs[1] == op.outputs[0]:
            yield "linear_add", [op, add]


def _rope_kv(graph: Graph) -> Groups:
    """RoPE of queries and keys, and both writes to the KV cache."""
    made, place = _producers(graph), {id(op): index for index, op in enumerate(graph.ops)}
    for op in graph.ops:
        if op.kind in ("attention", "attention_scores"):
            rope_q, write_k = made.get(op.inputs[0]), made.get(op.inputs[1])
            rope_k = write_k and made.get(write_k.inputs[0])
            if not (rope_q and rope_k and write_k):
                continue
            write_v = graph.ops[place[id(write_k)] + 1]
            kinds = [part.kind for part in (rope_q, rope_k, write_k, write_v)]
            if kinds == ["rope", "rope", "kv_write", "kv_write"] and write_k.inputs[2:] == write_v.inputs[2:]:
                yield "rope_kv_write", [rope_q, rope_k, write_k, write_v]


def _norm(graph: Graph) -> Groups:
    """A norm into the linear step that reads it: every worker normalises for itself, which is cheaper than waiting."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "rmsnorm":
            for kind in ("linear", "qkv", "gate_up"):
                if user := _only_reader(graph, readers, op, kind):
                    yield f"norm_{kind}", [op, user]


def _qkv_rope(graph: Graph) -> Groups:
    """A norm, three linears, RoPE and both writes to the cache: two rows that RoPE turns together are in one place."""
    readers = graph.consumers()
    for op in graph.ops:
        if op.kind == "norm_qkv" and (user := _only_reader(graph, readers, op, "rope_kv_write")):
            yield "norm_qkv_rope", [op, user]


FUSIONS: dict[str, Callable[[Graph], Groups]] = {
    "attention": _attention,
    "qkv": _qkv,
    "gate_up": _gate_up,
    "residual": _residual,
    "rope_kv": _rope_kv,
    "norm": _norm,
    "qkv_rope": _qkv_rope,
}
"""The passes, in the order in which they run."""


def operand_types(graph: Graph, inputs: Iterable[str]) -> list[str]:
    """The types by which the registry knows an op's kernel."""
    return [graph.values[name].dtype for name in inputs]


def fuse(graph: Graph, backend: str, passes: bool | Sequence[str] = True) -> Graph:
    """Run fusion passes: all (True), none (False) or those named. A group that `backend` has no kernel for is left
    alone.

    Raises `Error` for a pass that does not exist.
    """
    names = list(FUSIONS) if passes is True else strings("fusions", passes or ())
    if unknown := set(names) - set(FUSIONS):
        raise Error(f"unknown fusion {', '.join(sorted(unknown))}; there are {', '.join(FUSIONS)}")
    for name in (n for n in FUSIONS if n in names):
        graph = _join(graph, list(FUSIONS[name](graph)), backend)
    return graph


def _join(graph: Graph, groups: list[tuple[str, list[Op]]], backend: str) -> Graph:
    """Replace each group by one op: at the place of its last member, or of its first if another op reads a result
    before.
    """
    readers = graph.consumers()
    place = {id(op): index for index, op in enumerate(graph.ops)}
    made = {name: index for index, op in enumerate(graph.ops) for name in op.outputs}
    replaced: dict[int, Op | None] = {}
    for kind, group in groups:
        members = {id(op) for op in group}
        inside = {name for op in group for name in op.outputs}
        inputs = tuple(dict.fromkeys(name for op in group for name in op.inputs if name not in inside))
        outside = {name: [op for op in readers[name] if id(op) not in members] for op in group for name in op.outputs}
        outputs = tuple(name for name, users in outside.items() if users or name in graph.outputs)
        if not registry.has(kind, backend, operand_types(graph, inputs)) or members & replaced.keys():
            continue
        first, *_, last = sorted(members, key=place.__getitem__)
        if any(place[id(op)] < place[last] for users in outside.values() for op in users):
            if any(made.get(name, -1) > place[first] for name in inputs):
                continue
            last = first
        attrs: dict[str, Any] = {}
        body: list[Op] = []
        for op in group:
            attrs |= op.attrs
            body += op.body or [op]
        replaced |= dict.fromkeys(members)
        replaced[last] = Op(kind, inputs, outputs, attrs, tuple(body))
    ops = [replaced.get(id(op), op) for op in graph.ops]
    return graph.replace_ops([op for op in ops if op is not None])
