"""Launches of the plain operators (`kernels_cuda`), which move little memory. blockIdx.y is the token."""

from __future__ import annotations

from ...memory import ceil_div
from ...quantization.types import FLOAT_KV_TYPES, KV_BLOCK, LINEAR_TYPES
from ...registry import KernelRef, kernel
from ..kernels.params import ELEMENTWISE_THREADS as THREADS
from ..launch import Argument, Array, Launch, LaunchContext, Matrix, named, paged, scales_of

KERNELS = "numballama.kernels_cuda"
EMBEDDING = KernelRef(KERNELS, "embedding_kernel")
ROPE_ANGLES = KernelRef(KERNELS, "rope_angles_kernel")
RMSNORM = KernelRef(KERNELS, "rmsnorm_kernel")
HEAD_NORM = KernelRef(KERNELS, "head_norm_kernel")
QUANTIZE = KernelRef(KERNELS, "quantize_kernel")
BIAS = KernelRef(KERNELS, "bias_kernel")
ROPE = KernelRef(KERNELS, "rope_kernel")
KV_WRITE = KernelRef(KERNELS, "kv_write_kernel")
ROPE_KV_WRITE = KernelRef(KERNELS, "rope_kv_write_kernel")
SWIGLU = KernelRef(KERNELS, "swiglu_kernel")
ADD = KernelRef(KERNELS, "add_kernel")
ROWS = KernelRef(KERNELS, "rows_kernel")
ARGMAX = KernelRef(KERNELS, "argmax_kernel")

KV_Q8_0 = "numballama.cuda.kernels.kv_q8_0"
KV_WRITE_Q8_0 = KernelRef(KV_Q8_0, "kv_write_q8_0_kernel")
ROPE_KV_WRITE_Q8_0 = KernelRef(KV_Q8_0, "rope_kv_write_q8_0_kernel")

ARGMAX_BLOCKS = 64
"""Maximum number of blocks that share a row of an argmax."""


def blocks_for(elements: int) -> int:
    """Number of blocks for one thread per element."""
    return ceil_div(elements, THREADS)


@kernel("embedding", "cuda", "i32", LINEAR_TYPES)
def embedding(ctx: LaunchContext, ids: Array, table: Matrix, out: Array) -> list[Launch]:
    tokens, columns = out.shape
    arguments = named(tokens=ctx.tokens, ids=ids, **table.arguments("table"), out=out, columns=columns)
    return [Launch(EMBEDDING, (blocks_for(columns), tokens), THREADS, arguments)]


@kernel("rope_angles", "cuda", "i32", "f32")
def rope_angles(ctx: LaunchContext, positions: Array, frequencies: Array, out: Array, scale: float) -> list[Launch]:
    tokens, pairs = out.shape[0], frequencies.shape[0]
    arguments = named(
        tokens=ctx.tokens, positions=positions, frequencies=frequencies, out=out, pairs=pairs, scale=scale
    )
    return [Launch(ROPE_ANGLES, (blocks_for(pairs), tokens), THREADS, arguments)]


@kernel("rmsnorm", "cuda", "f32", "f32")
def rmsnorm(ctx: LaunchContext, x: Array, weight: Array, out: Array, eps: float) -> list[Launch]:
    tokens, columns = x.shape
    arguments = named(tokens=ctx.tokens, x=x, weight=weight, out=out, columns=columns, eps=eps)
    return [Launch(RMSNORM, (1, tokens), THREADS, arguments)]


