"""Sums over ranks that the kernels of linear steps begin: each sends its results, and others' arrive in an inbox.

A thread sends a number as soon as it has it, to a place that was `EMPTY`. Who adds up waits until those of all ranks
have come: neither flag nor count travels. Who has read a number makes its place empty again. A step takes the half that
its op names: those of neighbouring exchanges alternate.

An inbox has a slot for each rank (`collectives`). Where numbers lie in a slot is up to the kernel that sends them:

- number i (`gemv`), or lanes' parts of a unit of 32 rows and 8 tokens (`skinny_sum`),
- eight rows of a token, and then the next eight (`wide`), so that a kernel which reads rows can add them up,
- lanes' parts of a tile (`wgmma_gemm`).
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import float_as_uint, uint_as_float
from ..intrinsics import address, griddepcontrol_launch_dependents, griddepcontrol_wait, st_global_u32, st_v4_f32
from ..system_memory import (
    ld_relaxed_u32,
    ld_relaxed_v4_f32,
    nanosleep,
    st_relaxed_u32,
    st_relaxed_v4_u32,
    st_v4_u32,
)
from .collectives import is_stopped
from .common import FULL_MASK, add4, device, pdl_sync
from .params import SKINNY_UNIT as UNIT

EMPTY = np.uint32(0xFFFFFFFF)
"""What stands where no number has come: a NaN that no arithmetic gives."""
SOON, PAUSE_NS = 8, 100
"""Looks without a pause, and nanoseconds of a pause."""


@device
def link_of(exchange, inbox_at, slot, peers, stop, rank, ranks):
    """What the functions below need: slots of `slot` bytes, one of each rank, from byte `inbox_at` of all memory on."""
    return inbox_at, slot, address(exchange, 0), peers, stop, rank, ranks


@device
def number_to_send(x):
    """The bits of a float32; a NaN has others than what is `EMPTY`."""
    bits = float_as_uint(x)
    return np.uint32(0x7FFFFFFF) if bits == EMPTY else bits


@device
def is_ended(looks, stop):
    """Whether to wait no longer for a number, after this many looks. It pauses after some: looks take bandwidth."""
    if looks >= SOON:
        nanosleep(PAUSE_NS)
    return is_stopped(looks, stop)


@device
def wait_for_word(place, stop):
    """The bits of the number at a place, once it has come. `EMPTY` if it is waited for no longer."""
    bits, looks = ld_relaxed_u32(place), 0
    while bits == EMPTY and not is_ended(looks, stop):
        looks += 1
        bits = ld_relaxed_u32(place)
    return bits


@device
def send(link, i, a):
    """Send number i to all other ranks."""
    inbox_at, slot, _, peers, _, rank, ranks = link
    for other in range(ranks):
        if other != rank:
            st_relaxed_u32(peers[other] + inbox_at + rank * slot + 4 * i, number_to_send(a))


@device
def add_up(link, i, a):
    """The sum of number i of all ranks, in their order; this rank's is `a`. The places of the others are empty then."""
    inbox_at, slot, own, _, stop, rank, ranks = link
    total = np.float32(0)
    for other in range(ranks):
        p = a
        if other != rank:
            place = own + inbox_at + other * slot + 4 * i
            p = uint_as_float(wait_for_word(place, stop))
            st_global_u32(place, EMPTY)
        total = p if other == 0 else total + p
    return total


@device
def send_unit(link, unit, results):
    """Send this lane's results of a unit, of four rows for two tokens each, to all ranks, this one too."""
    inbox_at, slot, _, peers, _, rank, ranks = link
    first, second, third, fourth = results
    place = inbox_at + rank * slot + 4 * UNIT * unit + 16 * (cuda.threadIdx.x & 31)
    for other in range(ranks):
        to = peers[other] + place
        st_relaxed_v4_u32(to, number_to_send(first[0]), number_to_send(first[1]), number_to_send(second[0]),
                          number_to_send(second[1]))  # fmt: skip
        st_relaxed_v4_u32(to + 2 * UNIT, number_to_send(third[0]), number_to_send(third[1]), number_to_send(fourth[0]),
                          number_to_send(fourth[1]))  # fmt: skip


