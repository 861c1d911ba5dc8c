"""The memory that ranks on GPUs share, on devices whose memory is the host's."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numballama.errors import DeviceError, Error, UnsupportedError
from tests.helpers.cuda_host import (
    HostDevice,
    HostMappedMemory,
    HostMemory,
    HostPeerMemory,
    HostRegisteredMemory,
    missing_packages,
)
from tests.helpers.fake_nccl import FakeNccl, Function

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.cuda import nccl, peers
from numballama.cuda.kernels.params import TOKEN_ROWS
from numballama.cuda.launch import Array, Collective, Launch, LaunchContext, Matrix, Peers
from numballama.cuda.ops import collectives, linear
from numballama.cuda.peers import NcclPeers, PeerMemory

SHARES = (range(0, 5), range(5, 9))


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "Memory", HostPeerMemory)
    monkeypatch.setattr(peers, "MappedMemory", HostMappedMemory)
    monkeypatch.setattr(peers, "RegisteredMemory", HostRegisteredMemory)


def make(rank: int) -> PeerMemory:
    device: Any = HostDevice()
    return PeerMemory(device, rank, 2, 64)


def numbers_at(array: Array, dtype: Any) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(array.address, array.nbytes), dtype)


def shared_page() -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)


def test_what_a_rank_writes_is_in_the_memory_of_another() -> None:
    before = len(HostMemory.live)
    ranks = [make(0), make(1)]
    page = shared_page()
    joined = [rank.connect([each.handle for each in ranks], SHARES, page, 12) for rank in ranks]
    for rank, mine in enumerate(joined):
        assert mine.rank == rank and mine.stop == page.ctypes.data + 12
        assert numbers_at(mine.borders, np.int64).tolist() == [0, 5, 9]
        addresses = numbers_at(mine.addresses, np.int64)
        assert addresses[rank] == mine.exchange.address
        ctypes.c_uint32.from_address(int(addresses[1 - rank])).value = 40 + rank
    for rank, mine in enumerate(joined):
        words = numbers_at(mine.exchange, np.uint32)
        empty = np.zeros(words.nbytes, bool)
        for begin, end in collectives.empty_parts(2, 64):
            empty[begin:end] = True
        assert words[0] == 41 - rank and (words[1:] == np.where(empty[4::4], 0xFFFFFFFF, 0)).all()
        assert mine.arrivals.address == mine.exchange.address + mine.exchange.nbytes
        assert not numbers_at(mine.arrivals, np.int32).any()
        tokens = mine.arrivals.nbytes + mine.exchange.nbytes + 16 * TOKEN_ROWS
        assert tokens <= ranks[rank].nbytes < tokens + (2 << 20) + 1000
    for each in ranks:
        each.free()
    assert len(HostMemory.live) == before


def test_nccl_in_the_place_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks find each other by rank 0's id, and their first sum tells that it works. All comes back."""
    before = len(HostMemory.live)
    monkeypatch.setattr(nccl, "load", lambda: nccl.Library(FakeNccl(), "here"))
    device: Any = HostDevice()
    ranks = [NcclPeers(device, rank, 2) for rank in range(2)]
    unique_id = ranks[0].unique_id
    assert len(unique_id) == 128 and ranks[1].unique_id == b""
    with ThreadPoolExecutor(2) as pool:
        joined = list(pool.map(lambda rank: rank.connect(unique_id, SHARES, lambda: False), ranks))
    for rank, mine in enumerate(joined):
        assert mine.rank == rank and mine.communicator is not None and mine.shares == SHARES
        assert numbers_at(mine.borders, np.int64).tolist() == [0, 5, 9]
        assert mine.arrivals.shape[0] == 2
    for each in ranks:
        each.free()
        each.stop()
    assert len(HostMemory.live) == before


@pytest.mark.parametrize("moment", ["while they connect", "before the first sum"])
def test_ranks_that_are_stopped_while_nccl_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """One of two is gone. The other does not wait, and says nothing of a wrong sum."""
    fake = FakeNccl()
    monkeypatch.setattr(nccl, "load", lambda: nccl.Library(fake, "here"))
    if moment == "before the first sum":
        fake.ncclCommInitRank = Function(lambda out, *others: setattr(out._obj, "value", 1) or 0)
        fake._folder, fake._ranks, fake._rank = tmp_path, 2, 0
    device: Any = HostDevice()
    rank, end = NcclPeers(device, 0, 2), time.monotonic() + 0.2

    def stopped() -> bool:
        return time.monotonic() > end

    threading.Timer(0.3, rank.stop).start()
    try:
        said = "stopped while they connected" if moment == "while they connect" else "have been ended"
        with pytest.raises(DeviceError, match=said):
            rank.connect(rank.unique_id, SHARES, stopped)
        assert time.monotonic() < end + 3
    finally:
        fake.aborted = True
        rank.free()


