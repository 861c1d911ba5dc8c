"""Exchanges between ranks on different GPUs: sums of all ranks, parts side by side, and the tokens that rank 0 samples.

Each rank has memory that all others write to (`peers.PeerMemory`): two halves of an inbox with a slot for each rank,
then counts. Ranks send, and wait at their own memory: a write crosses the link once, a read twice.

- As *words*: a number travels with the count of the exchange in one word of 64 bits, which is written at once. The
  receiver looks at the word until it has this count. No flag and no fence: the fastest way for a few numbers.
- With *flags*: plain numbers, then a flag with the count. Half as many bytes: faster for many numbers.

A block exchanges with the block of its number on the other ranks, in its own part of each slot, and counts its
exchanges itself; so halves alternate by its count. A half may be overwritten two exchanges later: to have come to the
exchange in between, the other rank must have read it. All ranks launch the same exchanges in the same order.

The kernels of linear steps add up their own results: a thread sends a number as soon as it has it, to a place that was
`EMPTY`, and waits until those of all ranks have come (`add_up`): neither flag nor count travels. Who has read a number
makes its place empty again. They take the half that their op names: those of neighbouring exchanges alternate.

`stop` is the address of a word in host memory. Once it is not 0, nobody waits any more: results are then arbitrary, and
the host says so.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..intrinsics import (
    address,
    float_as_uint,
    griddepcontrol_launch_dependents,
    griddepcontrol_wait,
    ld_global_v4_u32,
    st_global_u32,
    uint_as_float,
)
from ..system_memory import (
    ld_acquire_u32,
    ld_relaxed_u32,
    ld_relaxed_u64,
    ld_relaxed_v2_u64,
    ld_relaxed_v4_f32,
    nanosleep,
    st_relaxed_u32,
    st_relaxed_u64,
    st_relaxed_v2_u64,
    st_relaxed_v4_u32,
    st_release_u32,
    st_v4_u32,
)
from .common import add4, device, pdl_sync
from .params import EXCHANGE_THREADS as THREADS
from .params import FLAG_NUMBERS, FLAG_SLOT, TOKEN_ROWS, WORD_NUMBERS, WORD_SLOT
from .params import SKINNY_UNIT as UNIT

CELL_BYTES = 64
"""Bytes of an entry of `arrivals`. Words: flags, or this rank's count of exchanges with flags; its count of those by
words; its count of tokens sent or received.
"""
FLAGS, WORDS, TOKENS = 0, 4, 8
"""Bytes from the beginning of a cell to these."""
EMPTY = np.uint32(0xFFFFFFFF)
"""What stands where no number has come: a NaN that no arithmetic gives."""
SOON, PAUSE_NS = 8, 100
"""Looks without a pause, and nanoseconds of a pause."""
LOOKS = 255
"""Looks at a word before `stop` is looked at, which is in host memory; one less than a power of two."""


@device
def cell(arrivals, workers, rank, block):
    """The address of an entry of `arrivals` i32 [ranks, workers, 16]."""
    return address(arrivals, 0) + (rank * workers + block) * CELL_BYTES


@device
def after(number):
    """The count after this one. It has 31 bits."""
    return (number + 1) & 0x7FFFFFFF


@device
def is_stopped(looks, stop):
    """Whether to wait no longer, after this number of looks."""
    return looks & LOOKS == LOOKS and ld_relaxed_u32(stop) != 0


@device
def word_of(x, number):
    """A float32 and the count of its exchange."""
    return (number << 32) | np.int64(float_as_uint(x))


@device
def number_in(word):
    """The float32 of a word."""
    return uint_as_float(np.uint32(word & 0xFFFFFFFF))


@device
def receive(where, number, stop):
    """The word at an address, once it has this count."""
    word, looks = ld_relaxed_u64(where), 0
    while word >> 32 != number and not is_stopped(looks, stop):
        looks += 1
        word = ld_relaxed_u64(where)
    return word


@device
def receive_pair(where, number, stop):
    """Two float32 of the words at an address, once both have this count."""
    word, following = ld_relaxed_v2_u64(where)
    looks = 0
    while (word >> 32 != number or following >> 32 != number) and not is_stopped(looks, stop):
        looks += 1
        word, following = ld_relaxed_v2_u64(where)
    return number_in(word), number_in(following)


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
            place, looks = own + inbox_at + other * slot + 4 * i, 0
            bits = ld_relaxed_u32(place)
            while bits == EMPTY and not is_ended(looks, stop):
                looks += 1
                bits = ld_relaxed_u32(place)
            st_global_u32(place, EMPTY)
            p = uint_as_float(bits)
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
            place, looks = own + inbox_at + other * slot + at, 0
            while other != rank and ld_relaxed_u32(place) == EMPTY and not is_ended(looks, stop):
                looks += 1
    cuda.syncwarp()


@device
def put_pair(out, row, column, rows, columns, a, b):
    """Write two neighbouring results, if there are such a row and column."""
    if row < rows and column < columns:
        at = row * columns + column
        out[at], out[at + 1] = a, b


@cuda.jit
def add_up_units_kernel(tokens, out, rows, groups, exchange, inbox_at, slot, peers, stop, rank, ranks):
    """out [T, rows] = the sums over ranks of results that the kernels of `wide` sent.

    A warp has a unit: blockIdx.x counts as many groups of 32 rows as a block has warps, blockIdx.y units of 8 tokens.
    """
    griddepcontrol_launch_dependents()  # at once: the next weight's first bytes come while numbers cross the link
    group, lane = cuda.blockIdx.x * (cuda.blockDim.x >> 5) + (cuda.threadIdx.x >> 5), cuda.threadIdx.x & 31
    token, row = 8 * cuda.blockIdx.y + 2 * (lane & 3), 32 * group + (lane >> 2)
    griddepcontrol_wait()
    if 8 * cuda.blockIdx.y < tokens[0] and group < groups:
        link = link_of(exchange, inbox_at, slot, peers, stop, rank, ranks)
        first, second, third, fourth = add_up_unit(link, cuda.blockIdx.y * groups + group)
        here = tokens[0] - token
        put_column(out, token, row, here, rows, first)
        put_column(out, token, row + 8, here, rows, second)
        put_column(out, token, row + 16, here, rows, third)
        put_column(out, token, row + 24, here, rows, fourth)


@device
def put_column(out, token, row, here, rows, pair):
    """Write a row's results for two tokens from `token` on, `here` of which exist, if there is such a row."""
    if row < rows:
        if here > 0:
            out[token * rows + row] = pair[0]
        if here > 1:
            out[(token + 1) * rows + row] = pair[1]


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


