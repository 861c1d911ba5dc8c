"""How large the context and the KV cache are: what the caller asks for, and what fits in memory."""

from __future__ import annotations

from dataclasses import replace

from ..config import ModelConfig
from ..errors import ContextError, Error
from ..graph import KVLayout
from ..memory import SHORTER, format_bytes
from ..quantization.types import KVType
from ..validation import whole_number

MAX_SEQUENCES = 1024
"""Largest `max_sequences`: tables have a row for each sequence, also while nobody uses it."""
SHARE = 0.9
"""Share of the free memory that the KV cache may take by itself. The rest is for programs and for others."""


def choose_context(config: ModelConfig, context: int | None, notes: list[str]) -> int:
    """The context in tokens: `context`, or the model's default. A note says if the model was trained for less."""
    if context is None:
        return config.default_context
    context = whole_number("context", context, 1)
    scaling, trained = config.rope_scaling, config.context
    if scaling is not None and scaling.kind == "yarn":
        trained = max(trained, int(scaling.factor * scaling.original_context))
    if context > trained:
        notes.append(f"context {context:,}: the model was trained for {trained:,}, beyond that it gets worse")
    return context


def kv_layout(
    config: ModelConfig,
    context: int,
    dtype: KVType,
    max_sequences: int,
    kv_tokens: int | None,
    free_bytes: int | None,
    notes: list[str],
    fewest: int = 1,
    most: int | None = None,
) -> KVLayout:
    """The layout of the KV cache for up to `max_sequences` sequences of up to `context` tokens each.

    `kv_tokens` is how many tokens all sequences may have together; None: `max_sequences` · `context`, or less where
    `free_bytes` (None: unknown) do not allow it, with a note. Raises `ContextError` where not even one context fits, or
    not the `kv_tokens` that were asked for; `Error` for more than MAX_SEQUENCES.

    `fewest` and `most` are limits of the backend (None: MAX_SEQUENCES). Fewer sequences become `fewest`, with no more
    KV cache and a note; more than `most` are an `Error`.
    """
    if max_sequences > (limit := MAX_SEQUENCES if most is None else most):
        here = "" if most is None else " for batch-invariant runs with these weights"
        raise Error(f"max_sequences must be at most {limit:,}{here}, found {max_sequences:,}; others wait their turn")
    if max_sequences < fewest:
        notes.append(
            f"max_sequences is {fewest}, not {max_sequences}: this device computes runs of fewer than {fewest} rows "
            "with other kernels, so batch-invariant runs have as many; the KV cache is no larger for it"
        )
    slots = max(max_sequences, fewest)
    wanted = replace(KVLayout.of(config, context, dtype, max_sequences, kv_tokens), slots=slots)
    if free_bytes is not None and wanted.table_nbytes > free_bytes:
        raise ContextError(
            f"the page table of a KV cache for {slots:,} × {context:,} tokens takes "
            f"{format_bytes(wanted.table_nbytes)}, {format_bytes(free_bytes)} are free; {SHORTER}"
        )
    share = SHARE if max_sequences > 1 and kv_tokens is None else 1
    if free_bytes is None or wanted.nbytes <= free_bytes * share:
        return wanted
    least = replace(wanted, pages=KVLayout.of(config, context, dtype, tokens=context).pages)
    if kv_tokens is not None or least.nbytes > free_bytes:
        what, advice = f"{context:,} tokens", SHORTER
        if kv_tokens is not None:
            what, advice = f"{kv_tokens:,} tokens", "a smaller kv_tokens= takes less"
        needed = wanted if kv_tokens is not None else least
        raise ContextError(
            f"a KV cache for {what} takes {format_bytes(needed.nbytes)}, {format_bytes(free_bytes)} are free; {advice}"
        )
    each = wanted.nbytes // wanted.pages
    pages = max(least.pages, int(free_bytes * SHARE) // each)
    fitting = replace(wanted, pages=min(pages, wanted.pages))
    notes.append(
        f"the KV cache holds {fitting.tokens:,} tokens, not {max_sequences} × {context:,}: "
        f"{format_bytes(free_bytes)} are free, of which programs need a part, and all would take "
        f"{format_bytes(wanted.nbytes)}"
    )
    return fitting
