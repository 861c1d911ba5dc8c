"""Drawings for a notebook, as SVG: a graph with its data flow, and a plan with its memory map."""

from __future__ import annotations

from colorsys import hls_to_rgb
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ir import Graph
    from .plan import Plan


def draw_graph(graph: Graph) -> str:
    """SVG of a graph: each op is below the ops that it reads from, with a line from each of them."""
    depth: dict[str, int] = {}
    spots: dict[str, tuple[int, int]] = {}
    rows: dict[int, int] = {}
    boxes, lines = [], []
    for op in graph.ops:
        level = 1 + max((depth.get(name, -1) for name in op.inputs), default=-1)
        x, y = rows.get(level, 0) * 250 + 10, level * 44 + 10
        rows[level] = rows.get(level, 0) + 1
        for name in dict.fromkeys(op.inputs):
            if name in spots:
                from_x, from_y = spots[name]
                lines.append(f'<path d="M{from_x},{from_y} L{x + 115},{y}" stroke="#99a"/>')
        for name in op.outputs:
            depth[name], spots[name] = level, (x + 115, y + 28)
        title = escape(str(op))
        boxes.append(
            f'<g><title>{title}</title><rect x="{x}" y="{y}" width="230" height="28" fill="#eef" stroke="#556"/>'
            f'<text x="{x + 8}" y="{y + 18}"><tspan font-weight="bold">{escape(op.kind)}</tspan> '
            f"{escape(op.outputs[0])}</text></g>"
        )
    width, height = max(rows.values(), default=1) * 250 + 10, len(rows) * 44 + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>{"".join(lines + boxes)}</svg>'
    )


def draw_plan(plan: Plan) -> str:
    """SVG of a plan's memory map: steps from left to right, arena offsets upwards, a rectangle for each value."""
    width, height, steps = 900, 320, len(plan.steps)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 24}" font-family="sans-serif">'
        f'<rect width="{width}" height="{height + 24}" fill="#fff"/>'
    ]
    for index, (name, place) in enumerate(plan.placements.items()):
        x, w = place.first / steps * width, (place.last - place.first + 1) / steps * width
        h = max(1.0, place.nbytes / plan.arena_bytes * height)
        y = height - place.offset / plan.arena_bytes * height - h
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{_colour(index)}"'
            f' stroke="#555" stroke-width="0.3"><title>{escape(name)}: {place.nbytes:,} bytes at {place.offset:,},'
            f" steps {place.first}-{place.last}</title></rect>"
        )
    text = f"{steps} steps; arena {plan.arena_bytes:,} bytes instead of {plan.unshared_bytes:,}"
    parts.append(f'<text x="4" y="{height + 17}" font-size="13">{text}</text></svg>')
    return "".join(parts)


def _colour(index: int) -> str:
    """A light colour; neighbouring indices get different hues."""
    red, green, blue = (int(255 * part) for part in hls_to_rgb(index * 0.13 % 1, 0.72, 0.6))
    return f"#{red:02x}{green:02x}{blue:02x}"
