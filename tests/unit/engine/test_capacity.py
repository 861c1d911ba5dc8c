"""How large the KV cache becomes: what is asked for, what fits, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.config import ModelConfig, RopeScaling
from numballama.engine.capacity import MAX_SEQUENCES, SHARE, choose_context, kv_layout
from numballama.errors import ContextError, Error
from numballama.graph import PAGE, KVLayout
from numballama.quantization.types import KV_TYPES

CONFIG = ModelConfig(64, 96, 3, 4, 2, 100, 512)
CONTEXT = 100
PAGES = 4
"""Pages of a context."""
EACH = KVLayout.of(CONFIG, CONTEXT).nbytes // (PAGES + 1)
"""Bytes of a page."""


def test_a_context_beyond_the_models_is_noted() -> None:
    notes: list[str] = []
    assert choose_context(CONFIG, None, notes) == CONFIG.default_context == 512
    assert choose_context(CONFIG, 512, notes) == 512 and notes == []
    assert choose_context(CONFIG, 513, notes) == 513
    assert notes == ["context 513: the model was trained for 512, beyond that it gets worse"]
    with pytest.raises(Error, match="context must be at least 1, found 0"):
        choose_context(CONFIG, 0, notes)


def test_yarn_trains_for_more_than_the_position_embeddings() -> None:
    notes: list[str] = []
    config = replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0, original_context=512))
    assert choose_context(config, 2048, notes) == 2048 and not notes
    choose_context(config, 2049, notes)
    assert notes == ["context 2,049: the model was trained for 2,048, beyond that it gets worse"]


@pytest.mark.parametrize("free", [None, 1 << 40, int((8 * PAGES + 1) * EACH / SHARE) + 1])
def test_every_sequence_may_have_the_whole_context(free: int | None) -> None:
    notes: list[str] = []
    found = kv_layout(CONFIG, CONTEXT, "f32", 8, None, free, notes)
    assert found == KVLayout.of(CONFIG, CONTEXT, "f32", 8) and found.pages == 8 * PAGES + 1
    assert notes == []


def test_less_where_memory_is_short_and_it_is_noted() -> None:
    notes: list[str] = []
    free = 20 * EACH
    found = kv_layout(CONFIG, CONTEXT, "f32", 8, None, free, notes)
    assert found.pages == 18 and (found.slots, found.pages_per_sequence) == (8, PAGES)
    (note,) = notes
    assert note.startswith("the KV cache holds 544 tokens, not 8 × 100: ") and "are free, of which programs" in note


def test_one_context_is_the_least() -> None:
    """It may take all that is free; where it does not fit, the error says what takes less."""
    least = (PAGES + 1) * EACH
    notes: list[str] = []
    assert kv_layout(CONFIG, CONTEXT, "f32", 8, None, least, notes).pages == PAGES + 1 and len(notes) == 1
    for sequences in (1, 8):
        with pytest.raises(ContextError, match=r"a KV cache for 100 tokens takes .* are free; a smaller context="):
            kv_layout(CONFIG, CONTEXT, "f32", sequences, None, least - 1, [])


def test_the_tokens_that_were_asked_for_or_an_error() -> None:
    notes: list[str] = []
    found = kv_layout(CONFIG, CONTEXT, "f32", 8, 65, 4 * EACH, notes)
    assert (found.pages, found.tokens, notes) == (4, 96, [])
    assert kv_layout(CONFIG, CONTEXT, "f32", 2, 10_000, None, notes).tokens >= 10_000, "more than the contexts"
    with pytest.raises(ContextError, match=r"a KV cache for 65 tokens takes .* are free; a smaller kv_tokens="):
        kv_layout(CONFIG, CONTEXT, "f32", 8, 65, 4 * EACH - 1, [])


def test_tables_have_no_more_rows_than_a_limit() -> None:
    assert kv_layout(CONFIG, CONTEXT, "f32", MAX_SEQUENCES, 1000, None, []).slots == MAX_SEQUENCES
    with pytest.raises(Error, match="max_sequences must be at most 1,024, found 1,025"):
        kv_layout(CONFIG, CONTEXT, "f32", MAX_SEQUENCES + 1, 1000, None, [])


@given(
    st.integers(1, 300),
    st.sampled_from(KV_TYPES),
    st.integers(1, 300),
    st.none() | st.integers(1, 5000),
    st.none() | st.integers(0, 1 << 24),
)
def test_what_is_chosen_fits_and_holds_a_context(
    context: int, dtype: str, sequences: int, tokens: int | None, free: int | None
) -> None:
    notes: list[str] = []
    wanted = KVLayout.of(CONFIG, context, dtype, sequences, tokens)  # type: ignore[arg-type]
    one = KVLayout.of(CONFIG, context, dtype, sequences, context)  # type: ignore[arg-type]
    try:
        found = kv_layout(CONFIG, context, dtype, sequences, tokens, free, notes)  # type: ignore[arg-type]
    except ContextError:
        assert free is not None and (one if tokens is None else wanted).nbytes > free
        return
    assert free is None or found.nbytes <= free
    assert (found.slots, found.page, found.dtype) == (sequences, PAGE, dtype)
    if found == wanted:
        assert notes == []
    else:
        assert tokens is None and len(notes) == 1 and free is not None and wanted.nbytes > free * SHARE
        assert one.pages <= found.pages < wanted.pages
        assert found.nbytes <= free * SHARE or found.pages == one.pages, "the rest is for programs"


def test_a_backend_s_numbers_of_sequences() -> None:
    """More rows of the page table than sequences get no more tokens and a note; more sequences than fit in a run are an
    error."""
    notes: list[str] = []
    found = kv_layout(CONFIG, CONTEXT, "f32", 1, None, None, notes, 2, 8)
    assert found.slots == 2 and found.tokens == kv_layout(CONFIG, CONTEXT, "f32", 1, None, None, []).tokens
    (note,) = notes
    assert note.startswith("max_sequences is 2, not 1: ") and "batch-invariant" in note
    for sequences in (2, 8):
        assert kv_layout(CONFIG, CONTEXT, "f32", sequences, None, None, notes, 2, 8).slots == sequences
    assert notes == [note], "as many as were asked for"
    with pytest.raises(Error, match=r"max_sequences must be at most 8 for batch-invariant runs.*found 9"):
        kv_layout(CONFIG, CONTEXT, "f32", 9, None, None, [], 2, 8)


def test_what_did_not_fit_is_what_was_asked_for() -> None:
    """A caller who gave no kv_tokens is not told to give a smaller one."""
    enough = (PAGES + 1) * EACH
    notes: list[str] = []
    assert kv_layout(CONFIG, CONTEXT, "f32", 1, None, enough, notes, 2, 8).pages == PAGES + 1 and len(notes) == 1
    with pytest.raises(ContextError, match=r"a KV cache for 100 tokens takes .* are free; a smaller context="):
        kv_layout(CONFIG, CONTEXT, "f32", 1, None, enough - 1, [], 2, 8)
    with pytest.raises(ContextError, match=r"a KV cache for 90 tokens takes .* are free; a smaller kv_tokens="):
        kv_layout(CONFIG, CONTEXT, "f32", 1, 90, 3 * EACH, [], 2, 8)
