"""Products of unsigned bytes of a weight and signed bytes of activations, with the instructions that the CPU has.

`vpdpbusd` (AVX512-VNNI, AVX-VNNI) adds four products to each 32-bit lane. AVX2 has `vpmaddubsw`, which adds two
products in 16 bits and cuts sums beyond them off. Products of 4-bit quants are so small that the sums of a whole group
of 32 fit in 16 bits, so one instruction widens them at the end of a group. They fit with a zero point subtracted, too,
half of it in each of the two sums of a lane; a sum that wraps around on the way is right at the end. Two products of
8-bit quants may not fit. There the weight's sign goes to the activation, and two products of at most 128 · 127 fit.
Other CPUs multiply in 16 bits.

Sums of K-quants' groups, packed into 16 bits, are multiplied by the groups' integer scales: two products go to each
32-bit lane, by `vpdpwssd`, or by `vpmaddwd` and an addition.

All of these sums are exact, so they are the same on every CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ..quantization.types import TYPE_TRAITS
from .intrinsics import INT16, INT32, INT64, cpu_features, unknown
from .panel_bytes import broadcast
from .tiling import PANEL_ROWS, PANEL_TOKENS, TILE
from .vecdot import INT8


def _has_vnni(lanes: int) -> bool:
    """Whether `vpdpbusd` multiplies vectors of this number of 32-bit lanes."""
    features = cpu_features()
    if lanes == 16:
        return features.get("avx512vnni", False)
    return (features.get("avx512vnni", False) and features.get("avx512vl", False)) or features.get("avxvnni", False)


def _has_avx2() -> bool:
    """Whether products are made with AVX2's instructions."""
    return cpu_features().get("avx2", False) and not _has_vnni(8)


ROWS_OF_A_VECTOR = 8 if _has_avx2() else PANEL_ROWS
"""Rows of a panel that are multiplied by one instruction."""
TOKENS_OF_A_PASS = 4 if _has_avx2() else PANEL_TOKENS
"""Number of tokens that a panel is multiplied with at a time. AVX2 has half of AVX-512's registers."""
SHORT_PASS = 2 if _has_avx2() else TOKENS_OF_A_PASS
"""Number of tokens that a panel is multiplied with where no more are left: a pass takes as long for fewer as for all.
"""


def least_tokens(name: str) -> int:
    """Least number of tokens for which a panel is made. With AVX2 it is two if quants have 4 bits: few are unpacked."""
    if not _has_avx2():
        return TILE
    return 2 if TYPE_TRAITS[name].bits == 4 else 3


def _pairs_that_fit(name: str) -> int:
    """How many pairs of products add up within 16 bits; one of 8-bit quants, because they are multiplied as signed."""
    return max((2**15 - 1) // (2 * 127 * ((1 << TYPE_TRAITS[name].bits) - 1)), 1)


def zero_point(name: str) -> int:
    """What `add_products` adds for an element that is 0, divided by its activation.

    It is the unsigned quant that means 0. With AVX2, 8-bit quants are multiplied as signed numbers, which need none.
    """
    if TYPE_TRAITS[name].bits == 8:
        return 0 if _has_avx2() else 128
    return TYPE_TRAITS[name].zero_point


def _sums_fit(name: str) -> bool:
    """Whether the sums of a whole scale group are made in 16 bits."""
    return _has_avx2() and _pairs_that_fit(name) >= TYPE_TRAITS[name].scale_group // 4


def offset_word(builder: Any, name: str, total: Any) -> Any:
    """-(zero point) · the sum of a group of x, as 32 bits with which the group's sums begin (see `group_products`)."""
    if not _sums_fit(name):
        return builder.mul(total, ir.Constant(INT32, -zero_point(name)))
    half = builder.and_(builder.mul(total, ir.Constant(INT32, -zero_point(name) // 2)), ir.Constant(INT32, 0xFFFF))
    return builder.or_(half, builder.shl(half, ir.Constant(INT32, 16)))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def _splat(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count)


def _part(builder: Any, vector: Any, half: int) -> Any:
    """The first or the second half of a vector's lanes."""
    count = vector.type.count // 2
    lanes = ir.Constant(ir.VectorType(INT32, count), list(range(count * half, count * (half + 1))))
    return builder.shuffle_vector(vector, vector, lanes)


def _pairs(builder: Any, name: str, quants: Any, x: Any) -> Any:
    """Sums of two products each, as 16 lanes of 16 bits, of <8 x i32> vectors that hold four bytes a lane (AVX2)."""
    byte, word = ir.VectorType(INT8, 32), ir.VectorType(INT16, 16)
    quants, x = builder.bitcast(quants, byte), builder.bitcast(x, byte)
    if TYPE_TRAITS[name].bits == 8:
        signed = builder.xor(quants, _splat(byte, -128))
        x = _call(builder, "llvm.x86.avx2.psign.b", byte, x, signed)
        negative = builder.icmp_signed("<", signed, _splat(byte, 0))
        quants = builder.select(negative, builder.neg(signed), signed)
    return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", word, quants, x)


def _widen(builder: Any, pairs: Any) -> Any:
    """Sums of two neighbours of 16 lanes of 16 bits, in 32 bits (AVX2)."""
    return _call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT32, 8), pairs, _splat(pairs.type, 1))


def add_products(builder: Any, name: str, sums: Any, quants: Any, x: Any) -> Any:
    """sums[i] + the products of bytes 4i to 4i + 3 of a type's unsigned `quants` and signed `x` (see `zero_point`)."""
    lanes = sums.type.count
    quants, x = builder.bitcast(quants, sums.type), builder.bitcast(x, sums.type)
    if _has_vnni(lanes):
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums.type, sums, quants, x)
    if lanes == 16:
        halves = [add_products(builder, name, *(_part(builder, v, half) for v in (sums, quants, x))) for half in (0, 1)]
        return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(INT32, 16), list(range(16))))
    if _has_avx2():
        return builder.add(sums, _widen(builder, _pairs(builder, name, quants, x)))
    words = ir.VectorType(INT16, 2 * lanes)
    a, b = builder.bitcast(quants, words), builder.bitcast(x, words)
    eight, sixteen = _splat(words, 8), _splat(sums.type, 16)
    for first, second in (
        (builder.and_(a, _splat(words, 255)), builder.ashr(builder.shl(b, eight), eight)),
        (builder.lshr(a, eight), builder.ashr(b, eight)),
    ):  # 255 · -128 fits in 16 bits, the sum of two products does not
        pairs = builder.bitcast(builder.mul(first, second), sums.type)
        sums = builder.add(sums, builder.ashr(builder.shl(pairs, sixteen), sixteen))
        sums = builder.add(sums, builder.ashr(pairs, sixteen))
    return sums


