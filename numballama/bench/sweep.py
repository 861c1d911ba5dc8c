"""Measure speed over lists of contexts, prompts, threads and sequences; as a table, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

from .. import progress
from .benchmark import BenchResult, bench

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True)
class Speed:
    """One measurement of a sweep. Speeds are medians, of all sequences together."""

    engine: str
    """ "numballama", or whose figures they are."""
    context: int
    threads: int
    sequences: int
    prompt_tokens: int
    tokens: int
    """Tokens that each sequence decodes after its prompt."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_s: float
    bandwidth_fraction: float | None = None

    @classmethod
    def of(cls, result: BenchResult) -> Speed:
        """What a sweep keeps of a benchmark's result."""
        names = [field.name for field in fields(cls) if field.name != "engine"]
        return cls("numballama", **{name: getattr(result, name) for name in names})


AXES = ("context", "threads", "sequences", "prompt_tokens")
"""The fields of `Speed` that a sweep varies."""
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def sweep(
    open_model: Callable[[int | None, int | None], Model],
    *,
    contexts: Sequence[int | None] = (None,),
    threads: Sequence[int | None] = (None,),
    prompts: Sequence[int] = (128,),
    sequences: Sequence[int] = (1,),
    tokens: int = 64,
    repeats: int = 5,
) -> Iterator[BenchResult]:
    """Yield a result for each combination. None is the model's default.

    `open_model(context, threads)` compiles the model, for `max(sequences)` sequences; it is closed after its part.
    Raises what `bench` does.
    """
    bandwidths: dict[int, float | None] = {}
    """Threads → memory bandwidth, which is measured once."""
    done, total = 0, len(contexts) * len(threads) * len(prompts) * len(sequences)
    for context, workers in product(contexts, threads):
        with open_model(context, workers) as model:
            for prompt, count in product(prompts, sequences):
                done += 1
                what = f"context {model.context}, {model.threads} threads, {prompt} prompt tokens, {count} sequences"
                progress.info(f"{done} of {total}: {what}")
                result = bench(model, prompt, tokens, repeats, count, bandwidths.get(model.threads))
                bandwidths[model.threads] = result.memory_bandwidth_bytes_per_second
                yield result


def as_csv(speeds: Sequence[Speed]) -> str:
    """Lines of CSV with a heading; None is empty."""
    out = io.StringIO()
    table = csv.DictWriter(out, [field.name for field in fields(Speed)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(speed) for speed in speeds)
    return out.getvalue()


def to_dict(first: BenchResult, speeds: Sequence[Speed]) -> dict[str, Any]:
    """What all measurements share, as `first` has it, and "runs", as JSON values."""
    shared = ("model", "device", "types", "activations", "batch_invariant", "repeats", "machine")
    return {name: getattr(first, name) for name in shared} | {"runs": [asdict(speed) for speed in speeds]}


def as_table(speeds: Sequence[Speed]) -> str:
    """A line for each measurement."""
    lines = [f"{'':12}{'context':>8}{'threads':>9}{'sequences':>11}{'prompt':>8}{'prompt t/s':>13}{'decode t/s':>13}"]
    for each in speeds:
        lines.append(
            f"{each.engine:12}{each.context:8}{each.threads:9}{each.sequences:11}{each.prompt_tokens:8}"
            f"{each.prefill_tokens_per_second:13,.1f}{each.decode_tokens_per_second:13,.1f}"
        )
    return "\n".join(lines)


# The picture: a row of bars for each measurement

LINE, LABEL, PANEL, NUMBER = 22, 330, 250, 80
"""Pixels: height of a row, widths of the labels, of a panel's longest bar and of the number after it."""
STYLE = """
text { font: 13px sans-serif; fill: #222 } .title { font-weight: bold } .page { fill: #fff }
.ours { fill: #3b6fb6 } .theirs { fill: #c9822b }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .page { fill: #1b1d21 } .ours { fill: #6d9fe0 } .theirs { fill: #d99a4e }
}
"""


def draw(speeds: Sequence[Speed], title: str) -> str:
    """SVG: bars of prompt and decode speed, a row for each measurement, labelled with what varies. Light and dark."""
    several = len({speed.engine for speed in speeds}) > 1
    varies = [axis for axis in AXES if len({getattr(speed, axis) for speed in speeds}) > 1]
    width, height = LABEL + 2 * (PANEL + NUMBER), LINE * (len(speeds) + 2) + 18
    parts = [f'<rect class="page" width="{width}" height="{height}"/>', _text(10, 20, title, "title")]
    for panel, (rate, heading) in enumerate(zip(RATES, ("prompt, tokens/s", "decode, tokens/s"), strict=True)):
        left = LABEL + panel * (PANEL + NUMBER)
        largest = max((getattr(speed, rate) for speed in speeds), default=1.0)
        parts.append(_text(left, LINE + 20, heading, "title"))
        for row, speed in enumerate(speeds):
            top, value = LINE * (row + 2) + 6, getattr(speed, rate)
            whose = "ours" if speed.engine == "numballama" else "theirs"
            length = max(1.0, value / largest * PANEL)
            parts.append(
                f'<rect class="{whose}" x="{left}" y="{top}" width="{length:.1f}" height="{LINE - 6}" rx="2"/>'
            )
            parts.append(_text(left + length + 6, top + 13, f"{value:,.0f}" if value >= 100 else f"{value:.1f}"))
    for row, speed in enumerate(speeds):
        names = [f"{axis.removesuffix('_tokens')} {getattr(speed, axis)}" for axis in varies]
        label = ", ".join([*([speed.engine] if several or not varies else []), *names])
        parts.append(_text(10, LINE * (row + 2) + 19, label))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y}"{style}>{escape(text)}</text>'
