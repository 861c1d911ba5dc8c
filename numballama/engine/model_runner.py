"""`ModelRunner`: runs the engine's batches on a backend, with one program for each size of batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..backend import Backend, Program
from ..graph import KVLayout, Logits
from ..ir import Graph
from ..progress import Report
from ..quantization.kv import has_largest_f16
from ..sampling import Sampled, SamplerTable, SamplingParams
from .runner import Batch

SATURATED = (
    "keys or values of the first tokens are beyond ±65,504, the largest numbers of a float16 KV cache, and become "
    "these: kv_dtype='bf16' or 'f32' (--kv-dtype) holds them"
)
GraphOf = Callable[[int, Logits], Graph]
"""graph_of(tokens, logits): the model's graph for runs of up to `tokens` tokens."""


class ModelRunner:
    """A model on a device. Implements `runner.Runner`.

    `decode` is the program for one sequence, `prompt` the one for a chunk of prompts or any mixture. Others are made
    when they are first needed: for two and more sequences that each decode a token, and for mixtures of few rows, in
    which others decode beside a prompt. `prepare` makes them all.
    """

    def __init__(
        self,
        backend: Backend,
        kv: KVLayout,
        table: SamplerTable,
        graph_of: GraphOf,
        chunk: int,
        make: Callable[[Graph, Report | None], Program],
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.backend, self.kv, self.table = backend, kv, table
        self.max_sequences, self.page, self.pages = kv.slots, kv.page, kv.pages
        self.pages_per_sequence, self.lookahead = kv.pages_per_sequence, backend.lookahead
        self.vocab_size = table.vocab_size
        self.max_tokens = max(chunk, kv.slots)
        self._graph_of, self._make = graph_of, make
        self._sizes = [size for size in backend.decode_sizes if size < kv.slots]
        self._sizes.append(next((size for size in backend.decode_sizes if size >= kv.slots), 0))
        """Rows of the programs for sequences that decode a token each; 0: `prompt` serves for more."""
        self._decode: dict[int, Program] = {}
        self.mixed_tokens = min(max(backend.mixed_tokens, 2 * kv.slots), self.max_tokens)
        """Rows of a run in which others decode beside a prompt: half of them at least are the prompt's."""
        self._few_rows = self.mixed_tokens if backend.decode_sizes[-1] > 1 else 0
        """Rows of the program for short prompts and for mixtures of few rows; 0 where the one for chunks is as fast."""
        self._mixed: Program | None = None
        self._in_flight: deque[tuple[int, Program | None]] = deque()
        self._submitted = 0
        self._note = note if kv.dtype == "f16" else None
        """Takes the note on a float16 cache; None once a page of it was checked."""
        self._first_pages: dict[int, int] = {}
        """Slot → page in which its sequence begins, until one was checked."""
        self._page_to_check: int | None = None
        """Where a sequence of the first run that samples a token begins."""

    def compile(self, report: Report | None) -> tuple[Program, Program]:
        """Make the programs for one sequence and for chunks; returns them."""
        size = self._sizes[0]
        graph = self._graph_of(size, "rows" if size == 1 else "all")
        self.decode = self._decode[size] = self._make(graph, report)
        self.prompt = self._make(self._graph_of(self.max_tokens, "rows"), report)
        return self.decode, self.prompt

    @property
    def programs(self) -> list[Program]:
        """The programs made so far. Each has an arena of its own."""
        mixed = [] if self._mixed is None else [self._mixed]
        return [*self._decode.values(), self.prompt, *mixed]

    def prepare(self, report: Report | None) -> None:
        """Make the programs of all batch sizes now, so that no request waits for them."""
        for size in self._sizes:
            self._decode_program(size, report)
        if self._few_rows:
            self._mixed_program(self._few_rows, report)

    def _decode_program(self, rows: int, report: Report | None = None) -> Program:
        """The program for `rows` sequences that decode a token each."""
        size = next((size for size in self._sizes if size >= rows), 0)
        if size == 0:
            return self.prompt
        if size not in self._decode:
            self._decode[size] = self._make(self._graph_of(size, "all"), report)
        return self._decode[size]

    def _mixed_program(self, rows: int, report: Report | None = None) -> Program:
        """The program for a mixture of `rows` rows."""
        if not 0 < rows <= self._few_rows < self.max_tokens:
            return self.prompt
        if self._mixed is None:
            self._mixed = self._make(self._graph_of(self._few_rows, "rows"), report)
        return self._mixed

    def start(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int],
        stop_token_ids: frozenset[int],
    ) -> None:
        """Start sampling in a slot, or resume after `output`. Raises `Error` for params that it cannot follow."""
        self.table.assign(slot, params, prompt, output, stop_token_ids)

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Write page numbers into the slot's row of the page table, from entry `first` on."""
        if self._note is not None and first == 0 and pages:
            self._first_pages[slot] = pages[0]
        self.backend.set_pages(slot, first, pages)

    def set_mask(self, slot: int, mask: NDArray[np.uint32] | None) -> None:
        """Allow only the tokens of a bitmask in this slot. None allows all."""
        self.table.set_mask(slot, mask)

    def submit(self, batch: Batch) -> int:
        """Start a run and return its ticket. Copies the batch's arrays."""
        rows, wanted = batch.rows, len(batch.logits)
        program = self._decode_program(rows) if batch.decodes == rows else self._mixed_program(rows)
        inputs = program.inputs
        inputs["ids"][:rows], inputs["positions"][:rows] = batch.ids, batch.positions
        inputs["sequences"][:rows] = batch.slots
        if not self.lookahead and batch.decodes:
            inputs["ids"][: batch.decodes] = self.table.last_token[batch.slots[: batch.decodes]]
        if "rows" in inputs:
            inputs["rows"][:wanted] = batch.logits
        if self._note is not None and self._page_to_check is None and wanted:
            self._page_to_check = self._first_pages.get(int(batch.slots[batch.logits[0]]))
        if wanted:
            ticket = program.submit(rows, wanted, self.table)
        else:
            program.run(rows, 0, program.prefill_end)
            ticket = -1
        self._submitted += 1
        self._in_flight.append((ticket, program if wanted else None))
        return self._submitted

    def collect(self, ticket: int) -> Sampled:
        """Wait for a run and return its tokens."""
        of_program, program = self._in_flight.popleft()
        if program is None:
            return Sampled.empty(0, 0)
        sampled = program.collect(of_program)
        if self._note is not None and self._page_to_check is not None:
            self.check_page(self._page_to_check)
        return sampled

    def check_page(self, page: int) -> None:
        """Note if a page of a float16 cache, in which a prompt begins, holds its largest number. Does it only once.

        Huge keys and values are a model's answer to its first tokens. To count them all, kernels would have to.
        """
        note, self._note = self._note, None
        self._first_pages.clear()
        if note is not None and any(map(has_largest_f16, self.backend.cache_page(page))):
            note(SATURATED)

    def reset(self) -> None:
        """Wait for all runs in flight and forget their tickets."""
        self._in_flight.clear()
        self.backend.discard_runs()