def multiplies_words() -> bool:
    """Whether the CPU has the instructions of `join_words` and `add_word_products`."""
    return cpu_features().get("avx2", False)


def join_words(builder: Any, first: Any, second: Any) -> Any:
    """Two <8 x i32> of numbers that fit in 16 bits, as <16 x i16>: the first four of each, then the others of each."""
    return _call(builder, "llvm.x86.avx2.packssdw", ir.VectorType(INT16, 16), first, second)


def add_word_products(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums[i] + a[2i] · b[2i] + a[2i + 1] · b[2i + 1] of <16 x i16>, in <8 x i32>."""
    if _has_vnni(8):
        a, b = (builder.bitcast(each, sums.type) for each in (a, b))
        return _call(builder, "llvm.x86.avx512.vpdpwssd.256", sums.type, sums, a, b)
    return builder.add(sums, _call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, a, b))


def group_products(
    builder: Any,
    name: str,
    tokens: int,
    quants_at: Callable[[Any], list[Any]],
    x_at: Callable[[int, Any], Any],
    offset: Callable[[int], Any],
) -> list[list[Any]]:
    """Emit the products of one scale group of a panel; returns their sums [token][part of the panel's rows].

    A column is four elements of each row: `quants_at(column)` gives the vectors of its parts, and `x_at(token, column)`
    the same four elements in all lanes. Sums begin with offset(token) in all lanes: 32 bits, which are an int32, or
    half of the offset twice where sums are of 16 bits (`offset_word`).
    """
    if not _has_avx2():
        lanes = ROWS_OF_A_VECTOR
        starts = [broadcast(builder, offset(token), lanes) for token in range(tokens)]
        sums = [[start] * (PANEL_ROWS // lanes) for start in starts]
        for column in range(TYPE_TRAITS[name].scale_group // 4):
            at = ir.Constant(INT64, column)
            quants = quants_at(at)
            for token, own in enumerate(sums):
                x = x_at(token, at)
                sums[token] = [add_products(builder, name, *pair, x) for pair in zip(own, quants, strict=True)]
        return sums
    fit, narrow = _pairs_that_fit(name), _sums_fit(name)
    kind = ir.VectorType(INT16, 16) if narrow else ir.VectorType(INT32, 8)
    places = [[cgutils.alloca_once(builder, kind) for _ in range(PANEL_ROWS // 8)] for _ in range(tokens)]
    for token, own in enumerate(places):
        start = builder.bitcast(broadcast(builder, offset(token), 8), kind)
        for place in own:
            builder.store(start, place)
    columns = unknown(builder, ir.Constant(INT64, TYPE_TRAITS[name].scale_group // 4))
    step = ir.Constant(INT64, 2 if narrow else fit)
    with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), columns, step) as (first, _):
        at = [builder.add(first, ir.Constant(INT64, i)) for i in range(step.constant)]
        quants = [quants_at(column) for column in at]
        for token, own in enumerate(places):
            x = [x_at(token, column) for column in at]
            for part, place in enumerate(own):
                pairs = [_pairs(builder, name, column[part], four) for column, four in zip(quants, x, strict=True)]
                total = functools.reduce(builder.add, pairs)
                builder.store(builder.add(builder.load(place), total if narrow else _widen(builder, total)), place)
    sums = [[builder.load(place) for place in own] for own in places]
    return [[_widen(builder, each) for each in own] for own in sums] if narrow else sums
