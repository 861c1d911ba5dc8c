"""Measure speed over lists of GPUs, contexts, prompts, threads and sequences; as tables, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

from .. import progress
from .benchmark import BenchResult, bench, communication_text

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
    gpus: int = 1
    communication_s: float | None = None

    @classmethod
    def of(cls, result: BenchResult) -> Speed:
        """What a sweep keeps of a benchmark's result."""
        names = [field.name for field in fields(cls) if field.name != "engine"]
        return cls("numballama", **{name: getattr(result, name) for name in names})


AXES = ("gpus", "context", "threads", "sequences", "prompt_tokens")
"""The fields of `Speed` that a sweep varies."""
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def sweep(
    open_model: Callable[[int | None, int | None, int], Model],
    *,
    gpus: Sequence[int] = (1,),
    contexts: Sequence[int | None] = (None,),
    threads: Sequence[int | None] = (None,),
    prompts: Sequence[int] = (128,),
    sequences: Sequence[int] = (1,),
    tokens: int = 64,
    repeats: int = 5,
) -> Iterator[BenchResult]:
    """Yield a result for each combination. None is the model's default.

    `open_model(context, threads, gpus)` compiles the model, for `max(sequences)` sequences; it is closed after its
    part. Raises what `bench` does.
    """
    bandwidths: dict[tuple[int, int], float | None] = {}
    """(GPUs, threads) → memory bandwidth, which is measured once."""
    done, total = 0, len(gpus) * len(contexts) * len(threads) * len(prompts) * len(sequences)
    for cards, context, workers in product(gpus, contexts, threads):
        with open_model(context, workers, cards) as model:
            key = model.gpus, model.threads
            for prompt, count in product(prompts, sequences):
                done += 1
                what = f"{cards} GPUs, " if cards > 1 else ""
                what += f"context {model.context}, {model.threads} threads, {prompt} prompt tokens, {count} sequences"
                progress.info(f"{done} of {total}: {what}")
                result = bench(model, prompt, tokens, repeats, count, bandwidths.get(key))
                bandwidths[key] = result.memory_bandwidth_bytes_per_second
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
    found: dict[str, Any] = {name: getattr(first, name) for name in shared}
    found["runs"] = [asdict(speed) for speed in speeds]
    if found_scaling := scaling(speeds):
        found["scaling"] = [asdict(each) for each in found_scaling]
    return found


def as_table(speeds: Sequence[Speed]) -> str:
    """A line for each measurement."""
    heading = f"{'':12}{'gpus':>5}{'context':>9}{'threads':>9}{'sequences':>11}{'prompt':>8}"
    lines = [f"{heading}{'prompt t/s':>13}{'decode t/s':>13}"]
    for each in speeds:
        lines.append(
            f"{each.engine:12}{each.gpus:5}{each.context:9}{each.threads:9}{each.sequences:11}{each.prompt_tokens:8}"
            f"{each.prefill_tokens_per_second:13,.1f}{each.decode_tokens_per_second:13,.1f}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Scaling:
    """What more GPUs gain: a measurement beside the one of the fewest GPUs with the same options."""

    gpus: int
    over_gpus: int
    """GPUs of the measurement that it is compared with."""
    context: int
    threads: int
    sequences: int
    prompt_tokens: int
    prefill_ratio: float
    """Speed of prompts, divided by that of `over_gpus`."""
    decode_ratio: float
    decode_step_s: float
    """Seconds of a decode step."""
    communication_s: float | None
    """Of these, the seconds that GPUs need at least to exchange values."""


def _options(speed: Speed) -> tuple[int, int, int, int]:
    """What a measurement has besides its number of GPUs."""
    return speed.context, speed.threads, speed.sequences, speed.prompt_tokens


def scaling(speeds: Sequence[Speed]) -> list[Scaling]:
    """Each of our measurements beside the one of the fewest GPUs; empty for one number of GPUs."""
    ours = [speed for speed in speeds if speed.engine == "numballama"]
    fewest: dict[tuple[int, ...], Speed] = {}
    for speed in sorted(ours, key=lambda speed: speed.gpus):
        fewest.setdefault(_options(speed), speed)
    found: list[Scaling] = []
    for speed in ours:
        base = fewest[_options(speed)]
        if speed.gpus > base.gpus:
            prefill, decode = (getattr(speed, rate) / getattr(base, rate) for rate in RATES)
            step_s = speed.sequences / speed.decode_tokens_per_second
            found.append(
                Scaling(speed.gpus, base.gpus, *_options(speed), prefill, decode, step_s, speed.communication_s)
            )
    return found


def as_scaling_table(found: Sequence[Scaling]) -> str:
    """A line for each measurement: speeds as multiples of those of the fewest GPUs, and what communication costs."""
    lines = [f"{'gpus':>5}{'over':>6}{'context':>9}{'sequences':>11}{'prompt':>8}{'prompt ×':>10}{'decode ×':>10}"]
    lines[0] += "  communication"
    for each in found:
        line = f"{each.gpus:5}{each.over_gpus:6}{each.context:9}{each.sequences:11}{each.prompt_tokens:8}"
        line += f"{each.prefill_ratio:10.2f}{each.decode_ratio:10.2f}"
        if each.communication_s is not None:
            line += f"  {communication_text(each.communication_s, each.decode_step_s, each.sequences)}"
        lines.append(line)
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
