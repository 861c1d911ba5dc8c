"""Drawings of graphs: a box an op, a line an edge with its shape and type, layers folded."""

from __future__ import annotations

from hypothesis import given, settings

from numballama.fusion import fuse
from numballama.graph import KVLayout, build
from numballama.ir import Graph
from numballama.quantization.types import F16, F32
from numballama.visualize.graph import draw_graph
from tests.helpers.graphs import SMALL, graphs, llama
from tests.helpers.markup import Element, parsed, tags
from tests.helpers.viewers import shown_by_github, shown_by_jupyterlab


def titles(root: Element) -> list[str]:
    return [title.own_text.partition("\n")[0] for title in root.all("title")]


def texts(root: Element) -> list[str]:
    return [text.own_text for text in root.all("text")]


@given(graphs())
@settings(max_examples=25)
def test_a_graph_has_a_box_an_op_and_a_line_an_edge(graph: Graph) -> None:
    root = parsed(draw_graph(graph))
    assert [title for title in titles(root) if " = " in title] == [str(op) for op in graph.ops]
    (svg,) = root.all("svg")
    boxes = [tuple(box.number(key) for key in ("x", "y", "width", "height")) for box in svg.all("rect")]
    assert all(x >= 0 and y >= 0 and x + w <= svg.number("width") + 1 for x, y, w, h in boxes)
    assert all(y + h <= svg.number("height") + 1 for x, y, w, h in boxes)
    results = sum(name in graph.outputs for op in graph.ops for name in op.outputs)
    edges = sum(len(set(op.inputs)) for op in graph.ops) + results
    assert len(list(svg.all("path"))) == edges
    read = {name for op in graph.ops for name in op.inputs}
    assert {str(value) for value in graph.operands(read)} <= set(texts(root)), "shape and type at each edge"


def test_layers_that_are_alike_are_one_fold() -> None:
    graph = llama(tokens=3)
    root = parsed(graph._repr_html_())
    (layers,) = root.all("details")
    summary, *_ = layers.all("summary")
    assert "open" not in layers.attributes
    assert summary.text.startswith("layers 0 to 1, alike: 19 ops, ") and "(f32)" in summary.text
    drawn = [str(op) for op in graph.ops if "layers.1." not in op.outputs[0]]
    assert [title for title in titles(root) if " = " in title] == drawn
    assert "wq: f32[16, 16]" in texts(layers) and "probabilities: f32[3, 4, 32]" in texts(layers)
    assert not [text for text in texts(layers) if "layers." in text]
    dashed = [path for path in layers.all("path") if "stroke-dasharray" in path.attributes]
    assert len(dashed) == 2, "keys and values of the cache"


def test_the_text_beside_a_drawing() -> None:
    """What JupyterLab shows before a notebook is trusted: a line an op, and none of the drawing's words."""
    graph = llama(tokens=3)
    shown = shown_by_jupyterlab(parsed(draw_graph(graph)))
    lines = "".join(f"{each.text}\n" for each in shown.all("pre")).splitlines()
    assert len(lines) == len([op for op in graph.ops if "layers.1." not in op.outputs[0]])
    assert "q: f32[3, 16] = linear(attn_in, wq: f32[16, 16])" in lines
    assert "v_cache' = kv_write(v, v_cache, positions, sequences, page_table)" in lines
    assert lines[-1] == "next: i32[1] = argmax(logits)"
    assert shown.text.count("wq: f32[16, 16]") == 1 and not any("layers.0." in line for line in lines)


def test_a_drawing_needs_no_style_sheet() -> None:
    """GitHub drops it: words must have the page's colour, and fit their boxes."""
    for svg in shown_by_github(parsed(draw_graph(llama()))).all("svg"):
        assert svg.attributes["fill"] == "currentColor"
        assert svg.number("font-size") <= 11 and "sans-serif" in svg.attributes["font-family"]
        assert all("fill" in each.attributes for each in (*svg.all("rect"), *svg.all("path")))


def test_layers_that_differ_are_two_folds() -> None:
    types = dict.fromkeys(SMALL.weight_shapes(), F32) | {"layers.1.w2": F16}
    root = parsed(draw_graph(build(SMALL, types, KVLayout.of(SMALL, 8))))
    assert [summary.text.partition(":")[0] for summary in root.all("summary")] == ["layer 0", "layer 1"]
    assert "w2: f16[16, 24]" in texts(root) and "w2: f32[16, 24]" in texts(root)


def test_a_fused_op_says_what_it_replaces() -> None:
    root = parsed(draw_graph(fuse(llama(), "cpu")))
    assert "= rmsnorm, 3 linear" in texts(root)
    whole = next(title.own_text for title in root.all("title") if title.own_text.startswith("layers.0.q, "))
    assert "linear(layers.0.attn_in, layers.0.wv)" in whole


def test_an_empty_graph_and_hostile_names() -> None:
    assert "0 ops" in parsed(draw_graph(Graph("empty"))).text
    graph = Graph("<script>")
    x = graph.input("a<b>&\"'\x1b", (1, 4), "f32")
    graph.outputs = [graph.add("add", x, x, out="</title></svg><script>").name]
    root = parsed(draw_graph(graph))
    assert "script" not in tags(root) and "\x1b" not in draw_graph(graph)
    assert "</title></svg><script>: f32[1, 4]" in texts(root)
