"""Launches after a decode step: sample the next token, and make it the input of the next step.

These are not operators of a graph. `decode_pipeline` appends them to a plan's steps.
"""

from __future__ import annotations

from ...registry import KernelRef
from ..kernels.params import SAMPLING_THREADS as THREADS
from ..launch import Array, Launch, named

KERNELS = "numballama.cuda.kernels.sampling"
SAMPLE = KernelRef(KERNELS, "sample_kernel")
ADVANCE = KernelRef(KERNELS, "advance_kernel")


def sample(
    logits: Array, n: int, *, settings: Array, recent: Array, counts: Array, state: Array, next_token: Array
) -> list[Launch]:
    """Sample among the first `n` tokens of the vocabulary; the sampler's state is updated in device memory."""
    arguments = named(
        logits=logits, n=n, settings=settings, recent=recent, counts=counts, state=state, next_token=next_token
    )
    return [Launch(SAMPLE, (1,), THREADS, arguments)]


def advance(
    *, next_token: Array, ids: Array, positions: Array, step: Array, slots_address: int, n_slots: int
) -> list[Launch]:
    """Write the new token where the next step reads it, and the token with its step number where the host reads it."""
    arguments = named(
        next_token=next_token, ids=ids, positions=positions, step=step, slots_address=slots_address, n_slots=n_slots
    )
    return [Launch(ADVANCE, (1,), 32, arguments)]
