"""The memory that ranks on GPUs share, on devices whose memory is the host's."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
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

if reason := missing_packages():
    pytest.skip(f"the backend cannot be imported: {reason}", allow_module_level=True)

from numballama.cuda import peers
from numballama.cuda.kernels.params import TOKEN_ROWS
from numballama.cuda.launch import Array, LaunchContext, Matrix, Peers
from numballama.cuda.ops import collectives, linear
from numballama.cuda.peers import PeerMemory

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
