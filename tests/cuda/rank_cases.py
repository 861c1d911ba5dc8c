"""Cases for exchanges between ranks on GPUs. All ranks run at the same time and exchange several times.

python -m tests.cuda.rank_cases 9.0      # emulated: a thread runs a rank's blocks, all in one memory
python -m tests.cuda.rank_cases          # on one GPU: two ranks, each in a stream of its own
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise
from threading import Event
from typing import Any
from unittest import mock

import numpy as np

from numballama.cuda.kernels.params import TOKEN_ROWS, WORDS_UP_TO
from numballama.cuda.launch import Array, Launch, LaunchContext, Matrix, Peers, TensorMap
from numballama.cuda.ops import collectives, wgmma_gemm
from numballama.cuda.ops.joins import join
from numballama.ops import CELL
from tests.cuda.emulator.program import BASE
from tests.cuda.gemm_cases import UNTOUCHED, Case, Emulated, Real, check_all, launches_of, ones_on, upload

EARLY = "add_up_rows_kernel", "wide_round_sums_kernel"
"""Kernels that look for numbers before the kernel that sends them has ended."""
COLUMNS = 512
"""The most columns of a linear step's results here."""


class Ranks:
    """Several ranks, each with memory that the others reach. `stop` i32 [4]: the fourth ends waits."""

    def __init__(self, machines: Sequence[Any], tokens: int, shares: Sequence[int]) -> None:
        self.machines, count = machines, len(shares)
        exchange, arrivals = (2, collectives.exchange_size(count, COLUMNS)), (count, collectives.WORKERS, CELL)
        nbytes = 4 * int(np.prod(exchange)) + 4 * int(np.prod(arrivals)) + 16 * TOKEN_ROWS
        begin = np.zeros(nbytes, np.uint8)
        for first, end in collectives.empty_parts(count, COLUMNS):
            begin[first:end] = 0xFF
        memory = [machine.put(begin, "u8") for machine in machines]
        borders = list(accumulate(shares, initial=0))
        self.stop = machines[0].put(np.zeros(4, np.int32), "i32")
        for rank, (machine, own) in enumerate(zip(machines, memory, strict=True)):
            inbox = Array(own.address, exchange, "f32")
            peers = Peers(
                rank,
                inbox,
                Array(own.address + inbox.nbytes, arrivals, "i32"),
                machine.put(np.array([each.address for each in memory], np.int64), "i64"),
                tuple(range(begin, end) for begin, end in pairwise(borders)),
                machine.put(np.array(borders, np.int64), "i64"),
                self.stop.address + 12,
            )
            machine.ctx = replace(machine.ctx, tokens=machine.put(np.array([tokens], np.int32), "i32"), peers=peers)

    def execute(self, launches: Sequence[Sequence[Launch]]) -> None:
        """Run the launches of each rank, at the same time."""
        for machine, own in zip(self.machines, launches, strict=True):
            machine.prepare(own)
        with ThreadPoolExecutor(len(self.machines)) as pool:
            for done in [
                pool.submit(machine.execute, own) for machine, own in zip(self.machines, launches, strict=True)
            ]:
                done.result()


def all_reduce(machines: Sequence[Any], rows: int, tokens: int, columns: int, times: int = 3) -> float:
    """Sums of all ranks, several times: each from the result of the last. Bits are the same on every rank."""
    count = len(machines)
    ranks = Ranks(machines, tokens, [1] * count)
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((rows, columns)).astype(np.float32) for _ in range(count)]
    launches, results = [], []
    for rank, machine in enumerate(machines):
        values = [machine.put(parts[rank], "f32")]
        values += [machine.put(np.full((rows, columns), UNTOUCHED, np.float32), "f32") for _ in range(times)]
        results.append(values[-1])
        peers, types = machine.ctx.peers, ["f32", "f32", "i32"]
        launches.append([
            launch
            for x, out in pairwise(values)
            for launch in launches_of(
                machine, "all_reduce", types, [x, peers.exchange, peers.arrivals], [out], rank=rank
            )
        ])  # fmt: skip
    ranks.execute(launches)
    want = parts
    for _ in range(times):
        total = want[0].copy()
        for part in want[1:]:
            total += part
        want = [total] * count
    for machine, result in zip(machines, results, strict=True):
        got = machine.get(result, np.float32)
        assert (got[tokens:] == UNTOUCHED).all(), "rows of tokens beyond the run were written"
        wrong = got[:tokens].view(np.uint32) != want[0][:tokens].view(np.uint32)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} sums differ"
    return 0.0