@device
def is_missing(four):
    """Whether one of four numbers has not come."""
    a, b, c, d = four
    return (
        float_as_uint(a) == EMPTY or float_as_uint(b) == EMPTY or float_as_uint(c) == EMPTY or float_as_uint(d) == EMPTY
    )


@device
def add_up_eight(link, at, distance):
    """The sums over all ranks, in their order, of four numbers at byte `at` of a slot and of four `distance` bytes
    further. The places of the others are empty then; this rank's numbers are there when it comes here.
    """
    inbox_at, slot, own, _, stop, rank, ranks = link
    place, zero = own + inbox_at + at, np.float32(0)
    upper, lower = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for other in range(ranks):
        a, b, looks = ld_relaxed_v4_f32(place), ld_relaxed_v4_f32(place + distance), 0
        if other != rank:
            while (is_missing(a) or is_missing(b)) and not is_ended(looks, stop):
                looks += 1
                a, b = ld_relaxed_v4_f32(place), ld_relaxed_v4_f32(place + distance)
            st_v4_u32(place, EMPTY, EMPTY, EMPTY, EMPTY)
            st_v4_u32(place + distance, EMPTY, EMPTY, EMPTY, EMPTY)
        upper, lower = (a, b) if other == 0 else (add4(upper, a), add4(lower, b))
        place += slot
    return upper, lower


@device
def add_up_unit(link, unit):
    """The sums of this lane's results of a unit over all ranks."""
    upper, lower = add_up_eight(link, 4 * UNIT * unit + 16 * (cuda.threadIdx.x & 31), 2 * UNIT)
    return (upper[0], upper[1]), (upper[2], upper[3]), (lower[0], lower[1]), (lower[2], lower[3])


@device
def wait_for_first(link, at):
    """Wait until the first numbers of a warp have come, of all ranks: one lane looks, which takes less bandwidth."""
    inbox_at, slot, own, _, stop, rank, ranks = link
    if cuda.threadIdx.x & 31 == 0:
        for other in range(ranks):
            if other != rank:
                wait_for_word(own + inbox_at + other * slot + at, stop)
    cuda.syncwarp()


@device
def put_pair(out, row, column, rows, columns, a, b):
    """Write two neighbouring results, if there are such a row and column."""
    if row < rows and column < columns:
        at = row * columns + column
        out[at], out[at + 1] = a, b


@device
def rows_of_lane(results):
    """A unit's results, eight in each lane, with other owners: lane 4 · v + p has the eight rows 8 · (v >> 1) to
    8 · (v >> 1) + 7 of token 2 · p + (v & 1). Before, it has rows v, v + 8, v + 16 and v + 24 of tokens 2 · p and
    2 · p + 1.
    """
    (a, b), (c, d), (e, f), (g, h) = results
    first, second, third = cuda.threadIdx.x & 4, cuda.threadIdx.x & 8, cuda.threadIdx.x & 16
    a, b = exchanged(a, b, 4, first)
    c, d = exchanged(c, d, 4, first)
    e, f = exchanged(e, f, 4, first)
    g, h = exchanged(g, h, 4, first)
    a, c = exchanged(a, c, 8, second)
    b, d = exchanged(b, d, 8, second)
    e, g = exchanged(e, g, 8, second)
    f, h = exchanged(f, h, 8, second)
    a, e = exchanged(a, e, 16, third)
    b, f = exchanged(b, f, 16, third)
    c, g = exchanged(c, g, 16, third)
    d, h = exchanged(d, h, 16, third)
    return (a, b, c, d), (e, f, g, h)


@device
def exchanged(a, b, distance, is_second):
    """(a, the other lane's a) in the first of two lanes, `distance` apart, and (its b, b) in the second."""
    other = cuda.shfl_xor_sync(FULL_MASK, a if is_second else b, distance)
    return (other, b) if is_second else (a, other)


