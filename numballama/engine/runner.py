"""`Runner`: what the engine asks of a device. `Batch`: the rows of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..sampling import Sampled, SamplingParams


@dataclass
class Batch:
    """The rows of one run. Rows of one sequence are contiguous, their positions ascend by one.

    The first `decodes` rows belong to one sequence each, and their id is FEED. The others are chunks of prompts. The
    arrays are views that the next plan overwrites: `Runner.submit` copies them.
    """

    ids: NDArray[np.int32]
    """[rows] token ids, or `sampling.FEED`. Where the slot's last token was -1, FEED may stand for any valid id: nobody
    reads what it leads to."""
    positions: NDArray[np.int32]
    """[rows] the place of each token in its sequence."""
    slots: NDArray[np.int32]
    """[rows] the row of the page table, and of the sampler's table, that each row belongs to."""
    logits: NDArray[np.int32]
    """[logit rows] the rows whose logits are wanted, ascending. A token is sampled for each."""
    decodes: int
    """Number of leading rows that are one sequence's next token."""

    @property
    def rows(self) -> int:
        return len(self.ids)


class Runner(Protocol):
    """A model on a device: `max_sequences` slots, a KV cache in pages, and runs of up to `max_tokens` rows.

    Everything takes effect in the order of the calls: what `start`, `set_pages` and `set_mask` write is seen by later
    submits and not by earlier ones, even if those still run. Up to `lookahead` + 1 runs are submitted and not yet
    collected. An exception other than an `Error` of `start` is a failure of the device: the engine ends.
    """

    @property
    def max_sequences(self) -> int:
        """Number of slots."""

    @property
    def max_tokens(self) -> int:
        """Most rows of a run; at least `max_sequences`."""

    @property
    def page(self) -> int:
        """Tokens a page holds."""

    @property
    def pages(self) -> int:
        """Number of pages, with page 0, which is scratch."""

    @property
    def pages_per_sequence(self) -> int:
        """Length of a row of the page table."""

    @property
    def lookahead(self) -> int:
        """Runs to submit ahead of the one whose tokens are waited for. 0 where `submit` does the work."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to `vocab_size` - 1."""

    def start(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int],
        stop_token_ids: frozenset[int],
    ) -> None:
        """Start sampling in a slot, or resume after `output` (`SamplerTable.assign`).

        Raises `Error` for params that this model cannot follow; only that request fails.
        """

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into the slot's row of the page table, from index `first` on."""

    def set_mask(self, slot: int, mask: NDArray[np.uint32] | None) -> None:
        """Allow only the tokens of a bitmask in this slot (`SamplerTable.set_mask`). None allows all."""

    def submit(self, batch: Batch) -> int:
        """Start a run and return its ticket. Copies the batch's arrays."""

    def collect(self, ticket: int) -> Sampled:
        """Wait for a run and return its tokens. Tickets are collected in the order of their submits, each once."""

    def reset(self) -> None:
        """Wait for all runs in flight and forget their tickets. Called after an interrupted step."""
