"""Runs that sample, queued ahead of the host, so that the GPU never waits for it.

Tokens and the samplers' state are in device memory. The last kernel of a run, `advance`, notes each token as its slot's
latest. A run whose id is FEED reads it from there, so it can be in the stream before the host has seen the token. After
a decode run, `advance` also writes tokens and next positions to where the same run of the next tokens would read them:
if it follows, the host sends nothing.

Of the ranks on several GPUs that share a model, rank 0 samples, and sends the tokens to the memory of the others. Where
NCCL exchanges values, a run is several graphs: those with calls of NCCL's are the same on all ranks, and rank 0 samples
in one of its own.

The host gets tokens through pinned memory: run n writes a 64-bit word for each row, n in its upper half and the token
in its lower half, to the words of n mod `N_RUNS`, and the host polls these.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError
from ..sampling import FEED, Sampled, SamplerTable
from .driver import Device, Memory, Pinned
from .launch import RowKind, Work
from .ops import collectives, sampling
from .sampler_table import DeviceSampled

if TYPE_CHECKING:
    from .program import CudaProgram, Prepared

LOOKAHEAD = 2
"""Number of runs to queue beyond the one whose tokens the host waits for."""
N_RUNS = 8
"""Number of runs that have words in the mailbox; a power of two above `LOOKAHEAD` + 1."""
MAX_ROWS = 1024
"""Rows of a run at most: the threads of a block."""
SPIN_S = 1e-4
"""Seconds for which a wait only polls. Then it sleeps between polls where other threads may want to run."""
SLEEP_PART, LONGEST_SLEEP_S = 1 / 16, 2e-4
"""A sleep is this part of the wait so far, and not longer than that. Linux adds some 60 µs to each. `LOOKAHEAD` more
runs are queued, so a token that is seen late does not delay the next one."""
CHECK_S = 0.01
"""Seconds after which the host asks whether the device still works."""


class Mailbox:
    """Where runs write their tokens for the host. All programs of a backend share it, and the count of runs.

    `address` is that of int64 [N_RUNS, MAX_ROWS] in memory that the host reads. `count` i64 [1] in device memory is the
    number of runs so far, `launched` the number that the host has put into the stream.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pinned = Pinned(device, 8 * N_RUNS * MAX_ROWS)
        self._words = self._pinned.bytes.view(np.int64).reshape(N_RUNS, MAX_ROWS)
        self._words[:] = 0
        self.memory = Memory(device, 8, "the count of runs")
        try:
            device.fill(self.memory.address, 0, 8)
        except BaseException:
            self.memory.free()
            raise
        self.address = self._pinned.address
        self.count = self.memory.array(0, (1,), "i64")
        self.launched = 0

    def wait(self, number: int, rows: int) -> NDArray[np.int32]:
        """The tokens of run `number`, once they are there. Raises `DeviceError` if the device stops without them."""
        words, tag = self._words[number % N_RUNS, :rows], number & 0x7FFFFFFF
        if not self._arrived(words, tag):
            self._poll(words, tag, number)
        return words.astype(np.int32)  # the lower halves

    def _poll(self, words: NDArray[np.int64], tag: int, number: int) -> None:
        """Return when all words are there. Another thread that wants the GIL gets it between two polls.

        Without a pause a server's HTTP thread would get it after the interpreter's switch interval, 5 ms, only. A
        compiled loop would release it as well, but to load one imports Numba.
        """
        is_alone = threading.active_count() == 1
        started = time.perf_counter()
        check_at = started + CHECK_S
        while not self._arrived(words, tag):
            now = time.perf_counter()
            if now >= check_at:
                idle = not self._device.busy  # asked before the words are read again: they may arrive in between
                if idle and not self._arrived(words, tag):
                    raise DeviceError(f"{self._device}: the stream is idle, but run {number} gave no tokens")
                check_at = now + CHECK_S
                time.sleep(0)
            if not is_alone:
                waited = now - started
                time.sleep(0 if waited < SPIN_S else min(waited * SLEEP_PART, LONGEST_SLEEP_S))

    def resume(self) -> None:
        """Count on from the device's number of runs. The stream must be idle."""
        count = np.zeros(1, np.int64)
        self._device.read(self.memory.address, count)
        self.launched = int(count[0])

    @staticmethod
    def _arrived(words: NDArray[np.int64], tag: int) -> bool:
        if int(words[0]) >> 32 & 0x7FFFFFFF != tag:
            return False
        return len(words) == 1 or int(np.count_nonzero(words >> 32 & 0x7FFFFFFF == tag)) == len(words)


