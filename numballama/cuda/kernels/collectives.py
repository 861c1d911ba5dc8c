"""Exchanges between ranks on different GPUs: sums of all ranks, parts side by side, and the tokens that rank 0 samples.

Each rank has memory that all others write to (`peers.PeerMemory`): two halves of an inbox with a slot for each rank,
then counts. Ranks send, and wait at their own memory: a write crosses the link once, a read twice.

- As *words*: a number travels with the count of the exchange in one word of 64 bits, which is written at once. The
  receiver looks at the word until it has this count. No flag and no fence: the fastest way for a few numbers.
- With *flags*: plain numbers, then a flag with the count. Half as many bytes: faster for many numbers.

A block exchanges with the block of its number on the other ranks, in its own part of each slot, and counts its
exchanges itself; so halves alternate by its count. A half may be overwritten two exchanges later: to have come to the
exchange in between, the other rank must have read it. All ranks launch the same exchanges in the same order.

`linear_sums` has what the kernels of linear steps exchange themselves.

`stop` is the address of a word in host memory. Once it is not 0, nobody waits any more: results are then arbitrary, and
the host says so.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from ..arithmetic import float_as_uint, uint_as_float
from ..intrinsics import address, ld_global_v4_u32, st_global_u32
from ..system_memory import (
    ld_acquire_u32,
    ld_relaxed_u32,
    ld_relaxed_u64,
    ld_relaxed_v2_u64,
    ld_relaxed_v4_f32,
    st_relaxed_u64,
    st_relaxed_v2_u64,
    st_release_u32,
    st_v4_u32,
)
from .common import device, pdl_sync
from .params import EXCHANGE_THREADS as THREADS
from .params import FLAG_NUMBERS, FLAG_SLOT, TOKEN_ROWS, WORD_NUMBERS, WORD_SLOT

CELL_BYTES = 64
"""Bytes of an entry of `arrivals`. Words: flags, or this rank's count of exchanges with flags; its count of those by
words; its count of tokens sent or received.
"""
FLAGS, WORDS, TOKENS = 0, 4, 8
"""Bytes from the beginning of a cell to these."""
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
def join_columns_kernel(tokens, gathered, slot, borders, columns, out):
    """out [T, columns] = the columns of all ranks side by side. NCCL has put the rows of a rank one after the other,
    from `gathered[rank * slot]` on. A block has a row of `blockIdx.y`.
    """
    pdl_sync()
    row, c = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if row < tokens[0] and c < columns:
        rank = 0
        while c >= borders[rank + 1]:
            rank += 1
        width = borders[rank + 1] - borders[rank]
        out[row * columns + c] = gathered[rank * slot + row * width + c - borders[rank]]


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
