"""Graphs for the tests of passes, plans and drawings: small models, and random graphs of simple ops."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st

import numballama.cpu.ops
import numballama.cuda.ops
import numballama.reference  # noqa: F401 (these three register their kernels)
from numballama.config import ModelConfig
from numballama.graph import KVLayout, Logits, build
from numballama.ir import Graph
from numballama.quantization.types import F32, WeightType

SMALL = ModelConfig(16, 24, 2, 4, 2, 20, 8)


def llama(
    config: ModelConfig = SMALL, tokens: int = 1, logits: Logits = "rows", kind: str = "f32", int8: bool = False
) -> Graph:
    types = {name: WeightType(kind, 32) if len(shape) == 2 else F32 for name, shape in config.weight_shapes().items()}
    return build(config, types, KVLayout.of(config, config.context), tokens, logits, int8)


def kinds(graph: Graph) -> Counter[str]:
    return Counter(op.kind for op in graph.ops)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph of ops that need nothing but their inputs: values of all sizes, read late, often, or never."""
    graph = Graph("random")
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 70)), min_size=1, max_size=3))
    live = [graph.input(f"in{index}", shape, "f32") for index, shape in enumerate(shapes)]
    for index in range(draw(st.integers(1, 25))):
        a = draw(st.sampled_from(live))
        kind = draw(st.sampled_from(["add", "swiglu", "softmax", "quantize"]))
        if kind == "quantize":
            _, scales = graph.add(kind, a, out=(f"q{index}", f"s{index}"), group=draw(st.integers(1, 9)))
            live.append(scales)
        elif kind == "softmax":
            live.append(graph.add(kind, a, out=f"v{index}"))
        else:
            b = draw(st.sampled_from([value for value in live if value.shape == a.shape]))
            live.append(graph.add(kind, a, b, out=f"v{index}"))
    computed = [name for op in graph.ops for name in op.outputs]
    graph.outputs = draw(st.lists(st.sampled_from(computed), min_size=1, max_size=3, unique=True))
    return graph
