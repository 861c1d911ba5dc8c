"""Encoders that search for the scales of a block with the least error: q5_0, q5_1 and the K-quants.

ggml's own encoders for these types search too, so no encoding is the only right one. Here a range of scales is tried
for each group of elements, with least squares for each. Then the scales of a block are rounded to their few bits, and
these integers, the elements and the two float16 factors are improved in turn, each with the others fixed. All is NumPy
on many blocks at a time: values are float32 [blocks, groups, elements of a group], and so are weights of errors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Error
from .blocks import ENCODERS, Bytes, Floats, Records, encode_f16, pack, records
from .blocks import encode as encode_exactly

SCALE_STEPS = np.linspace(-1.0, 1.0, 17, dtype=np.float32)
"""The largest quant of a group, for which a scale is tried, minus the largest that the type has."""
ROUNDS = 2
"""How often integers and factors of a block are improved in turn."""


LOW_BITS, HIGH_BITS = np.uint8(15), np.uint8(4)
LARGEST = np.float32(3e8)
"""Beyond the largest number of any of these types: larger ones would only overflow sums of squares."""


def encode(name: str, rows: Floats, blocks: Bytes, importance: Floats | None = None) -> None:
    """Fill blocks [n, block_bytes] with values [n, block_size]. `importance` [n, block_size], positive, says how much
    an element's error counts; types of `blocks.ENCODERS` do not use it.

    Scales larger float16 saturate. Raises `Error` for NaN and infinity.
    """
    if name in ENCODERS:
        return encode_exactly(name, rows, blocks)
    if not np.isfinite(rows).all():
        raise Error(f"a weight holds NaN or infinity, which {name} cannot express")
    SEARCHING[name](np.clip(rows, -LARGEST, LARGEST), records(name, blocks), importance)


def _f16(values: Floats) -> Floats:
    """Rounded to float16, finite, as float32."""
    return encode_f16(values + np.float32(0)).view(np.float16).astype(np.float32)  # -0.0 + 0.0 is 0.0


def _factor(largest: Floats, most: int) -> Floats:
    """The factor, in float16, of integers up to `most`, the largest of which stands for `largest`.

    Below 6e-5 float16 has few bits. Where the nearest is too small, so that the largest integer would not do, the next
    one is taken, and smaller integers with it.
    """
    exact = largest / np.float32(most)
    near = _f16(exact)
    larger = np.nextafter(near.astype(np.float16), np.where(exact < 0, -np.inf, np.inf).astype(np.float16))
    short = np.abs(near) < np.abs(exact) * np.float32(1 - 0.1 / abs(most))
    return np.where(short & np.isfinite(larger), larger.astype(np.float32), near)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient, or 0 where that is infinite."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        result = np.divide(numerator, denominator, dtype=np.float32)
    result[~np.isfinite(result)] = 0
    return result


def _reciprocal(scale: Floats) -> Floats:
    return _divide(np.ones_like(scale), scale)


def _weights(x: Floats, importance: Floats | None) -> Floats:
    """How much the square of each element's error counts: a little more for large elements, times the column's
    importance.

    Plain least squares has the least RMS error, but large elements often lie in columns with large inputs. The square
    root of ggml's rule for K-quants, about |x| + RMS of the group, is within 1 % of the least error of a layer's output
    for every type; neither its rule nor least squares is (docs/quantize.md).
    """
    squares = np.square(x)
    squares += np.mean(squares, axis=-1, keepdims=True)
    weights = np.sqrt(np.sqrt(squares, out=squares), out=squares)
    return weights if importance is None else weights * importance


def _error(x: Floats, w: Floats, scale: Floats, low: Floats, quants: Floats) -> Floats:
    """Weighted squared error of each group: scale and low are [blocks, groups]."""
    difference = scale[..., None] * quants
    difference += low[..., None]
    difference -= x
    np.square(difference, out=difference)
    return np.einsum("bge,bge->bg", difference, w)


def _affine(x: Floats, w: Floats, most: int, any_low: bool) -> tuple[Floats, Floats]:
    """(scale, low) of each group for x ≈ scale · quant + low with quants from 0 to `most`.

    Low is at most 0, unless `any_low`: K-quants store minimums without a sign.
    """
    bottom, top = x.min(axis=-1), x.max(axis=-1)
    if not any_low:
        bottom, top = np.minimum(bottom, 0), np.maximum(top, 0)
    span, shifted = top - bottom, x - bottom[..., None]
    best_scale, best_low = span / np.float32(most), bottom
    quants = np.clip(np.rint(shifted * _reciprocal(best_scale)[..., None]), 0, most)
    best = _error(x, w, best_scale, best_low, quants)
    sum_w, sum_x = w.sum(axis=-1), np.einsum("bge,bge->bg", w, x)
    for step in SCALE_STEPS:
        inverse = _divide(np.full_like(span, most + step), span)
        quants = np.clip(np.rint(shifted * inverse[..., None]), 0, most)
        weighted = w * quants
        sum_q, sum_qx = weighted.sum(axis=-1), np.einsum("bge,bge->bg", weighted, x)
        sum_qq = np.einsum("bge,bge->bg", weighted, quants)
        determinant = sum_w * sum_qq - sum_q * sum_q
        scale = _divide(sum_w * sum_qx - sum_q * sum_x, determinant)
        low = _divide(sum_qq * sum_x - sum_q * sum_qx, determinant)
        if not any_low:
            without = low > 0
            low[without], scale[without] = 0, _divide(sum_qx, sum_qq)[without]
        error = _error(x, w, scale, low, quants)
        better = (error < best) & (scale > 0)
        best[better], best_scale[better], best_low[better] = error[better], scale[better], low[better]
    return best_scale, best_low


def _signed(x: Floats, w: Floats, least: int) -> Floats:
    """The scale of each group for x ≈ scale · quant with quants from `least` to -1 - `least`."""
    most = -1 - least
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    best_scale = extreme / np.float32(least)
    best = np.full(extreme.shape, -1, np.float32)
    for end in (least, most):
        for step in SCALE_STEPS:
            quants = np.clip(np.rint(x * _divide(np.full_like(extreme, end + step), extreme)[..., None]), least, most)
            weighted = w * quants
            product, square = np.einsum("bge,bge->bg", weighted, x), np.einsum("bge,bge->bg", weighted, quants)
            scale = _divide(product, square)
            better = (gain := scale * product) > best  # the error is a constant minus this
            best[better], best_scale[better] = gain[better], scale[better]
    return best_scale


def _quants(x: Floats, scale: Floats, low: Floats, least: int, most: int) -> Floats:
    """The nearest quants for scales and lows [blocks, groups]."""
    return np.clip(np.rint((x - low[..., None]) * _reciprocal(scale)[..., None]), least, most)


def _neighbours(
    x: Floats,
    w: Floats,
    d: Floats,
    dmin: Floats,
    integers: tuple[Floats, Floats],
    limits: tuple[int, int, int],
    bounds: tuple[int, int],
) -> tuple[Floats, Floats]:
    """The integer scale and minimum of each group, or neighbours of them, with the least error.

    d and dmin are [blocks, 1], `integers` two arrays [blocks, groups], `limits` the least and the most of a scale and
    the most of a minimum, `bounds` those of quants.
    """
    scales, mins = integers
    best_scales, best_mins = scales.copy(), mins.copy()
    best = np.full(scales.shape, np.inf, np.float32)
    for other_min in (0, -1, 1) if limits[2] else (0,):
        for other in (0, -1, 1):
            tried, tried_min = np.clip(scales + other, *limits[:2]), np.clip(mins + other_min, 0, limits[2])
            scale, low = d * tried, -dmin * tried_min
            error = _error(x, w, scale, low, _quants(x, scale, low, *bounds))
            better = error < best
            best[better], best_scales[better], best_mins[better] = error[better], tried[better], tried_min[better]
    return best_scales, best_mins


def _factors(
    x: Floats, w: Floats, scales: Floats, mins: Floats, quants: Floats, d: Floats, dmin: Floats
) -> tuple[Floats, Floats]:
    """d and dmin, [blocks, 1], of least squares for x ≈ d · scale · quant - dmin · min. The old ones where that
    fails.
    """
    a, b = scales[..., None] * quants, np.broadcast_to(mins[..., None], x.shape)
    aa, ab, bb = (np.einsum("bge,bge,bge->b", w, one, other) for one, other in ((a, a), (a, b), (b, b)))
    ax, bx = (np.einsum("bge,bge,bge->b", w, one, x) for one in (a, b))
    determinant = aa * bb - ab * ab
    alone = ~(bb > 0)  # no minimums: one factor
    new = np.where(alone, _divide(ax, aa), _divide(ax * bb - ab * bx, determinant))[:, None]
    new_min = np.where(alone, 0, _divide(ab * ax - aa * bx, determinant))[:, None]
    works = (np.sign(new) == np.sign(d)) & (new != 0) & (new_min >= 0) & (alone[:, None] | (determinant > 0)[:, None])
    return _f16(np.where(works, new, d)), _f16(np.where(works, new_min, dmin))


def _improve(
    x: Floats,
    w: Floats,
    d: Floats,
    dmin: Floats,
    integers: tuple[Floats, Floats],
    limits: tuple[int, int, int],
    bounds: tuple[int, int],
) -> tuple[Floats, Floats, Floats, Floats, Bytes]:
    """(d, dmin, scales, mins, quants above the least) after `ROUNDS` of improvement; only what lessens a block's error
    is kept.
    """

    def error_of(d: Floats, dmin: Floats, scales: Floats, mins: Floats) -> Floats:
        scale, low = d * scales, -dmin * mins
        return _error(x, w, scale, low, _quants(x, scale, low, *bounds)).sum(axis=-1)

    scales, mins = _neighbours(x, w, d, dmin, integers, limits, bounds)
    for _ in range(ROUNDS):
        quants = _quants(x, d * scales, -dmin * mins, *bounds)
        new = _factors(x, w, scales, mins, quants, d, dmin)
        better = (error_of(*new, scales, mins) < error_of(d, dmin, scales, mins))[:, None]
        d, dmin = np.where(better, new[0], d), np.where(better, new[1], dmin)
        scales, mins = _neighbours(x, w, d, dmin, (scales, mins), limits, bounds)
    quants = _quants(x, d * scales, -dmin * mins, *bounds) - np.float32(bounds[0])
    return d, dmin, scales, mins, quants.astype(np.uint8).reshape(len(x), -1)


def _groups(rows: Floats, importance: Floats | None, size: int) -> tuple[Floats, Floats]:
    """(values, weights of their errors) as [blocks, groups, size]."""
    x = np.ascontiguousarray(rows).reshape(len(rows), -1, size)
    return x, _weights(x, None if importance is None else importance.reshape(x.shape))


def _k_with_mins(rows: Floats, importance: Floats | None, bits: int, block: Records) -> Bytes:
    """Fill the factors and scales of q4_k or q5_k; returns the quants [blocks, 256]."""
    x, w = _groups(rows, importance, 32)
    most = (1 << bits) - 1
    scale, low = _affine(x, w, most, any_low=False)
    d = _factor(scale.max(axis=1, keepdims=True), 63)
    dmin = _factor(-low.min(axis=1, keepdims=True), 63)
    integers = tuple(
        np.clip(np.rint(_divide(values, np.broadcast_to(factor, values.shape))), 0, 63)
        for values, factor in ((scale, d), (-low, dmin))
    )
    d, dmin, scales, mins, quants = _improve(x, w, d, dmin, (integers[0], integers[1]), (0, 63, 63), (0, most))
    block["d"], block["dmin"] = encode_f16(d)[:, 0], encode_f16(dmin)[:, 0]
    s, m = scales.astype(np.uint8), mins.astype(np.uint8)
    high = np.uint8(6)
    block["scales"] = np.hstack(
        [
            s[:, :4] | (s[:, 4:] >> HIGH_BITS) << high,
            m[:, :4] | (m[:, 4:] >> HIGH_BITS) << high,
            s[:, 4:] & LOW_BITS | (m[:, 4:] & LOW_BITS) << HIGH_BITS,
        ]
    )
    return quants


def _q4_k(rows: Floats, block: Records, importance: Floats | None) -> None:
    block["qs"] = pack(_k_with_mins(rows, importance, 4, block), 4, 32)


def _q5_k(rows: Floats, block: Records, importance: Floats | None) -> None:
    quants = _k_with_mins(rows, importance, 5, block)
    block["qs"], block["qh"] = pack(quants & LOW_BITS, 4, 32), pack(quants >> HIGH_BITS, 1, 32)


def _q6_k(rows: Floats, block: Records, importance: Floats | None) -> None:
    x, w = _groups(rows, importance, 16)
    scale = _signed(x, w, -32)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
    d = _factor(largest, -128)
    integers = np.clip(np.rint(_divide(scale, np.broadcast_to(d, scale.shape))), -128, 127)
    none = np.zeros_like(integers)
    d, _, scales, _, quants = _improve(x, w, d, np.zeros_like(d), (integers, none), (-128, 127, 0), (-32, 31))
    block["d"], block["scales"] = encode_f16(d)[:, 0], scales.astype(np.int8)
    block["ql"], block["qh"] = pack(quants & LOW_BITS, 4, 64), pack(quants >> HIGH_BITS, 2, 32)


def _q5_0(rows: Floats, block: Records, importance: Floats | None) -> None:
    x, w = _groups(rows, importance, 32)
    d = _f16(_signed(x, w, -16))
    quants = (_quants(x, d, np.zeros_like(d), -16, 15) + 16).astype(np.uint8)[:, 0]
    block["d"] = encode_f16(d)[:, 0]
    block["qs"], block["qh"] = pack(quants & LOW_BITS, 4, 16), pack(quants >> HIGH_BITS, 1, 1)


def _q5_1(rows: Floats, block: Records, importance: Floats | None) -> None:
    x, w = _groups(rows, importance, 32)
    d, m = (_f16(found) for found in _affine(x, w, 31, any_low=True))
    quants = _quants(x, d, m, 0, 31).astype(np.uint8)[:, 0]
    block["d"], block["m"] = encode_f16(d)[:, 0], encode_f16(m)[:, 0]
    block["qs"], block["qh"] = pack(quants & LOW_BITS, 4, 16), pack(quants >> HIGH_BITS, 1, 1)


SEARCHING: dict[str, Callable[[Floats, Records, Floats | None], None]] = {
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
"""Type → fills blocks with rows [blocks, block_size], with the importance of each element, or None."""
