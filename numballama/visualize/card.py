"""Cards of a compiled model and of a model file: what it is, where its bytes are, what memory it takes.

A `Card` is put together once, and shown as HTML or as text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..memory import format_bytes, resident_bytes
from .html import COLOURS, bar, chip, escape, fold, frame, heading, printable, table, text_table
from .parts import PartBytes, bytes_by_part

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..model import Model

KNOWN_FIELDS = (
    "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "context", "norm_eps",
    "rope_theta", "rope_pairing",
)  # fmt: skip
"""Fields of a config that a card always shows. Of the others it shows those that differ from their default."""


@dataclass(frozen=True)
class Card:
    """What a card shows. Texts may come from a file: they are escaped when they are shown."""

    title: str
    about: str
    """One line below the title."""
    facts: Sequence[tuple[str, str]]
    """(name, value) of the first column."""
    parts: Sequence[PartBytes]
    """The weights. A table that is the classifier too counts as the embedding, whose row then says so."""
    memory: Sequence[tuple[str, int | None, str]]
    """(what, bytes, remark). The bytes are None where nothing is known."""
    needs: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    """Type of the KV cache → context → bytes of the whole model with it. Empty: nothing is shown."""
    free_bytes: int | None = None
    """Memory that is free: what needs more is marked."""
    notes: Sequence[str] = ()


def config_facts(config: ModelConfig) -> list[tuple[str, str]]:
    """The fields of a config as (name, value)."""
    facts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in KNOWN_FIELDS or value != field.default:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            facts.append((field.name, shown if len(shown) <= 80 else f"{shown[:79]}…"))
    return facts


def of_model(model: Model) -> Card:
    """The card of a compiled model. A closed one has its configuration only."""
    facts = config_facts(model.config)
    if model.tokenizer is not None:
        facts.append(("tokenizer", f"{model.tokenizer.vocab_size:,} tokens"))
    if not model.weights:
        return Card(model.path.name, f"{model.format}; closed", facts, [], [], notes=model.notes)
    backend, kv = model.backend, model.kv
    sized = [(n, str(w.type), w.shape, backend.weight_nbytes(n)) for n, w in model.weights.items()]
    parts = bytes_by_part(sized, model.config.tied_embeddings)
    unit = "multiprocessors" if backend.name == "cuda" else "threads" if model.threads > 1 else "thread"
    facts += [
        ("device", backend.description),
        (unit, str(model.threads)),
        *([] if model.activations == "f32" else [("activations", model.activations)]),
        ("loaded in", f"{model.load_s:.2f} s"),
    ]
    sequences = "1 sequence" if kv.slots == 1 else f"{kv.slots:,} sequences"
    memory: list[tuple[str, int | None, str]] = [
        ("weights", sum(part.nbytes for part in parts), "as the device stores them"),
        ("KV cache", kv.nbytes, f"{kv.tokens:,} tokens, {kv.dtype}; {sequences} of up to {kv.context:,}"),
        ("arenas", model.arena_bytes, "of all programs: model.plan shows that of one token"),
    ]
    if backend.memory_bytes is None:
        memory.append(("process", resident_bytes(), "resident now, Python included"))
    else:
        memory.append(("device", backend.memory_bytes, "all that is allocated there"))
    parameters = sum(part.parameters for part in parts)
    about = f"{model.format}, {parameters:,} parameters, on {backend.description}"
    return Card(model.path.name, about, facts, parts, memory, notes=model.notes)


def as_html(card: Card) -> str:
    """The card for a notebook."""
    total = sum(part.nbytes for part in card.parts)
    config = table(["configuration", ""], [[escape(name), escape(value)] for name, value in card.facts], "ll")
    right = []
    if card.parts:
        shares = [(COLOURS[p.part], p.nbytes / total, f"{p.part}: {format_bytes(p.nbytes)}") for p in card.parts]
        rows = [[escape(cell) for cell in row] for row in _part_rows(card.parts)]
        for part, row in zip(card.parts, rows, strict=False):
            row[0] = chip(part.part) + row[0]
        right.append(bar(shares) + table(_part_headings(card.parts), rows, totals=1))
    memory = [[escape(what), escape(size), f'<span class="muted">{escape(remark)}</span>']
              for what, size, remark in _memory_rows(card)]  # fmt: skip
    if memory:
        right.append("<h4>memory</h4>" + table(["", "", ""], memory, "lrl"))
    if card.needs:
        headings, *rows = _need_rows(card)
        needs = table([escape(cell) for cell in headings], [list(map(escape, row)) for row in rows])
        right.append(f"<h4>{escape(_need_title(card))}</h4>{needs}")
    notes = ""
    if card.notes:
        items = "".join(f"<div>{escape(note)}</div>" for note in card.notes)
        notes = fold(f"{len(card.notes)} note{'s' if len(card.notes) > 1 else ''}", items)
    columns = f'<div class="columns"><div>{config}</div><div>{"".join(right)}</div></div>'
    return frame(heading(card.title, card.about) + columns + notes)


def as_text(card: Card) -> str:
    """The card as lines of text, for a terminal or a pipe."""
    lines = [printable(card.title), *([f"  {printable(card.about)}"] if card.about else [])]
    lines += [f"  note: {printable(note)}" for note in card.notes]
    lines += [
        "",
        "configuration",
        *text_table(["", ""], [[name, printable(value)] for name, value in card.facts], "ll"),
    ]
    if card.parts:
        lines += ["", "weights", *text_table(_part_headings(card.parts), _part_rows(card.parts))]
    rows = [[what, size, printable(remark)] for what, size, remark in _memory_rows(card)]
    if rows:
        lines += ["", "memory", *text_table(["", "", ""], rows, "lrl")]
    if card.needs:
        headings, *rows = _need_rows(card)
        lines += ["", _need_title(card), *text_table(headings, rows)]
    return "\n".join(lines)


def _types(parts: Sequence[PartBytes]) -> list[str]:
    sums: dict[str, int] = {}
    for part in parts:
        for kind, nbytes in part.types.items():
            sums[kind] = sums.get(kind, 0) + nbytes
    return sorted(sums, key=lambda kind: -sums[kind])


def _part_headings(parts: Sequence[PartBytes]) -> list[str]:
    return ["part", "parameters", *_types(parts), "bytes", "share"]


def _part_rows(parts: Sequence[PartBytes]) -> list[list[str]]:
    """A row for each part: bytes by type, and their sum. The last row sums the parts."""
    kinds, whole = _types(parts), max(1, sum(part.nbytes for part in parts))
    total = PartBytes("all")
    for part in parts:
        total.parameters += part.parameters
        for kind, nbytes in part.types.items():
            total.types[kind] = total.types.get(kind, 0) + nbytes
    return [
        [
            part.label or part.part, f"{part.parameters:,}",
            *(format_bytes(part.types[kind]) if kind in part.types else "" for kind in kinds),
            format_bytes(part.nbytes), f"{part.nbytes / whole:.1%}",
        ]
        for part in (*parts, total)
    ]  # fmt: skip


def _memory_rows(card: Card) -> list[tuple[str, str, str]]:
    return [(what, "" if size is None else format_bytes(size), remark) for what, size, remark in card.memory]


def _need_title(card: Card) -> str:
    title = "memory for a context, by type of the KV cache"
    if card.free_bytes is None:
        return title
    too_much = any(need > card.free_bytes for needs in card.needs.values() for need in needs.values())
    return f"{title}; {format_bytes(card.free_bytes)} are free{', ! is more' if too_much else ''}"


def _need_rows(card: Card) -> list[list[str]]:
    contexts = list(next(iter(card.needs.values())))

    def cell(nbytes: int) -> str:
        too_much = card.free_bytes is not None and nbytes > card.free_bytes
        return f"{'! ' if too_much else ''}{format_bytes(nbytes)}"

    rows = [[f"{context:,}", *(cell(card.needs[kind][context]) for kind in card.needs)] for context in contexts]
    return [["tokens", *card.needs], *rows]
