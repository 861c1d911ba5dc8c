"""`ModelConfig` → `Graph`: the model, declared once.

`llama_layer` and `build` read like the model, top to bottom. `fusion.py` joins ops of the result, `plan.py` lowers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .config import INTERLEAVED, ModelConfig
from .errors import Error
from .ir import Graph, Value, nbytes_of
from .memory import ceil_div
from .ops import EXCHANGE
from .quantization.types import VEC_DOT_TYPE, ActivationType, KVType, WeightType
from .rope import attention_factor, rope_frequencies

Logits = Literal["rows", "all"]
"""Which tokens of a run have logits: those that its input `rows` names, or all."""

PAGE = 32
"""Tokens in a page of the KV cache, unless the caller chooses another number."""


@dataclass(frozen=True)
class KVLayout:
    """Layout of the KV cache: for each layer keys and values [pages, n_kv_heads, page, head_dim], and a page table.

    A page holds `page` tokens of one sequence. Inside a page the positions of one head are contiguous. Page 0 belongs
    to no sequence: rows that pad a run write there. The page table i32[slots + 1, pages_per_sequence] names the pages
    of the sequence in each slot; its last row is for padding and names page 0 only.
    """

    n_layers: int
    pages: int
    n_kv_heads: int
    page: int
    head_dim: int
    slots: int
    context: int
    """Tokens that a sequence may have. RoPE frequencies with dynamic scaling are those of a text of this length."""
    dtype: KVType = "f32"

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        context: int,
        dtype: KVType = "f32",
        slots: int = 1,
        tokens: int | None = None,
        page: int = PAGE,
    ) -> KVLayout:
        """The layout for a model and up to `slots` sequences of up to `context` tokens each.

        `tokens` is how many tokens all sequences may have together, default slots · context.
        """
        pages = 1 + (slots * ceil_div(context, page) if tokens is None else ceil_div(tokens, page))
        return cls(config.n_layers, pages, config.n_kv_heads, page, config.head_dim, slots, context, dtype)

    @property
    def pages_per_sequence(self) -> int:
        """Entries in a row of the page table: pages that a whole context takes."""
        return ceil_div(self.context, self.page)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the keys, or of the values, of one layer."""
        return (self.pages, self.n_kv_heads, self.page, self.head_dim)

    @property
    def table_shape(self) -> tuple[int, int]:
        """Shape of the page table."""
        return (self.slots + 1, self.pages_per_sequence)

    @property
    def table_nbytes(self) -> int:
        """Bytes of the page table."""
        return nbytes_of(self.table_shape, "i32")

    @property
    def tokens(self) -> int:
        """Tokens that fit the cache, over all sequences."""
        return (self.pages - 1) * self.page

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache, without the page table."""
        return 2 * self.n_layers * nbytes_of(self.shape, self.dtype)


PAGE_TABLE = "page_table"
"""Name of the page table among a graph's states."""
NOT_CACHED = frozenset({PAGE_TABLE, *EXCHANGE})
"""Names of states that are not keys and values."""