def linear_all_reduce(
    machines: Sequence[Any], kind: str, rows: int, tokens: int, columns: int, width: int, times: int = 3
) -> float:
    """A linear step whose kernel adds up its results, several times: the residual of rank 0 is the last result.

    The same bits as those of `linear_add` and `linear`, added up in the order of ranks.
    """
    ranks = Ranks(machines, tokens, [1] * len(machines))
    rng = np.random.default_rng(6)
    begin = rng.standard_normal((rows, width)).astype(np.float32)
    launches: list[list[Launch]] = []
    results, inputs = [], []
    for rank, machine in enumerate(machines):
        peers, own = machine.ctx.peers, []
        x = machine.put(rng.standard_normal((rows, columns)).astype(np.float32), "f32")
        matrix, _ = upload(machine, rng.standard_normal((width, columns)) * columns**-0.5, kind)
        values = [machine.put(begin, "f32")]
        values += [machine.put(np.full((rows, width), UNTOUCHED, np.float32), "f32") for _ in range(times)]
        for turn, (residual, out) in enumerate(pairwise(values)):
            added = rank == 0
            own += launches_of(
                machine, f"linear_{'add_' * added}all_reduce", ["f32", kind, *["f32"] * added, "f32", "i32"],
                [x, matrix, *[residual] * added, peers.exchange, peers.arrivals], [out], rank=rank,
                half=turn & 1,
            )  # fmt: skip
        assert not any(launch.name.startswith("all_reduce") for launch in own), "its own kernels add up results"
        launches.append(own)
        results.append(values)
        inputs.append((x, matrix))
    if isinstance(machines[0], RealRank) and rows > 16:
        # on one GPU, blocks that are launched early keep those with the most shared memory of the other rank out
        for turn in range(times):
            each = len(launches[0]) // times
            ranks.execute([own[turn * each : (turn + 1) * each] for own in launches])
    else:
        ranks.execute(launches)
    for turn in range(times):
        total = np.zeros((rows, width), np.float32)
        for rank, machine in enumerate(machines):
            part, added = machine.put(np.zeros((rows, width), np.float32), "f32"), rank == 0
            operands = [*inputs[rank], *[results[0][turn]] * added]
            types = ["f32", kind, *["f32"] * added]
            machine.execute(launches_of(machine, f"linear{'_add' * added}", types, operands, [part]))
            own_part = machine.get(part, np.float32)
            total = own_part if rank == 0 else total + own_part
        for machine, values in zip(machines, results, strict=True):
            got = machine.get(values[turn + 1], np.float32)
            assert (got[tokens:] == UNTOUCHED).all(), "rows of tokens beyond the run were written"
            wrong = got[:tokens].view(np.uint32) != total[:tokens].view(np.uint32)
            assert not wrong.any(), f"turn {turn}: {wrong.sum()} of {wrong.size} results differ"
    return 0.0


