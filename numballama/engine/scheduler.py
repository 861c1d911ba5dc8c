"""`Scheduler`: which rows the next run holds. It decides and keeps the books; it calls no device."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from ..errors import Error
from ..sampling import FEED
from .pages import BlockManager
from .runner import Batch
from .sequence import Sequence, Status

_order = attrgetter("order")
TableWrite = tuple[int, int, list[int]]
"""(slot, first index, page numbers) to write into the page table."""


@dataclass
class Run:
    """A planned run: its rows, whom they belong to, and what the runner must be told before it."""

    batch: Batch
    decodes: list[Sequence]
    """Sequences of the first rows, one row each."""
    chunks: list[tuple[Sequence, int]]
    """(sequence, position after its last row) of each chunk of a prompt."""
    sampled: list[Sequence]
    """The sequence of each logit row."""
    starts: list[Sequence] = field(default_factory=list)
    """Sequences that have just been given a slot."""
    tables: list[TableWrite] = field(default_factory=list)
    ticket: int = -1
    """What `Runner.submit` returned for it."""
    prompt_tokens: int = 0
    """Rows of prompts. The other rows of `chunks` are of known tokens, such as those that a grammar forces."""


class Scheduler:
    """Decides what the next run computes: a row for every sequence that generates, and chunks of prompts.

    Sequences are ordered by (priority, arrival). All that generate have a row in each run. What is left of the run's
    rows (`max_tokens`; `mixed_tokens` when others generate) goes to prompts, in order. A waiting sequence is admitted
    when it is first, a slot is free, and its pages are available with some to spare. Nobody overtakes it except while
    it waits for pages that a running sequence computes and that it will share. When a running sequence needs a page and
    none is available, the last running sequence in order is preempted: it loses its pages and computes them again.

    Attributes: `waiting`, `prefilling` and `decoding` (sequences in order), `leaving` (preempted or finished, with rows
    in flight: slot and pages are theirs until these are collected), `pages`.
    """

    def __init__(
        self,
        pages: BlockManager[Sequence],
        max_sequences: int,
        max_tokens: int,
        mixed_tokens: int | None = None,
    ) -> None:
        if max_tokens < max_sequences:
            raise Error(f"a run of {max_tokens} rows is too small for {max_sequences} sequences")
        self.pages, self.max_sequences, self.max_tokens = pages, max_sequences, max_tokens
        self.mixed_tokens = min(max(mixed_tokens or max_tokens, max_sequences), max_tokens)
        self.waiting: list[Sequence] = []
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._ids, self._positions, self._slots = (np.zeros(max_tokens, np.int32) for _ in range(3))
        self._numbers = np.arange(max_tokens, dtype=np.int32)
        self._empty()

    def _empty(self) -> None:
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.leaving: set[Sequence] = set()
        self._parked: dict[int, list[Sequence]] = {}
        self._free_slots = list(range(self.max_sequences - 1, -1, -1))
        self._no_room = False  # the first waiting sequence did not fit, and nothing has been freed since
        self._tables: list[TableWrite] = []  # of a plan that had no rows
        self._last: list[Sequence] = []  # `decodes` of the last plan, whose rows are in the arrays
        self._batch = self._make_batch(0, [])

    @property
    def running(self) -> int:
        """Number of sequences with a slot that plan rows."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def queued(self) -> int:
        """Number of sequences that wait for a slot, for pages, or for pages that another computes."""
        return len(self.waiting) + sum(map(len, tuple(self._parked.values())))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must fit: `prompt_tokens` and `end` are at most what all pages hold."""
        if max(sequence.prompt_tokens, sequence.end) > (self.pages.pages - 1) * self.pages.page:
            raise Error(f"{sequence!r} can never fit into {self.pages.pages - 1} pages")
        insort(self.waiting, sequence, key=_order)
        self._no_room = False

    def plan(self) -> Run | None:
        """Choose the rows of the next run. None: there is nothing to compute before a run is collected."""
        tables, self._tables = self._tables, []
        decodes: list[Sequence] = []
        for sequence in tuple(self.decoding):
            if sequence.planned >= sequence.allowed and not self._extend(sequence, tables):
                continue
            sequence.planned += 1
            sequence.pending += 1
            sequence.in_flight += 1
            decodes.append(sequence)
        count = len(decodes)
        if decodes == self._last:
            self._positions[:count] += 1
        else:
            self._ids[:count] = FEED
            self._positions[:count] = [each.planned - 1 for each in decodes]
            self._slots[:count] = [each.slot for each in decodes]
            self._last = decodes
        if self.prefilling or (self.waiting and self._free_slots and not self._no_room):
            return self._plan_chunks(Run(self._batch, decodes, [], decodes, [], tables))
        if not count:
            return None
        if self._batch.decodes != count or self._batch.rows != count:
            self._batch = self._make_batch(count, None)
        return Run(self._batch, decodes, [], decodes, [], tables)

    def _plan_chunks(self, run: Run) -> Run | None:
        """Fill the run with chunks of prompts, first of those that run already."""
        row = count = len(run.decodes)
        most = self.mixed_tokens if count else self.max_tokens
        logits = list(range(count))
        run.sampled = list(run.decodes)
        for sequence in tuple(self.prefilling):
            if row == most:
                break
            if not self._add_pages(sequence, run):
                continue
            row = self._add_chunk(run, sequence, row, most, logits)
        while row < most and (admitted := self._admit(run)) is not None:
            row = self._add_chunk(run, admitted, row, most, logits)
        if not row:
            self._tables = run.tables  # pages that a sequence has while it waits for more
            return None
        run.batch = self._batch = self._make_batch(row, logits)
        run.batch.decodes = count
        return run

    def _add_chunk(self, run: Run, sequence: Sequence, row: int, most: int, logits: list[int]) -> int:
        """Add the next positions of a prompt from `row` on. Returns the row after them."""
        start = sequence.planned
        end = min(len(sequence.ids), start + most - row)
        after = row + end - start
        self._ids[row:after] = sequence.ids[start:end]
        np.add(self._numbers[: end - start], start, out=self._positions[row:after])
        self._slots[row:after] = sequence.slot
        sequence.planned = end
        sequence.in_flight += 1
        run.prompt_tokens += max(min(end, sequence.prompt_tokens) - start, 0)
        if sequence.resume:
            sequence.resume = False
            run.starts.append(sequence)
        run.chunks.append((sequence, end))
        if end == len(sequence.ids):
            sequence.pending += 1
            logits.append(after - 1)
            run.sampled.append(sequence)
            _remove(self.prefilling, sequence)
            insort(self.decoding, sequence, key=_order)
        return after

    def prefill_forced(self, sequence: Sequence) -> None:
        """Tokens beyond the sampled one were added to a sequence that generates: compute them as those of a prompt."""
        _remove(self.decoding, sequence)
        insort(self.prefilling, sequence, key=_order)
        sequence.allowed, sequence.resume = 0, True

    def _make_batch(self, rows: int, logits: list[int] | None) -> Batch:
        """The first `rows` rows; `logits` None: each wants logits."""
        wanted = self._numbers[:rows] if logits is None else np.array(logits, np.int32)
        return Batch(self._ids[:rows], self._positions[:rows], self._slots[:rows], wanted, rows)

    def _extend(self, sequence: Sequence, tables: list[TableWrite]) -> bool:
        """Whether the sequence can have a row now. Gives it a page if it needs one."""
        if sequence.status is not Status.RUNNING or sequence.planned >= sequence.end:
            return False
        if sequence.constraint is not None and (sequence.pending or sequence.advancing):
            return False
        if sequence.planned >= len(sequence.pages) * self.pages.page:
            if not self._make_room(sequence):
                return False
            self._add_page(sequence, tables)
        have = len(sequence.pages) * self.pages.page
        sequence.allowed = min(have, sequence.end) if sequence.constraint is None else sequence.planned + 1
        return True

    def _add_pages(self, sequence: Sequence, run: Run) -> bool:
        """Give a sequence the pages that its known tokens need. False: it must wait, or it is itself preempted."""
        if sequence.status is not Status.RUNNING:
            return False  # one before it in order has needed its pages
        while len(sequence.ids) > len(sequence.pages) * self.pages.page:
            if not self._make_room(sequence, run.decodes):
                return False
            self._add_page(sequence, run.tables)
        return True

    def _add_page(self, sequence: Sequence, tables: list[TableWrite]) -> None:
        """Give a sequence an available page."""
        page = self.pages.allocate(1)
        tables.append((sequence.slot, len(sequence.pages), page))
        sequence.pages += page

    def _make_room(self, sequence: Sequence, planned: list[Sequence] | None = None) -> bool:
        """Make a page available for a running sequence. False: it must wait, or it is itself preempted.

        Those in `planned` have a row in this run, which writes to their pages: they are not preempted now.
        """
        while not self.pages.available:
            if self.leaving:
                return False  # their pages come free when their last run is collected
            victim = max((*self.decoding[-1:], *self.prefilling[-1:]), key=_order)
            if planned and victim in planned:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._stop(sequence, Status.PREEMPTED)

    def _stop(self, sequence: Sequence, status: Status) -> None:
        """Take a running sequence out of the runs to come."""
        if not _remove(self.decoding, sequence):
            _remove(self.prefilling, sequence)
        sequence.status, sequence.allowed = status, 0
        if sequence.in_flight:
            self.leaving.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take slot and pages from a sequence that no run in flight writes for. A preempted one waits again."""
        for page in self.pages.release(sequence.pages):
            self._unpark(page)
        self._free_slots.append(sequence.slot)
        self._no_room = False
        sequence.vacate()
        if sequence.status is Status.PREEMPTED:
            sequence.status = Status.WAITING
            insort(self.waiting, sequence, key=_order)

    def _unpark(self, page: int) -> None:
        """Queue those again that waited for a page."""
        for sequence in self._parked.pop(page, ()):
            sequence.parked_on = 0
            insort(self.waiting, sequence, key=_order)
            self._no_room = False

    def _admit(self, run: Run) -> Sequence | None:
        """Give the first waiting sequence a slot and pages for all its tokens. None: nobody can be admitted now."""
        while self.waiting and self._free_slots and not self._no_room:
            sequence, pages = self.waiting[0], self.pages
            if sequence.advancing:
                return None  # it was preempted, and its next mask is not there yet
            match = pages.match(sequence.root, sequence.ids)
            if match.writer is not None and match.writer.order < sequence.order:
                # it is computed by a sequence that comes before this one, so this cannot take for ever
                del self.waiting[0]
                sequence.parked_on = match.awaited
                self._parked.setdefault(match.awaited, []).append(sequence)
                continue
            spare = max(self.running, pages.pages // 100) if self.running else 0
            if pages.needed(match, len(sequence.ids)) + spare > pages.available:
                self._no_room = True
                return None
            del self.waiting[0]
            pages.share(match.pages)
            sequence.pages = match.pages + pages.allocate(-(-len(sequence.ids) // pages.page) - len(match.pages))
            self._start(sequence, len(match.pages))
            sequence.chain = match.node
            for number in range(len(match.pages), len(sequence.ids) // pages.page):
                self._enter(sequence, number)
            run.starts.append(sequence)
            run.tables.append((sequence.slot, 0, sequence.pages))
            return sequence
        return None

    def _start(self, sequence: Sequence, shared: int) -> None:
        """Let a sequence run whose first `shared` pages are computed."""
        known = shared * self.pages.page
        sequence.status = Status.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.planned = sequence.computed = known
        sequence.entered = sequence.published = shared
        sequence.publish_at = known + self.pages.page
        if not sequence.preemptions:
            sequence.cached_tokens = known
            sequence.admitted_at = time.monotonic()
            self.prefix_queries += sequence.prompt_tokens
            self.prefix_hits += known
        insort(self.prefilling, sequence, key=_order)

    def _enter(self, sequence: Sequence, number: int) -> None:
        """Enter the sequence's page `number` in the prefix cache's index."""
        size = self.pages.page
        ids = sequence.ids[number * size : (number + 1) * size]
        sequence.chain = self.pages.enter(sequence.pages[number], sequence.chain, ids, sequence)
        sequence.entered = number + 1

    def collected(self, run: Run) -> None:
        """Take in that a run has ended: its positions are computed, its rows no longer in flight.

        Call it before the run's tokens are added to their sequences. Skip the tokens of finished ones.
        """
        for sequence in run.decodes:
            sequence.in_flight -= 1
            sequence.pending -= 1
            sequence.computed += 1
            if sequence.computed >= sequence.publish_at:
                self._publish(sequence)
        for sequence, end in run.chunks:
            sequence.in_flight -= 1
            sequence.computed = end
            self._publish(sequence)
        if len(run.sampled) > len(run.decodes):
            for sequence in run.sampled[len(run.decodes) :]:
                sequence.pending -= 1
        if self.leaving:
            for sequence in [each for each in self.leaving if not each.in_flight]:
                self.leaving.discard(sequence)
                self._release(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Let others share the pages that are full and computed."""
        if sequence.status is Status.FINISHED:
            return  # runs in flight may have sampled tokens that are not collected yet
        while sequence.computed >= sequence.publish_at:
            number = sequence.published
            if number >= sequence.entered:
                self._enter(sequence, number)
            page = sequence.pages[number]
            self.pages.publish(page)
            sequence.published = number + 1
            sequence.publish_at += self.pages.page
            if self._parked:
                self._unpark(page)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, wherever it stands. Its slot and pages come free when no row of it is in flight."""
        if sequence.status is Status.RUNNING:
            self._stop(sequence, Status.FINISHED)
        elif sequence.status is Status.WAITING and not _remove(self.waiting, sequence) and sequence.parked_on:
            parked = self._parked[sequence.parked_on]
            parked.remove(sequence)
            if not parked:
                del self._parked[sequence.parked_on]
        sequence.status = Status.FINISHED

    def reset(self, sequences: Iterable[Sequence]) -> None:
        """Start from an empty KV cache without runs in flight. `sequences` have not ended; they compute all again."""
        self.waiting = sorted(sequences, key=_order)
        self.pages.reset()
        self._empty()
        for sequence in self.waiting:
            sequence.status, sequence.parked_on = Status.WAITING, 0
            sequence.vacate()


def _remove(ordered: list[Sequence], sequence: Sequence) -> bool:
    """Remove a sequence from a list in order. False if it is not there."""
    place = bisect_left(ordered, sequence.order, key=_order)
    if place == len(ordered) or ordered[place] is not sequence:
        return False
    del ordered[place]
    return True
