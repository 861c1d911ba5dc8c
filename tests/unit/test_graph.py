"""The graph that a config declares: ops, names and shapes of a layer, the variants, and the KV cache's layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from numballama import Error
from numballama.config import ModelConfig
from numballama.fusion import fuse
from numballama.graph import LAYERS, Builder, KVLayout, build, llama_layer
from numballama.ir import Value, verify
from numballama.quantization.types import F32, VEC_DOT_TYPE, WeightType
from tests.helpers.graphs import SMALL, kinds, llama

LAYER = {"rmsnorm": 2, "linear": 7, "rope": 2, "kv_write": 2, "attention_scores": 1, "softmax": 1}
LAYER |= {"attention_values": 1, "add": 2, "swiglu": 1}


def test_a_layer_reads_like_the_model() -> None:
    graph = llama()
    verify(graph)
    layers = SMALL.n_layers
    rest = {"rope_angles": 1, "embedding": 1, "argmax": 1}
    found = {kind: layers * count for kind, count in LAYER.items()} | rest
    assert kinds(graph) == found | {"rmsnorm": 2 * layers + 1, "linear": 7 * layers + 1}
    first = [op.kind for op in graph.ops if any(name.startswith("layers.0.") for name in op.outputs)]
    assert first == [
        "rmsnorm", "linear", "linear", "linear", "rope", "rope", "kv_write", "kv_write", "attention_scores", "softmax",
        "attention_values", "linear", "add", "rmsnorm", "linear", "linear", "swiglu", "linear", "add",
    ]  # fmt: skip
    weights = {name for name, value in graph.values.items() if value.kind == "weight"}
    assert weights == SMALL.weight_shapes().keys()
    assert {name for name, value in graph.values.items() if value.kind == "input"} == {"ids", "positions", "sequences"}


def test_logits_of_chosen_rows_or_of_all() -> None:
    for tokens in (1, 4):
        chosen, whole = llama(tokens=tokens), llama(tokens=tokens, logits="all")
        assert chosen.outputs == whole.outputs == ["logits", "next"]
        assert chosen.values["logits"].shape == (1, SMALL.vocab_size) and chosen.values["next"].shape == (1,)
        assert whole.values["logits"].shape == (tokens, SMALL.vocab_size)
        assert kinds(chosen)["rows"] == (tokens > 1) and kinds(whole)["rows"] == 0
        assert ("rows" in chosen.values) == (tokens > 1)
    types = dict.fromkeys(SMALL.weight_shapes(), F32)
    for slots, tokens, rows in ((3, 5, 3), (3, 2, 2)):
        graph = build(SMALL, types, KVLayout.of(SMALL, 8, slots=slots), tokens)
        assert graph.values["rows"].shape == (rows,) and graph.values["logits"].shape == (rows, SMALL.vocab_size)
    assert llama().name == "llama, 1 token" and llama(tokens=4).name == "llama, 4 tokens"


def test_the_lens_classifies_each_layers_output() -> None:
    types = dict.fromkeys(SMALL.weight_shapes(), F32)
    graph = build(SMALL, types, KVLayout.of(SMALL, 8), 3, "all", lens=True)
    verify(graph)
    made = {name: op for op in graph.ops for name in op.outputs}
    for layer in range(SMALL.n_layers - 1):
        name = f"layers.{layer}.lens_logits"
        assert graph.values[name].shape == (3, SMALL.vocab_size) and made[name].inputs[1] == made["logits"].inputs[1]
        assert made[made[name].inputs[0]].inputs == (f"layers.{layer}.x_out", "norm")
    plain = llama(tokens=3, logits="all")
    assert [op for op in graph.ops if ".lens_" not in op.outputs[0]] == plain.ops, "the model is the same"
    assert len(graph.ops) == len(plain.ops) + 2 * (SMALL.n_layers - 1)


def test_the_classifier_may_be_the_embedding_table() -> None:
    for tied, name in ((True, "tok_embeddings"), (False, "output")):
        graph = llama(replace(SMALL, tied_embeddings=tied))
        (op,) = (op for op in graph.ops if op.outputs == ("logits",))
        assert op.inputs == ("final", name)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"qkv_bias": True}, {"bias": 3}),
        ({"o_bias": True}, {"bias": 1}),
        ({"mlp_bias": True}, {"bias": 3}),
        ({"qk_norm": True}, {"head_norm": 2}),
    ],
)
def test_optional_parts_of_a_layer(options: dict[str, bool], more: dict[str, int]) -> None:
    graph = llama(replace(SMALL, **options))  # type: ignore[arg-type]
    verify(graph)
    assert kinds(graph) - kinds(llama()) == {kind: SMALL.n_layers * count for kind, count in more.items()}


def test_attributes_come_from_the_config() -> None:
    config = replace(SMALL, window=3, norm_eps=1e-6, rope_pairing="half")
    attrs = {op.kind: dict(op.attrs) for op in llama(config).ops}
    assert attrs["attention_scores"] == attrs["attention_values"] == {"window": 3}
    assert attrs["rmsnorm"] == {"eps": 1e-6}
    assert attrs["rope"] == {"head_dim": SMALL.head_dim, "interleaved": 0}
    assert {op.kind: dict(op.attrs) for op in llama().ops}["rope"]["interleaved"] == 1


def test_int8_activations_are_quantised_once_for_all_readers() -> None:
    graph = llama(kind="int8", int8=True)
    assert kinds(graph)["quantize"] == 4 * SMALL.n_layers + 1
    fused = fuse(graph, "cpu")
    verify(fused)
    assert kinds(fused)["qkv"] == kinds(fused)["gate_up"] == 2 and kinds(fused)["linear_add"] == 4


@pytest.mark.parametrize("kind", VEC_DOT_TYPE)
def test_activations_for_weights_of_blocks(kind: str) -> None:
    """With `activations="int8"` x is quantised as the weight's type wants, and not otherwise."""
    config = ModelConfig(256, 256, 2, 4, 2, 20, 8)
    types = {name: WeightType(kind) if len(shape) == 2 else F32 for name, shape in config.weight_shapes().items()}
    plain, rounded = (build(config, types, KVLayout.of(config, 8), activations=what) for what in ("f32", "int8"))  # type: ignore[arg-type]
    verify(rounded)
    assert not [op for op in plain.ops if op.kind.startswith("quantize")]
    assert kinds(rounded)[f"quantize_{VEC_DOT_TYPE[kind]}"] == 4 * config.n_layers + 1