@device
def wait_for_flag(where, number, stop):
    """Wait until a flag has this count, or a later one."""
    looks = 0
    while (np.int64(ld_acquire_u32(where)) - number) & 0x7FFFFFFF >= 0x40000000 and not is_stopped(looks, stop):
        looks += 1


@cuda.jit
def all_reduce_words_kernel(tokens, x, out, columns, exchange, half_bytes, arrivals, workers, peers, stop, rank, ranks):
    """out = the sum of x over ranks, in their order. A thread has two numbers of each exchange of its block.

    x, out: [T, columns], an even number of them. `peers` i64 [ranks]: the addresses of all ranks' memory.
    """
    pdl_sync()
    block, thread = cuda.blockIdx.x, cuda.threadIdx.x
    count, own = tokens[0] * columns, address(exchange, 0)
    counter = cell(arrivals, workers, rank, block) + WORDS
    number = np.int64(ld_relaxed_u32(counter))
    for begin in range(block * WORD_NUMBERS, count, cuda.gridDim.x * WORD_NUMBERS):
        number = after(number)
        place = (number & 1) * half_bytes + (block * WORD_NUMBERS + 2 * thread) * 8
        i = begin + 2 * thread
        if i < count:
            a, b = x[i], x[i + 1]
            for other in range(ranks):
                if other != rank:
                    where = peers[other] + rank * WORD_SLOT + place
                    st_relaxed_v2_u64(where, word_of(a, number), word_of(b, number))
            sum_a, sum_b = np.float32(0), np.float32(0)
            for other in range(ranks):
                p, q = a, b
                if other != rank:
                    p, q = receive_pair(own + other * WORD_SLOT + place, number, stop)
                sum_a, sum_b = (p, q) if other == 0 else (sum_a + p, sum_b + q)
            out[i], out[i + 1] = sum_a, sum_b
        cuda.syncthreads()  # a thread that sends the next number says that all of the block have this one
    if thread == 0:
        st_global_u32(counter, np.uint32(number))