@kernel("head_norm", "cuda", "f32", "f32")
def head_norm(ctx: LaunchContext, x: Array, weight: Array, out: Array, eps: float) -> list[Launch]:
    (tokens, columns), (head_dim,) = x.shape, weight.shape
    grid = ceil_div(columns // head_dim, THREADS // 32), tokens
    arguments = named(tokens=ctx.tokens, x=x, weight=weight, out=out, columns=columns, head_dim=head_dim, eps=eps)
    return [Launch(HEAD_NORM, grid, THREADS, arguments)]


@kernel("quantize", "cuda", "f32")
def quantize(ctx: LaunchContext, x: Array, out: Array, scales: Array, group: int) -> list[Launch]:
    (tokens, columns), groups = x.shape, scales.shape[1]
    arguments = named(tokens=ctx.tokens, x=x, out=out, scales=scales, columns=columns, group=group, groups=groups)
    return [Launch(QUANTIZE, (ceil_div(groups, THREADS // 32), tokens), THREADS, arguments)]


@kernel("bias", "cuda", "f32", "f32")
def bias(ctx: LaunchContext, x: Array, weight: Array, out: Array) -> list[Launch]:
    tokens, columns = x.shape
    arguments = named(tokens=ctx.tokens, x=x, weight=weight, out=out, columns=columns)
    return [Launch(BIAS, (blocks_for(columns), tokens), THREADS, arguments)]


@kernel("rope", "cuda", "f32", "f32")
def rope(ctx: LaunchContext, x: Array, angles: Array, out: Array, head_dim: int, interleaved: int) -> list[Launch]:
    tokens, columns = x.shape
    arguments = named(
        tokens=ctx.tokens, x=x, angles=angles, out=out, columns=columns, head_dim=head_dim, interleaved=interleaved
    )
    return [Launch(ROPE, (blocks_for(columns // 2), tokens), THREADS, arguments)]


@kernel("kv_write", "cuda", "f32", FLOAT_KV_TYPES, "i32", "i32", "i32")
def kv_write(
    ctx: LaunchContext, x: Array, cache: Array, positions: Array, sequences: Array, page_table: Array
) -> list[Launch]:
    _, heads, _, head_dim = cache.shape
    arguments = named(
        tokens=ctx.tokens, x=x, cache=cache, **paged(cache, positions, sequences, page_table), heads=heads,
        head_dim=head_dim,
    )  # fmt: skip
    return [Launch(KV_WRITE, (blocks_for(heads * head_dim), x.shape[0]), THREADS, arguments)]


def _blocks(head_dim: int) -> dict[str, Argument]:
    """Arguments of kernels that write q8_0: blocks of a head, and 1 / blocks."""
    blocks = ceil_div(head_dim, KV_BLOCK)
    return named(blocks=blocks, inverse_blocks=1 / blocks)


@kernel("kv_write", "cuda", "f32", "q8_0", "i32", "i32", "i32")
def kv_write_q8_0(
    ctx: LaunchContext, x: Array, cache: Array, positions: Array, sequences: Array, page_table: Array
) -> list[Launch]:
    _, heads, _, head_dim = cache.shape
    arguments = named(
        tokens=ctx.tokens, x=x, cache=cache, **paged(cache, positions, sequences, page_table), **scales_of(cache),
        heads=heads, head_dim=head_dim, **_blocks(head_dim),
    )  # fmt: skip
    grid = ceil_div(heads * ceil_div(head_dim, KV_BLOCK), THREADS // 32), x.shape[0]
    return [Launch(KV_WRITE_Q8_0, grid, THREADS, arguments)]


@kernel("rope_kv_write", "cuda", "f32", "f32", "f32", FLOAT_KV_TYPES, "i32", "i32", "i32", "f32", FLOAT_KV_TYPES)
def rope_kv_write(
    ctx: LaunchContext, q: Array, angles: Array, k: Array, k_cache: Array, positions: Array, sequences: Array,
    page_table: Array, v: Array, v_cache: Array, out: Array, head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    tokens, q_rows = q.shape
    arguments = named(
        tokens=ctx.tokens, q=q, angles=angles, k=k, k_cache=k_cache,
        **paged(k_cache, positions, sequences, page_table), v=v, v_cache=v_cache, out=out, q_rows=q_rows,
        kv_rows=k.shape[1], head_dim=head_dim, interleaved=interleaved,
    )  # fmt: skip
    return [Launch(ROPE_KV_WRITE, (blocks_for(q_rows // 2), tokens), THREADS, arguments)]


@kernel("rope_kv_write", "cuda", "f32", "f32", "f32", "q8_0", "i32", "i32", "i32", "f32", "q8_0")
def rope_kv_write_q8_0(
    ctx: LaunchContext, q: Array, angles: Array, k: Array, k_cache: Array, positions: Array, sequences: Array,
    page_table: Array, v: Array, v_cache: Array, out: Array, head_dim: int, interleaved: int,
) -> list[Launch]:  # fmt: skip
    heads, kv_heads = q.shape[1] // head_dim, k_cache.shape[1]
    arguments = named(
        tokens=ctx.tokens, q=q, angles=angles, k=k, k_cache=k_cache,
        **paged(k_cache, positions, sequences, page_table), **scales_of(k_cache), v=v, v_cache=v_cache, out=out,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, interleaved=interleaved, **_blocks(head_dim),
    )  # fmt: skip
    grid = ceil_div((heads + 2 * kv_heads) * ceil_div(head_dim, KV_BLOCK), THREADS // 32), q.shape[0]
    return [Launch(ROPE_KV_WRITE_Q8_0, grid, THREADS, arguments)]


@kernel("swiglu", "cuda", "f32", "f32")
def swiglu(ctx: LaunchContext, gate: Array, up: Array, out: Array) -> list[Launch]:
    tokens, columns = out.shape
    arguments = named(tokens=ctx.tokens, gate=gate, up=up, out=out, columns=columns)
    return [Launch(SWIGLU, (blocks_for(columns), tokens), THREADS, arguments)]


@kernel("add", "cuda", "f32", "f32")
def add(ctx: LaunchContext, a: Array, b: Array, out: Array) -> list[Launch]:
    tokens, columns = out.shape
    arguments = named(tokens=ctx.tokens, a=a, b=b, out=out, columns=columns)
    return [Launch(ADD, (blocks_for(columns), tokens), THREADS, arguments)]


@kernel("rows", "cuda", "f32", "i32")
def rows(ctx: LaunchContext, x: Array, rows: Array, out: Array) -> list[Launch]:
    count, columns = out.shape
    arguments = named(tokens=ctx.tokens, x=x, rows=rows, out=out, columns=columns)
    return [Launch(ROWS, (blocks_for(columns), count), THREADS, arguments)]


@kernel(
    "argmax",
    "cuda",
    "f32",
    values=lambda x, workers: (x[0], ARGMAX_BLOCKS),
    places=lambda x, workers: (x[0], ARGMAX_BLOCKS),
)
def argmax(ctx: LaunchContext, x: Array, out: Array, values: Array, places: Array) -> list[Launch]:
    tokens, columns = x.shape
    arguments = named(
        tokens=ctx.tokens, x=x, out=out, columns=columns, values=values, places=places, counter=ctx.zeros(tokens)
    )
    return [Launch(ARGMAX, (min(ARGMAX_BLOCKS, ceil_div(columns, THREADS)), tokens), THREADS, arguments)]
