"""Registers the CPU's kernels: for each op and the types of its inputs, the function that computes it.

Functions are only named here. Their modules, and Numba with them, are imported when a kernel is compiled, so a plan can
be made and printed without Numba. The functions are in `kernels_cpu`, `cpu.kernels_int8` and `cpu.collectives`;
`kernels_cpu` explains how they are called.
"""

from __future__ import annotations

import math

from ..memory import round_up
from ..quantization.types import ACTIVATION_QUANT, FLOAT_KV_TYPES, KV_TYPES, LINEAR_TYPES, VEC_DOT_TYPE
from ..registry import KernelRef, ScratchShape, Types, kernel
from .tiling import SCORE_HEADS, SCORES_BEYOND, TILE, dequant_buffer_size, panel_buffer_size

BLOCK_TYPES = tuple(VEC_DOT_TYPE)
"""Types that are multiplied with int8 activations, which come with scales and sums."""
SUM_TYPES = tuple(dict.fromkeys(quant.sum_dtype for quant in ACTIVATION_QUANT.values()))
"""Types of the sums that come with int8 activations."""

Shape = tuple[int, ...]

FOR_MANY_TOKENS = ("dequant_buffer", "panel_buffer")
"""Scratch arrays of linear layers. Without them, runs of many tokens are computed as runs of few are: each row's dot
product by itself. That is slower, and the bits are the same for any number of tokens.
"""


def plain(op: str, *types: Types, name: str = "", **scratch: ScratchShape) -> None:
    """Register the function `name` (default: the op's name) of `kernels_cpu` for `op` with inputs of these types."""
    kernel(op, "cpu", *types, **scratch)(KernelRef("numballama.kernels_cpu", name or op))


def int8(op: str, *types: Types, name: str = "", **scratch: ScratchShape) -> None:
    """Like `plain`, for a function of `cpu.kernels_int8`."""
    kernel(op, "cpu", *types, **scratch)(KernelRef("numballama.cpu.kernels_int8", name or op))


# Shapes of scratch arrays, from those of the inputs. `weight` and `x` are indices of inputs.


def dequantized_rows(weight: int) -> ScratchShape:
    """Some rows of a weight as float32, for each worker."""
    return lambda *inputs, workers: (workers, dequant_buffer_size(inputs[weight][1]) if inputs[0][0] >= TILE else 1)


def panels(*inputs: Shape, workers: int) -> Shape:
    """A panel buffer for each worker, and an offset for each of the sums, which are input 2: whole cache lines."""
    return (workers, panel_buffer_size() + round_up(math.prod(inputs[2]), 16))


def product(x: int, weight: int) -> ScratchShape:
    """The product of x and a weight, which all workers share."""
    return lambda *inputs, workers: (inputs[x][0], inputs[weight][0])


def each_worker_x(*inputs: Shape, workers: int) -> Shape:
    """A copy of the first input for each worker."""
    return (workers, *inputs[0])


def each_worker_scores(*inputs: Shape, workers: int) -> Shape:
    """Scores of a token's heads that share keys, of SCORE_HEADS at most, for each worker; input 0 are the queries,
    input 1 the cache of keys, input 4 the page table. A row is longer by SCORES_BEYOND elements.
    """
    _, kv_heads, page, head_dim = inputs[1]
    sharing = max(inputs[0][1] // (kv_heads * head_dim), 1)
    return (workers, min(SCORE_HEADS, sharing), inputs[4][1] * page + SCORES_BEYOND)


# The ops that `graph` declares

plain("embedding", "i32", LINEAR_TYPES)
plain("rope_angles", "i32", "f32")
plain("rmsnorm", "f32", "f32")
plain("head_norm", "f32", "f32")
plain("quantize", "f32")
int8("quantize_q8_0", "f32")
int8("quantize_q8_1", "f32")
int8("quantize_q8_k", "f32")
plain("linear", "f32", LINEAR_TYPES, dequant_buffer=dequantized_rows(weight=1))
plain("linear", "i8", "f32", "int8", name="linear_int8")
int8("linear", "i8", "f32", SUM_TYPES, BLOCK_TYPES, name="linear_blocks_int8", panel_buffer=panels)
plain("bias", "f32", "f32")
plain("rope", "f32", "f32")
plain("kv_write", "f32", KV_TYPES, "i32", "i32", "i32")
plain("attention_scores", "f32", KV_TYPES, "i32", "i32", "i32")
plain("softmax", "f32")
plain("attention_values", "f32", KV_TYPES, "i32", "i32", "i32")
plain("swiglu", "f32", "f32")
plain("add", "f32", "f32")
plain("rows", "f32", "i32")
plain("argmax", "f32")

for _collective in ("all_reduce", "all_gather"):
    kernel(_collective, "cpu", "f32", "f32", "i32")(KernelRef("numballama.cpu.collectives", _collective))

# The ops that fusion passes build

plain("linear_add", "f32", LINEAR_TYPES, "f32", dequant_buffer=dequantized_rows(weight=1))
plain("linear_add", "i8", "f32", "int8", "f32", name="linear_add_int8")
int8("linear_add", "i8", "f32", SUM_TYPES, BLOCK_TYPES, "f32", name="linear_add_blocks_int8", panel_buffer=panels)
plain("qkv", "f32", LINEAR_TYPES, LINEAR_TYPES, LINEAR_TYPES, dequant_buffer=dequantized_rows(weight=1))
plain("qkv", "i8", "f32", "int8", "int8", "int8", name="qkv_int8")
int8(
    "qkv", "i8", "f32", SUM_TYPES, BLOCK_TYPES, BLOCK_TYPES, BLOCK_TYPES,
    name="qkv_blocks_int8", panel_buffer=panels,
)  # fmt: skip
plain(
    "gate_up", "f32", LINEAR_TYPES, LINEAR_TYPES,
    gate_buffer=product(0, weight=1), dequant_buffer=dequantized_rows(weight=1),
)  # fmt: skip
plain("gate_up", "i8", "f32", "int8", "int8", name="gate_up_int8", gate_buffer=product(0, weight=2))
int8(
    "gate_up", "i8", "f32", SUM_TYPES, BLOCK_TYPES, BLOCK_TYPES,
    name="gate_up_blocks_int8", gate_buffer=product(0, weight=3), panel_buffer=panels,
)  # fmt: skip
plain("norm_linear", "f32", "f32", LINEAR_TYPES, normed=each_worker_x, dequant_buffer=dequantized_rows(weight=2))
plain(
    "norm_qkv", "f32", "f32", LINEAR_TYPES, LINEAR_TYPES, LINEAR_TYPES,
    normed=each_worker_x, dequant_buffer=dequantized_rows(weight=2),
)  # fmt: skip
plain(
    "norm_gate_up", "f32", "f32", LINEAR_TYPES, LINEAR_TYPES,
    normed=each_worker_x, gate_buffer=product(0, weight=2), dequant_buffer=dequantized_rows(weight=2),
)  # fmt: skip
plain("rope_kv_write", "f32", "f32", "f32", FLOAT_KV_TYPES, "i32", "i32", "i32", "f32", FLOAT_KV_TYPES)
plain("attention", "f32", KV_TYPES, "i32", "i32", "i32", KV_TYPES, scores=each_worker_scores)