class _Logprobs:
    """Pinned copies of the log probabilities of the last N_RUNS runs of a program."""

    def __init__(self, device: Device, sampled: DeviceSampled) -> None:
        self._device, self._source = device, sampled.memory
        self._arrays = {name: sampled.arrays[name] for name in ("logprobs", "top_ids", "top_logprobs")}
        self._pinned = Pinned(device, N_RUNS * sampled.memory.nbytes)

    def enqueue(self, number: int) -> None:
        """Enqueue a copy of what run `number` has just written."""
        size = self._source.nbytes
        self._device.fetch(self._source.address, self._pinned.address + number % N_RUNS * size, size)

    def read(self, number: int, out: Sampled) -> None:
        """Wait for the stream, then write the results of run `number` to `out`."""
        self._device.synchronize()
        begin = number % N_RUNS * self._source.nbytes
        for name, array in self._arrays.items():
            target = getattr(out, name)
            place = begin + array.address - self._source.address
            found = self._pinned.bytes[place : place + array.nbytes].view(target.dtype).reshape(array.shape)
            target[...] = found[: len(target)] if target.ndim == 1 else found[: len(target), : target.shape[1]]


class DecodePipeline:
    """The runs of one program that sample after the plan's steps."""

    def __init__(self, program: CudaProgram) -> None:
        self._program, self._backend, self._device = program, program.backend, program.backend.device
        logits = program.values.get("logits")
        self._vocab = logits.shape[-1] if logits is not None else 0
        self.sampled = DeviceSampled(self._device, logits.shape[0] if logits is not None else 1)
        self._tails: dict[str, list[Work]] = {}
        self._prepared_tails: dict[str, list[Prepared]] = {}
        self._logprobs: _Logprobs | None = None
        self._wanted: dict[int, int] = {}
        """Run → how many likeliest tokens its rows want at most, for runs that want log probabilities."""
        self._rows: dict[int, int] = {}
        self._last: tuple[int, int, SamplerTable | None, int] | None = None
        """(tokens, rows, table, its changes) of the last run, which the next one may continue."""
        self._kind = ""
        self._positions = np.zeros(program.plan.tokens, np.int32)
        self._sequences = np.zeros(program.plan.tokens, np.int32)

    # Launches after a plan's steps

    def tail(self, kind: str) -> list[Work]:
        """Launches after the plan. `kind` is "greedy" (the plan's own argmax has chosen), "sample", "logprobs" or, on
        ranks above 0, "receive". With NCCL "receive" follows the others on rank 0.
        """
        if kind not in self._tails:
            program, mailbox = self._program, self._backend.mailbox
            inputs, next_token = program.run_inputs, program.array("next")
            table = self._backend.sampler_table(self._vocab)
            launches: list[Work] = []
            if kind in ("sample", "logprobs"):
                launches += sampling.sample(
                    inputs.rows, program.array("logits"), inputs.slots, table.arrays,
                    self.sampled.arrays | {"next_token": next_token}, logprobs=kind == "logprobs",
                )  # fmt: skip
            self._tails[kind] = launches
            if self._backend.by_nccl and kind != "receive":
                return launches
            if self._backend.peers is not None:
                launches += collectives.share_tokens(self._backend.peers, inputs.rows, next_token)
            launches += sampling.advance(
                n_rows=inputs.rows, next_token=next_token, slots=inputs.slots, last_token=table.arrays["last_token"],
                ids=program.array("ids"), positions=program.array("positions"), continues=int(self._decodes),
                count=mailbox.count, words=mailbox.address, n_runs=N_RUNS, max_rows=MAX_ROWS,
            )  # fmt: skip
        return self._tails[kind]

    @property
    def _decodes(self) -> bool:
        """Whether every token of a run has logits, so that a run of the next tokens may follow."""
        return "rows" not in self._program.inputs

    @property
    def _likely_kinds(self) -> tuple[str, ...]:
        """The tails that runs are likely to have."""
        peers = self._backend.peers
        return ("greedy", "sample") if peers is None or peers.rank == 0 else ("receive",)

    def all_launches(self) -> list[list[Work]]:
        """The launches of all tails, and the one that feeds tokens."""
        kinds = self._likely_kinds
        rare = ("logprobs", *(["receive"] * self._backend.by_nccl)) if "sample" in kinds else ()
        return [*map(self.tail, (*kinds, *rare)), self._feed_launches()]

    def _feed_launches(self) -> list[Work]:
        table, program = self._backend.sampler_table(self._vocab), self._program
        return [*sampling.feed(
            tokens=program.run_inputs.tokens, ids=program.array("ids"), sequences=program.array("sequences"),
            last_token=table.arrays["last_token"],
        )]  # fmt: skip

    def capture(self) -> None:
        """Capture the graphs of likely runs now, so that none waits for it later."""
        program = self._program
        if program.run_inputs.max_tokens == 1:
            mixtures: list[tuple[RowKind, ...]] = [()]
        elif self._decodes:
            mixtures = [("single rows",)]
        else:
            mixtures = [("chunks",), ("single rows",), ("chunks", "single rows")]
        for start in (0, *program.variant_starts):
            for kinds in mixtures:
                for kind in self._likely_kinds:
                    program.capture(("run", kind, start, *kinds), self._whole_run(kind, start, kinds))
                if not self._decodes:
                    end = program.prefill_end
                    program.capture((0, end, start, *kinds), program.prepared_steps(0, end, start, kinds))
        program.capture(("feed",), self._feed_launch())

    def _prepared_tail(self, kind: str) -> list[Prepared]:
        if kind not in self._prepared_tails:
            (self._prepared_tails[kind],) = self._backend.prepare_launches([self.tail(kind)])
        return self._prepared_tails[kind]

    def _whole_run(self, kind: str, start: int, kinds: tuple[RowKind, ...]) -> list[Prepared]:
        """The launches of a run; sampling takes the place of the plan's argmax."""
        program = self._program
        end = len(program.plan.steps) if kind == "greedy" else program.plan.sampling_start
        return program.prepared_steps(0, end, start, kinds) + self._prepared_tail(kind)

    def _replay_by_nccl(self, kind: str, start: int, kinds: tuple[RowKind, ...], counts: tuple[int, ...]) -> None:
        """A run whose values NCCL exchanges. `counts` are how many rows. What rank 0 samples by differs between runs,
        so it is not in the graphs that all ranks must capture at the same time.
        """
        program = self._program
        begin, end = program.plan.sampling_start, len(program.plan.steps)
        program.replay(
            (0, begin, start, *kinds, *counts),
            lambda: program.sized(program.prepared_steps(0, begin, start, kinds), counts),
        )
        if kind == "greedy":
            program.replay((begin, end, start, *kinds), lambda: program.prepared_steps(begin, end, start, kinds))
        elif kind != "receive":
            program.replay((kind,), lambda: self._prepared_tail(kind))
        program.replay(("receive", *counts), lambda: program.sized(self._prepared_tail("receive"), counts))

    def _feed_launch(self) -> list[Prepared]:
        (prepared,) = self._backend.prepare_launches([self._feed_launches()])
        return prepared

    # Runs

    def submit(self, tokens: int, rows: int, table: SamplerTable | None) -> int:
        """Enqueue a run for the program's inputs; returns its number. Without a table rank 0 samples."""
        program, inputs = self._program, self._program.inputs
        positions, sequences = inputs["positions"][:tokens], inputs["sequences"][:tokens]
        changes = 0 if table is None else table.changes
        continues = self._last == (tokens, rows, table, changes) and self._continues(tokens)
        if not continues:
            self._start(tokens, rows, table)
        start = program.variant_start(int(positions[0]) if tokens == 1 else int(positions.max()))
        kind, kinds, counts = self._kind, program.run_inputs.row_kinds, program.exchanged(tokens, rows)
        if counts:
            self._replay_by_nccl(kind, start, kinds, counts)
        else:
            program.replay(("run", kind, start, *kinds), lambda: self._whole_run(kind, start, kinds))
        mailbox = self._backend.mailbox
        mailbox.launched += 1
        number = mailbox.launched
        if kind == "logprobs":
            assert table is not None
            if self._logprobs is None:
                self._logprobs = _Logprobs(self._device, self.sampled)
            self._logprobs.enqueue(number)
            self._wanted[number] = table.top_logprobs(self._slots(rows))
        if table is not None:
            self._rows[number] = rows
        if self._decodes:
            if not continues:
                self._sequences[:tokens] = sequences
            self._positions[:tokens] = positions
            self._positions[:tokens] += 1
            self._last = (tokens, rows, table, changes)
        return number

    def _continues(self, tokens: int) -> bool:
        """Whether the inputs are the tokens that follow those of the last run: the device has them already."""
        inputs = self._program.inputs
        ids, positions, sequences = inputs["ids"], inputs["positions"], inputs["sequences"]
        if tokens == 1:
            return bool(ids[0] == FEED and positions[0] == self._positions[0] and sequences[0] == self._sequences[0])
        return bool(
            (ids[:tokens] == FEED).all()
            and (positions[:tokens] == self._positions[:tokens]).all()
            and (sequences[:tokens] == self._sequences[:tokens]).all()
        )

    def _start(self, tokens: int, rows: int, table: SamplerTable | None) -> None:
        """Send the inputs of a run that does not continue the last one."""
        program, slots = self._program, self._slots(rows)
        if table is None:
            self._kind = "receive"
        else:
            self._kind = self._kind_for(table, slots)
            self._backend.sampler_table(self._vocab).update(table, slots.tolist())
        program.run_inputs.send(tokens, rows, slots)
        if (program.inputs["ids"][:tokens] == FEED).any():
            program.replay(("feed",), self._feed_launch)

    def _kind_for(self, table: SamplerTable, slots: NDArray[np.int32]) -> str:
        """The tail of a run that samples in these slots."""
        if table.top_logprobs(slots) >= 0:
            return "logprobs"
        return "greedy" if all(map(table.is_argmax, slots.tolist())) else "sample"

    def _slots(self, rows: int) -> NDArray[np.int32]:
        """The slot of each row with logits."""
        inputs = self._program.inputs
        sequences: NDArray[np.int32] = inputs["sequences"]
        return sequences[:rows] if self._decodes else sequences[inputs["rows"][:rows]]

    def collect(self, number: int) -> Sampled:
        """Wait for a run and return what it sampled."""
        rows = self._rows.pop(number)
        wanted = self._wanted.pop(number, -1)
        tokens = self._backend.mailbox.wait(number, rows)
        out = Sampled.empty(rows, max(wanted, 0))
        out.tokens[:] = tokens
        if wanted >= 0:
            assert self._logprobs is not None
            self._logprobs.read(number, out)
        return out

    def discard(self) -> None:
        """Forget the runs that were not collected."""
        self._rows.clear()
        self._wanted.clear()
        self._last = None

    def forget(self) -> None:
        """Another run has changed what the device holds: the next one must send its inputs."""
        self._last = None