@device
def send_rows(link, token, row, tokens, rows, eight):
    """Send eight rows of a token's results to all ranks, this one too, if there are such a token and row.

    Of two lanes, 2n and 2n + 1, the second has the same rows of the token two further. Each stores half of the first's
    rows, then half of the second's: the 128 bytes of a token's 32 rows cross the link together.
    """
    inbox_at, slot, _, peers, _, rank, ranks = link
    (a, b, c, d), (e, f, g, h) = eight
    odd = cuda.threadIdx.x & 1
    a, e = exchanged(a, e, 1, odd)
    b, f = exchanged(b, f, 1, odd)
    c, g = exchanged(c, g, 1, odd)
    d, h = exchanged(d, h, 1, odd)
    token -= 2 * odd
    for other in range(ranks):
        to = peers[other] + inbox_at + slot_of(rank, other, ranks) * slot + 16 * odd
        if token < tokens and row < rows:
            st_relaxed_v4_u32(to + place_of_rows(token, row, rows), number_to_send(a), number_to_send(b),
                              number_to_send(c), number_to_send(d))  # fmt: skip
        if token + 2 < tokens and row < rows:
            st_relaxed_v4_u32(to + place_of_rows(token + 2, row, rows), number_to_send(e), number_to_send(f),
                              number_to_send(g), number_to_send(h))  # fmt: skip


@device
def slot_of(rank, of_rank, ranks):
    """The number of the slot for what a rank sends in rows to `of_rank`: of its own numbers the one after all slots. In
    the slots of ranks, who reads does not make its own numbers' places empty.
    """
    return ranks if rank == of_rank else rank


@device
def place_of_rows(token, row, rows):
    """The byte of a slot from which on eight rows of a token lie. A token has whole eights of them."""
    return 32 * (token * ((rows + 7) >> 3) + (row >> 3))


@device
def arrived(place, here):
    """Eight numbers from a place on, zeros if not `here`."""
    zero = np.float32(0)
    a, b = (zero, zero, zero, zero), (zero, zero, zero, zero)
    if here:
        a, b = ld_relaxed_v4_f32(place), ld_relaxed_v4_f32(place + 16)
    return a, b


@device
def clear(place, here):
    """Make the places of eight numbers empty."""
    if here:
        st_v4_u32(place, EMPTY, EMPTY, EMPTY, EMPTY)
        st_v4_u32(place + 16, EMPTY, EMPTY, EMPTY, EMPTY)


@device
def add_up_rows(link, token, row0, row1, end, rows, out):
    """The sums over all ranks, in their order, of eight rows of a token from `row0` on and of eight from `row1` on;
    zeros from `end` on. They are also written to out [T, rows].

    It may be called before the wait for the kernel that sends: this rank's numbers are waited for as the others' are.
    That kernel ends only when all that it sent has arrived, later than what this one needs. One lane of a warp looks
    until the first number is there. Then all loads of two ranks are in flight together: each takes 0.7 µs.
    """
    inbox_at, slot, own, _, stop, rank, ranks = link
    here0, here1 = row0 < end, row1 < end
    if here0 and cuda.threadIdx.x & 31 == 0:
        wait_for_word(own + inbox_at + ranks * slot + place_of_rows(token, row0, rows), stop)
    cuda.syncwarp()
    place0 = own + inbox_at + place_of_rows(token, row0, rows)
    place1 = own + inbox_at + place_of_rows(token, row1, rows)
    sum0, sum1 = arrived(place0, False), arrived(place1, False)
    for other in range(0, ranks, 2):
        second, looks = min(other + 1, ranks - 1), 0
        p, q = slot_of(other, rank, ranks) * slot, slot_of(second, rank, ranks) * slot
        p0, p1, q0, q1 = place0 + p, place1 + p, place0 + q, place1 + q
        a0, a1, b0, b1 = arrived(p0, here0), arrived(p1, here1), arrived(q0, here0), arrived(q1, here1)
        while (
            is_missing(a0[0]) or is_missing(a0[1]) or is_missing(a1[0]) or is_missing(a1[1])
            or is_missing(b0[0]) or is_missing(b0[1]) or is_missing(b1[0]) or is_missing(b1[1])
        ) and not is_ended(looks, stop):  # fmt: skip
            looks += 1
            a0, a1, b0, b1 = arrived(p0, here0), arrived(p1, here1), arrived(q0, here0), arrived(q1, here1)
        sum0 = a0 if other == 0 else (add4(sum0[0], a0[0]), add4(sum0[1], a0[1]))
        sum1 = a1 if other == 0 else (add4(sum1[0], a1[0]), add4(sum1[1], a1[1]))
        clear(p0, here0)
        clear(p1, here1)
        if second != other:
            sum0, sum1 = (
                (add4(sum0[0], b0[0]), add4(sum0[1], b0[1])), (add4(sum1[0], b1[0]), add4(sum1[1], b1[1])),
            )  # fmt: skip
            clear(q0, here0)
            clear(q1, here1)
    return put_eight(out, token, row0, end, rows, sum0), put_eight(out, token, row1, end, rows, sum1)