def in_halves(machines: Sequence[Any], kind: str, rows: int, tokens: int, columns: int, width: int) -> float:
    """`linear_all_reduce` where two blocks have half of K each. `rows` are too many for other kernels.

    On one multiprocessor they have several tiles, which would be wider if K was not halved.
    """
    asked: list[Matrix] = []

    def halved(_: LaunchContext, weights: Sequence[Matrix], paired: bool = False) -> bool:
        asked.extend(weights)
        return True

    for machine in machines:
        machine.ctx = replace(machine.ctx, n_sms=1)
    with mock.patch.object(wgmma_gemm, "is_halved", halved):
        worst = linear_all_reduce(machines, kind, rows, tokens, columns, width, times=2)
    assert asked, "by another kernel"
    return worst


def kernels_in_turn(machines: Sequence[Any], kind: str, counts: Sequence[int], columns: int, width: int) -> float:
    """Linear steps of these numbers of tokens, whose kernels lay out the inbox in their own ways, one after the other:
    each finds it as it needs it.
    """
    ranks = Ranks(machines, 1, [1] * len(machines))
    rng = np.random.default_rng(10)
    launches: list[list[Launch]] = []
    alone: list[list[Launch]] = []
    results, parts, of_turns = [], [], []
    for rank, machine in enumerate(machines):
        matrix, _ = upload(machine, rng.standard_normal((width, columns)) * columns**-0.5, kind)
        peers, made, single = machine.ctx.peers, list[list[Launch]](), list[Launch]()
        results.append([])
        parts.append([])
        for turn, rows in enumerate(counts):
            machine.ctx = replace(machine.ctx, tokens=machine.put(np.array([rows], np.int32), "i32"))
            x = machine.put(rng.standard_normal((rows, columns)).astype(np.float32), "f32")
            out, part = (machine.put(np.zeros((rows, width), np.float32), "f32") for _ in range(2))
            operands = [x, matrix, peers.exchange, peers.arrivals]
            made.append(
                launches_of(
                    machine, "linear_all_reduce", ["f32", kind, "f32", "i32"], operands, [out], rank=rank, half=turn & 1
                )
            )
            single += launches_of(machine, "linear", ["f32", kind], [x, matrix], [part])
            results[-1].append(out)
            parts[-1].append(part)
        of_turns.append(made)
        launches.append([launch for each in made for launch in each])
        alone.append(single)
    if isinstance(machines[0], RealRank):  # as in `linear_all_reduce`
        for turn in range(len(counts)):
            ranks.execute([made[turn] for made in of_turns])
    else:
        ranks.execute(launches)
    for machine, single in zip(machines, alone, strict=True):
        machine.execute(single)
    for turn in range(len(counts)):
        own = [machine.get(each[turn], np.float32) for machine, each in zip(machines, parts, strict=True)]
        total = own[0]
        for part in own[1:]:
            total = total + part
        for machine, outs in zip(machines, results, strict=True):
            wrong = machine.get(outs[turn], np.float32).view(np.uint32) != total.view(np.uint32)
            assert not wrong.any(), f"{counts[turn]} tokens: {wrong.sum()} of {wrong.size} results differ"
    return 0.0


