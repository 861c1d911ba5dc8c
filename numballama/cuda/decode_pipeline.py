"""Decode steps that are queued ahead of the host, so that the GPU never waits for it.

Token, position and the sampler's state are in device memory. The last kernel of a step, `advance`, writes the new token
where the next step reads it, so the next step can be in the stream before the host has seen this one's token. The host
gets tokens through slots in pinned memory: step n writes one 64-bit word, n in its upper half and the token in its
lower half, to slot n mod `N_SLOTS`, and the host polls that word.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import NOT_NUMBERS, DeviceError, Error
from ..sampling import SamplerTable
from .driver import Pinned, PreparedLaunch
from .launch import Array, Launch
from .ops import sampling
from .sampler_table import DeviceSampled

if TYPE_CHECKING:
    from .program import CudaProgram

LOOKAHEAD = 2
"""Number of steps to queue beyond the one whose token the host waits for."""
N_SLOTS = 64
"""Number of slots for tokens; a power of two above `LOOKAHEAD`."""
POLL_LIMIT = 2000
"""Polls of a slot, some µs each, before the host asks whether the device still works."""


@dataclass(frozen=True)
class _PendingStep:
    """A decode step in the stream whose token the host has not read yet."""

    number: int
    position: int
    sequence: int


@dataclass(frozen=True)
class _LastStep:
    """The step after the last token that the host read. A run with these inputs continues with the queued steps."""

    token: int
    position: int
    sequence: int
    sampler: SamplerTable
    count: int
    """Number of tokens that the sampler had counted."""


class DecodePipeline:
    """The decode steps of one program, with sampling after the plan's steps."""

    def __init__(self, program: CudaProgram) -> None:
        self._program, self._backend, self._device = program, program.backend, program.backend.device
        self._slots = Pinned(self._device, 8 * N_SLOTS)
        self._slot_words = self._slots.bytes.view(np.int64)
        self.sampled = DeviceSampled(self._device, 1)
        self._zero = program.ctx.zeros(1)
        self._tails: dict[int, list[Launch]] = {}
        self._prepared_tails: dict[int, list[PreparedLaunch]] = {}
        self._pending: deque[_PendingStep] = deque()
        self._last: _LastStep | None = None
        self._penalized_tokens = 0
        self.launched = 0
        """Number of the last step that was put into the stream."""

    # Launches after a plan's steps

    def tail(self, n: int) -> list[Launch]:
        """Launches after the plan: sample over the first `n` tokens of the vocabulary (0: greedy, the plan's own
        argmax), then update the inputs for the next step.
        """
        if n not in self._tails:
            program, launches = self._program, []
            next_token, logits = program.array("next"), program.array("logits")
            if n:
                table = self._backend.sampler_table(logits.shape[1])
                row = Array(logits.address, (1, logits.shape[1]), logits.dtype)
                out = self.sampled.arrays | {"next_token": next_token}
                launches += sampling.sample(program.ctx.tokens, row, self._zero, table.arrays, out, logprobs=False)
            launches += sampling.advance(
                next_token=next_token, ids=program.array("ids"), positions=program.array("positions"),
                step=program.run_inputs.step, slots_address=self._slots.address, n_slots=N_SLOTS,
            )  # fmt: skip
            self._tails[n] = launches
        return self._tails[n]

    def _prepared_tail(self, n: int) -> list[PreparedLaunch]:
        if n not in self._prepared_tails:
            (self._prepared_tails[n],) = self._backend.prepare_launches([self.tail(n)])
        return self._prepared_tails[n]

    def _whole_step(self, n: int, start: int) -> list[PreparedLaunch]:
        """The launches of a decode step; sampling takes the place of the plan's argmax."""
        plan = self._program.plan
        end = plan.sampling_start if n else len(plan.steps)
        return self._program.prepared_steps(0, end, start) + self._prepared_tail(n)

    # Tokens

    def next_token(self, tokens: int, sampler: SamplerTable) -> int:
        """Run the plan for the program's inputs and return the next token. Queues the steps that are likely to follow.

        Raises `Error` if the logits hold NaN.
        """
        try:
            return self._next_token(tokens, sampler)
        except BaseException:  # such as Ctrl-C between a launch and its entry in the queue
            self.discard_pending()
            raise

    def _next_token(self, tokens: int, sampler: SamplerTable) -> int:
        program = self._program
        n = 0 if sampler.is_argmax(0) else sampler.n_candidates
        token_in, position, sequence = (
            int(program.inputs[name][tokens - 1]) for name in ("ids", "positions", "sequences")
        )
        last = self._last
        continues = (
            tokens == program.plan.tokens == 1 and last is not None and last.sampler is sampler
            and (last.token, last.position, last.sequence, last.count)
            == (token_in, position, sequence, int(sampler.generated[0]))
        )  # fmt: skip
        if not (continues and self._pending):
            self.discard_pending()
            if not continues:
                self.launched += N_SLOTS  # words of steps that were discarded, or never launched, match no later step
                program.run_inputs.send(tokens, self.launched)
                if n:
                    self._backend.sampler_table(sampler.vocab_size).send(sampler, 0)
            self._launch(n, position, sequence)
        if continues:
            ahead = self._pending[-1].position + 1
            limit = next(v.shape[2] for v in program.plan.graph.values.values() if v.kind == "state")
            while len(self._pending) <= LOOKAHEAD and ahead < limit:
                self._launch(n, ahead, sequence)
                ahead += 1
        token = self._await_token(self._pending[0].number)
        self._pending.popleft()
        if token < 0:
            if self._pending:  # compute this step's values again, so that `value` shows the cause
                program.run_steps(tokens, 0, len(program.plan.steps))
            raise Error(NOT_NUMBERS)
        if n:
            sampler.accept(0, token)
        self._penalized_tokens = tokens if n and sampler.changes_logits(0) else 0
        self._last = _LastStep(token, position + 1, sequence, sampler, int(sampler.generated[0]))
        return token

    def _launch(self, n: int, position: int, sequence: int) -> None:
        start = self._program.variant_start(position)
        self._program.replay(("step", n, start), lambda: self._whole_step(n, start))
        self.launched += 1
        self._pending.append(_PendingStep(self.launched, position, sequence))

    def _await_token(self, number: int) -> int:
        """The token of step `number`, once its slot has it. Raises `DeviceError` if the device stops without it."""
        polls = 0
        while True:
            word = int(self._slot_words[number % N_SLOTS])
            if word >> 32 & 0x7FFFFFFF == number & 0x7FFFFFFF:
                return int(np.int64(word).astype(np.int32))
            polls += 1
            if polls % POLL_LIMIT == 0:
                idle = not self._device.busy  # asked before the slot is read again: the token may arrive in between
                word = int(self._slot_words[number % N_SLOTS])
                if idle and word >> 32 & 0x7FFFFFFF != number & 0x7FFFFFFF:
                    raise DeviceError(f"{self._device}: the stream is idle, but step {number} gave no token")
                time.sleep(0)

    def discard_pending(self) -> None:
        """Ignore the steps that were queued ahead of the host; the next step starts from the host's inputs."""
        self._pending.clear()
        self._last = None

    def logits_unchanged(self) -> None:
        """Record that the logits in memory are those of the plan, so that nothing is recomputed."""
        self._penalized_tokens = 0

    def recompute_last(self) -> None:
        """Run the host's last step again if its values are no longer in memory, so that they can be read.

        They are gone if the device has run ahead of the host, or if the repetition penalty has changed the logits.
        """
        tokens = 1 if self._pending and self._last is not None else self._penalized_tokens
        if tokens:
            self.discard_pending()
            self.logits_unchanged()
            self._program.run_steps(tokens, 0, len(self._program.plan.steps))
