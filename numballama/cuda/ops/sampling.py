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
    *, next_token: Array, ids: Array, positions: Array, step: Array, slots_address: int, n_slots: int
) -> list[Launch]:
    """Write the new token where the next step reads it, and the token with its step number where the host reads it."""
    arguments = named(
        next_token=next_token, ids=ids, positions=positions, step=step, slots_address=slots_address, n_slots=n_slots
    )
    return [Launch(ADVANCE, (1,), 32, arguments)]
