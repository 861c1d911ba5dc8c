"""wgmma, the tensor cores' instruction of sm_90: 64 rows of A times up to 256 rows of B, both in shared memory.

A tile has 64 columns of 16 bits: rows of 128 bytes, whose eight 16-byte pieces are swizzled (piece p of row r is in
place p xor (r mod 8)). Tiles begin at multiples of 1,024 bytes. The compiler assembles kernels that contain wgmma for
sm_90a.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .lowering import F32, I32, I64, VOID, as_integer, call_asm, instruction
from .mma import _ex2, _pack, _parts

LOG2_E = math.log2(math.e)

DESCRIPTOR = 1 << 62 | 1024 // 16 << 32 | 1 << 16
"""Of a tile at address 0, swizzled by 128 bytes; eight rows are 1,024 bytes. All sizes are divided by 16; a tile's
address / 16 is added."""


def _in_place(context: Any, builder: Any, text: str, kind: Any, value: Any, more: list[Any]) -> Any:
    """Inline PTX whose first operands are the elements of a tuple of float32, read and written where they are."""
    count = kind.count
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l"] * len(more) + ["~{memory}"]
    result = ir.LiteralStructType([F32] * count)
    made = call_asm(builder, result, text, ",".join(constraints), [*_parts(builder, kind, value), *more])
    return context.make_tuple(builder, kind, [builder.extract_value(made, i) for i in range(count)])


@intrinsic
def zeros_of(typingctx, count):  # type: ignore[no-untyped-def]
    """`count` float32 of 0, a number that is written in the program."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    kind = types.UniTuple(types.float32, count.literal_value)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.make_tuple(builder, kind, [ir.Constant(F32, 0.0)] * kind.count)

    return kind(count), codegen


@intrinsic
def wgmma_tile(typingctx, memory, sums, a, b):  # type: ignore[no-untyped-def]
    """Begin sums += A · Bᵀ over the 64 columns of two tiles, given by descriptors, in the 16-bit type of `memory`.

    A warpgroup has 64 rows of A, and as many of B as `sums` has numbers in two rows. All that earlier calls began has
    ended when this one returns.
    """
    kind = "bf16" if memory.dtype.name == "int16" else "f16"

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = sums.count
        registers = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        op = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{kind}.{kind} {registers}"
        text = "{.reg .b64 a, b; wgmma.fence.sync.aligned; "
        for i in range(4):  # 16 columns are 32 bytes, 2 in a descriptor's units: the swizzle is one of addresses
            text += f"add.s64 a, ${2 * count}, {2 * i}; add.s64 b, ${2 * count + 1}, {2 * i}; "
            text += f"{op}, a, b, 1, 1, 1, 0, 0; "
        text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;}"
        return _in_place(context, builder, text, sums, args[1], list(args[2:]))

    return sums(memory, sums, types.int64, types.int64), codegen


