"""Launches of exchanges between ranks: `all_reduce`, `all_gather`, and the tokens that rank 0 samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...errors import Error, UnsupportedError
from ...memory import ceil_div, round_up
from ...registry import KernelRef, kernel
from ..kernels.params import (
    ELEMENTWISE_THREADS,
    FLAG_BLOCKS,
    FLAG_NUMBERS,
    FLAG_SLOT,
    WORD_BLOCKS,
    WORD_NUMBERS,
    WORD_SLOT,
    WORDS_UP_TO,
)
from ..kernels.params import EXCHANGE_THREADS as THREADS
from ..launch import Argument, Array, Collective, Launch, LaunchContext, Peers, Work, named

KERNELS = "numballama.cuda.kernels.collectives"
ALL_REDUCE_WORDS = KernelRef(KERNELS, "all_reduce_words_kernel")
ALL_REDUCE_FLAGS = KernelRef(KERNELS, "all_reduce_flags_kernel")
ALL_GATHER = KernelRef(KERNELS, "all_gather_kernel")
SEND_TOKENS = KernelRef(KERNELS, "send_tokens_kernel")
RECEIVE_TOKENS = KernelRef(KERNELS, "receive_tokens_kernel")
JOIN_COLUMNS = KernelRef(KERNELS, "join_columns_kernel")

WORKERS = max(WORD_BLOCKS, FLAG_BLOCKS)
"""Entries of a rank in `arrivals`: the blocks that exchange at the same time."""

RESULT_TOKENS = 2048
"""Tokens of a run whose linear steps exchange their results at most."""
WIDEST = 256
"""Columns of the widest tile of results."""
OWN_PART = RESULT_TOKENS // 128
"""How many of the slot after all others, for a rank's own results of up to 128 tokens, make up one rank's slot."""


def exchange_size(ranks: int, columns: int) -> int:
    """Float32 in a half of `exchange`: slots of each rank for words, for numbers with flags, and for results of linear
    steps, which have `columns` columns; then a smaller slot for the rank's own results.
    """
    numbers = result_numbers(columns)
    return ranks * (WORD_SLOT + FLAG_SLOT + 4 * numbers) // 4 + numbers // OWN_PART


def result_numbers(columns: int) -> int:
    """Results of a linear step that ranks exchange at once: whole tiles of the largest run and of all columns."""
    return RESULT_TOKENS * (round_up(columns, WIDEST) + WIDEST)


def empty_parts(ranks: int, columns: int) -> list[tuple[int, int]]:
    """(begin, end) of the bytes of `exchange` that are 0xFF before the first exchange: where no results have come."""
    begin, half = ranks * (WORD_SLOT + FLAG_SLOT), 4 * exchange_size(ranks, columns)
    return [(begin, half), (half + begin, 2 * half)]


@dataclass(frozen=True)
class Sums:
    """Where a linear step adds up its results over ranks: the operands of an `all_reduce`."""

    exchange: Array
    arrivals: Array
    rank: int
    half: int

    @property
    def slot(self) -> int:
        """Bytes of a rank's results."""
        ranks = self.arrivals.shape[0]
        return (self.exchange.nbytes // 2 - ranks * (WORD_SLOT + FLAG_SLOT)) * OWN_PART // (ranks * OWN_PART + 1)

    def hold(self, numbers: int, in_rows: bool = False) -> bool:
        """Whether a rank's slot has room for this many numbers; with `in_rows` the smaller one for its own, too."""
        return 4 * numbers <= (self.slot // OWN_PART if in_rows else self.slot)

    def arguments(self, ctx: LaunchContext) -> dict[str, Argument]:
        """The arguments of a kernel that adds up its own results."""
        peers, ranks = _peers(ctx, self.rank), self.arrivals.shape[0]
        return named(
            exchange=self.exchange, inbox_at=self.half * self.exchange.nbytes // 2 + ranks * (WORD_SLOT + FLAG_SLOT),
            slot=self.slot, peers=peers.addresses, stop=peers.stop, rank=self.rank, ranks=ranks,
        )  # fmt: skip

    def of(self, ctx: LaunchContext, out: Array) -> list[Launch]:
        """The launch that adds up results after the step."""
        return _all_reduce_by_peers(ctx, out, self.exchange, self.arrivals, out, self.rank)


def _peers(ctx: LaunchContext, rank: int) -> Peers:
    if ctx.peers is None or ctx.peers.rank != rank:
        raise Error(f"a graph of rank {rank} is bound on a backend that is not this rank: call `join` first")
    return ctx.peers


@kernel("all_reduce", "cuda", "f32", "f32", "i32")
def all_reduce(ctx: LaunchContext, x: Array, exchange: Array, arrivals: Array, out: Array, rank: int) -> list[Work]:
    if _peers(ctx, rank).communicator is not None:
        return [Collective("all_reduce", x, out, ctx.tokens, x.shape[1])]
    return [*_all_reduce_by_peers(ctx, x, exchange, arrivals, out, rank)]


def _all_reduce_by_peers(
    ctx: LaunchContext, x: Array, exchange: Array, arrivals: Array, out: Array, rank: int
) -> list[Launch]:
    tokens, columns = x.shape
    peers, numbers = _peers(ctx, rank), tokens * columns
    ranks, workers, _ = arrivals.shape
    which = named(tokens=ctx.tokens, x=x, out=out, columns=columns, exchange=exchange, half_bytes=exchange.nbytes // 2)
    others = named(peers=peers.addresses, stop=peers.stop, rank=rank, ranks=ranks)
    if columns % 2:
        raise UnsupportedError(f"ranks on GPUs add pairs of numbers, found rows of {columns}; leave gpus= at 1")
    if numbers <= WORDS_UP_TO or columns % 4:
        arguments = {**which, **named(arrivals=arrivals, workers=workers), **others}
        grid = min(ceil_div(numbers, WORD_NUMBERS), WORD_BLOCKS)
        return [Launch(ALL_REDUCE_WORDS, (grid,), THREADS, arguments)]
    counts = named(arrivals=arrivals, arrivals_at=arrivals.address - exchange.address, workers=workers)
    grid = min(ceil_div(numbers, FLAG_NUMBERS), FLAG_BLOCKS)
    return [Launch(ALL_REDUCE_FLAGS, (grid,), THREADS, {**which, **counts, **others})]


@kernel("all_gather", "cuda", "f32", "f32", "i32")
def all_gather(
    ctx: LaunchContext, x: Array, exchange: Array, arrivals: Array, out: Array, rank: int, begin: int, columns: int
) -> list[Work]:
    tokens, width = x.shape
    peers = _peers(ctx, rank)
    share = peers.shares[rank]
    if (share.start, len(share), peers.shares[-1].stop) != (begin, width, columns):
        raise Error(f"rank {rank} has columns {begin} to {begin + width} of {columns}, and as it joined {share}")
    if peers.communicator is not None:
        return _gather_by_nccl(ctx, x, out, peers)
    ranks, workers, _ = arrivals.shape
    widest = max(map(len, peers.shares))
    arguments = named(
        tokens=ctx.tokens, x=x, out=out, width=width, widest=widest, columns=columns, borders=peers.borders,
        exchange=exchange, half_bytes=exchange.nbytes // 2, arrivals=arrivals, workers=workers, peers=peers.addresses,
        stop=peers.stop, rank=rank, ranks=ranks,
    )  # fmt: skip
    grid = min(tokens * ceil_div(widest, WORD_NUMBERS), WORD_BLOCKS)
    return [Launch(ALL_GATHER, (grid,), THREADS, arguments)]


def _gather_by_nccl(ctx: LaunchContext, x: Array, out: Array, peers: Peers) -> list[Work]:
    """Parts of one row come to their places. Those of several rows come one after the other, and a kernel puts their
    columns side by side.
    """
    (tokens, width), widths = x.shape, [len(share) for share in peers.shares]
    if tokens == 1:
        kind: Literal["all_gather", "gather_parts"] = "all_gather" if len({*widths}) == 1 else "gather_parts"
        places = [out.address + 4 * share.start for share in peers.shares]
        return [Collective(kind, x, out, ctx.tokens, width, tuple(zip(places, widths, strict=True)))]
    slot = tokens * max(widths)
    gathered = replace(ctx.zeros(len(widths) * slot), shape=(len(widths), slot), dtype="f32")
    places = [gathered.address + 4 * rank * slot for rank in range(len(widths))]
    arguments = named(
        tokens=ctx.tokens, gathered=gathered, slot=slot, borders=peers.borders, columns=out.shape[1], out=out
    )
    grid = ceil_div(out.shape[1], ELEMENTWISE_THREADS), tokens
    return [
        Collective("gather_parts", x, gathered, ctx.tokens, width, tuple(zip(places, widths, strict=True))),
        Launch(JOIN_COLUMNS, grid, ELEMENTWISE_THREADS, arguments),
    ]


def share_tokens(peers: Peers, n_rows: Array, next_token: Array) -> list[Work]:
    """Send each row's token to the other ranks; on these, receive it. `n_rows` i32 [1]: rows of this run."""
    if peers.communicator is not None:
        return [Collective("broadcast", next_token, next_token, n_rows, 1)]
    arrivals, exchange = peers.arrivals, peers.exchange
    tokens_at = arrivals.address + arrivals.nbytes - exchange.address
    where = named(tokens_at=tokens_at, arrivals=arrivals, workers=arrivals.shape[1])
    which = named(n_rows=n_rows, next_token=next_token)
    if peers.rank == 0:
        others = named(peers=peers.addresses, rank=0, ranks=arrivals.shape[0])
        return [Launch(SEND_TOKENS, (1,), THREADS, {**which, **where, **others})]
    arguments = {**which, "exchange": exchange, **where, **named(stop=peers.stop, rank=peers.rank)}
    return [Launch(RECEIVE_TOKENS, (1,), THREADS, arguments)]
