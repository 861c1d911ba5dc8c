"""Runs that sample, queued ahead of the host, on a fake device.

The next token is a function of token and position instead of a model's output. `advance` and `feed` do what their
kernels do.
"""

from __future__ import annotations

import _thread
import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import graph_of, install, missing_packages

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.config import ModelConfig
from numballama.cuda.backend import CudaBackend
from numballama.cuda.decode_pipeline import LONGEST_SLEEP_S, LOOKAHEAD, MAX_ROWS, N_RUNS, SPIN_S, Mailbox
from numballama.cuda.program import CudaProgram
from numballama.errors import DeviceError, Error
from numballama.graph import KVLayout
from numballama.sampling import FEED, SamplerTable, SamplingParams
from tests.helpers.random_models import random_checkpoint

CONFIG = ModelConfig(16, 16, 1, 2, 1, 40, 24)
VOCAB, SLOTS = CONFIG.vocab_size, 3


def following(token: int, position: int) -> int:
    return (7 * token + 3 * position + 1) % VOCAB


class FakeKernels:
    """Runs argmax, advance and feed, in the order of the launches."""

    def __init__(self) -> None:
        self.programs: list[Any] = []
        self.fed = 0
        """Number of times that ids were fed."""
        self.broken_at = -1
        """The position whose logits are NaN."""
        self.lost = False
        """Whether the device does not publish tokens."""

    @staticmethod
    def int32(array: Any) -> Any:
        return (ctypes.c_int32 * int(np.prod(array.shape))).from_address(array.address)

    def __call__(self, launch: Any) -> None:
        arguments = launch.arguments
        if launch.name == "argmax_kernel":
            (program,) = (each for each in self.programs if each.array("next").address == arguments["out"].address)
            ids, positions = (self.int32(program.array(name)) for name in ("ids", "positions"))
            rows = list(range(len(ids))) if "rows" not in program.inputs else self.int32(program.array("rows"))
            out = self.int32(arguments["out"])
            for index in range(len(out)):
                row = rows[index]
                out[index] = -1 if positions[row] == self.broken_at else following(ids[row], positions[row])
        elif launch.name == "feed_kernel":
            self.fed += 1
            ids, slots, last = (self.int32(arguments[name]) for name in ("ids", "sequences", "last_token"))
            for t in range(self.int32(arguments["tokens"])[0]):
                if ids[t] < 0:
                    ids[t] = last[slots[t]]
        elif launch.name == "advance_kernel":
            self._advance(arguments)

    def _advance(self, arguments: Any) -> None:
        names = ("next_token", "slots", "last_token", "ids", "positions")
        token, slots, last, ids, positions = (self.int32(arguments[name]) for name in names)
        count = ctypes.c_int64.from_address(arguments["count"].address)
        number = count.value + 1
        for r in range(self.int32(arguments["n_rows"])[0]):
            last[slots[r]] = max(token[r], 0)
            if arguments["continues"]:
                ids[r] = max(token[r], 0)
                positions[r] += 1
            word = arguments["words"] + 8 * (number % arguments["n_runs"] * arguments["max_rows"] + r)
            if not self.lost:
                ctypes.c_uint64.from_address(word).value = (number & 0x7FFFFFFF) << 32 | token[r] & 0xFFFFFFFF
        count.value = number


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernels]:
    """Programs for one token, for three sequences, and for chunks."""
    fake = FakeKernels()
    install(run=fake, patch=monkeypatch.setattr)
    weights = random_checkpoint(CONFIG).weights
    kv = KVLayout.of(CONFIG, CONFIG.context, "f32", page=8, slots=SLOTS)
    backend = CudaBackend(weights)
    for tokens, logits in ((1, "rows"), (3, "all"), (8, "rows")):
        fake.programs.append(backend.program(graph_of(CONFIG, weights, kv, tokens, logits)))
    yield fake
    backend.close()


@pytest.fixture
def table() -> SamplerTable:
    made = SamplerTable(SLOTS, VOCAB)
    for slot in range(SLOTS):
        made.assign(slot, SamplingParams(temperature=0))
    return made


