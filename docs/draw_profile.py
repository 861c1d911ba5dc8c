"""Draw docs/decode-step.svg from a profile: the time of each kind of step, and the minimum time that the memory allows.

numballama bench MODEL --device cuda --profile --json > profile.json
python docs/draw_profile.py profile.json [OUT.svg]
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, ROW, TOP = 900, 250, 150, 30, 58
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b79a20", "#72b7b2", "#9d755d", "#b279a2", "#e45756", "#7f7f7f", "#d67195")


def draw(profile: dict[str, Any]) -> str:
    """The picture as SVG: for each kind of step a bar, the time of all its instances, with its floor marked.

    The floor is the bytes that the steps must move, divided by the memory's bandwidth. Below are the sum and the whole.
    """
    bandwidth = profile["memory_bandwidth_bytes_per_second"]
    bars = [
        (f"{row['name']} × {row['count']}", row["count"] * row["seconds"], row["count"] * row["nbytes"])
        for row in profile["rows"]
    ]
    bars.sort(key=lambda bar: -bar[1])
    whole = ("whole step, as it runs", profile["whole_step_s"], profile["bytes"])
    longest = max(seconds for _, seconds, _ in bars)
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + ROW * (len(bars) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="12" y="22" font-size="16">{escape(_title(profile))}</text>'
        f'<text x="12" y="42" fill="#555">bars: time of all instances; black marks: least time at '
        f"{bandwidth / 1e9:,.0f} GB/s; right: µs, and the mark's share of the bar</text>"
    ]
    for i, (name, seconds, nbytes) in enumerate(bars):
        y, floor = TOP + ROW * i, nbytes / bandwidth
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 19}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LEFT}" y="{y + 5}" width="{max(1.0, seconds * scale):.1f}" height="{ROW - 10}" '
            f'fill="{COLOURS[i % len(COLOURS)]}"/>'
            f'<rect x="{LEFT + min(floor, longest) * scale - 1:.1f}" y="{y + 2}" width="2" height="{ROW - 4}"/>'
            f'<text x="{WIDTH - 12}" y="{y + 19}" text-anchor="end">'
            f"{seconds * 1e6:,.1f}  ({floor / seconds:.0%})</text>"
        )
    y = TOP + ROW * len(bars) + 10
    parts.append(f'<line x1="12" x2="{WIDTH - 12}" y1="{y - 4}" y2="{y - 4}" stroke="#999"/>')
    for name, seconds, nbytes in (("sum of the steps", profile["sum_of_steps_s"], profile["bytes"]), whole):
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text><text x="{LEFT}" y="{y + 14}">'
            f"{seconds * 1e6:,.1f} µs, {nbytes / seconds / 1e9:,.0f} GB/s, {nbytes / bandwidth / seconds:.0%} of the "
            "memory's bandwidth</text>"
        )
        y += 22
    return "\n".join([*parts, "</svg>\n"])


def _title(profile: dict[str, Any]) -> str:
    return f"One decode step of {profile['model']} on {profile['device']}, position {profile['position']:,}"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("decode-step.svg")
    out.write_text(draw(found.get("profile", found)), encoding="utf-8")


if __name__ == "__main__":
    main()
