"""Drawings: well-formed SVG that names every op and value."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from hypothesis import given, settings

from numballama.fusion import fuse
from numballama.ir import Graph
from numballama.plan import lower
from numballama.visualize import draw_graph, draw_plan
from tests.helpers.graphs import graphs, llama

SVG = "{http://www.w3.org/2000/svg}"


def titles(svg: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def odd_names() -> Graph:
    graph = Graph("<&>")
    x = graph.input("a<b>&\"'", (1, 4), "f32")
    graph.outputs = [graph.add("add", x, x, out="</title>").name]
    return graph


@given(graphs())
@settings(max_examples=25)
def test_a_graph_has_a_box_an_op(graph: Graph) -> None:
    svg = draw_graph(graph)
    assert titles(svg) == [str(op) for op in graph.ops]
    root = ElementTree.fromstring(svg)
    boxes = [box for group in root.findall(f"{SVG}g") for box in group.findall(f"{SVG}rect")]
    corners = [tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height")) for box in boxes]
    assert len(set(corners)) == len(graph.ops), "no two lie on each other"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in corners)
    made = {name for op in graph.ops for name in op.outputs}
    edges = sum(len(made.intersection(op.inputs)) for op in graph.ops)
    assert len(root.findall(f"{SVG}path")) == edges, "a line from each op whose result another reads"


def test_a_model_is_drawn_with_every_op_and_value() -> None:
    graph = fuse(llama(tokens=3), "cpu")
    assert titles(graph._repr_svg_()) == [str(op) for op in graph.ops]
    plan = lower(graph, "cpu")
    assert [title.partition(":")[0] for title in titles(plan._repr_svg_())] == list(plan.placements)
    assert draw_graph(Graph("empty")).startswith("<svg")


def test_names_are_escaped() -> None:
    graph = odd_names()
    assert titles(draw_graph(graph)) == [str(graph.ops[0])]
    assert titles(draw_plan(lower(graph, "cpu")))[1].startswith("</title>: 16 bytes at ")


def rectangles(svg: str) -> Sequence[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}rect")


@given(graphs())
@settings(max_examples=25)
def test_svg_has_a_rectangle_a_value_inside_the_picture(graph: Graph) -> None:
    plan = lower(graph, "cpu")
    background, *found = rectangles(plan._repr_svg_())
    assert len(found) == len(plan.placements)
    for rectangle, name in zip(found, plan.placements, strict=True):
        x, y, w, h = (float(rectangle.attrib[key]) for key in ("x", "y", "width", "height"))
        assert w > 0 and h > 0 and x >= 0 and x + w <= float(background.attrib["width"]) + 0.2
        assert y > -1 and y + h <= float(background.attrib["height"])
        title = rectangle.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and (title.text or "").startswith(f"{name}:")


def test_svg_escapes_names() -> None:
    graph = Graph("<&>")
    x = graph.input("a<b>&\"'", (1, 4), "f32")
    graph.outputs = [graph.add("add", x, x, out="</title>").name]
    assert len(rectangles(lower(graph, "cpu")._repr_svg_())) == 3