def test_memory_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a GPU without peer access. What was made is freed."""
    before = len(HostMemory.live)
    ranks = [make(0), make(1)]

    def refuse(device: object, handle: bytes) -> HostMappedMemory:
        raise DeviceError("CUDA: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")

    monkeypatch.setattr(peers, "MappedMemory", refuse)
    with pytest.raises(
        DeviceError, match=r"the host does not reach the memory of rank 1 .*PEER_ACCESS_UNSUPPORTED.*leave gpus= at 1"
    ):
        ranks[0].connect([each.handle for each in ranks], SHARES, shared_page(), 12)
    for each in ranks:
        each.free()
    assert len(HostMemory.live) == before


def array(*shape: int, dtype: str = "f32", address: int = 1 << 20) -> Array:
    return Array(address, shape, dtype)


def context(rank: int) -> LaunchContext:
    exchange = array(2, collectives.exchange_size(2, 64))
    arrivals = array(2, collectives.WORKERS, 16, dtype="i32", address=exchange.address + exchange.nbytes)
    mine = Peers(rank, exchange, arrivals, array(2, dtype="i64"), SHARES, array(3, dtype="i64"), 64)
    one = array(1, dtype="i32")
    return LaunchContext(132, 99 << 10, one, one, lambda count: array(count, dtype="i32"), peers=mine)


@pytest.mark.parametrize(
    ("shape", "kernel", "blocks"),
    [
        ((1, 4096), "all_reduce_words_kernel", 4), ((16, 4096), "all_reduce_words_kernel", 64),
        ((64, 4096), "all_reduce_flags_kernel", 64), ((512, 8192), "all_reduce_flags_kernel", 256),
        ((512, 4098), "all_reduce_words_kernel", 128),
    ],
)  # fmt: skip
def test_few_numbers_travel_as_words_and_many_with_flags(shape: tuple[int, int], kernel: str, blocks: int) -> None:
    """Flags take rows of a multiple of 4. Blocks that do not fit their slots exchange several times."""
    ctx, x = context(1), array(*shape)
    assert ctx.peers is not None
    (launch,) = collectives.all_reduce(ctx, x, ctx.peers.exchange, ctx.peers.arrivals, x, rank=1)
    assert (launch.name, launch.grid) == (kernel, (blocks,))


@pytest.mark.parametrize(
    ("tokens", "rows", "kernels"),
    [
        (1, 64, ["linear_all_reduce_kernel"]),
        (7, 64, ["skinny_8_kernel", "skinny_sum_all_reduce_kernel"]),
        (64, 64, ["wide_round_kernel", "wide_64_send_kernel", "add_up_rows_kernel"]),
        (512, 64, ["round_kernel", "wgmma_128_kernel", "add_up_pieces_kernel"]),
        (64, 1 << 10, ["wide_round_kernel", "wide_64_send_kernel", "add_up_rows_kernel"]),
        (64, 1 << 14, ["wide_round_kernel", "wide_64_kernel", "all_reduce_flags_kernel"]),
        (128, 1 << 14, ["wide_round_kernel", "wide_128_kernel", "all_reduce_flags_kernel"]),
        (2048, 1024, ["round_kernel", "wgmma_128_kernel", "all_reduce_flags_kernel"]),
    ],
)
def test_a_linear_step_adds_up_its_results_where_they_have_room(tokens: int, rows: int, kernels: list[str]) -> None:
    """Room is for whole tiles of 2,048 tokens and, here, 64 columns."""
    ctx = replace(context(1), wgmma=True, shared_limit=227 << 10)
    assert ctx.peers is not None
    weight = Matrix((rows, 256), array(rows, 256, dtype="f16"), 512, array(rows, 256, dtype="f16"))
    operands = array(tokens, 256), weight, ctx.peers.exchange, ctx.peers.arrivals, array(tokens, rows), array(1 << 22)
    assert [launch.name for launch in linear.linear_all_reduce(ctx, *operands, rank=1, half=1)] == kernels
    places = set()
    for half in (0, 1):
        *_, last = linear.linear_all_reduce(ctx, *operands, rank=1, half=half)
        places.add(last.arguments.get("inbox_at"))
    assert places == {None} or places == {at for at, _ in collectives.empty_parts(2, 64)}


@pytest.mark.parametrize(
    ("tokens", "alike", "last"),
    [
        (512, True, "add_up_pieces_kernel"), (512, False, "all_reduce_words_kernel"),
        (64, True, "add_up_rows_kernel"), (64, False, "skinny_sum_all_reduce_kernel"),
    ],
)  # fmt: skip
def test_gpus_that_differ_send_neither_tiles_nor_rows(tokens: int, alike: bool, last: str) -> None:
    """How wide a tile is depends on the number of multiprocessors, and whether there are kernels for tiles and rows on
    the capability.
    """
    ctx = context(0)
    assert ctx.peers is not None
    ctx = replace(ctx, wgmma=True, shared_limit=227 << 10, peers=replace(ctx.peers, alike=alike))
    weight = Matrix((64, 256), array(64, 256, dtype="f16"), 512, array(64, 256, dtype="f16"))
    operands = array(tokens, 256), weight, ctx.peers.exchange, ctx.peers.arrivals, array(tokens, 64), array(1 << 22)
    assert linear.linear_all_reduce(ctx, *operands, rank=0, half=0)[-1].name == last


def by_nccl(rank: int, shares: tuple[range, ...] = SHARES) -> LaunchContext:
    ctx = context(rank)
    assert ctx.peers is not None
    link: Any = object()
    return replace(ctx, peers=replace(ctx.peers, communicator=link, shares=shares))


def test_steps_of_nccl() -> None:
    """A sum is a call. Columns of one row come to their places; those of several rows need a kernel after the call."""
    ctx = by_nccl(1)
    exchange, arrivals = array(1), array(2, 1, 1, dtype="i32")
    x, out = array(3, 7), array(3, 7, address=1 << 24)
    (total,) = collectives.all_reduce(ctx, x, exchange, arrivals, out, rank=1)
    assert total == Collective("all_reduce", x, out, ctx.tokens, 7)
    assert total.name == "nccl_all_reduce" and total.variant_for(600) is total and not total.variant_starts
    one, row = array(1, 4), array(1, 9, address=1 << 24)
    (gather,) = collectives.all_gather(ctx, one, exchange, arrivals, row, rank=1, begin=5, columns=9)
    assert isinstance(gather, Collective) and gather.kind == "gather_parts"
    assert gather.parts == ((row.address, 5), (row.address + 20, 4))
    equal = by_nccl(0, (range(0, 4), range(4, 8)))
    (gather,) = collectives.all_gather(equal, one, exchange, arrivals, array(1, 8), rank=0, begin=0, columns=8)
    assert isinstance(gather, Collective) and (gather.kind, gather.numbers) == ("all_gather", 4)
    gather, join = collectives.all_gather(ctx, array(3, 4), exchange, arrivals, array(3, 9), rank=1, begin=5, columns=9)
    assert isinstance(gather, Collective) and isinstance(join, Launch)
    assert [width for _, width in gather.parts] == [5, 4]
    assert gather.parts[1][0] - gather.parts[0][0] == 4 * 3 * 5 == 4 * join.arguments["slot"]
    assert gather.out.shape == (2, 15) and join.name == "join_columns_kernel" and join.grid == (1, 3)
    assert ctx.peers is not None
    tokens, rows = array(3, dtype="i32"), array(1, dtype="i32")
    (sent,) = collectives.share_tokens(ctx.peers, rows, tokens)
    assert sent == Collective("broadcast", tokens, tokens, rows, 1)


def test_exchanges_that_do_not_fit_are_refused() -> None:
    ctx = context(1)
    assert ctx.peers is not None
    exchange, arrivals = ctx.peers.exchange, ctx.peers.arrivals
    with pytest.raises(UnsupportedError, match="pairs of numbers, found rows of 7"):
        collectives.all_reduce(ctx, array(1, 7), exchange, arrivals, array(1, 7), rank=1)
    for rank, begin, width, columns in ((0, 0, 5, 9), (1, 4, 4, 9), (1, 5, 3, 9), (1, 5, 4, 10)):
        with pytest.raises(Error, match=r"rank 0 is bound|as it joined"):
            collectives.all_gather(
                ctx, array(1, width), exchange, arrivals, array(1, columns), rank=rank, begin=begin, columns=columns
            )
    (launch,) = collectives.all_gather(ctx, array(3, 4), exchange, arrivals, array(3, 9), rank=1, begin=5, columns=9)
    assert launch.arguments["widest"] == 5 and launch.grid == (3,)
