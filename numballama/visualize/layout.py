"""Places the boxes of a directed graph in levels, and its edges between them (Sugiyama's method).

Every box is below those that it reads from. An edge that passes levels gets a place in each of them, so that it does
not run through a box. Boxes are ordered within a level so that few edges cross, and moved towards their neighbours.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 12
GAP = 18.0
"""Least space between neighbours in a level, in pixels."""
LANE = 6.0
"""Width of an edge that passes a level."""
LANE_WEIGHT = 8.0
"""How much an edge that passes levels resists being moved, where a box has 1."""


@dataclass(frozen=True)
class Layout:
    """Where boxes and edges are.

    `levels` has the level of each box, 0 at the top, `centres` its x. `routes` has the x of each edge in every level
    from its source to its target, both included. `width` is that of all levels.
    """

    levels: list[int]
    centres: list[float]
    routes: list[list[float]]
    width: float


def place(widths: Sequence[float], edges: Sequence[tuple[int, int]]) -> Layout:
    """The layout of boxes of these widths. An edge is (index of its source, index of its target), source first."""
    count = len(widths)
    levels = [0] * count
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        levels[target] = max(levels[target], levels[source] + 1)
    sizes, level_of = list(widths), list(levels)
    chains: list[list[int]] = []  # the nodes of each edge, one a level
    for source, target in edges:
        between = range(levels[source] + 1, levels[target])
        lanes = list(range(len(sizes), len(sizes) + len(between)))
        sizes += [LANE] * len(lanes)
        level_of += between
        chains.append([source, *lanes, target])
    above: list[list[int]] = [[] for _ in sizes]
    below: list[list[int]] = [[] for _ in sizes]
    for chain in chains:
        for first, second in pairwise(chain):
            below[first].append(second)
            above[second].append(first)
    rows: list[list[int]] = [[] for _ in range(max(level_of, default=-1) + 1)]
    for node, level in enumerate(level_of):
        rows[level].append(node)
    rows = _ordered(rows, above, below)
    x = _centred(rows, above, below, sizes, [chain[1:-1] for chain in chains])
    left = min((x[n] - sizes[n] / 2 for n in range(len(sizes))), default=0.0)
    x = [each - left for each in x]
    width = max((x[n] + sizes[n] / 2 for n in range(len(sizes))), default=0.0)
    return Layout(levels, x[:count], [[x[node] for node in chain] for chain in chains], width)


def _ordered(rows: list[list[int]], above: list[list[int]], below: list[list[int]]) -> list[list[int]]:
    """The rows in the best order of several sweeps, each by the mean position of a node's neighbours."""
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        rows = [list(row) for row in rows]
        at = {node: index for row in rows for index, node in enumerate(row)}
        for row in rows if down else reversed(rows):
            means = {n: sum(at[m] for m in neighbours[n]) / len(neighbours[n]) for n in row if neighbours[n]}
            row.sort(key=lambda node: means.get(node, at[node]))
            at |= {node: index for index, node in enumerate(row)}
        found = _crossings(rows, below)
        if found < fewest:
            best, fewest = rows, found
    return best


def _crossings(rows: list[list[int]], below: list[list[int]]) -> int:
    at = {node: index for row in rows for index, node in enumerate(row)}
    count = 0
    for row in rows:
        ends = [at[target] for node in row for target in sorted(below[node], key=at.__getitem__)]
        count += sum(ends[i] > ends[j] for i in range(len(ends)) for j in range(i + 1, len(ends)))
    return count


def _centred(
    rows: list[list[int]], above: list[list[int]], below: list[list[int]], sizes: Sequence[float],
    chains: Iterable[Sequence[int]],
) -> list[float]:  # fmt: skip
    """The x of each node, with GAP between neighbours of a row: boxes near their neighbours, each chain straight."""
    x = [0.0] * len(sizes)
    chain_of = {node: chain for chain in chains for node in chain}
    for row in rows:
        _spread(row, dict.fromkeys(row, 0.0), sizes, x, chain_of)
    for sweep in range(2 * SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {}
            for node in row:
                around = chain_of.get(node) or above[node] + below[node]
                wanted[node] = sum(x[n] for n in around) / len(around) if around else x[node]
            _spread(row, wanted, sizes, x, chain_of)
    return x


def _spread(
    row: Sequence[int], wanted: dict[int, float], sizes: Sequence[float], x: list[float], heavy: Container[int]
) -> None:
    """Move the nodes of a row to where they are wanted, as far as their order and their sizes allow.

    Least squares: nodes that touch move together, to the mean of what they want. A heavy node moves least.
    """
    offsets = [0.0]
    for first, second in pairwise(row):
        offsets.append(offsets[-1] + (sizes[first] + sizes[second]) / 2 + GAP)
    blocks: list[tuple[float, float, int]] = []  # (sum of what its nodes want, by weight; sum of weights; number)
    for node, offset in zip(row, offsets, strict=True):
        weight, count = LANE_WEIGHT if node in heavy else 1.0, 1
        total = weight * (wanted[node] - offset)
        while blocks and blocks[-1][0] / blocks[-1][1] > total / weight:
            more, heavier, others = blocks.pop()
            total, weight, count = total + more, weight + heavier, count + others
        blocks.append((total, weight, count))
    starts = [total / weight for total, weight, count in blocks for _ in range(count)]
    for node, start, offset in zip(row, starts, offsets, strict=True):
        x[node] = start + offset