@device
def put_eight(out, token, row, end, rows, eight):
    """Write eight rows of a token, up to row `end`; returns them, with zeros from there on."""
    a, b = eight
    at, zero = token * rows + row, np.float32(0)
    if rows & 3 == 0:  # then `end` is a multiple of 4, too
        if row < end:
            st_v4_f32(out, at, a[0], a[1], a[2], a[3])
        if row + 4 < end:
            st_v4_f32(out, at + 4, b[0], b[1], b[2], b[3])
        else:
            b = (zero, zero, zero, zero)
        return a + b
    return put_numbers(out, at, end - row, a) + put_numbers(out, at + 4, end - row - 4, b)


@device
def put_numbers(out, at, left, four):
    """Write up to four numbers, `left` of which exist; returns them with 0 for the others."""
    zero = np.float32(0)
    a, b, c, d = four
    a, b, c, d = a if left > 0 else zero, b if left > 1 else zero, c if left > 2 else zero, d if left > 3 else zero
    if left > 0:
        out[at] = a
    if left > 1:
        out[at + 1] = b
    if left > 2:
        out[at + 2] = c
    if left > 3:
        out[at + 3] = d
    return a, b, c, d


@cuda.jit
def add_up_rows_kernel(tokens, out, rows, exchange, inbox_at, slot, peers, stop, rank, ranks):
    """out [T, rows] = the sums over ranks of results that `send_rows` sent. A thread has sixteen rows of a token."""
    griddepcontrol_launch_dependents()  # at once: the next weight's first bytes come while numbers cross the link
    link, pairs = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks), (rows + 15) >> 4
    i, count = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, tokens[0]
    row, end = 16 * (i % pairs), rows if i < count * pairs else 0
    add_up_rows(link, i // pairs, row, row + 8, end, rows, out)
    griddepcontrol_wait()  # a kernel must not end before the preceding one


@cuda.jit
def add_up_pieces_kernel(tokens, out, columns, width, exchange, inbox_at, slot, peers, stop, rank, ranks):
    """out = the sums over ranks of results that `wgmma_gemm.send_piece` sent, of tiles of `width` columns.

    128 threads, which stand for those of a warpgroup there, have 16 columns of 64 tokens at a time.
    """
    pdl_sync()  # `out` may be what the preceding kernel reads
    link, rows = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks), tokens[0]
    slabs, parts = 2 * ((rows + 127) >> 7), width >> 4
    items = (columns + width - 1) // width * slabs * parts
    thread, groups = cuda.threadIdx.x & 127, cuda.blockDim.x >> 7
    row_in_slab = 16 * (thread >> 5) + ((thread & 31) >> 2)
    for item in range(cuda.blockIdx.x * groups + (cuda.threadIdx.x >> 7), items, cuda.gridDim.x * groups):
        piece, part = item // parts, item % parts
        tile, slab = piece // slabs, piece % slabs
        row, column = 64 * slab + row_in_slab, tile * width + 16 * part + 2 * (thread & 3)
        if row - ((thread & 31) >> 2) < rows:
            wait_for_first(link, 256 * width * piece + 4096 * part + 16 * thread)
        if row < rows:
            a, b = add_up_eight(link, 256 * width * piece + 4096 * part + 16 * thread, 2048)
            put_pair(out, row, column, rows, columns, a[0], a[1])
            put_pair(out, row + 8, column, rows, columns, a[2], a[3])
            put_pair(out, row, column + 8, rows, columns, b[0], b[1])
            put_pair(out, row + 8, column + 8, rows, columns, b[2], b[3])
