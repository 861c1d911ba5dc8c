"""Places of boxes and edges: nothing lies on anything else, and every edge goes down."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from numballama.visualize.layout import GAP, LANE, place


@st.composite
def drawings(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, int]]]:
    count = draw(st.integers(1, 14))
    pairs = list(combinations(range(count), 2))
    edges = draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    return draw(st.lists(st.floats(10, 300), min_size=count, max_size=count)), edges


@given(drawings())
@settings(max_examples=60)
def test_nothing_overlaps(drawing: tuple[list[float], list[tuple[int, int]]]) -> None:
    widths, edges = drawing
    layout = place(widths, edges)
    rows: dict[int, list[tuple[float, float]]] = {}  # level → (centre, width) of boxes and of edges that pass
    for centre, width, level in zip(layout.centres, widths, layout.levels, strict=True):
        rows.setdefault(level, []).append((centre, width))
        assert centre - width / 2 > -1e-6 and centre + width / 2 < layout.width + 1e-6
    for (source, target), route in zip(edges, layout.routes, strict=True):
        assert layout.levels[target] > layout.levels[source]
        assert len(route) == layout.levels[target] - layout.levels[source] + 1
        assert (route[0], route[-1]) == (layout.centres[source], layout.centres[target])
        for level, x in enumerate(route[1:-1], layout.levels[source] + 1):
            rows[level].append((x, LANE))
    for row in rows.values():
        for (left, one), (right, other) in combinations(sorted(row), 2):
            assert right - left > (one + other) / 2 + GAP - 1e-6


def test_a_chain_stands_in_a_line_and_a_long_edge_is_straight() -> None:
    layout = place([100.0] * 5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)])
    assert layout.levels == [0, 1, 2, 3, 4]
    assert max(layout.centres[1:4]) - min(layout.centres[1:4]) < 5
    passing = layout.routes[4][1:4]
    assert max(passing) - min(passing) < 5


def test_edges_do_not_cross_where_they_need_not() -> None:
    """The two boxes below change places."""
    layout = place([50.0] * 4, [(0, 3), (1, 2)])
    assert (layout.centres[0] < layout.centres[1]) == (layout.centres[3] < layout.centres[2])


def test_nothing_to_place() -> None:
    assert place([], []).width == 0