@intrinsic
def wgmma_end(typingctx, sums):  # type: ignore[no-untyped-def]
    """The sums, once all products have ended."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _in_place(context, builder, "wgmma.wait_group.sync.aligned 0;", sums, args[0], [])

    return sums(sums), codegen


@intrinsic
def add_global_rows(typingctx, sums, first_at, second_at, first, second):  # type: ignore[no-untyped-def]
    """sums + what is in global memory where `mma.st_global_rows` would store them."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        pair = ir.LiteralStructType([F32] * 2)
        for i in range(0, len(parts), 2):
            row, column = i // 2 % 2, 8 * (i // 4)
            text = f"{{.reg .pred p; setp.gt.s64 p, $5, {column}; @p ld.global.v2.f32 {{$0, $1}}, [$4+{4 * column}];}}"
            zeros = [ir.Constant(F32, 0.0)] * 2
            loaded = call_asm(builder, pair, text, "=f,=f,0,1,l,l,~{memory}", [*zeros, args[1 + row], args[3 + row]])
            for j in range(2):
                parts[i + j] = builder.fadd(parts[i + j], builder.extract_value(loaded, j))
        return context.make_tuple(builder, sums, parts)

    return sums(sums, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def add_parts(typingctx, a, b):  # type: ignore[no-untyped-def]
    """a + b, number by number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pairs = zip(_parts(builder, a, args[0]), _parts(builder, b, args[1]), strict=True)
        return context.make_tuple(builder, a, [builder.fadd(*pair) for pair in pairs])

    return a(a, b), codegen


@intrinsic
def scale_columns(typingctx, sums, first_at, second_at, first, second):  # type: ignore[no-untyped-def]
    """Multiply each column by a float32 in global memory: those of the first half of the columns begin at `first_at`,
    of which `first` are wanted; the second half's at `second_at`.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        pair, count = ir.LiteralStructType([F32] * 2), len(parts) // 2
        for half in range(2):
            for i in range(0, count, 4):
                column = 2 * i
                text = "{.reg .pred p; setp.gt.s64 p, $5, "
                text += f"{column}; @p ld.global.v2.f32 {{$0, $1}}, [$4+{4 * column}];}}"
                given = [*[ir.Constant(F32, 0.0)] * 2, args[1 + half], args[3 + half]]
                loaded = call_asm(builder, pair, text, "=f,=f,0,1,l,l,~{memory}", given)
                for j in range(4):
                    at = half * count + i + j
                    parts[at] = builder.fmul(parts[at], builder.extract_value(loaded, j & 1))
        return context.make_tuple(builder, sums, parts)

    return sums(sums, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def silu_and_mul_halves(typingctx, sums):  # type: ignore[no-untyped-def]
    """silu(gate) · up, where the first half of the columns is the gate's and the second half up's."""
    kind = types.UniTuple(types.float32, sums.count // 2)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        made = []
        for gate, up in zip(parts[: kind.count], parts[kind.count :], strict=True):
            power = _ex2(builder, builder.fmul(gate, ir.Constant(F32, -LOG2_E)))
            below = builder.fadd(power, ir.Constant(F32, 1.0))
            # not fdiv: its slow path is a function call, beside which wgmma runs one at a time
            silu = call_asm(builder, F32, "div.full.f32 $0, $1, $2;", "=f,f,f", [gate, below])
            made.append(builder.fmul(silu, up))
        return context.make_tuple(builder, kind, made)

    return kind(sums), codegen


@intrinsic
def rotate_rows(typingctx, sums, size, interleaved, at, at2, one):  # type: ignore[no-untyped-def]
    """RoPE of a lane's elements of two rows, which hold whole heads of `size` elements. Two elements are rotated
    together: neighbours if `interleaved`, otherwise those that are half a head apart. Both are numbers in the program.

    A row's angles lie in global memory: size / 2 cosines, as many sines. `at` and `at2` are the addresses of the
    cosines of the lane's first elements. `one` is any number but 0. The assembler cannot know that, so each group of
    columns keeps a branch of its own, with its loads behind it. Without these branches it would begin with all loads,
    and need more registers than there are.
    """
    if not (isinstance(size, types.IntegerLiteral) and isinstance(interleaved, types.IntegerLiteral)):
        return None
    of_head, step = size.literal_value // 8, 1 if interleaved.literal_value else 2

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        if len(parts) // 4 % of_head:
            return args[0]  # tiles of this width have no whole heads, and are not used for them
        apart = 1 if step == 1 else 2 * of_head
        for group in range(of_head // step):
            wholes = range(group, len(parts) // 4, of_head)
            firsts = [4 * whole + 2 * row + i for whole in wholes for row in range(2) for i in range(step)]
            places = [place for first in firsts for place in (first, first + apart)]
            text = _rotation(len(firsts), step, 4 * 8 // (3 - step) * group, 4 * of_head * 4)
            constraints = ["=f"] * len(places) + [str(i) for i in range(len(places))] + ["l", "l", "l", "~{memory}"]
            given = [*(parts[place] for place in places), *args[3:]]
            made = call_asm(builder, ir.LiteralStructType([F32] * len(places)), text, ",".join(constraints), given)
            for i, place in enumerate(places):
                parts[place] = builder.extract_value(made, i)
        return context.make_tuple(builder, sums, parts)

    return sums(sums, size, interleaved, *[types.int64] * 3), codegen


def _rotation(pairs: int, step: int, at: int, sines: int) -> str:
    """PTX that rotates pairs, operands 0 and 1, 2 and 3 and so on, each `step` of them by neighbouring angles. First
    come those of the first row, then those of the second, then of the first row's next head. The three last operands
    are those of `rotate_rows`; the angles lie `at` bytes further, their sines `sines` bytes behind.
    """
    first = 4 * pairs
    text = "{.reg .pred p; .reg .f32 c0, c1, c2, c3, s0, s1, s2, s3, t, u; "
    text += f"setp.eq.s64 p, ${first + 2}, 0; @p bra done; "
    for row in range(2):
        for name, offset in (("c", at), ("s", at + sines)):
            names = ", ".join(f"{name}{2 * row + i}" for i in range(step))
            kind, names = ("v2.f32", f"{{{names}}}") if step == 2 else ("f32", names)
            text += f"ld.global.{kind} {names}, [${first + row}+{offset}]; "
    for pair in range(pairs):
        row, i = pair // step % 2, pair % step
        x, y, c, s = f"${2 * pair}", f"${2 * pair + 1}", f"c{2 * row + i}", f"s{2 * row + i}"
        text += f"mul.f32 t, {y}, {s}; neg.f32 t, t; mul.f32 u, {x}, {s}; "
        text += f"fma.rn.f32 {x}, {x}, {c}, t; fma.rn.f32 {y}, {y}, {c}, u; "
    return text + "done: }"


@intrinsic
def st_cache_rows(  # type: ignore[no-untyped-def]
    typingctx, memory, sums, size, first_at, second_at, distance, first, second
):
    """Store a lane's elements of two rows, whole heads of `size` elements, in the 16-bit type of `memory`; what is
    finite stays finite. Heads lie `distance` bytes apart. Of a row the first `first` or `second` columns are stored.
    """
    if not isinstance(size, types.IntegerLiteral):
        return None
    of_head, kind = size.literal_value // 8, _kind(memory)
    most = "0f7F7F0000" if kind == "bf16" else "0f477FE000"
    # a branch, not a predicate: the assembler would else convert all elements first
    text = "{.reg .pred p; .reg .f32 a, b, c; .reg .b32 w; setp.le.s32 p, $1, COLUMN; @p bra done; "
    for name, operand in (("b", "$2"), ("c", "$3")):
        text += f"abs.f32 a, {operand}; setp.lt.f32 p, a, 0f7F800000; neg.f32 {name}, {most}; "
        text += f"max.f32 {name}, {name}, {operand}; min.f32 {name}, {name}, {most}; "
        text += f"selp.f32 {name}, {name}, {operand}, p; "
    text += f"cvt.rn.{kind}x2.f32 w, c, b; st.global.b32 [$0+OFFSET], w; done:}}"

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[1])
        for i in range(0, len(parts), 2):
            row, (number, inside) = i // 2 % 2, divmod(i // 4, of_head)
            to = builder.add(args[3 + row], builder.mul(args[5], ir.Constant(I64, number)))
            here = text.replace("COLUMN", str(8 * (i // 4))).replace("OFFSET", str(16 * inside))
            call_asm(builder, VOID, here, "l,r,f,f,~{memory}", [to, args[6 + row], *parts[i : i + 2]])
        return context.get_dummy_value()

    return types.void(memory, sums, size, *[types.int64] * 3, *[types.int32] * 2), codegen


fence_proxy_async = instruction("fence.proxy.async.shared::cta;", "")
"""fence_proxy_async(): what this thread has written to shared memory is there for wgmma after the next barrier."""


def _st_async(builder: Any, where: list[Any], four: list[Any], offset: int = 0) -> None:
    """Send four numbers, `offset` bytes after a place. `where`: that place, an mbarrier that counts their bytes, and
    the rank of a block of the cluster, which has both.
    """
    text = (
        "{.reg .b32 there, counted; mapa.shared::cluster.u32 there, $0, $2; "
        "mapa.shared::cluster.u32 counted, $1, $2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
        f"[there+{offset}], {{$3, $4, $5, $6}}, [counted];}}"
    )
    call_asm(builder, VOID, text, "r,r,r,f,f,f,f,~{memory}", [*where, *four])


@intrinsic
def st_async_units(typingctx, sums, at, barrier, group, slices, inverse):  # type: ignore[no-untyped-def]
    """Send four numbers of `sums` for each 8 columns to a block of the cluster, whose mbarrier counts their bytes.

    Of 8 columns number u, part 4 · u + `group` belongs to block part mod `slices`; its place there is `at`, and 1,024
    bytes · `slices` further for each part that the block has before it. `inverse` is 65,536 / `slices`, rounded up.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        at, barrier, group, slices, inverse = (as_integer(context, builder, a, t, types.int32) for a, t in
                                      zip(args[1:], signature.args[1:], strict=True))  # fmt: skip
        for unit in range(len(parts) // 4):
            part = builder.add(group, ir.Constant(I32, 4 * unit))
            # exact, as there are fewer than 2^13 / slices parts
            number = builder.lshr(builder.mul(part, inverse), ir.Constant(I32, 16))
            rank = builder.sub(part, builder.mul(number, slices))
            to = builder.add(at, builder.mul(builder.mul(number, slices), ir.Constant(I32, 1024)))
            _st_async(builder, [to, barrier, rank], parts[4 * unit : 4 * unit + 4])
        return context.get_dummy_value()

    return types.void(sums, at, barrier, group, slices, inverse), codegen


@intrinsic
def st_shared_units(typingctx, sums, at, group):  # type: ignore[no-untyped-def]
    """Store what `st_async_units` would send, where one block has all parts."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        at, group = (as_integer(context, builder, a, t, types.int32) for a, t in
                     zip(args[1:], signature.args[1:], strict=True))  # fmt: skip
        at = builder.add(at, builder.mul(group, ir.Constant(I32, 1024)))
        for unit in range(len(parts) // 4):
            text = f"st.shared.v4.f32 [$0+{4096 * unit}], {{$1, $2, $3, $4}};"
            call_asm(builder, VOID, text, "r,f,f,f,f,~{memory}", [at, *parts[4 * unit : 4 * unit + 4]])
        return context.get_dummy_value()

    return types.void(sums, at, group), codegen


@intrinsic
def st_async_parts(typingctx, sums, at, barrier, rank):  # type: ignore[no-untyped-def]
    """Send `sums` to block `rank` of the cluster, whose mbarrier counts their bytes: four numbers for each 8 columns,
    2,048 bytes apart from `at` on.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        where = [as_integer(context, builder, a, t, types.int32) for a, t in
                 zip(args[1:], signature.args[1:], strict=True)]  # fmt: skip
        for unit in range(len(parts) // 4):
            _st_async(builder, where, parts[4 * unit : 4 * unit + 4], 2048 * unit)
        return context.get_dummy_value()

    return types.void(sums, at, barrier, rank), codegen


@intrinsic
def add_shared_parts(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """`sums`, plus those that `st_async_parts` has sent to `at`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        where = as_integer(context, builder, args[1], at, types.int32)
        loaded = ir.LiteralStructType([F32] * 4)
        for unit in range(len(parts) // 4):
            text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{2048 * unit}];"
            four = call_asm(builder, loaded, text, "=f,=f,=f,=f,r,~{memory}", [where])
            for i in range(4):
                parts[4 * unit + i] = builder.fadd(parts[4 * unit + i], builder.extract_value(four, i))
        return context.make_tuple(builder, sums, parts)

    return sums(sums, at), codegen


@intrinsic
def st_system_parts(typingctx, sums, at):  # type: ignore[no-untyped-def]
    """Store four numbers of `sums` for each 8 columns, 2,048 bytes apart, so that other devices see them at once."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts = _parts(builder, sums, args[0])
        for unit in range(len(parts) // 4):
            text = f"st.relaxed.sys.global.v4.f32 [$0+{2048 * unit}], {{$1, $2, $3, $4}};"
            call_asm(builder, VOID, text, "l,f,f,f,f,~{memory}", [args[1], *parts[4 * unit : 4 * unit + 4]])
        return context.get_dummy_value()

    return types.void(sums, types.int64), codegen


# Attention: scores = Q · Kᵀ and sums += P · V


TILE_ROW_BYTES = 128
"""A row of a tile: 64 columns of 16 bits."""


def _op(kind: str, first: int, width: int) -> str:
    """wgmma of `width` columns, whose sums are operands from number `first` on."""
    places = ", ".join(f"${first + i}" for i in range(width // 2))
    return f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{places}}}"


def _scores(kind: str, scores: int, sums: int, q: int, k: int) -> str:
    """PTX for scores = Q · Kᵀ: `scores` and `sums` are numbers of a lane, `q` and `k` the operands' descriptors."""
    text, keys = "", 2 * scores
    for step in range(2 * sums // 16):  # tiles of 64 columns follow each other: 64 rows of Q each, `keys` rows of K
        tile, inside = divmod(step, 4)
        text += f"add.s64 a, ${q}, {64 * TILE_ROW_BYTES // 16 * tile + 2 * inside}; "
        text += f"add.s64 b, ${k}, {keys * TILE_ROW_BYTES // 16 * tile + 2 * inside}; "
        text += f"{_op(kind, 0, keys)}, a, b, {int(step > 0)}, 1, 1, 0, 0; "
    return text + "wgmma.commit_group.sync.aligned;"


def _values(kind: str, keys: int, sums: int, v: int, words: int) -> str:
    """PTX for sums += P · V, of P in registers from operand `words` on and V in memory, whose rows are keys."""
    text, width = "", 2 * sums
    whole = width & ~63  # half a tile is a product of its own
    parts = [(at, columns) for at, columns in ((0, whole), (whole, width - whole)) if columns]
    for step in range(keys // 16):
        p = ", ".join(f"${words + 4 * step + i}" for i in range(4))
        for at, columns in parts:
            offset = (16 * step + keys * (at // 64)) * TILE_ROW_BYTES // 16
            text += f"add.s64 b, ${v}, {offset}; {_op(kind, at // 2, columns)}, {{{p}}}, b, 1, 1, 1, 1; "
    return text + "wgmma.commit_group.sync.aligned;"


def _kind(memory: Any) -> str:
    return "bf16" if memory.dtype.name == "int16" else "f16"


@intrinsic
def value_descriptor(typingctx, scores):  # type: ignore[no-untyped-def]
    """Of tiles of values at address 0, whose rows are keys, twice as many as `scores` has numbers: eight rows are 1,024
    bytes, and tiles of 64 columns follow each other.
    """
    number = 1 << 62 | 1024 // 16 << 32 | 2 * scores.count * TILE_ROW_BYTES // 16 << 16

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(I64, number)

    return types.int64(scores), codegen


@intrinsic
def wgmma_qk(typingctx, memory, sums, scores, q, k):  # type: ignore[no-untyped-def]
    """Begin Q · Kᵀ of 64 queries a warpgroup and as many keys as two rows of `scores` have numbers, by descriptors.

    Of `sums` only the type matters: heads have twice as many elements. The result takes the registers of `scores`: the
    assembler would else put off what reads them, and need more registers than there are.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        text = "{.reg .b64 a, b; wgmma.fence.sync.aligned; "
        text += _scores(_kind(memory), scores.count, sums.count, 2 * scores.count, 2 * scores.count + 1) + "}"
        return _in_place(context, builder, text, scores, args[2], list(args[3:]))

    return scores(memory, sums, scores, types.int64, types.int64), codegen


@intrinsic
def wgmma_qk_end(typingctx, scores):  # type: ignore[no-untyped-def]
    """The scores, once all products but those of the newest group have ended."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _in_place(context, builder, "wgmma.wait_group.sync.aligned 1;", scores, args[0], [])

    return scores(scores), codegen


@intrinsic
def wgmma_pv(typingctx, memory, sums, words, v):  # type: ignore[no-untyped-def]
    """Begin sums += P · V, of weights P as `weight_words` packs them; `v` is a descriptor as of `value_descriptor`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        m = sums.count
        text = "{.reg .b64 b; wgmma.fence.sync.aligned; "
        text += _values(_kind(memory), 4 * words.count, m, 2 * m, 2 * m + 1) + "}"
        constraints = ["=f"] * m + [str(i) for i in range(m)] + ["l"] + ["r"] * words.count + ["~{memory}"]
        given = [*_parts(builder, sums, args[1]), args[3], *_parts(builder, words, args[2])]
        made = call_asm(builder, ir.LiteralStructType([F32] * m), text, ",".join(constraints), given)
        return context.make_tuple(builder, sums, [builder.extract_value(made, i) for i in range(m)])

    return sums(memory, sums, words, types.int64), codegen


@intrinsic
def weight_words(typingctx, memory, weights):  # type: ignore[no-untyped-def]
    """Weights as A of wgmma: pairs of neighbours rounded to the 16-bit type of `memory`."""
    kind = types.UniTuple(types.uint32, weights.count // 2)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        parts, name = _parts(builder, weights, args[1]), memory.dtype.name
        packed = [_pack(builder, name, parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
        return context.make_tuple(builder, kind, packed)

    return kind(memory, weights), codegen


@intrinsic
def window_mask(typingctx, scores, first, second):  # type: ignore[no-untyped-def]
    """Scores with -infinity before the first key that a row sees: the lane's key number `first` in its first row and
    number `second` in its second, counted from the lane's first key.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        firsts = [as_integer(context, builder, args[i], kind, types.int32) for i, kind in ((1, first), (2, second))]
        below, elements = ir.Constant(F32, float("-inf")), []
        for i, element in enumerate(_parts(builder, scores, args[0])):
            seen = builder.icmp_signed(">=", ir.Constant(I32, 8 * (i // 4) + i % 2), firsts[i // 2 % 2])
            elements.append(builder.select(seen, element, below))
        return context.make_tuple(builder, scores, elements)

    return scores(scores, first, second), codegen


@intrinsic
def rcp_approx(typingctx, x):  # type: ignore[no-untyped-def]
    """rcp.approx: 1 / x, off by 1 in the last place. A division is a call, beside which wgmma runs one at a time."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return call_asm(builder, F32, "rcp.approx.f32 $0, $1;", "=f,f", args)

    return types.float32(types.float32), codegen