class Builder:
    """A graph under construction, and the building blocks of all architectures' layers."""

    def __init__(
        self,
        graph: Graph,
        config: ModelConfig,
        types: Mapping[str, WeightType],
        kv: KVLayout,
        tokens: int,
        int8_activations: bool,
        activations: ActivationType,
    ) -> None:
        self.graph, self.config = graph, config
        self._types, self._kv = types, kv
        self._activation_types = dict(VEC_DOT_TYPE) if activations == "int8" else {}
        if int8_activations or activations == "int8":
            self._activation_types["int8"] = ""
        self._shapes = config.weight_shapes()
        self._quantized: dict[tuple[str, str], tuple[Value, ...]] = {}
        self.ids = graph.input("ids", (tokens,), "i32")
        positions, sequences = (graph.input(name, (tokens,), "i32") for name in ("positions", "sequences"))
        self._where = positions, sequences, graph.state(PAGE_TABLE, kv.table_shape, "i32")
        frequencies = graph.constant("rope_frequencies", rope_frequencies(config, kv.context))
        self._angles = graph.add(
            "rope_angles", self._where[0], frequencies, out="angles", scale=attention_factor(config)
        )

    def weight(self, name: str) -> Value:
        """The weight that `config.weight_shapes()` lists under this name."""
        return self.graph.weight(name, self._shapes[name], self._types[name].name)

    def norm(self, x: Value, name: str, out: str) -> Value:
        """RMSNorm of whole rows by the weight `name`."""
        return self.graph.add("rmsnorm", x, self.weight(name), out=out, eps=self.config.norm_eps)

    def linear(self, x: Value, name: str, out: str) -> Value:
        """x · weightᵀ. Where activations are int8, x is quantised first, once per way of quantising."""
        graph, weight_type = self.graph, self._types[name]
        if weight_type.name not in self._activation_types:
            return graph.add("linear", x, self.weight(name), out=out)
        group = weight_type.group
        attrs = {"group": group} if group else {}
        activation = self._activation_types[weight_type.name]  # "": int8 in the weight's own groups
        key = (x.name, activation or str(group))
        if key not in self._quantized:
            names = [f"{x.name}_{activation}{part}" for part in ("", "_scales", "_sums")]
            if not activation:
                names = [f"{x.name}_q{group}", f"{x.name}_scale{group}"]
            op = f"quantize_{activation}" if activation else "quantize"
            self._quantized[key] = graph.add(op, x, out=names, **attrs)
        return graph.add("linear", *self._quantized[key], self.weight(name), out=out, **attrs)

    def project(self, x: Value, p: str, which: str, out: str, biased: bool = False) -> Value:
        """x · weightᵀ, plus the bias if `biased`: the weight is `{p}w{which}`, the bias `{p}b{which}`."""
        y = self.linear(x, f"{p}w{which}", f"{p}{out}")
        return self.graph.add("bias", y, self.weight(f"{p}b{which}"), out=f"{p}{out}_biased") if biased else y

    def attend(self, q: Value, k: Value, v: Value, p: str) -> Value:
        """RoPE, the writes to the KV cache, and attention. Returns [T, n_heads · head_dim]."""
        graph, config = self.graph, self.config
        rotation = {"head_dim": config.head_dim, "interleaved": int(config.rope_pairing == INTERLEAVED)}
        q, k = (graph.add("rope", y, self._angles, out=f"{y.name}_rope", **rotation) for y in (q, k))
        k_cache, v_cache = (graph.state(f"{p}{name}_cache", self._kv.shape, self._kv.dtype) for name in "kv")
        k_cache = graph.add("kv_write", k, k_cache, *self._where, out=f"{p}k_cache'")
        v_cache = graph.add("kv_write", v, v_cache, *self._where, out=f"{p}v_cache'")
        window = config.window
        scores = graph.add("attention_scores", q, k_cache, *self._where, out=f"{p}scores", window=window)
        weights = graph.add("softmax", scores, out=f"{p}probabilities")
        return graph.add("attention_values", weights, v_cache, *self._where, out=f"{p}attn_out", window=window)

    def classify(self, x: Value, p: str = "") -> Value:
        """The final norm and the classifier. Returns `{p}logits` [T, vocab]."""
        x = self.norm(x, "norm", f"{p}final")
        return self.linear(x, "tok_embeddings" if self.config.tied_embeddings else "output", f"{p}logits")


def llama_layer(b: Builder, x: Value, p: str) -> Value:
    """One layer of Llama, Mistral, Qwen2 or Qwen3. The names of its weights begin with `p`."""
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
"""Class of a config → function that adds one layer to the graph. An architecture that `ModelConfig` cannot describe has
a subclass of it, and a function here."""


def build(
    config: ModelConfig,
    types: Mapping[str, WeightType],
    kv: KVLayout,
    tokens: int = 1,
    logits: Logits = "rows",
    int8_activations: bool = False,
    activations: ActivationType = "f32",
    lens: bool = False,
) -> Graph:
    """The graph of a model for up to `tokens` tokens per run.

    `types` maps each name of `config.weight_shapes()` to its type. The result is `logits`[R, vocab] and `next`[R],
    their argmax. With `logits` "all", or for a single token, every token has logits: R = `tokens`. With "rows", the
    input `rows` names those that have: R is the number of slots, or `tokens` if that is less. With `int8_activations`
    the input of every int8 weight is quantised first, in the weight's groups; with `activations` "int8" that of every
    weight of blocks as well, as `VEC_DOT_TYPE` says. With `lens`, the output of each layer before the last also goes
    through the final norm and the classifier: `layers.N.lens_logits` are the logits if the model ended there.

    Raises `Error` if no op reads one of the config's weights.
    """
    graph = Graph(f"llama, {tokens} token{'s' if tokens > 1 else ''}")
    b = Builder(graph, config, types, kv, tokens, int8_activations, activations)
    x = graph.add("embedding", b.ids, b.weight("tok_embeddings"), out="x")
    for layer in range(config.n_layers):
        x = LAYERS[type(config)](b, x, f"layers.{layer}.")
        if lens and layer < config.n_layers - 1:
            b.classify(x, f"layers.{layer}.lens_")
    if logits == "rows" and tokens > 1:
        rows = graph.input("rows", (min(kv.slots, tokens),), "i32")
        x = graph.add("rows", x, rows, out="x_rows")
    result = b.classify(x)
    graph.outputs = [result.name, graph.add("argmax", result, out="next").name]
    readers = graph.consumers()
    if unread := [name for name in config.weight_shapes() if not readers.get(name)]:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise Error(
            f"no op reads {', '.join(unread[:3])}{more}: {LAYERS[type(config)].__name__} must read each weight that "
            f"{type(config).__name__}.layer_shapes has"
        )
    return graph
