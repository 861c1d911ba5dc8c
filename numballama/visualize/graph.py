"""A graph as HTML: layers folded, alike ones once, and in each a box an op with shapes and types on its edges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

from .html import COLOURS, chip, escape, fold, frame, heading, svg
from .layout import place
from .parts import PARTS, layer_of, parts_of_ops, short_name

if TYPE_CHECKING:
    from ..ir import Graph, Op, Value

LINE, PAD, BETWEEN, MARGIN = 15, 8, 46, 12
"""Height of a line of text, space around the text of a box, space between levels, space around the drawing."""
MONO, BOLD = 6.4, 8.0
"""Widths of a character in pixels, at most."""


def draw_graph(graph: Graph) -> str:
    """The graph as HTML. Runs of layers that differ in names only are one fold, with the first of them drawn."""
    parts = dict(zip(map(id, graph.ops), parts_of_ops(graph), strict=True))
    results = ", ".join(map(str, graph.operands(graph.outputs)))
    pieces = [
        heading(f"graph {graph.name}", f"{len(graph.ops):,} ops; results {results}"),
        f"<div>{' &nbsp; '.join(chip(part) + part for part in PARTS if part in parts.values())}</div>",
    ]
    for run in _runs(graph):
        if len(pieces) > 2:
            entering = ", ".join(_renamed(value) for value in _entering(graph, run[0]))
            pieces.append(f'<div class="mono muted">↓ {escape(entering)}</div>')
        drawing = _draw_section(graph, run[0], parts)
        layer = layer_of(run[0].ops[0].outputs[0])
        pieces.append(drawing if layer is None else fold(_summary(graph, run, layer), drawing))
    return frame("".join(pieces))


@dataclass(frozen=True)
class Section:
    """Consecutive ops of one layer, or of none."""

    ops: Sequence[Op]
    shape: tuple[object, ...] = field(compare=False)
    """What the section is but for names: equal for layers that are alike."""


def _runs(graph: Graph) -> list[list[Section]]:
    """The sections in order; neighbours that are alike are together."""
    sections = []
    for layer, ops in groupby(graph.ops, key=lambda op: layer_of(op.outputs[0])):
        members = list(ops)
        sections.append(Section(members, (object(),) if layer is None else _shape(graph, members)))
    return [list(run) for _, run in groupby(sections, key=lambda section: section.shape)]


def _shape(graph: Graph, ops: Sequence[Op]) -> tuple[object, ...]:
    """Kinds, operands by order of appearance, attributes, shapes and types."""
    numbers: dict[str, int] = {}

    def operand(name: str) -> tuple[object, ...]:
        value = graph.values[name]
        own = short_name(name) if value.kind != "temp" else ""
        return numbers.setdefault(name, len(numbers)), own, value.shape, value.dtype, value.kind

    return tuple(
        (op.kind, *map(operand, op.inputs), "→", *map(operand, op.outputs), tuple(sorted(op.attrs.items())))
        for op in ops
    )


def _entering(graph: Graph, section: Section) -> list[Value]:
    """The computed values that a section reads and does not compute."""
    made = {name for op in section.ops for name in op.outputs}
    names = dict.fromkeys(name for op in section.ops for name in op.inputs if name not in made)
    return [value for value in graph.operands(names) if value.kind == "temp"]


def _leaving(graph: Graph, section: Section) -> list[Value]:
    """The values of a section that others read, or that are results of the graph."""
    inside = {id(op) for op in section.ops}
    read = {name for op in graph.ops if id(op) not in inside for name in op.inputs}
    made = (name for op in section.ops for name in op.outputs)
    return graph.operands(name for name in made if name in read or name in graph.outputs)


def _summary(graph: Graph, run: list[Section], layer: int) -> str:
    """HTML of the line that unfolds a run of layers."""
    first = run[0].ops
    weights = {value.name: value for op in first for value in graph.operands(op.inputs) if value.kind == "weight"}
    parameters = sum(math.prod(value.shape) for value in weights.values())
    types = ", ".join(dict.fromkeys(value.dtype for value in weights.values()))
    name = f"layer {layer}" if len(run) == 1 else f"layers {layer} to {layer + len(run) - 1}, alike"
    each = "" if len(run) == 1 else " each"
    return f"<b>{name}</b>: {len(first)} ops, {parameters:,} parameters{each} ({escape(types)})"


@dataclass
class _Box:
    """A box of the drawing: an op, or a value that enters or leaves the section."""

    lines: list[str]
    title: str
    colour: str = ""
    """That of its part; "" for a value."""
    labels: list[str] = field(default_factory=list)
    """What stands at the beginning of the edges of each output."""

    @property
    def width(self) -> float:
        widths = [len(line) * (BOLD if self.colour and n == 0 else MONO) for n, line in enumerate(self.lines)]
        if len(self.labels) > 1:
            widths.append(len(self.labels) * max(len(label) * MONO + 8 for label in self.labels))
        return max(widths) + 2 * PAD

    @property
    def room(self) -> float:
        """The width that the box takes with its label, which begins in the middle if there is one only."""
        labels = [2 * (len(label) * MONO + 6) for label in self.labels]
        return max([self.width, *(labels if len(labels) == 1 else [])])

    def exit(self, index: int) -> float:
        """Where the edges of output `index` leave the box, from its middle."""
        count = len(self.labels)
        return 0.0 if count < 2 else self.width * (index / count - 0.5) + PAD

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + PAD


def _renamed(value: Value) -> str:
    """Name, type and shape of a value, without its layer."""
    return str(replace(value, name=short_name(value.name)))


def _label(value: Value) -> str:
    """What stands at the beginning of an edge. The box above says the shape of a state."""
    return short_name(value.name) if value.kind == "state" else _renamed(value)


def _draw_section(graph: Graph, section: Section, parts: dict[int, str]) -> str:
    """SVG of a section. Inputs of the graph are boxes outside the layers, and lines of text in the boxes of a layer."""
    in_layer = layer_of(section.ops[0].outputs[0]) is not None
    made = {name for op in section.ops for name in op.outputs}
    boxes: list[_Box] = []
    sources: dict[str, tuple[int, int]] = {}  # value → its box, and which of its outputs
    edges: list[tuple[int, int]] = []
    carried: list[str] = []  # the value of each edge
    for op in section.ops:
        drawn = []
        for value in graph.operands(dict.fromkeys(op.inputs)):
            if value.name in made or value.kind == "temp" or (value.kind == "input" and not in_layer):
                drawn.append(value.name)
                if value.name not in made and value.name not in sources:
                    sources[value.name] = len(boxes), 0
                    boxes.append(_Box([_renamed(value)], str(value)))
        for name in drawn:
            edges.append((sources[name][0], len(boxes)))
            carried.append(name)
        sources |= {name: (len(boxes), n) for n, name in enumerate(op.outputs)}
        boxes.append(_op_box(graph, op, drawn, COLOURS[parts[id(op)]]))
    leaving = {value.name for value in _leaving(graph, section)}
    read = set(carried)
    for op in section.ops:
        box = boxes[sources[op.outputs[0]][0]]
        values = graph.operands(op.outputs)
        box.labels = [_label(value) if value.name in read else "" for value in values]
        for value in values:
            if value.name in leaving and value.kind == "temp":
                edges.append((sources[value.name][0], len(boxes)))
                carried.append(value.name)
                boxes.append(
                    _Box([_renamed(value)], f"{value}, a result" if value.name in graph.outputs else str(value))
                )
    dashed = [graph.values[name].kind == "state" for name in carried]
    return _drawn(boxes, edges, [sources[name] for name in carried], dashed, _lines(graph, section))


def _lines(graph: Graph, section: Section) -> Iterator[str]:
    """The section as text: a line an op."""
    for op in section.ops:
        inputs = (
            _label(value) if value.kind == "weight" else short_name(value.name) for value in graph.operands(op.inputs)
        )
        yield f"{', '.join(map(_label, graph.operands(op.outputs)))} = {op.kind}({', '.join(inputs)})"


def _op_box(graph: Graph, op: Op, drawn: Iterable[str], colour: str) -> _Box:
    lines, others = [op.kind], []
    for value in graph.operands(dict.fromkeys(op.inputs)):
        if value.name in drawn:
            continue
        if value.kind == "weight" or (value.kind == "state" and len(value.shape) == 4):
            lines.append(_renamed(value))
        else:
            others.append(short_name(value.name))
    if others:
        lines.append(f"reads {', '.join(others)}")
    if op.body:
        counts = Counter(part.kind for part in op.body)
        lines.append("= " + ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in counts.items()))
    title = [str(op), *map(str, graph.operands(op.outputs)), *(f"  {part}" for part in op.body)]
    return _Box(lines, "\n".join(title), colour)


def _drawn(
    boxes: list[_Box], edges: list[tuple[int, int]], sources: list[tuple[int, int]], dashed: list[bool],
    lines: Iterable[str],
) -> str:  # fmt: skip
    layout = place([box.room for box in boxes], edges)
    heights = [0.0] * (max(layout.levels, default=-1) + 1)
    for box, level in zip(boxes, layout.levels, strict=True):
        heights[level] = max(heights[level], box.height)
    tops = [MARGIN + sum(heights[:level]) + level * BETWEEN for level in range(len(heights))]
    paths = [
        _path(boxes[edge[0]], layout.levels[edge[0]], route, source[1], tops, heights, dash)
        for edge, route, source, dash in zip(edges, layout.routes, sources, dashed, strict=True)
    ]
    drawn = [
        _box_svg(box, centre + MARGIN, tops[level])
        for box, centre, level in zip(boxes, layout.centres, layout.levels, strict=True)
    ]
    width = layout.width + 2 * MARGIN
    height = (tops[-1] + heights[-1] if tops else 0) + MARGIN
    return svg(width, height, [*paths, *drawn], lines)


def _path(
    box: _Box, level: int, route: list[float], output: int, tops: list[float], heights: list[float],
    dashed: bool,
) -> str:  # fmt: skip
    """An edge: down from its box, straight through each level that it passes, into the top of its target."""
    x, bottom = route[0] + box.exit(output) + MARGIN, tops[level] + heights[level]
    path = [f"M{x:.1f},{tops[level] + box.height:.1f} L{x:.1f},{bottom:.1f}"]
    for below, centre in enumerate(route[1:], level + 1):
        before, x = x, centre + MARGIN
        bends = f"{before:.1f},{bottom + BETWEEN * 0.8:.1f} {x:.1f},{tops[below] - BETWEEN * 0.6:.1f}"
        path.append(f"C{bends} {x:.1f},{tops[below]:.1f}")
        bottom = tops[below] + heights[below]
        if below < level + len(route) - 1:
            path.append(f"L{x:.1f},{bottom:.1f}")
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="{" ".join(path)}" fill="none" stroke="currentColor" stroke-opacity=".5"{dash}/>'


def _box_svg(box: _Box, centre: float, top: float) -> str:
    left, look = centre - box.width / 2, 'fill="none" stroke="currentColor" stroke-opacity=".5" rx="9"'
    if box.colour:
        look = f'fill="{box.colour}" fill-opacity=".16" stroke="{box.colour}" rx="4"'
    texts = [
        f'<text x="{left + PAD:.1f}" y="{top + LINE * (n + 1):.1f}" class="{"b" if box.colour and n == 0 else "m"}">'
        f"{escape(line)}</text>"
        for n, line in enumerate(box.lines)
    ]
    for n, label in enumerate(box.labels):
        if label:
            x = centre + box.exit(n) + 4
            texts.append(f'<text x="{x:.1f}" y="{top + box.height + 12:.1f}" class="m q">{escape(label)}</text>')
    title = "".join(escape(line) + "&#10;" for line in box.title.split("\n")).removesuffix("&#10;")
    return (
        f'<g><title>{title}</title>\n<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" {look}/>{chr(10).join(texts)}</g>'
    )
