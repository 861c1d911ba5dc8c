"""Launches after a run's steps: sample the next tokens, and make a token the input of the next step.

These are not operators of a graph. `decode_pipeline` appends them to a plan's steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...registry import KernelRef
from ..kernels.params import SAMPLING_THREADS as THREADS
from ..launch import Array, Launch, named

KERNELS = "numballama.cuda.kernels.sampling"
LOGPROBS = KernelRef(KERNELS, "logprobs_kernel")
SAMPLE = KernelRef(KERNELS, "sample_kernel")
ADVANCE = KernelRef(KERNELS, "advance_kernel")
FEED = KernelRef(KERNELS, "feed_kernel")
ADVANCE_THREADS = 256


def sample(
    n_rows: Array, logits: Array, slots: Array, table: Mapping[str, Array], out: Mapping[str, Array], *, logprobs: bool
) -> list[Launch]:
    """Sample a token for each row of `logits` f32 [R, vocab]; the state of the rows' slots is updated.

    `n_rows` i32 [1]: rows of this run, at most R. `slots` i32 [R]: each row's slot; a slot that the table does not have
    marks a padded row. `table` is `DeviceSamplerTable.arrays`, `out` `DeviceSampled.arrays`. `logprobs`: whether a slot
    of the run may want log probabilities, which takes a launch more.
    """
    rows, vocab = logits.shape
    n_slots = table["last_token"].shape[0]
    which = named(n_rows=n_rows, logits=logits, vocab=vocab, slots=slots, n_slots=n_slots)
    launches = []
    if logprobs:
        arguments = {
            **which, **named(info=table["info"], rows=table["rows"]),
            **{name: out[name] for name in ("normalizers", "top_ids", "top_logprobs")},
        }  # fmt: skip
        launches.append(Launch(LOGPROBS, (rows,), THREADS, arguments))
    record = ("settings", "info", "rows", "counts", "state", "recent", "last_token")
    results = ("next_token", "normalizers", "logprobs")
    arguments = {**which, **{name: table[name] for name in record}, **{name: out[name] for name in results}}
    return [*launches, Launch(SAMPLE, (rows,), THREADS, arguments)]


def advance(
    *, n_rows: Array, next_token: Array, slots: Array, last_token: Array, ids: Array, positions: Array, continues: int,
    count: Array, words: int, n_runs: int, max_rows: int,
) -> list[Launch]:  # fmt: skip
    """Note each row's token as its slot's latest and publish it to the host. `continues`: also make it the row's next
    input."""
    arguments = named(
        n_rows=n_rows, next_token=next_token, slots=slots, n_slots=last_token.shape[0], last_token=last_token, ids=ids,
        positions=positions, continues=continues, count=count, words=words, n_runs=n_runs, max_rows=max_rows,
    )  # fmt: skip
    return [Launch(ADVANCE, (1,), ADVANCE_THREADS, arguments)]


def feed(*, tokens: Array, ids: Array, sequences: Array, last_token: Array) -> list[Launch]:
    """Replace each id of FEED by the token that the row's slot sampled last."""
    arguments = named(tokens=tokens, ids=ids, sequences=sequences, n_slots=last_token.shape[0], last_token=last_token)
    return [Launch(FEED, (1,), ADVANCE_THREADS, arguments)]
