"""Sizes that kernels are compiled with and that their launches depend on. Both sides import them from here.

No Numba here: launch functions (`cuda/ops`) import this at every start. A kernel file imports the names of its family
without the prefix.
"""

from __future__ import annotations

# Plain operators (`kernels_cuda`)

ELEMENTWISE_THREADS = 256
"""Threads per block."""

PROMPT_CHUNK = 512
"""The most tokens of a run: a prompt is computed in chunks of these."""

# Linear layers for a few tokens (`gemv`, `dot`)

GEMV_WARPS = 8
GEMV_THREADS = 32 * GEMV_WARPS
CHUNK_BYTES, SCALE_BYTES = 512, 128
"""A chunk of a row is 16 bytes of payload per lane, its scales 4 bytes per lane. A stage has two chunks of a row."""
SCALES_AT = 2 * CHUNK_BYTES
"""Byte offset of a row's scales in a pipeline stage. Payload is 16 bytes per lane and scales 4, hence the correction of
12 bytes per lane where they are addressed.
"""
Q6_K_HIGH_AT, Q6_K_SCALES_AT, Q6_K_FACTORS_AT = CHUNK_BYTES, CHUNK_BYTES + 256, CHUNK_BYTES + 256 + SCALE_BYTES
"""Byte offsets in a q6_k row of a stage: the quants' upper two bits, the scales, the blocks' float16 factors."""
X_LANE_STRIDE = 132
"""Distance in float32 between two rows of a chunk of x in shared memory. It is not a multiple of 32, so writes of x
have no bank conflicts (see `dot`).
"""
GEMV_STAGES = 4
"""Stages of a warp's ring in shared memory; a power of two."""

# Linear layers for many tokens (`gemm`)

GEMM_TILE, GEMM_K_STEP = 128, 64
"""Tokens and columns of Y that a block computes; columns of X and W per stage."""
GEMM_THREADS = 128
GEMM_TILE_BYTES = GEMM_TILE * GEMM_K_STEP * 2
GEMM_F32_THREADS, GEMM_F32_K_STEP, GEMM_F32_X_STRIDE, GEMM_F32_W_STRIDE = 256, 16, 64 + 4, 128 + 4
"""float32: a block computes 64 tokens × 128 columns, a thread 8 × 4. 16 columns of X and W at a time are in shared
memory, transposed so that elements of one column are neighbours; the strides count float32.
"""
GEMM_STAGED_BYTES = 544
"""Distance in bytes of two rows of 128 float32 results in shared memory. Rows that one group of lanes writes are in
different banks.
"""

# Linear layers for 2 to 128 tokens (`skinny`)

SKINNY_WARPS = 8
SKINNY_THREADS = 32 * SKINNY_WARPS
SKINNY_ROWS, SKINNY_STEP_BYTES = 32, 32 * 64
"""Rows of W of a warp; bytes of payload that a warp copies per step: 64 of each of its rows."""
SKINNY_UNITS = 8
"""Most units of 8 tokens of a block."""
SKINNY_FUSED_UNITS = 2
"""Up to this number of units each block rounds its part of X itself."""
SKINNY_SLICE_COLUMNS = 1024
"""Most columns of a slice: a lane rounds up to 32 of them."""
SKINNY_UNIT = 256
"""Sums of a unit of 8 tokens, as float32."""
SKINNY_PLANE_BYTES = 4 * SKINNY_ROWS
"""A plane of scales in a stage: a word for each row of a warp."""

# The same by wgmma (`wide`)

WIDE_ROWS, WIDE_WIDTHS = 128, (64, 128)
"""Rows of W of a tile; tokens of a block."""
WIDE_CONSUMERS, WIDE_LOADERS, WIDE_HELPERS = 256, 256, 64
"""Threads of a block that multiply; threads that load weights which must be decoded. A warp loads other weights, and so
many threads fetch the factors."""
WIDE_REGISTERS = 104
"""Registers of a thread at most, for up to 64 tokens: of 65,536, a block of 512 threads leaves 12,288 to small kernels
before and after."""
WIDE_STEP_COLUMNS = 64
"""Columns of W and X that are copied together."""

# Linear layers for many tokens by wgmma (`wgmma_gemm`)

