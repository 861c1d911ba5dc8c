"""`FakeRunner`: a device without a model. It checks that every row finds its own history in its pages."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numballama.engine.request import TokenEvent
from numballama.engine.runner import Batch
from numballama.sampling import FEED, Sampled, SamplingParams

POISON = -7


def next_token(history: Sequence[int], vocab_size: int, seed: int = 0) -> int:
    """The model: a token that depends on all ids before it, on their order and on the seed."""
    state = 1469598103934665603 ^ (seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    for token in history:
        state = (state ^ (token + 1)) * 1099511628211 & (1 << 64) - 1
    return (state >> 24) % vocab_size


def expected(prompt: Sequence[int], count: int, vocab_size: int, seed: int = 0) -> list[int]:
    """What a prompt continues with."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, vocab_size, seed))
    return history[len(prompt) :]


@dataclass
class FakeRunner:
    """Runs are done when they are collected, `lookahead` or more submits after their own, as on a GPU.

    A page holds the ids written to it. A row reads the ids of its whole history through the page table as it stood at
    the submit. `before_submit` and `before_collect` are called with the number of the run.
    """

    max_sequences: int = 4
    max_tokens: int = 16
    page: int = 4
    pages: int = 33
    pages_per_sequence: int = 16
    lookahead: int = 0
    vocab_size: int = 1000
    before_submit: Callable[[int], None] = lambda number: None
    before_collect: Callable[[int], None] = lambda number: None
    nan_after: dict[int, int] = field(default_factory=dict)
    """Prompt's first token → number of output tokens after which its logits are NaN."""
    runs: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        self.content = np.full((self.pages, self.page), POISON, np.int64)
        self.table = np.zeros((self.max_sequences + 1, self.pages_per_sequence), np.int64)
        self.last_token = np.zeros(self.max_sequences, np.int64)
        self.seeds = [0] * self.max_sequences
        self.prompts: list[list[int]] = [[] for _ in range(self.max_sequences)]
        self.outputs: list[list[int]] = [[] for _ in range(self.max_sequences)]
        self.masks: dict[int, NDArray[np.uint32]] = {}
        self.queue: deque[tuple[str, tuple[object, ...]]] = deque()
        self.results: dict[int, Sampled] = {}
        self.in_flight: deque[int] = deque()
        self.batches: list[Batch] = []
        self.busy = threading.Lock()

    def start(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int],
        stop_token_ids: frozenset[int],
    ) -> None:
        assert 0 <= slot < self.max_sequences
        self.queue.append(("start", (slot, params, list(prompt), list(output))))

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        assert all(0 < page < self.pages for page in pages)
        self.queue.append(("pages", (slot, first, list(pages))))

    def set_mask(self, slot: int, mask: NDArray[np.uint32] | None) -> None:
        self.queue.append(("mask", (slot, None if mask is None else mask.copy())))

    def submit(self, batch: Batch) -> int:
        assert self.busy.acquire(blocking=False), "one thread at a time drives a runner"
        try:
            self.before_submit(self.runs)
            assert 1 <= batch.rows <= self.max_tokens
            assert len(self.in_flight) <= self.lookahead, "too many runs in flight"
            self.check_shape(batch)
            copied = Batch(*(a.copy() for a in (batch.ids, batch.positions, batch.slots, batch.logits)), batch.decodes)
            self.batches.append(copied)
            number = self.runs
            self.runs += 1
            self.rows += batch.rows
            self.queue.append(("run", (number, copied)))
            self.in_flight.append(number)
            return number
        finally:
            self.busy.release()

    def check_shape(self, batch: Batch) -> None:
        """The promises of `Batch`."""
        slots, positions = batch.slots.tolist(), batch.positions.tolist()
        assert len(slots) == len(positions) == batch.rows
        assert len(set(slots[: batch.decodes])) == batch.decodes, "one row for each sequence that generates"
        assert batch.logits.tolist()[: batch.decodes] == list(range(batch.decodes))
        assert sorted(set(batch.logits.tolist())) == batch.logits.tolist()
        assert (batch.ids[: batch.decodes] == FEED).all() and (batch.ids[batch.decodes :] >= 0).all()
        seen: set[int] = set()
        for row, slot in enumerate(slots):
            if row and slots[row - 1] == slot:
                assert row >= batch.decodes and positions[row] == positions[row - 1] + 1
            else:
                assert slot not in seen, "a sequence's rows are contiguous"
                seen.add(slot)

    def collect(self, ticket: int) -> Sampled:
        assert self.busy.acquire(blocking=False), "one thread at a time drives a runner"
        try:
            assert self.in_flight[0] == ticket, "tickets are collected in order"
            self.before_collect(ticket)
            while ticket not in self.results:
                self.execute(*self.queue.popleft())
            self.in_flight.popleft()
            return self.results.pop(ticket)
        finally:
            self.busy.release()

    def reset(self) -> None:
        while self.queue:
            self.execute(*self.queue.popleft())
        self.in_flight.clear()
        self.results.clear()

    def execute(self, what: str, arguments: tuple) -> None:
        """What the stream of a GPU does, in the order of the calls."""
        if what == "start":
            slot, params, prompt, output = arguments
            self.seeds[slot] = params.seed or 0 if params.temperature else 0
            self.prompts[slot], self.outputs[slot] = prompt, output
            self.masks.pop(slot, None)
        elif what == "pages":
            slot, first, pages = arguments
            self.table[slot, first : first + len(pages)] = pages
        elif what == "poison":
            self.content[arguments[0]] = POISON
        elif what == "mask":
            slot, mask = arguments
            self.masks.pop(slot, None)
            if mask is not None:
                self.masks[slot] = mask
        else:
            self.execute_run(*arguments)

    def execute_run(self, number: int, batch: Batch) -> None:
        ids = batch.ids.astype(np.int64)
        for row in np.flatnonzero(ids == FEED):
            ids[row] = self.last_token[batch.slots[row]]
        for token, position, slot in zip(ids.tolist(), batch.positions.tolist(), batch.slots.tolist(), strict=True):
            place = self.table[slot, position // self.page], position % self.page
            assert place[0] > 0, "a row would write to the scratch page"
            self.content[place] = token
        tokens = []
        for row in batch.logits.tolist():
            slot, position = int(batch.slots[row]), int(batch.positions[row])
            pages = self.table[slot, : position // self.page + 1]
            history = self.content[pages].reshape(-1)[: position + 1].tolist()
            tokens.append(self.sample(slot, history))
        rows = len(tokens)
        self.results[number] = Sampled(
            np.array(tokens, np.int32),
            np.array([-token / 8 for token in tokens], np.float32),
            np.array([[token, 1] for token in tokens], np.int32).reshape(rows, 2),
            np.array([[-token / 8, -9] for token in tokens], np.float32).reshape(rows, 2),
        )

    def sample(self, slot: int, history: list[int]) -> int:
        """The token after what the pages hold, which must be the slot's own history."""
        own = self.prompts[slot] + self.outputs[slot]
        assert history == own, f"slot {slot} finds {history} in its pages, and its ids are {own}"
        token = next_token(history, self.vocab_size, self.seeds[slot])
        if slot in self.masks:
            allowed = np.flatnonzero(np.unpackbits(self.masks[slot].view(np.uint8), bitorder="little"))
            token = int(allowed[token % len(allowed)])
        if self.nan_after.get(history[0]) == len(self.outputs[slot]):
            token = -1
        self.outputs[slot].append(max(token, 0))
        self.last_token[slot] = max(token, 0)
        return token

    def poison(self, pages: Sequence[int]) -> None:
        """Overwrite pages that nobody may read any more, after the runs submitted so far."""
        self.queue.append(("poison", (list(pages),)))


def make_params(**options: Any) -> SamplingParams:
    """Greedy settings, changed by `options`."""
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, **options})


def tokens_of(request: Iterable[TokenEvent], index: int = 0) -> list[int]:
    """Read one of a request's sequences to the end."""
    return [event.token for event in request if event.index == index]


def read_until_error(request: Iterable[TokenEvent]) -> tuple[list[int], Exception | None]:
    """A request's tokens, and the error that it ends with."""
    tokens = []
    try:
        for event in request:
            tokens.append(event.token)
    except Exception as error:
        return tokens, error
    return tokens, None