def test_an_architecture_of_its_own_has_a_layer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Twice(ModelConfig):
        pass

    def layer(b: Builder, x: Value, p: str) -> Value:
        y = llama_layer(b, x, p)
        return b.graph.add("add", y, y, out=f"{p}twice")

    monkeypatch.setitem(LAYERS, Twice, layer)
    config = Twice(**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})
    assert kinds(llama(config)) - kinds(llama()) == {"add": SMALL.n_layers}


def test_a_layer_reads_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose biases are forgotten would write wrong text."""

    def without_biases(b: Builder, x: Value, p: str) -> Value:
        monkeypatch.setattr(b, "config", replace(b.config, qkv_bias=False))
        return llama_layer(b, x, p)

    llama(replace(SMALL, qkv_bias=True))
    monkeypatch.setitem(LAYERS, ModelConfig, without_biases)
    with pytest.raises(Error, match=r"no op reads layers\.0\.bq, .* and 3 more: without_biases must "):
        llama(replace(SMALL, qkv_bias=True))


def test_layout_of_the_kv_cache() -> None:
    layout = KVLayout.of(SMALL, 7, "f16", slots=3, page=4)
    assert layout.shape == (1 + 3 * 2, SMALL.n_kv_heads, 4, SMALL.head_dim)
    assert layout.table_shape == (4, 2) and layout.context == 7 and layout.tokens == 24
    assert layout.nbytes == 2 * SMALL.n_layers * 7 * SMALL.n_kv_heads * 4 * SMALL.head_dim * 2
    assert KVLayout.of(SMALL, 7, "f16", slots=3, page=4, tokens=9).pages == 1 + 3
    graph = build(SMALL, dict.fromkeys(SMALL.weight_shapes(), F32), layout)
    states = [value for value in graph.values.values() if value.kind == "state" and value.alias is None]
    assert sum(value.nbytes for value in states if value.name != "page_table") == layout.nbytes