def sums_rounded(
    machines: Sequence[Any], kind: str, rows: int, tokens: int, columns: int, width: int, times: int = 3
) -> float:
    """Sums of a linear step whose next kernel adds them up and rounds them for a linear step after a norm.

    The same sums as kernels of their own give, the same results after them within rounding, and the same on all ranks.
    """
    ranks = Ranks(machines, tokens, [1] * len(machines))
    rng = np.random.default_rng(8)
    norm = rng.uniform(0.5, 2, width).astype(np.float32)
    joined: list[list[Launch]] = []
    apart: list[list[Launch]] = []
    results: list[list[Any]] = []
    for rank, machine in enumerate(machines):
        peers = machine.ctx.peers
        x = machine.put(rng.standard_normal((rows, columns)).astype(np.float32), "f32")
        first, _ = upload(machine, rng.standard_normal((width, columns)) * columns**-0.5, kind)
        second, _ = upload(machine, np.random.default_rng(9).standard_normal((40, width)) * width**-0.5, kind)
        weight = machine.put(norm, "f32")
        results.append([])
        for of_rank in (joined, apart):
            of_rank.append([])
            for turn in range(times):
                sums, after = (
                    machine.put(np.full((rows, n), UNTOUCHED, np.float32), "f32") for n in (width, 40)
                )  # fmt: skip
                operands = [x, first, peers.exchange, peers.arrivals]
                steps = [
                    launches_of(
                        machine, "linear_all_reduce", ["f32", kind, "f32", "i32"], operands, [sums], rank=rank,
                        half=turn & 1,
                    ),
                    launches_of(
                        machine, "norm_linear", ["f32", "f32", kind], [sums, weight, second], [after], eps=1e-5
                    ),
                ]  # fmt: skip
                if of_rank is joined:
                    before = sum(map(len, steps))
                    join(steps, [True], ones_on(machine))
                    assert sum(map(len, steps)) == before - 1, "one kernel adds up and rounds"
                of_rank[-1] += [launch for step in steps for launch in step]
                results[-1].append((sums, after))
    for launches in (joined, apart):
        if isinstance(machines[0], RealRank):  # as in `linear_all_reduce`
            each = len(launches[0]) // times
            for turn in range(times):
                ranks.execute([own[turn * each : (turn + 1) * each] for own in launches])
        else:
            ranks.execute(launches)
    for machine, values in zip(machines, results, strict=True):
        for one, other in zip(values[:times], values[times:], strict=True):
            for got, want in zip(one, other, strict=True):
                a, b = machine.get(got, np.float32), machine.get(want, np.float32)
                assert (a[tokens:] == UNTOUCHED).all(), "rows of tokens beyond the run were written"
                assert np.isfinite(a[:tokens]).all()
                if got is one[0]:
                    assert (a.view(np.uint32) == b.view(np.uint32)).all(), "sums differ"
                else:  # a sum of squares may be rounded otherwise
                    assert np.abs(a - b)[:tokens].max() <= 2**-22 * np.abs(b[:tokens]).max()
                of_rank_0 = machines[0].get(results[0][values.index(one)][one.index(got)], np.float32)
                assert (a.view(np.uint32) == of_rank_0.view(np.uint32)).all(), "ranks differ"
    return 0.0


def all_gather(machines: Sequence[Any], rows: int, tokens: int, shares: Sequence[int], times: int = 3) -> float:
    """Parts of different widths, side by side."""
    ranks = Ranks(machines, tokens, shares)
    rng, columns = np.random.default_rng(4), sum(shares)
    begins = list(accumulate(shares, initial=0))
    whole = [rng.standard_normal((rows, columns)).astype(np.float32) for _ in range(times)]
    launches: list[list[Launch]] = []
    results: list[list[Any]] = []
    for rank, machine in enumerate(machines):
        begin, end, peers = begins[rank], begins[rank + 1], machine.ctx.peers
        launches.append([])
        results.append([])
        for each in whole:
            x = machine.put(np.ascontiguousarray(each[:, begin:end]), "f32")
            out = machine.put(np.full((rows, columns), UNTOUCHED, np.float32), "f32")
            results[-1].append(out)
            launches[-1] += launches_of(
                machine, "all_gather", ["f32", "f32", "i32"], [x, peers.exchange, peers.arrivals], [out], rank=rank,
                begin=begin, columns=columns,
            )  # fmt: skip
    ranks.execute(launches)
    for machine, outs in zip(machines, results, strict=True):
        for want, out in zip(whole, outs, strict=True):
            got = machine.get(out, np.float32)
            assert (got[tokens:] == UNTOUCHED).all(), "rows of tokens beyond the run were written"
            assert (got[:tokens] == want[:tokens]).all(), f"{(got[:tokens] != want[:tokens]).sum()} numbers differ"
    return 0.0