@cuda.jit
def all_reduce_flags_kernel(
    tokens, x, out, columns, exchange, half_bytes, arrivals, arrivals_at, workers, peers, stop, rank, ranks
):
    """The same with flags. `columns` is a multiple of 4. `arrivals_at`: bytes to `arrivals` in a rank's memory."""
    pdl_sync()
    block, thread = cuda.blockIdx.x, cuda.threadIdx.x
    count, own = tokens[0] * columns, address(exchange, 0)
    counter = cell(arrivals, workers, rank, block) + FLAGS
    flag_at = arrivals_at + counter - address(arrivals, 0)
    number = np.int64(ld_relaxed_u32(counter))
    for begin in range(block * FLAG_NUMBERS, count, cuda.gridDim.x * FLAG_NUMBERS):
        number = after(number)
        place = (number & 1) * half_bytes + ranks * WORD_SLOT + 4 * (block * FLAG_NUMBERS + 4 * thread)
        for i in range(4 * thread, min(FLAG_NUMBERS, count - begin), 4 * THREADS):
            a, b, c, d = ld_global_v4_u32(address(x, begin + i))
            for other in range(ranks):
                if other != rank:
                    st_v4_u32(peers[other] + rank * FLAG_SLOT + place + 4 * (i - 4 * thread), a, b, c, d)
        cuda.syncthreads()
        if thread < ranks and thread != rank:
            st_release_u32(peers[thread] + flag_at, np.uint32(number))
            wait_for_flag(cell(arrivals, workers, thread, block) + FLAGS, number, stop)
        cuda.syncthreads()
        for i in range(4 * thread, min(FLAG_NUMBERS, count - begin), 4 * THREADS):
            at = begin + i
            sum_a, sum_b, sum_c, sum_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for other in range(ranks):
                p, q, r, s = x[at], x[at + 1], x[at + 2], x[at + 3]
                if other != rank:
                    p, q, r, s = ld_relaxed_v4_f32(own + other * FLAG_SLOT + place + 4 * (i - 4 * thread))
                if other == 0:
                    sum_a, sum_b, sum_c, sum_d = p, q, r, s
                else:
                    sum_a, sum_b, sum_c, sum_d = sum_a + p, sum_b + q, sum_c + r, sum_d + s
            out[at], out[at + 1], out[at + 2], out[at + 3] = sum_a, sum_b, sum_c, sum_d
    if thread == 0:
        st_global_u32(counter, np.uint32(number))


@cuda.jit
def all_gather_kernel(
    tokens, x, out, width, widest, columns, borders, exchange, half_bytes, arrivals, workers, peers, stop, rank, ranks
):
    """out [T, columns] = the x of all ranks side by side: that of rank r is [T, borders[r + 1] - borders[r]], this
    rank's [T, width].

    All ranks exchange as many words, `widest` a row: a rank that has no number for one sends 0.
    """
    pdl_sync()
    block, thread = cuda.blockIdx.x, cuda.threadIdx.x
    own, begin = address(exchange, 0), borders[rank]
    counter = cell(arrivals, workers, rank, block) + WORDS
    number = np.int64(ld_relaxed_u32(counter))
    pieces = (widest + WORD_NUMBERS - 1) // WORD_NUMBERS
    for item in range(block, tokens[0] * pieces, cuda.gridDim.x):
        number = after(number)
        row, first = item // pieces, item % pieces * WORD_NUMBERS
        place = (number & 1) * half_bytes + (block * WORD_NUMBERS - first) * 8
        end = min(first + WORD_NUMBERS, widest)
        for c in range(first + thread, end, THREADS):
            value = np.float32(0)
            if c < width:
                value = x[row * width + c]
                out[row * columns + begin + c] = value
            for other in range(ranks):
                if other != rank:
                    st_relaxed_u64(peers[other] + rank * WORD_SLOT + place + 8 * c, word_of(value, number))
        for c in range(first + thread, end, THREADS):
            for other in range(ranks):
                if other != rank:
                    word = receive(own + other * WORD_SLOT + place + 8 * c, number, stop)
                    if c < borders[other + 1] - borders[other]:
                        out[row * columns + borders[other] + c] = number_in(word)
        cuda.syncthreads()
    if thread == 0:
        st_global_u32(counter, np.uint32(number))


@cuda.jit
def send_tokens_kernel(n_rows, next_token, tokens_at, arrivals, workers, peers, rank, ranks):
    """Send the token of each row to the other ranks. One block.

    The halves of `tokens` i64 [2, TOKEN_ROWS], `tokens_at` bytes from the beginning of a rank's memory, alternate. The
    exchanges of the run in between tell that the others have read the last but one.
    """
    pdl_sync()
    counter = cell(arrivals, workers, rank, 0) + TOKENS
    number = after(np.int64(ld_relaxed_u32(counter)))
    for row in range(cuda.threadIdx.x, n_rows[0], cuda.blockDim.x):
        word = (number << 32) | (np.int64(next_token[row]) & 0xFFFFFFFF)
        for other in range(ranks):
            if other != rank:
                st_relaxed_u64(peers[other] + tokens_at + 8 * ((number & 1) * TOKEN_ROWS + row), word)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        st_global_u32(counter, np.uint32(number))


@cuda.jit
def receive_tokens_kernel(n_rows, next_token, exchange, tokens_at, arrivals, workers, stop, rank):
    """Receive the token of each row from rank 0. One block."""
    pdl_sync()
    counter, own = cell(arrivals, workers, rank, 0) + TOKENS, address(exchange, 0) + tokens_at
    number = after(np.int64(ld_relaxed_u32(counter)))
    for row in range(cuda.threadIdx.x, n_rows[0], cuda.blockDim.x):
        word = receive(own + 8 * ((number & 1) * TOKEN_ROWS + row), number, stop)
        next_token[row] = np.int32(word & 0xFFFFFFFF)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        st_global_u32(counter, np.uint32(number))
