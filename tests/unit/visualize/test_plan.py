"""The map of a plan's memory: a rectangle for each value, where and while it is alive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from numballama.fusion import fuse
from numballama.ir import Graph
from numballama.plan import lower
from numballama.visualize.plan import HEIGHT, LEFT, TOP, WIDTH
from tests.helpers.graphs import graphs, llama
from tests.helpers.markup import Element, parsed, tags
from tests.helpers.viewers import shown_by_jupyterlab


def places(svg: Element) -> dict[str, Element]:
    """Name of a value → its rectangle."""
    found = {}
    for group in svg.all("g"):
        (title,), (rectangle,) = group.all("title"), group.all("rect")
        found[title.own_text.rpartition(": ")[0]] = rectangle
    return found


@given(graphs())
@settings(max_examples=25)
def test_a_rectangle_for_each_value_inside_the_map(graph: Graph) -> None:
    plan = lower(graph, "cpu")
    (svg,) = parsed(plan._repr_html_()).all("svg")
    found = places(svg)
    assert list(found) == list(plan.placements)
    for name, rectangle in found.items():
        x, y, w, h = (rectangle.number(key) for key in ("x", "y", "width", "height"))
        assert w > 0 and h > 0 and x >= LEFT - 0.1 and x + w <= WIDTH
        assert y >= TOP - 1 and y + h <= TOP + HEIGHT + 0.1
        place = plan.placements[name]
        steps = len(plan.steps)
        assert abs(w / (WIDTH - LEFT - 4) - (place.last - place.first + 1) / steps) < 0.01


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_plan_of_a_model(backend: str) -> None:
    plan = lower(fuse(llama(), backend), backend)
    root = parsed(plan._repr_html_())
    whole, layer = root.all("svg")
    assert list(places(whole)) == list(plan.placements)
    written = {name for name in plan.placements if name.startswith("layers.0.")}
    assert written <= places(layer).keys() and "logits" not in places(layer)
    named = {text.own_text for text in layer.all("text")}
    assert {"ffn_hidden", "attn_out"} <= named and {step.op.kind for step in plan.steps if "q" in step.op.kind} <= named
    assert {"layer 0", "layer 1"} <= {text.own_text for text in whole.all("text")}
    assert f"({plan.arena_bytes:,} bytes)" in root.text and "% saved" in root.text
    rows = [[cell.text for cell in row.children] for row in root.all("tr")]
    assert rows[2][:3] == ["1", "embedding", "embedding"], "the steps, with their kernels"
    assert len(rows) - 1 == len([step for step in plan.steps if "layers.1." not in step.op.outputs[0]])


def test_the_text_beside_a_map() -> None:
    """What JupyterLab shows before a notebook is trusted: where each value is, and none of the map's words."""
    plan = lower(fuse(llama(), "cpu"), "cpu")
    shown = shown_by_jupyterlab(parsed(plan._repr_html_()))
    (text,) = shown.all("pre")
    headings, *rows = (line.split(maxsplit=3) for line in text.text.splitlines())
    assert headings == ["value", "bytes", "at", "steps"]
    places = {name: place for name, place in plan.placements.items() if not name.startswith("layers.1.")}
    assert rows == [
        [name, f"{place.nbytes:,}", f"{place.offset:,}", f"{place.first} to {place.last}"]
        for name, place in places.items()
    ]
    assert "layers.1." not in shown.text and "steps 0 to" not in shown.text


def test_names_are_escaped() -> None:
    graph = Graph("<&>")
    x = graph.input("a<b>&\"'", (1, 4), "f32")
    graph.outputs = [graph.add("add", x, x, out="</title><script>").name]
    root = parsed(lower(graph, "cpu")._repr_html_())
    assert "script" not in tags(root)
    (svg,) = root.all("svg")
    assert list(places(svg)) == ["a<b>&\"'", "</title><script>"]