WGMMA_ROWS, WGMMA_STEP_COLUMNS = 128, 64
"""Tokens of a block; columns of X and W that are copied together."""
WGMMA_CONSUMERS, WGMMA_LOADERS, WGMMA_TALL_LOADERS = 256, 256, 128
"""Threads of a block that multiply; threads that load weights which must be decoded, and where a tile has 256 tokens.
Of other weights it is a warp."""
WGMMA_NARROW = 128
"""Rows of a tile of a weight that must be decoded or is float32, or of which two blocks have half of K each."""
WGMMA_HALF_BYTES = 16 + 4 * 64 * WGMMA_NARROW
"""Shared memory for what one of these blocks gets from the other: two mbarriers and a warpgroup's sums."""
WGMMA_STAGES, WGMMA_TALL_STAGES = {128: 6, 192: 5, 224: 5, 256: 4}, 4
"""Rows of W of a block → stages of its ring; stages where a tile has 256 tokens."""


def units_together(units: int) -> int:
    """Units whose sums are in shared memory at a time, of `units`; fewer of the largest, beside which X is largest."""
    return units if units < SKINNY_UNITS else 2


# Attention of single tokens (`decode_attention`)

ATTENTION_THREADS = 256
ATTENTION_WARPS = ATTENTION_THREADS // 32
HEADS_PER_BLOCK = 2
"""Query heads with the same keys that one block computes together in a long context."""
SPLIT_FROM, MIN_SPLIT_KEYS = 256, 128
"""One block computes up to `SPLIT_FROM` keys. A longer context is split over blocks of at least `MIN_SPLIT_KEYS`."""
ATTENTION_STAGES, ATTENTION_STAGE_BYTES = 2, 64 * ATTENTION_THREADS
"""The ring of keys and values: a stage has 16 bytes per lane of two keys and of their values. The kernel waits for all
copies but the last group, so its depth is fixed.
"""
MAX_SPLITS = 32
"""Maximum number of blocks that share a head's context. One lane each combines their results."""
SPLIT_WEIGHTS = MAX_SPLITS + 1
"""float32 per head that combining the splits writes to shared memory."""
ROW_SPLIT_KEYS = 256
"""Keys of a split where a run has many rows. In contexts longer than `MAX_SPLITS` of these it is doubled until the
splits suffice."""
GROUP_HEADS, FEW_HEADS = 8, 4
"""Query heads with the same keys that a block computes on tensor cores (`group_attention`), and where they are few."""
GROUP_THREADS, GROUP_STAGES = 128, 2
"""Threads of a block there; stages of a warp's ring, whose depth is compiled in."""
BULK_WARPS, BULK_RING_BYTES = 14, 16 << 10
"""Warps of a block of `bulk_attention`; bytes of a warp's rings of keys and of values in shared memory."""
BULK_KEYS, BULK_FROM = 32, 9
"""Keys that are copied together there; the least rows of a program for which it is faster than `group_attention`."""
PLAIN_ATTENTION_THREADS = 128

# Attention of many tokens (`prefill_attention`)

PREFILL_ATTENTION_TILE, PREFILL_ATTENTION_THREADS = 64, 128
"""Queries per block, which is also the number of keys per tile; threads per block."""

WGMMA_ATTENTION_TILE, WGMMA_ATTENTION_THREADS = 128, 256
"""The same of `wgmma_attention`: a warpgroup has 64 queries."""
WGMMA_ATTENTION_KEYS = {64: 128, 96: 128, 128: 128, 256: 64}
"""Elements of the widest head of a kernel there → its keys per tile."""

# Exchanges between ranks (`collectives`)

EXCHANGE_THREADS = 512
"""Threads per block."""
WORD_NUMBERS, WORD_BLOCKS = 2 * EXCHANGE_THREADS, 128
"""Numbers that a block exchanges at a time where each travels in a word with the number of the exchange; most blocks.
"""
FLAG_NUMBERS, FLAG_BLOCKS = 8 * EXCHANGE_THREADS, 256
"""The same where plain numbers travel and a flag follows them."""
WORDS_UP_TO = 65536
"""Most numbers of a program's exchange for which words are faster than flags."""
WORD_SLOT, FLAG_SLOT = 8 * WORD_BLOCKS * WORD_NUMBERS, 4 * FLAG_BLOCKS * FLAG_NUMBERS
"""Bytes of what one rank sends to another at most before it hears from that one, as words and with flags."""
TOKEN_ROWS = 1024
"""Most rows whose tokens rank 0 sends to the others."""

# Sampling (`sampling`)

SAMPLING_THREADS = 1024
RECORD_BYTES = 512
"""Bytes of a slot's record in device memory: the fields of a `SamplerTable`'s row, one after the other."""
ROW_COUNTS, ROW_BIAS, ROW_MASK, ROW_LOGITS = range(4)
"""Addresses in a record of what only some slots need, 0 without: int32 output counts [vocab]; biases and stop tokens,
(id, float32) each; mask words; float32 [vocab] for a copy of the model's logits.
"""