def submit(
    program: CudaProgram, table: SamplerTable, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int] = (0,)
) -> int:
    for name, values in (("ids", ids), ("positions", positions), ("sequences", slots)):
        program.inputs[name][: len(ids)] = values
    return program.submit(len(ids), len(ids), table)


def collect(program: CudaProgram, ticket: int) -> list[int]:
    return program.collect(ticket).tokens.tolist()


def test_there_are_more_words_than_runs_in_flight() -> None:
    """A run must not overwrite the words of one whose tokens the host has not read."""
    assert N_RUNS > LOOKAHEAD + 1 and N_RUNS & (N_RUNS - 1) == 0 and max(CudaBackend.decode_sizes) <= MAX_ROWS
    assert CudaBackend.lookahead == LOOKAHEAD


def test_runs_ahead_of_the_host(kernels: FakeKernels, table: SamplerTable) -> None:
    """A run whose token is not known yet is fed on the device, and sends nothing if it continues the one before."""
    program = kernels.programs[0]
    tickets = [submit(program, table, [5], [0])]
    tickets += [submit(program, table, [FEED], [position]) for position in range(1, LOOKAHEAD + 1)]
    token = 5
    for position in range(12):
        (found,) = collect(program, tickets.pop(0))
        assert found == following(token, position)
        token = found
        tickets.append(submit(program, table, [FEED], [position + LOOKAHEAD + 1]))
    assert kernels.fed == 0
    assert program.entries == 12 + LOOKAHEAD + 1, "a run is one graph launch"


def test_rows_come_and_go(kernels: FakeKernels, table: SamplerTable) -> None:
    """Rows of other slots, in another order, in another program: each continues with its slot's own token."""
    one, three, chunk = kernels.programs
    tokens = collect(three, submit(three, table, [1, 2, 3], [0, 5, 9], [0, 1, 2]))
    assert tokens == [following(1, 0), following(2, 5), following(3, 9)]
    again = collect(three, submit(three, table, [FEED] * 3, [1, 6, 10], [0, 1, 2]))
    assert again == [following(tokens[0], 1), following(tokens[1], 6), following(tokens[2], 10)] and kernels.fed == 0
    (last,) = collect(one, submit(one, table, [FEED], [11], [2]))
    assert last == following(again[2], 11) and kernels.fed == 1
    two = collect(three, submit(three, table, [FEED] * 2, [12, 2], [2, 0]))
    assert two == [following(last, 12), following(again[0], 2)]
    chunk.inputs["ids"][:4], chunk.inputs["positions"][:4] = [FEED, 7, 8, 9], [7, 0, 1, 2]
    chunk.inputs["sequences"][:4], chunk.inputs["rows"][:2] = [1, 0, 0, 0], [0, 3]
    assert collect(chunk, chunk.submit(4, 2, table)) == [following(again[1], 7), following(9, 2)]
    (first,) = collect(one, submit(one, table, [FEED], [3], [0]))
    assert first == following(following(9, 2), 3)


def test_inputs_may_be_rewritten_at_once(kernels: FakeKernels, table: SamplerTable) -> None:
    program = kernels.programs[0]
    tickets = [submit(program, table, [token], [0]) for token in (1, 2, 3)]
    assert [collect(program, ticket) for ticket in tickets] == [[following(token, 0)] for token in (1, 2, 3)]


def test_a_slot_that_is_assigned_anew_is_sent(kernels: FakeKernels, table: SamplerTable) -> None:
    """Its position could follow the last run's, but the device's token is another generation's."""
    program = kernels.programs[0]
    (token,) = collect(program, submit(program, table, [4], [0]))
    table.assign(0, SamplingParams(temperature=0), output=[11])
    (found,) = collect(program, submit(program, table, [FEED], [1]))
    assert kernels.fed == 1 and found == following(11, 1) != following(token, 1)


