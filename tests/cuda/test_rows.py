"""Runs with rows of many sequences on a GPU, against the NumPy reference."""

# ruff: noqa: E402
from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.cuda_host import require_gpu

require_gpu()

pytestmark = pytest.mark.gpu

from numballama.config import HALF_SPLIT, ModelConfig
from numballama.cuda.ops import gemm, linear
from tests.cuda.checks import SHARE, Pair
from tests.cuda.gpu import MODELS, ROUNDED, pair_of
from tests.cuda.row_checks import Step, check_alone, check_rows, check_whole_rows

MIXED = ModelConfig(256, 320, 2, 8, 2, 500, 700, rope_pairing=HALF_SPLIT)


@st.composite
def steps(draw: st.DrawFn, slots: int, context: int, most: int) -> list[Step]:
    """Runs of at most `most` rows; no sequence becomes longer than `context`."""
    lengths, made = [0] * slots, []
    for _ in range(draw(st.integers(1, 4))):
        step: list[tuple[int, int]] = []
        for slot in draw(st.permutations(range(slots))):
            left = min(context - lengths[slot], most - sum(count for _, count in step))
            if left > 0 and draw(st.booleans()):
                count = draw(st.sampled_from([1, 1, min(2, left), left]))
                step.append((slot, count))
                lengths[slot] += count
        if step:
            made.append(step)
    return made


@given(MODELS, st.sampled_from([1, 2, 4, 16, 32, 64]), st.data())
@settings(max_examples=20)
def test_every_value_of_runs_of_many_sequences(drawn: dict[str, Any], page: int, data: st.DataObject) -> None:
    slots, most = data.draw(st.integers(1, 4)), data.draw(st.integers(2, gemm.FEW))
    pair = pair_of(drawn, sequences=slots, page=page)
    try:
        # by `gemv`: tensor cores round activations to 16 bits, which has bounds of its own
        with mock.patch.object(linear, "EXACT", gemm.FEW):
            check_rows(pair, data.draw(steps(slots, pair.context, most)), most)
    finally:
        pair.close()


@pytest.mark.parametrize(("kind", "kv", "share"), [
    ("f32", "f32", SHARE), ("f32", "q8_0", ROUNDED), ("f16", "f16", ROUNDED), ("bf16", "bf16", ROUNDED),
    ("q4_0", "f16", ROUNDED),
])  # fmt: skip
@pytest.mark.parametrize("page", [16, 32, 64])
def test_chunks_and_single_rows_mixed(kind: str, kv: str, share: float, page: int) -> None:
    """Long and short sequences, prompts in chunks between rows of others."""
    pair = Pair(MIXED, kind, kv, sequences=12, page=page)
    mixed: list[Step] = [
        [(0, 400)],
        [(0, 1), (1, 70), (2, 1), (3, 2), (4, 200)],
        [(slot, 1) for slot in (4, 1, 0, 3, 2)],
        [(5, 65), (0, 1), (6, 129), (1, 1), (7, 33), (8, 1), (4, 64)],
        [(slot, 1) for slot in range(9)],
        [(0, 250), (9, 3), (10, 1), (11, 150)],
    ]
    try:
        check_whole_rows(pair, mixed, 512, share)
    finally:
        pair.close()


@pytest.mark.parametrize(("kv", "heads", "kv_heads"), [("f16", 8, 2), ("bf16", 4, 4), ("f32", 6, 2), ("q8_0", 8, 2)])
def test_a_row_does_not_depend_on_its_neighbours(kv: str, heads: int, kv_heads: int) -> None:
    """Bit for bit, at lengths of one split and of several; by programs for few rows and for more."""
    pair = Pair(ModelConfig(64, 96, 1, heads, kv_heads, 100, 1500, head_dim=64), "f32", kv, sequences=4)
    try:
        first: list[Step] = [[(0, 1), (1, 3), (2, 2)], [(2, 1), (0, 1), (1, 1), (3, 1)]]
        check_alone(pair, first, [2, 4, 8])
    finally:
        pair.close()


@pytest.mark.parametrize("kv", ["f16", "f32", "q8_0"])
def test_long_and_short_rows_in_one_run(kv: str) -> None:
    """A row of 9,000 keys beside rows of a few, in a cache that is full of numbers."""
    from tests.cuda.gpu import fill_cache

    pair = Pair(ModelConfig(32, 16, 1, 4, 2, 50, 9000, head_dim=64), "f32", kv, sequences=6)
    try:
        (program, reference) = pair.programs(6)
        fill_cache(pair, program)
        from tests.cuda.checks import bounds_of, poison_dead
        from tests.helpers.bounds import check_step

        for name, numbers in (
            ("ids", range(6)), ("positions", [8999, 0, 255, 256, 1023, 4100]), ("sequences", range(6)),
            ("rows", range(6)),
        ):  # fmt: skip
            program.inputs[name][:] = np.array(numbers)
        program.run_inputs.send(6, 6)
        for index in range(len(program.plan.steps)):
            poison_dead(program, index)
            with bounds_of(reference.backend):
                check_step(
                    program, index, 6, reference.backend,
                    lambda index=index: program.run(6, index, index + 1, rows=6), rows=6,
                )  # fmt: skip
    finally:
        pair.close()