def tokens_of_rank_0(machines: Sequence[Any], rows: int, tokens: int, times: int = 3) -> float:
    """Tokens that rank 0 sends between sums, -1 too, which says that a draw failed."""
    ranks = Ranks(machines, tokens, [1] * len(machines))
    sent = [np.arange(rows, dtype=np.int32) * (7 + turn) - 1 for turn in range(times)]
    launches: list[list[Launch]] = []
    received: list[list[Any]] = []
    for rank, machine in enumerate(machines):
        peers, n_rows = machine.ctx.peers, machine.put(np.array([tokens], np.int32), "i32")
        x = machine.put(np.zeros((rows, 4), np.float32), "f32")
        launches.append([])
        received.append([])
        for each in sent:
            next_token = machine.put(each if rank == 0 else np.full(rows, -9, np.int32), "i32")
            received[-1].append(next_token)
            launches[-1] += launches_of(
                machine, "all_reduce", ["f32", "f32", "i32"], [x, peers.exchange, peers.arrivals], [x], rank=rank
            )
            launches[-1] += collectives.share_tokens(peers, n_rows, next_token)
    ranks.execute(launches)
    for machine, outs in zip(machines, received, strict=True):
        for want, out in zip(sent, outs, strict=True):
            got = machine.get(out, np.int32)
            assert (got[:tokens] == want[:tokens]).all(), f"{got[:tokens]} instead of {want[:tokens]}"
    return 0.0


def stopped(machines: Sequence[Any], rows: int, columns: int) -> float:
    """A rank that waits for one that does not come ends when it is told to."""
    ranks = Ranks(machines, rows, [1] * len(machines))
    machine, peers = machines[1], machines[1].ctx.peers
    operands = [machine.put(np.zeros((rows, columns), np.float32), "f32"), peers.exchange, peers.arrivals]
    out = machine.put(np.zeros((rows, columns), np.float32), "f32")
    launches = launches_of(machine, "all_reduce", ["f32", "f32", "i32"], operands, [out], rank=1)
    machine.prepare(launches)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(machine.execute, launches)
        try:
            done.result(0.3)
            raise AssertionError("it did not wait")
        except TimeoutError:
            pass
        machines[0].overwrite(ranks.stop, np.ones(4, np.int32))
        done.result(30)
    return 0.0


def cases(ranks: int, everything: bool = True) -> list[Case]:
    """All cases for a number of ranks, or those in which the number matters."""
    made: list[Case] = []

    def add(name: str, check: Callable[..., float], *arguments: Any, always: bool = False) -> None:
        if everything or always:
            made.append((f"{ranks} ranks: {name}", ranks, lambda machines: check(machines, *arguments)))

    add("all_reduce, one token", all_reduce, 1, 1, 2048, always=True)
    add("all_reduce, 3 of 5 tokens", all_reduce, 5, 3, 1030)
    add("all_reduce, a row that flags cannot have", all_reduce, 10, 10, 6554)
    add("all_reduce with flags", all_reduce, 17, 14, 4096, always=True)
    add("linear f16, one token, an odd number of rows", linear_all_reduce, "f16", 1, 1, 256, 37, always=True)
    add("linear bf16, 13 of 16 tokens", linear_all_reduce, "bf16", 16, 13, 336, 72)
    add("wide f16, 20 of 24 tokens", linear_all_reduce, "f16", 24, 20, 1024, 136)
    add("wide q8_0, 100 of 128 tokens", linear_all_reduce, "q8_0", 128, 100, 256, 168)
    turns = 1, 12, 24, 136, 24, 12, 1, 24, 136
    add("kernels in turn f16", kernels_in_turn, "f16", turns, 64, 72)
    add("wide bf16, sums rounded, an odd number of rows", sums_rounded, "bf16", 24, 18, 128, 45)
    add("wide bf16, sums rounded once", sums_rounded, "bf16", 24, 18, 64, 45, 1, always=True)
    add("wide q4_0, sums rounded, 65 of 66 tokens", sums_rounded, "q4_0", 66, 65, 64, 288)
    add("wgmma f16, 150 of 160 tokens", linear_all_reduce, "f16", 160, 150, 64, 264)
    add("wgmma q4_0, 200 of 224 tokens", linear_all_reduce, "q4_0", 224, 200, 64, 130)
    add("wgmma f16, halves of K, 140 of 150 tokens", in_halves, "f16", 150, 140, 328, 130)
    add("all_gather, equal parts", all_gather, 1, 1, [1536] * ranks)
    unequal = [700 + 500 * (rank % 2) for rank in range(ranks)]
    add("all_gather, 5 of 6 tokens, unequal parts", all_gather, 6, 5, unequal, always=True)
    add("tokens of rank 0", tokens_of_rank_0, 24, 21, always=True)
    add("a wait that is ended, words", stopped, 1, 512)
    add("a wait that is ended, flags", stopped, 17, 4096)
    assert WORDS_UP_TO < 17 * 4096 and WORDS_UP_TO < 10 * 6554
    return made


