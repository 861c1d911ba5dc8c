"""The CPU's kernels by name, operand types and scratch: what a plan needs that is only looked at.

Importing `kernels_cpu`, which defines them, takes Numba along: a quarter of a second, and tens of MB. This is a backend
of its own, `OUTLINE`: a graph can be fused and lowered for it, but not run. A test holds it to the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .quantization.types import KV_TYPES as CACHE
from .quantization.types import LINEAR_TYPES as LINEAR
from .registry import Types, kernel

OUTLINE = "cpu-outline"
_TILE = 4


def _kernel(op: str, *types: Types, name: str = "", window: bool = False, **scratch: Any) -> None:
    def plain() -> None: ...
    def windowed(window: int) -> None: ...

    function: Callable[..., None] = windowed if window else plain
    function.__name__ = name or op
    kernel(op, OUTLINE, *types, **scratch)(function)


def _rows(weight: int) -> Callable[..., tuple[int, ...]]:
    """Decoded rows of the operand with this number."""
    return lambda *shapes, workers: (workers, _TILE, shapes[weight][1])


def _gate(x: int, weight: int) -> Callable[..., tuple[int, ...]]:
    return lambda *shapes, workers: (shapes[x][0], shapes[weight][0])


def _normed(*shapes: tuple[int, ...], workers: int) -> tuple[int, ...]:
    return (workers, *shapes[0])


_kernel("embedding", "i32", LINEAR)
_kernel("rope_angles", "i32", "f32")
_kernel("rmsnorm", "f32", "f32")
_kernel("head_norm", "f32", "f32")
_kernel("quantize", "f32")
_kernel("linear", "f32", LINEAR, rows=_rows(1))
_kernel("linear", "i8", "f32", "int8", name="linear_int8")
_kernel("bias", "f32", "f32")
_kernel("rope", "f32", "f32")
_kernel("kv_write", "f32", CACHE, "i32", "i32")
_kernel("attention_scores", "f32", CACHE, "i32", "i32", window=True)
_kernel("softmax", "f32")
_kernel("attention_values", "f32", CACHE, "i32", "i32", window=True)
_kernel("swiglu", "f32", "f32")
_kernel("add", "f32", "f32")
_kernel("last", "f32")
_kernel("argmax", "f32")
# fused
_kernel("linear_add", "f32", LINEAR, "f32", rows=_rows(1))
_kernel("linear_add", "i8", "f32", "int8", "f32", name="linear_add_int8")
_kernel("qkv", "f32", LINEAR, LINEAR, LINEAR, rows=_rows(1))
_kernel("qkv", "i8", "f32", "int8", "int8", "int8", name="qkv_int8")
_kernel("gate_up", "f32", LINEAR, LINEAR, gate=_gate(0, 1), rows=_rows(1))
_kernel("gate_up", "i8", "f32", "int8", "int8", name="gate_up_int8", gate=_gate(0, 2))
_kernel("norm_linear", "f32", "f32", LINEAR, h=_normed, rows=_rows(2))
_kernel("norm_qkv", "f32", "f32", LINEAR, LINEAR, LINEAR, h=_normed, rows=_rows(2))
_kernel("norm_gate_up", "f32", "f32", LINEAR, LINEAR, h=_normed, gate=_gate(0, 2), rows=_rows(2))
_kernel("rope_kv_write", "f32", "f32", "f32", CACHE, "i32", "i32", "f32", CACHE)
_kernel(
    "attention", "f32", CACHE, "i32", "i32", CACHE,
    window=True, scores=lambda q, keys, positions, sequences, values, workers: (workers, keys[2]),
)  # fmt: skip
