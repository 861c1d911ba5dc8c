"""Instructions that compute a result from registers, thread by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cuda.emulator.program import NUMPY, WIDTHS, round_16
from tests.cuda.emulator.threads import Threads

COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float64)


def _not(a: np.ndarray) -> np.ndarray:
    return ~a


def _rsqrt(a: np.ndarray) -> np.ndarray:
    return np.reciprocal(np.sqrt(a))


def _popc(a: np.ndarray) -> np.ndarray:
    return np.array([int(each).bit_count() for each in a.view(np.uint32)]).astype(a.dtype)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "div": _divide, "rem": _remainder,
    "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": _not,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rcp": np.reciprocal, "ex2": np.exp2,
    "rsqrt": _rsqrt, "popc": _popc,
}  # fmt: skip
"""Instruction → what it computes of operands of one type."""


class Arithmetic(Threads):
    """Moves, conversions, comparisons and all of `OPERATIONS`."""

    def _mov(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        to, source = operands
        kind = modifiers[0]
        if isinstance(source, tuple):  # pack
            half = {"b32": "b16", "b64": "b32"}[kind]
            low, high = (self._value(name, half).astype(np.uint64) for name in source)
            self._set(to, (low | high << np.uint64(8 * WIDTHS[half])).astype(NUMPY[kind]), mask)
        elif isinstance(to, tuple):
            half = {"b32": "b16", "b64": "b32"}[kind]
            whole = self._value(source, kind).astype(np.uint64)
            for i, name in enumerate(to):
                self._set(name, (whole >> np.uint64(8 * WIDTHS[half] * i)).astype(NUMPY[half]), mask)
        else:
            self._set(to, self._value(source, kind), mask)
            for group in self.warpgroups:
                group.moved(to, source, mask)

    def _cvt(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        to, source = self._kind(modifiers, 0), self._kind(modifiers, -1)
        if to in ("f16x2", "bf16x2"):
            high, low = (round_16(self._value(name, "f32"), to[:-2]) for name in operands[1:])
            self._set(operands[0], low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16), mask)
            return
        value = self._value(operands[1], source)
        if to[0] in "usb" and source[0] == "f":
            rounded = (
                np.trunc(value) if "rzi" in modifiers else np.floor(value) if "rmi" in modifiers else np.rint(value)
            )
            info = np.iinfo(NUMPY[to])
            value = np.clip(np.nan_to_num(rounded.astype(np.float64)), float(info.min), float(info.max))
        self._set(operands[0], value.astype(NUMPY[to]), mask)

    def _setp(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        kind = self._kind(modifiers)
        a, b = (self._value(name, kind) for name in operands[1:3])
        how = modifiers[0]
        if kind[0] != "f":
            self._set(operands[0], COMPARED[how](a, b), mask)
            return
        unordered = np.isnan(a) | np.isnan(b)
        if how == "nan":
            result = unordered
        elif how == "num":
            result = ~unordered
        elif how.endswith("u") and how[:-1] in COMPARED:
            result = COMPARED[how[:-1]](a, b) | unordered
        else:
            result = COMPARED[how](a, b) & ~unordered
        self._set(operands[0], result, mask)

    def _selp(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        kind = modifiers[0]
        chosen = np.where(self._value(operands[3], "pred"), *(self._value(name, kind) for name in operands[1:3]))
        self._set(operands[0], chosen, mask)

    def _prmt(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray) -> None:
        assert modifiers == ["b32"]
        a, b, selector = (self._value(name, "b32") for name in operands[1:])
        both = np.stack([a, b], axis=1).view(np.uint8)  # little endian: the bytes of a, then of b
        digits = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & np.uint32(15)
        assert (digits[mask] < 8).all(), "copies of a sign"
        chosen = np.take_along_axis(both, (digits & np.uint32(7)).astype(np.int64), axis=1)
        self._set(operands[0], chosen.view(np.uint32)[:, 0], mask)

    def _arithmetic(self, modifiers: list[str], operands: tuple[Any, ...], mask: np.ndarray, name: str) -> None:
        kind = self._kind(modifiers) if name != "ex2" else "f32"
        to, *sources = operands
        if name in ("shl", "shr"):
            value, amount = self._value(sources[0], kind), self._value(sources[1], "u32")
            width = 8 * WIDTHS[kind]
            far = amount >= width
            amount = np.minimum(amount, width - 1).astype(value.dtype)
            result = np.left_shift(value, amount) if name == "shl" else np.right_shift(value, amount)
            if not (name == "shr" and kind[0] == "s"):
                result = np.where(far, 0, result).astype(value.dtype)
            self._set(to, result, mask)
            return
        if name in ("bfi", "bfe"):
            self._bits(name, kind, to, sources, mask)
            return
        if kind == "f16x2":  # exact in float64, rounded once
            halves = [
                self._value(source, "b32").view(np.float16).reshape(-1, 2).astype(np.float64) for source in sources
            ]
            self._set(to, OPERATIONS[name](*halves).astype(np.float16).reshape(-1).view(np.uint32), mask)
            return
        values = [self._value(source, kind) for source in sources]
        if name in ("mul", "mad") and kind[0] in "us":
            wide = np.int64 if kind[0] == "s" else np.uint64
            if "wide" in modifiers:
                result = values[0].astype(wide) * values[1].astype(wide)
                if name == "mad":
                    result = result + self._value(sources[2], {"s32": "s64", "u32": "u64"}[kind])
            elif "hi" in modifiers:
                exact = values[0].astype(object) * values[1].astype(object)
                result = np.array([int(n) >> (8 * WIDTHS[kind]) for n in exact], dtype=NUMPY[kind])
            else:
                result = values[0] * values[1] + (values[2] if name == "mad" else 0)
                result = result.astype(NUMPY[kind])
            self._set(to, result, mask)
            return
        self._set(to, np.asarray(OPERATIONS[name](*values)).astype(NUMPY[kind], copy=False), mask)

    def _bits(self, name: str, kind: str, to: str, sources: list[str], mask: np.ndarray) -> None:
        start, length = (int(s, 0) for s in sources[-2:])
        ones = (1 << length) - 1
        if name == "bfi":
            new, old = (self._value(s, kind).astype(np.uint64) for s in sources[:2])
            result = (old & np.uint64(~(ones << start) & (1 << 64) - 1)) | ((new & np.uint64(ones)) << np.uint64(start))
        else:
            result = (self._value(sources[0], kind).astype(np.uint64) >> np.uint64(start)) & np.uint64(ones)
            assert kind[0] == "u"
        self._set(to, result.astype(NUMPY[kind]), mask)