def test_logits_that_are_not_numbers_end_one_row(kernels: FakeKernels, table: SamplerTable) -> None:
    program = kernels.programs[1]
    kernels.broken_at = 5
    tokens = collect(program, submit(program, table, [1, 2, 3], [0, 5, 9], [0, 1, 2]))
    assert tokens == [following(1, 0), -1, following(3, 9)]
    kernels.broken_at = -1
    assert collect(program, submit(program, table, [FEED] * 3, [1, 6, 10], [0, 1, 2]))[0] == following(tokens[0], 1)


def test_a_device_that_stops_is_noticed(kernels: FakeKernels, table: SamplerTable) -> None:
    kernels.lost = True
    ticket = submit(kernels.programs[0], table, [1], [0])
    with pytest.raises(DeviceError, match=f"the stream is idle, but run {ticket} gave no tokens"):
        collect(kernels.programs[0], ticket)


@pytest.fixture
def mailbox(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> Mailbox:
    """That of a device which is at work for 20 s, and publishes nothing by itself."""
    found: Mailbox = kernels.programs[0].backend.mailbox
    end = time.monotonic() + 20
    monkeypatch.setattr(type(found._device), "busy", property(lambda device: time.monotonic() < end))
    return found


def publish(mailbox: Mailbox, number: int, tokens: Sequence[int]) -> None:
    mailbox._words[number % N_RUNS, : len(tokens)] = [number << 32 | token & 0xFFFFFFFF for token in tokens]


def test_other_threads_run_while_a_token_is_awaited(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that wants the interpreter gets it between two polls, whatever the switch interval is."""
    polls, between = 0, list[int]()
    arrived = Mailbox._arrived

    def counted(words: Any, tag: int) -> bool:
        nonlocal polls
        polls += 1
        return arrived(words, tag)

    def work() -> None:
        for _ in range(40):
            before = polls
            time.sleep(0)  # gives the interpreter away and wants it back
            between.append(polls - before)
        publish(mailbox, 9, [5, -1, 7])

    monkeypatch.setattr(Mailbox, "_arrived", staticmethod(counted))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(20)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        tokens = mailbox.wait(9, 3)
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert tokens.tolist() == [5, -1, 7] and tokens.dtype == np.int32
    assert polls > 2 and statistics.median(between) <= 2


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_wait_sleeps_where_other_threads_are(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """At first it only polls; a lone thread never sleeps."""
    clock, slept = [0.0], list[float]()

    def now() -> float:
        clock[0] += SPIN_S / 8
        if clock[0] > 40 * SPIN_S:
            publish(mailbox, 3, [1])
        return clock[0]

    monkeypatch.setattr("numballama.cuda.decode_pipeline.time.perf_counter", now)
    monkeypatch.setattr("numballama.cuda.decode_pipeline.time.sleep", slept.append)
    monkeypatch.setattr("numballama.cuda.decode_pipeline.threading.active_count", lambda: 1 if is_alone else 2)
    assert mailbox.wait(3, 1).tolist() == [1]
    if is_alone:
        assert not slept
    else:
        assert slept[:7] == [0] * 7 and 0 < slept[8] < slept[-1] <= LONGEST_SLEEP_S


def test_numbers_of_many_runs(mailbox: Mailbox) -> None:
    """A word has 32 bits of its run's number, and the sign is one of them."""
    number = (1 << 33) - 3
    word = np.array([number << 32 & (1 << 64) - 1 | 6], np.uint64).view(np.int64)
    mailbox._words[number % N_RUNS, :1] = word
    assert word[0] < 0 and mailbox.wait(number, 1).tolist() == [6]


def test_ctrl_c_ends_a_wait(mailbox: Mailbox) -> None:
    worker = threading.Timer(0.03, _thread.interrupt_main)
    worker.start()
    with pytest.raises(KeyboardInterrupt):
        mailbox.wait(1, 2)
    worker.join()


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (4, 1), (2, 3), (1, 0)])
def test_runs_that_do_not_exist(kernels: FakeKernels, table: SamplerTable, tokens: int, rows: int) -> None:
    with pytest.raises(Error, match=f"cannot run {tokens} tokens of 3 and sample for {rows} rows"):
        kernels.programs[1].submit(tokens, rows, table)