class EmulatedRank(Emulated):
    """A rank whose memory all ranks see."""

    def __init__(self, capability: tuple[int, int], memory: Any) -> None:
        super().__init__(capability, 1, wgmma=capability == (9, 0))
        self.memory = memory
        self.ctx = replace(self.ctx, tokens=self.put(np.ones(1, np.int32), "i32"))

    def prepare(self, launches: Sequence[Launch]) -> None:
        """Compile and parse the kernels of launches, and put their maps: not at the same time as another rank."""
        for launch in launches:
            self.program_of(launch)
            for argument in launch.arguments.values():
                if isinstance(argument, TensorMap):
                    self.memory.put_map(argument)

    def execute(self, launches: Sequence[Launch]) -> None:
        """Kernels of `EARLY` run beside the one before them, as they may on a GPU."""
        for launch, following in pairwise([*launches, None]):
            if launch is None or launch.name in EARLY:
                continue
            if following is None or following.name not in EARLY:
                self.run(launch)
                continue
            ended = Event()
            with ThreadPoolExecutor(1) as pool:
                early = pool.submit(self.run, following, ended)
                self.run(launch)
                ended.set()
                early.result()

    def overwrite(self, array: Any, elements: np.ndarray) -> None:
        at = array.address - BASE
        self.memory.bytes[at : at + elements.nbytes] = elements.view(np.uint8)


class RealRank(Real):
    """A rank with a stream of its own on the GPU that all share."""

    _prepared: Sequence[Any] = ()

    def prepare(self, launches: Sequence[Launch]) -> None:
        self._prepared = self.calls(launches)  # by this thread: others do not have the context that maps are made in

    def execute(self, launches: Sequence[Launch]) -> None:
        prepared, self._prepared = self._prepared, ()
        for call in prepared or self.calls(launches):
            call()
        self.device.synchronize()

    def overwrite(self, array: Any, elements: np.ndarray) -> None:
        self.device.write(array.address, elements.ctypes.data, elements.nbytes)
        self.device.synchronize()


def ranks_maker(arguments: Sequence[str]) -> Callable[[int], list[Any]]:
    """(number of ranks) → their machines: emulated for the capability that is the first argument, else on the GPU."""
    if arguments:
        from tests.cuda.emulator import Memory

        major, minor = map(int, arguments[0].split("."))

        def emulated(count: int) -> list[Any]:
            memory = Memory()
            return [EmulatedRank((major, minor), memory) for _ in range(count)]

        return emulated
    from numballama.cuda.driver import Device

    return lambda count: [RealRank(Device(), 1) for _ in range(count)]


if __name__ == "__main__":
    machines_of = ranks_maker(sys.argv[1:])
    wrong = check_all(machines_of, cases(2))
    if sys.argv[1:]:  # on one GPU, the blocks of more ranks would not all have a place
        wrong |= check_all(machines_of, cases(3, "all" in sys.argv))
    sys.exit(bool(wrong))
