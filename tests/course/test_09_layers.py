"""Solutions of docs/course/09-layers.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from numballama.cpu import ops  # noqa: F401 (registers the kernels)
from numballama.fusion import FUSIONS, fuse
from numballama.ir import Graph, verify
from numballama.quantization.convert import dequantize
from numballama.reference import ReferenceBackend
from tests.course.story import checkpoint, graph, layout

TEXT = "Once upon a time, there was a little girl named"


def ids_of(text: str) -> list[int]:
    tokenizer = checkpoint().tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text)


def run(declared: Graph, ids: list[int]) -> Any:
    backend = ReferenceBackend(checkpoint().weights)
    program = backend.program(declared)
    backend.set_pages(0, 0, range(1, layout().pages))
    program.inputs["ids"][:], program.inputs["positions"][:] = ids, range(len(ids))
    program.inputs["rows"][:] = len(ids) - 1
    program.run(tokens=len(ids))
    return program


def test_1_a_layer_by_hand() -> None:
    ids = ids_of(TEXT)
    program = run(graph(len(ids)), ids)
    w = {name: dequantize(weight) for name, weight in checkpoint().weights.items() if name.startswith("layers.3.")}
    x = program.value("layers.2.x_out") + program.value("layers.3.attn_out") @ w["layers.3.wo"].T
    h = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * w["layers.3.ffn_norm"]
    gate, up = h @ w["layers.3.w1"].T, h @ w["layers.3.w3"].T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["layers.3.w2"].T
    expected = program.value("layers.3.x_out")
    assert np.abs(x - expected).max() < 1e-3 * np.abs(expected).max()


def test_2_passes_that_depend_on_others() -> None:
    """`qkv_rope` joins what `norm` and `rope_kv` made of q, k and v; the CPU has no kernel for the result. `all_reduce`
    joins a linear op with the sum over several GPUs, which a graph for one does not have.
    """
    one = graph()
    alone = {name: len(fuse(one, "cpu", [name]).ops) for name in FUSIONS}
    assert [name for name, count in alone.items() if count == len(one.ops)] == ["all_reduce", "qkv_rope"]
    assert len(fuse(one, "cpu", ["norm"]).ops) == 118, "alone, `norm` finds only the classifier: norm_linear"
    assert len(fuse(one, "cpu", ["norm", "qkv", "gate_up"]).ops) < 118 - 6 * 4


@pytest.mark.slow
def test_3_skip_a_layer() -> None:
    ids = ids_of("Once upon a time, there was a little")
    declared = graph(len(ids))
    kept = [op for op in declared.ops if not op.outputs[0].startswith("layers.3.")]
    kept = [
        replace(op, inputs=tuple("layers.2.x_out" if name == "layers.3.x_out" else name for name in op.inputs))
        for op in kept
    ]
    shorter = declared.replace_ops(kept)
    verify(shorter)
    whole, skipped = (run(each, ids).value("logits")[0] for each in (declared, shorter))
    tokenizer = checkpoint().tokenizer
    assert tokenizer is not None
    words = [tokenizer.decode([int(i)]).strip() for i in skipped.argsort()[::-1][:5]]
    print(words)
    assert "girl" in words and tokenizer.decode([int(whole.argmax())]).strip() == "girl"
