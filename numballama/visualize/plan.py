"""A plan as HTML: the map of its memory, of all steps and of one layer, and the table of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..memory import format_bytes
from .html import COLOURS, chip, escape, fold, frame, heading, svg, table, text_table
from .parts import PARTS, layer_of, parts_of_ops, short_name

if TYPE_CHECKING:
    from ..plan import Plan

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 940, 300, 62, 6, 34
"""Pixels: the whole width, the height of the map, space for the offsets, above, and for the steps below."""
TEXT = 6.4
"""Width of a character in pixels, at most."""


def draw_plan(plan: Plan) -> str:
    """The plan as HTML."""
    states = sum(value.nbytes for value in plan.graph.values.values() if value.kind == "state" and value.alias is None)
    saved = 1 - plan.arena_bytes / max(1, plan.unshared_bytes)
    about = (
        f"{len(plan.steps):,} steps for up to {plan.tokens:,} token{'s' if plan.tokens > 1 else ''}; "
        f"arena {format_bytes(plan.arena_bytes)} ({plan.arena_bytes:,} bytes), a buffer for each value would take "
        f"{format_bytes(plan.unshared_bytes)} ({saved:.0%} saved); KV cache {format_bytes(states)}"
    )
    workers = f"{plan.workers} worker{'s' if plan.workers > 1 else ''}"
    parts = parts_of_ops(plan.graph)
    pieces = [
        heading(f"plan of {plan.graph.name} on {plan.backend}, {workers}", about),
        f"<div>{' &nbsp; '.join(chip(part) + part for part in PARTS if part in parts)}</div>",
        _draw_map(plan, parts, 0, len(plan.steps), plan.arena_bytes, _lines(plan)),
    ]
    layer = [index for index, step in enumerate(plan.steps) if layer_of(step.op.outputs[0]) == 0]
    if layer and len(layer) < len(plan.steps):
        first, end = layer[0], layer[-1] + 1
        top = _top_of(plan, first, end)
        title = f"<b>layer 0</b>, enlarged: the lowest {format_bytes(top)} of the arena"
        pieces.append(fold(title, _draw_map(plan, parts, first, end, top)))
    pieces.append(fold("<b>steps</b>", _steps(plan)))
    return frame("".join(pieces))


def _top_of(plan: Plan, begin: int, end: int) -> int:
    """The end of the part of the arena that steps [begin, end) write to."""
    steps = plan.steps[begin:end]
    written = {name for step in steps for name in (*step.op.outputs, *(value.name for value in step.scratch))}
    return max(
        (p.offset + p.nbytes for name, p in plan.placements.items() if name in written), default=plan.arena_bytes
    )


def _lines(plan: Plan) -> list[str]:
    """The map as text: where each value is. Layers like the first are left out."""
    rows = [
        (name, f"{place.nbytes:,}", f"{place.offset:,}", f"{place.first} to {place.last}")
        for name, place in plan.placements.items()
        if layer_of(name) in (None, 0)
    ]
    return text_table(["value", "bytes", "at", "steps"], rows)


def _draw_map(plan: Plan, parts: list[str], begin: int, end: int, top: int, lines: Iterable[str] = ()) -> str:
    """SVG of steps [begin, end) from left to right, and offsets up to `top` upwards: a rectangle for each value.

    A rectangle has the colour of the part that writes the value, and its name where there is room.
    """
    writer = {name: part for step, part in zip(plan.steps, parts, strict=True) for name in step.op.outputs}
    writer |= {value.name: part for step, part in zip(plan.steps, parts, strict=True) for value in step.scratch}
    width, arena = WIDTH - LEFT - 4, max(1, top)
    boxes = []
    for name, place in plan.placements.items():
        first, last = max(place.first, begin), min(place.last, end - 1)
        if first > last or place.offset >= arena:
            continue
        x, w = LEFT + (first - begin) / (end - begin) * width, (last - first + 1) / (end - begin) * width
        h = max(1.0, place.nbytes / arena * HEIGHT)
        y = TOP + HEIGHT - place.offset / arena * HEIGHT - h
        colour = COLOURS[writer.get(name, "other")]
        label = short_name(name).rpartition("/")[2]
        text = ""
        if h >= 11 and w >= len(label) * TEXT + 6:
            text = f'<text x="{x + 3:.1f}" y="{y + h / 2 + 4:.1f}" class="m">{escape(label)}</text>'
        boxes.append(
            f"<g><title>{escape(name)}: {place.nbytes:,} bytes at {place.offset:,}, steps {place.first} to "
            f'{place.last}</title>\n<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill="{colour}" '
            f'fill-opacity=".38" stroke="{colour}" stroke-width=".6"/>{text}</g>'
        )
    height = TOP + HEIGHT + BOTTOM
    return svg(WIDTH, height, [_offsets(arena), *boxes, _ruler(plan, begin, end, width)], lines)


def _offsets(arena: int) -> str:
    """The frame, and the offsets in the arena at its left."""
    marks = []
    for quarter in range(5):
        y = TOP + HEIGHT * (1 - quarter / 4)
        marks.append(
            f'<path d="M{LEFT - 4},{y:.1f} H{WIDTH - 4}" stroke="currentColor" stroke-opacity=".18"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end" class="q">'
            f"{format_bytes(arena * quarter / 4) if quarter else 0}</text>\n"
        )
    return "".join(marks)


def _ruler(plan: Plan, begin: int, end: int, width: float) -> str:
    """Below the map: where each layer begins or, if there are few steps, the op of each step."""

    def x(step: int) -> float:
        return LEFT + (step - begin) / (end - begin) * width

    y, marks = TOP + HEIGHT, []
    ops = [step.op for step in plan.steps[begin:end]]
    names = [op.kind for op in ops]
    if end - begin <= 12 and max(map(len, names)) * TEXT <= width / len(ops) * 2:
        for index, name in enumerate(names):
            line = y + 14 + 13 * (index % 2)  # in two lines, so that neighbours do not touch
            marks.append(f'<text x="{x(begin + index) + 2:.1f}" y="{line}" class="q">{escape(name)}</text>\n')
        return "".join(marks)
    free = 0.0
    for index, op in enumerate(ops, begin):
        layer = layer_of(op.outputs[0])
        if layer is None or (index > begin and layer_of(ops[index - begin - 1].outputs[0]) == layer):
            continue
        marks.append(f'<path d="M{x(index):.1f},{y} v5" stroke="currentColor" stroke-opacity=".6"/>')
        if x(index) >= free:
            marks.append(f'<text x="{x(index) + 2:.1f}" y="{y + 15}" class="q">layer {layer}</text>\n')
            free = x(index) + 56
    marks.append(f'<text x="{WIDTH - 4}" y="{y + 29}" text-anchor="end" class="q">steps {begin} to {end - 1} →</text>')
    return "".join(marks)


def _steps(plan: Plan) -> str:
    """The steps as a table: kernel, what it reads, and where its results are. Layers like the first are left out."""
    rows = []
    for index, step in enumerate(plan.steps):
        layer = layer_of(step.op.outputs[0])
        if layer is not None and layer > 0:
            continue
        places = []
        for name in (*step.op.outputs, *(value.name for value in step.scratch)):
            place = plan.placements.get(name)
            where = f"at {place.offset:,} ({place.nbytes:,} bytes)" if place else f"in {plan.graph.root(name)}"
            places.append(f"{short_name(name).rpartition('/')[2]} {where}")
        reads = ", ".join(map(short_name, step.op.inputs))
        rows.append(
            [str(index), escape(step.op.kind), escape(step.kernel.name), escape(reads), escape(", ".join(places))]
        )
    layers = {layer_of(step.op.outputs[0]) for step in plan.steps} - {None, 0}
    note = '<div class="muted">Of the layers, layer 0 is listed; print(plan) lists every step.</div>' if layers else ""
    return table(["step", "op", "kernel", "reads", "writes"], rows, "lllww") + note
