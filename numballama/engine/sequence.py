"""`Sequence`: one text that the engine generates, and how far it has come."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from collections.abc import Sequence as TokenIds
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..sampling import SamplingParams

if TYPE_CHECKING:
    from .request import RequestState


class Status(Enum):
    """Where a sequence stands. It is set, never inferred from other fields."""

    WAITING = "waiting"
    """For a slot and pages, or for pages that another sequence computes."""
    RUNNING = "running"
    """It has a slot and pages."""
    PREEMPTED = "preempted"
    """It gives way to others. It waits again when none of its rows is in flight."""
    FINISHED = "finished"
    """It plans no more rows. Its slot and pages are free when none of its rows is in flight."""


class Constraint(Protocol):
    """Restricts a sequence's next token, as a grammar does.

    `accept` is called in a thread of the engine's, for one token at a time; `mask` there and in the thread that steps.
    What they raise ends the request.
    """

    def mask(self) -> NDArray[np.uint32] | None:
        """Bitmask uint32 [ceil(vocab_size / 32)] of the tokens that may come next. None: all.

        It is read until the next `accept`.
        """

    def accept(self, token: int) -> bool | None:
        """Advance by a sampled token, which is no stop token. True: the text is complete, nothing may follow."""


@runtime_checkable
class BatchConstraint(Constraint, Protocol):
    """Constraints of a class that advances many at once."""

    forced: TokenIds[int]
    """Tokens that must follow the last one that was accepted, and have been accepted with it."""

    @staticmethod
    def advance(steps: list[tuple[Any, int]]) -> list[bool | Exception]:
        """`accept` and `mask` of each (constraint of this class, token): what `accept` returns or either raises."""


Order = tuple[int, int, int]


class Sequence:
    """One sequence of a request. Positions count from 0; a row computes the keys and values of one position.

    `ids` are the prompt and the known output. After them come `pending` tokens that runs in flight sample. Positions
    below `computed` are in the KV cache; rows of positions below `planned` have been submitted.
    """

    __slots__ = (
        "admitted_at", "advancing", "allowed", "cached_tokens", "chain", "computed", "constraint", "end", "entered",
        "ids", "in_flight", "index", "order", "pages", "params", "parked_on", "pending", "planned", "preemptions",
        "prompt_tokens", "publish_at", "published", "request", "resume", "root", "slot", "status", "stop_token_ids",
    )  # fmt: skip

    def __init__(
        self,
        prompt: TokenIds[int],
        params: SamplingParams,
        max_tokens: int,
        *,
        order: Order,
        index: int = 0,
        root: Hashable = None,
        stop_token_ids: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
        request: RequestState | None = None,
    ) -> None:
        self.order = order
        """(priority, arrival, index): the least is first to be admitted and last to be preempted."""
        self.request, self.index = request, index
        self.params, self.stop_token_ids, self.constraint = params, stop_token_ids, constraint
        self.root = root
        """Under which node its first page is looked up: it holds the salt."""
        self.ids = list(prompt)
        self.prompt_tokens = len(self.ids)
        self.end = self.prompt_tokens + max_tokens - 1
        """Positions that are computed at most. The last token is never computed."""
        self.status = Status.WAITING
        self.cached_tokens = 0
        """Tokens of the prompt that were in the KV cache when the sequence was first admitted."""
        self.admitted_at = 0.0
        """When it first got a slot, on the clock of `time.monotonic`; 0 before that."""
        self.preemptions = 0
        self.advancing = False
        """Whether its constraint is being advanced by its last token. It has no row until the next mask is there."""
        self.parked_on = 0
        """The page that it waits for while another sequence computes it, or 0."""
        self.vacate()

    def vacate(self) -> None:
        """Forget slot, pages and everything computed."""
        self.slot = -1
        self.pages: list[int] = []
        self.planned = self.computed = self.pending = self.in_flight = 0
        self.allowed = 0
        """Rows may be planned for positions below this without a further look."""
        self.entered = self.published = self.publish_at = 0
        """Pages in the prefix cache's index; pages computed; positions computed when the next page is full."""
        self.chain: Hashable = None
        """Node of the last entered page."""
        self.resume = False
        """Whether its next row must be preceded by a start of its sampler, which lacks the latest tokens."""

    @property
    def output_tokens(self) -> int:
        """Known tokens after the prompt."""
        return len(self.ids) - self.prompt_tokens

    @property
    def output(self) -> list[int]:
        """The known tokens after the prompt."""
        return self.ids[self.prompt_tokens :]

    def __repr__(self) -> str:
        counts = (
            f"{self.prompt_tokens}+{self.output_tokens} tokens, {self.computed} computed, {self.in_flight} in flight"
        )
        return f"<Sequence {self.order} {self.status.value}: {counts}>"


def owner(sequence: Sequence) -> RequestState:
    """The request of a sequence that has one, as all of an engine's."""
    state = sequence.request
    assert state is not None
    return state


def make_sequences(
    prompt: TokenIds[int],
    params: SamplingParams,
    max_tokens: int,
    priority: int,
    number: int,
    *,
    root: Hashable,
    stop_token_ids: frozenset[int],
    constraint: Callable[[], Constraint] | None,
    request: RequestState,
) -> list[Sequence]:
    """The `n` sequences of request `number`, each with a seed and a constraint of its own."""
    return [
        Sequence(
            prompt,
            own,
            max_tokens,
            order=(priority, number, index),
            index=index,
            root=root,
            stop_token_ids=stop_token_ids,
            constraint=None if constraint is None else constraint(),
            request=request,
        )
        for index, own in enumerate(seeded(params))
    ]


def seeded(params: SamplingParams) -> list[SamplingParams]:
    """The params of each of a request's sequences.

    Each has a seed of its own, so that a preempted one can continue its draws.
    """
    if params.n == 1 and params.temperature == 0:
        return [params]
    seed = params.seed
    if seed is None or seed == -1:
        seed = int.from_bytes(os.urandom(7), "little")
    if params.n == 1 and seed == params.seed:
        return [params]
    return [params.override({"seed": (seed + index) % 2**64, "n": 1}) for index in range(params.n)]
