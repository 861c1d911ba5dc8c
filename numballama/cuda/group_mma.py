"""Instructions of `group_attention`: up to 8 queries with the keys and values that they share, on tensor cores.

Of more than four queries, queries are the rows of a product and keys the columns; of up to four it is the other way
round, which takes half of the products and of the registers.

Nothing is exchanged through shared memory. The order of a head's elements in a product is free, and so is that of its
results: both are chosen so that a lane's 16 bytes of a key or a value are parts of fragments as they are.
"""

from __future__ import annotations

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import F32, I32, VOID, call_asm
from .mma import _mma_m16n8k16, _parts, _short


@intrinsic
def ld_parts(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """The lane's parts of 16 keys or values, copied to shared memory before: 16 bytes every 512 from an address on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        where, words = _short(context, builder, args[1], at), []
        for i in range(sums.count // 8):
            text = f"ld.shared.v4.u32 {{$0, $1, $2, $3}}, [$4+{512 * i}];"
            loaded = call_asm(builder, ir.LiteralStructType([I32] * 4), text, "=r,=r,=r,=r,r,~{memory}", [where])
            words += [builder.extract_value(loaded, j) for j in range(4)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, sums.count // 2)(sums, types.int64), codegen


@intrinsic
def join_queries(typingctx, sums, a, b, c, d):  # type: ignore[no-untyped-def]
    """The pieces of a head's queries that `mma_scores` wants: of two times 32 elements, or of four."""
    used = [a, b, c, d][: sums.count // 16]

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words = [word for kind, arg in zip(used, args[1:], strict=False) for word in _parts(builder, kind, arg)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 8 * len(used))(sums, a, b, c, d), codegen


@intrinsic
def mma_scores(typingctx, memory, queries, keys):  # type: ignore[no-untyped-def]
    """Scores of up to 8 queries, each the sum of two pieces of 16 bits, with 16 keys: four float32 per lane.

    Rows 0 to 7 of the fragments are the first pieces, rows 8 to 15 the second ones, so that a lane has both sums. Lane
    4 g + t has elements 32 c + 8 t to 32 c + 8 t + 7: of query g, in `queries`, four words of first and four of second
    pieces for each c; of keys g and 8 + g, in `keys`, four words for each c and key. It gets the scores of query g with
    keys 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        q, k, name = _parts(builder, queries, args[1]), _parts(builder, keys, args[2]), memory.dtype.name
        scores, half = [], len(k) // 2
        for key in (k[:half], k[half:]):
            totals = [ir.Constant(F32, 0.0)] * 4
            for at in range(0, half, 2):
                first = 2 * (at - at % 4) + at % 4
                a = [q[first], q[first + 4], q[first + 1], q[first + 5]]
                totals = _mma_m16n8k16(builder, name, a, key[at : at + 2], totals)
            scores += [builder.fadd(totals[0], totals[2]), builder.fadd(totals[1], totals[3])]
        return context.make_tuple(builder, signature.return_type, scores)

    return types.UniTuple(types.float32, 4)(memory, queries, keys), codegen


@intrinsic
def mma_values(typingctx, memory, sums, weights, values):  # type: ignore[no-untyped-def]
    """sums + weights of up to 8 queries for 16 keys, in two pieces as in `mma_scores`, times the keys' values.

    Lane 4 g + t has in `weights` (words of two) the first pieces for keys 2 t, 2 t + 1 and 8 + 2 t, 8 + 2 t + 1 of
    query g, then the second ones; in `values` for each 64 elements of a head four words of each of these keys, elements
    8 g to 8 g + 7. For each 64 elements c, `sums` has four numbers for each i below 8: elements 64 c + 16 t + i and
    64 c + 16 t + 8 + i of the first pieces of query g, and of the second ones.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, words = _parts(builder, sums, args[1]), _parts(builder, values, args[3])
        first, first2, second, second2 = _parts(builder, weights, args[2])
        for at in range(0, len(totals), 4):
            chunk, i = at // 32, at // 4 % 8
            rows = [words[16 * chunk + 4 * row + i // 2] for row in range(4)]
            b = [
                call_asm(
                    builder, I32, f"prmt.b32 $0, $1, $2, {0x7632 if i % 2 else 0x5410};", "=r,r,r", rows[2 * j :][:2]
                )
                for j in range(2)
            ]
            totals[at : at + 4] = _mma_m16n8k16(
                builder, memory.dtype.name, [first, second, first2, second2], b, totals[at : at + 4]
            )
        return context.make_tuple(builder, sums, totals)

    return sums(memory, sums, weights, values), codegen


@intrinsic
def scaled(typingctx, sums, factor):  # type: ignore[no-untyped-def]
    """A tuple of float32 times a factor."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.make_tuple(builder, sums, [builder.fmul(x, args[1]) for x in _parts(builder, sums, args[0])])

    return sums(sums, types.float32), codegen


@intrinsic
def st_shared_heads(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """Store what `mma_values` has summed up as float32 to shared memory, both pieces added: `at` is the address of
    element 16 t of the lane's query.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, where = _parts(builder, sums, args[0]), _short(context, builder, args[1], at)
        for first in range(0, len(totals), 16):
            for odd in range(2):
                four = [builder.fadd(totals[first + 4 * i + odd], totals[first + 4 * i + odd + 2]) for i in range(4)]
                away = 256 * (first // 32) + 4 * (8 * odd + first % 32 // 4)
                text = f"st.shared.v4.f32 [$0+{away}], {{$1, $2, $3, $4}};"
                call_asm(builder, VOID, text, "r,f,f,f,f,~{memory}", [where, *four])
        return context.get_dummy_value()

    return types.void(sums, types.int64), codegen


@intrinsic
def mma_scores_few(typingctx, memory, queries, keys):  # type: ignore[no-untyped-def]
    """Scores of up to 4 queries with 16 keys: two float32 per lane. `keys` are as for `mma_scores`.

    Columns 2 h and 2 h + 1 of the fragments are the two pieces of query h. Lane 4 g + t has in `queries` four words of
    column g for each 32 elements, those that it has of a key. It gets the scores of query t with keys g and 8 + g.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        q, k = _parts(builder, queries, args[1]), _parts(builder, keys, args[2])
        totals, half = [ir.Constant(F32, 0.0)] * 4, len(k) // 2
        for at in range(0, half, 2):
            a = [k[at], k[half + at], k[at + 1], k[half + at + 1]]
            totals = _mma_m16n8k16(builder, memory.dtype.name, a, q[at : at + 2], totals)
        scores = [builder.fadd(totals[0], totals[1]), builder.fadd(totals[2], totals[3])]
        return context.make_tuple(builder, signature.return_type, scores)

    return types.UniTuple(types.float32, 2)(memory, queries, keys), codegen


@intrinsic
def mma_values_few(typingctx, memory, sums, first, second, values):  # type: ignore[no-untyped-def]
    """sums + weights of up to 4 queries for 16 keys, in columns as in `mma_scores_few`, times the keys' values.

    Lane 4 g + t has in `first` the weights of column g for keys 2 t and 2 t + 1, in `second` for 8 + 2 t and 9 + 2 t;
    `values` are as for `mma_values`. For each 64 elements c, `sums` has two numbers, of the two pieces of query t, for
    each of elements 64 c + 8 g to 64 c + 8 g + 7.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, words = _parts(builder, sums, args[1]), _parts(builder, values, args[4])
        for at in range(0, len(totals), 4):
            chunk, word = at // 16, at // 4 % 4
            rows = [words[16 * chunk + 4 * row + word] for row in range(4)]
            a = [
                call_asm(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", rows[2 * j : 2 * j + 2])
                for j in range(2)
                for selector in (0x5410, 0x7632)
            ]
            totals[at : at + 4] = _mma_m16n8k16(builder, memory.dtype.name, a, list(args[2:4]), totals[at : at + 4])
        return context.make_tuple(builder, sums, totals)

    return sums(memory, sums, types.uint32, types.uint32, values), codegen


@intrinsic
def st_shared_few(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """Store what `mma_values_few` has summed up as float32 to shared memory, both pieces added: `at` is the address of
    element 8 g of the lane's query.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        totals, where = _parts(builder, sums, args[0]), _short(context, builder, args[1], at)
        for first in range(0, len(totals), 8):
            four = [builder.fadd(totals[first + 2 * i], totals[first + 2 * i + 1]) for i in range(4)]
            text = f"st.shared.v4.f32 [$0+{256 * (first // 16) + 2 * (first % 16)}], {{$1, $2, $3, $4}};"
            call_asm(builder, VOID, text, "r,f,f,f,f,~{memory}", [where, *four])
        return context.get_dummy_value()

    return types.void(sums, types.int64), codegen


@intrinsic
def join_pieces(typingctx, sums, a, b, c, d):  # type: ignore[no-untyped-def]
    """The words of a column that `mma_scores_few` wants: of two times 32 elements, or of four."""
    used = [a, b, c, d][: sums.count // 8]

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words = [word for kind, arg in zip(used, args[1:], strict=False) for word in _parts(builder, kind, arg)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4 * len(used))(sums, a, b, c, d), codegen
