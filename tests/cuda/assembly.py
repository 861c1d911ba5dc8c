"""Compile every kernel that plans of representative models launch, for one compute capability; no GPU is used.

    python -m tests.cuda.assembly 9.0 out.json

A process compiles for one capability, so test_assembly.py starts this three times. The result is a list of kernels
with the assembler's report and the opcodes of their PTX. Unless there is an argument `all`, kernels of `EVERY_TYPE`
are compiled in all types for sm_90, others in one set of types; before sm_90 those of `FAMILIES`, in one set of types.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import mmap
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from numballama.config import ModelConfig
from numballama.cuda.compiler import Cubin
from numballama.cuda.kernels.params import WGMMA_ATTENTION_KEYS
from numballama.cuda.kernels.wgmma_gemm import wgmma_128_kernel
from numballama.cuda.launch import Specialization
from numballama.cuda.ops import wgmma_gemm
from numballama.graph import KVLayout
from numballama.parallel.shard import shard
from numballama.parallel.shares import Shares
from numballama.parallel.weights import rank_weights
from tests.cuda.kept_ptx import compiled
from tests.cuda.older_cards import OLDER
from tests.helpers.cuda_host import HostDevice, converted, graph_of, install
from tests.helpers.random_models import random_checkpoint

GROUPED = ModelConfig(64, 96, 1, 8, 2, 40, 300)
SINGLE = ModelConfig(64, 96, 1, 8, 8, 40, 300)
"""Contexts long enough for attention's long-context variant."""
ODD = ModelConfig(24, 10, 1, 4, 2, 11, 7)
"""Heads of six elements, which are not read 16 bytes at a time."""
BLOCKS = ModelConfig(256, 256, 1, 8, 2, 40, 16)
"""Rows are whole blocks of 256."""
BIASED = ModelConfig(64, 96, 1, 8, 2, 40, 16, qkv_bias=True)
"""With biases, q, k and v are computed in one step and rotated in another."""

BIASED_BLOCKS = ModelConfig(256, 256, 1, 8, 2, 40, 16, qkv_bias=True)
NORMED = ModelConfig(64, 96, 1, 8, 2, 40, 16, qk_norm=True)
WIDE = ModelConfig(64, 96, 1, 2, 1, 40, 16, head_dim=128)
EIGHT_64, EIGHT_128 = (ModelConfig(64, 96, 1, 8, 1, 40, 16, head_dim=size) for size in (64, 128))
WGMMA_96, WGMMA_256 = (ModelConfig(64, 96, 1, 2, 1, 40, 16, head_dim=size) for size in (96, 256))
TWO_64 = ModelConfig(64, 96, 1, 2, 1, 40, 16, head_dim=64)
"""Eight and two heads that share keys, for `group_attention`."""
HEADS_64, HEADS_128 = (ModelConfig(256, 256, 1, 256 // size, 1, 40, 16, head_dim=size) for size in (64, 128))
"""Whole heads in the tiles of `wgmma_gemm`, which rotates them and writes keys and values."""
ALONE_64, ALONE_128 = (ModelConfig(64, 96, 1, 2, 2, 40, 16, head_dim=size) for size in (64, 128))
"""Heads that share no keys, for `bulk_attention`."""

CASES: list[tuple[ModelConfig, str, str, Any, bool]] = [
    # shape, weights, KV cache, fusions, int8 activations
    *((GROUPED, kind, "f16", True, False) for kind in ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1")),
    *((BIASED, kind, "f16", True, False) for kind in ("f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1")),
    *((config, kind, "f16", True, False) for config in (BLOCKS, BIASED_BLOCKS) for kind in ("q4_k", "q5_k", "q6_k")),
    *((BLOCKS, mixture, "f16", True, False) for mixture in ("q4_k_m", "all")),
    (SINGLE, "f32", "f32", True, False),
    (SINGLE, "bf16", "bf16", True, False),
    (SINGLE, "f16", "f16", True, False),
    *((ODD, "f32", kv, ["attention"], False) for kv in ("f32", "f16", "bf16")),
    *((GROUPED, "f32", kv, ["attention", "rope_kv"], False) for kv in ("f32", "bf16")),
    *((GROUPED, "f32", kv, False, False) for kv in ("f32", "f16", "bf16")),
    (GROUPED, "int8", "f16", True, True),
    *((config, "f16", "q8_0", fusions, False) for config in (GROUPED, SINGLE) for fusions in (True, False)),
    (ODD, "f32", "q8_0", ["attention"], False),
    (NORMED, "f32", "f16", True, False),
    *((WIDE, "f32", kv, ["attention"], False) for kv in ("f16", "bf16")),
    *((config, "f32", "f16", ["attention"], False) for config in (EIGHT_64, EIGHT_128, TWO_64, WGMMA_96, WGMMA_256,
                                                             ALONE_64, ALONE_128)),
    *((config, kind, "f16", True, False) for config in (HEADS_64, HEADS_128) for kind in ("bf16", "q4_k", "q8_0")),
]  # fmt: skip
"""Every type of weights, each with one KV cache; every type of cache with each kernel that reads or writes it."""


ASSEMBLED = OLDER | {"7.5": ("bf16", "q4_k", "f16", "f32")}
"""Types of weights whose cases launch a kernel of each file, before sm_90."""


def cases_for(arguments: Sequence[str]) -> list[tuple[ModelConfig, str, str, Any, bool]]:
    """Cases of a command line: all for sm_90; before, fewer types, in the order of `ASSEMBLED`."""
    kinds = list(ASSEMBLED.get(arguments[0], ())) if "all" not in arguments else []
    if not kinds:
        return CASES
    cases = [case for case in CASES if case[1] in kinds or case[4]]
    return sorted(cases, key=lambda case: kinds.index(case[1]) if case[1] in kinds else len(kinds))


FAMILIES = {
    "linear_kernel", "qkv_rope_kernel", "skinny_8_kernel", "skinny_64_kernel", "skinny_round_kernel",
    "skinny_sum_kernel", "gemm_kernel", "attention_128_kernel", "attention_grouped_kernel",
    "attention_grouped_rows_kernel", "attention_group_128_kernel", "kv_write_q8_0_kernel", "sample_kernel",
    "rmsnorm_kernel", "repack_kernel", "round_kernel", "all_reduce_words_kernel", "all_reduce_flags_kernel",
    "all_gather_kernel", "send_tokens_kernel", "receive_tokens_kernel",
}  # fmt: skip
"""Kernels of each file, those with the most registers. The others have the same helpers, which these show to assemble
for every type and card.
"""

EVERY_TYPE = FAMILIES - {"skinny_64_kernel", "qkv_rope_kernel"}
"""Kernels that are compiled for sm_90 in every type that they are launched for; these decode as `skinny_8_kernel` and
`linear_kernel` do."""
TMA = {f"wgmma_{each}_kernel" for each in (128, 192, 224, 256, "tall")}
"""Kernels with wgmma to which the copy engine brings tiles."""
WIDE = {f"wide_{width}_{name}kernel" for width in (64, 128) for name in ("", "send_")}
"""The same for few tokens."""
ALSO_BLOCKS = TMA | WIDE | {"qkv_rope_kernel"}
"""Kernels that are compiled for their first type and for one whose blocks they decode."""
ATTENTION = {f"attention_wgmma_{width}_kernel" for width in WGMMA_ATTENTION_KEYS}
OF_Q5_K = {"linear_kernel", "skinny_8_kernel", "repack_kernel"}
"""Those of them that are compiled for q5_k: it is decoded as q4_k, with a bit more."""
BULK = {"attention_bulk_64_kernel", "attention_bulk_128_kernel"}
"""Kernels to which the copy engine brings plain bytes, which are for sm_90 and newer."""
HOPPER = WIDE | TMA | ATTENTION
"""Kernels with wgmma, which are for sm_90 only."""
BEFORE_WIDE = {"wide_round_kernel", "add_up_pieces_kernel", "add_up_rows_kernel", "wide_round_sums_kernel"}
"""Those that only kernels with wgmma need."""
OUT_K = list(inspect.signature(wgmma_128_kernel.py_func).parameters).index("out_k")
"""Where those of `TMA` are told their second result: the cache of keys, if they finish heads."""
CHOICES = ((("tall_wins", True),), *((("width_for", width),) for width in wgmma_gemm.KERNELS))
"""What `wgmma_gemm` chooses for larger models than those here."""
OPCODE = re.compile(r"^\s*(?:@!?%?\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)(?=[\s;])", re.MULTILINE)


def decodes(types: Sequence[str]) -> bool:
    """Whether a kernel with arguments of these types decodes weights."""
    return bool({"q4_k*", "q8_0*"} & set(types))


def opcodes(ptx: str) -> list[str]:
    """The instructions that a PTX text uses."""
    text = ptx.replace(";", ";\n").replace("{", "{\n")  # inline PTX stands in one line
    return sorted(set(OPCODE.findall(text)))


def assemble_ranks() -> set[str]:
    """Bind programs of two ranks: few numbers as words and with flags, linear steps that add up themselves, and NCCL.
    Returns the kinds of their ops.
    """
    from numballama.cuda.backend import CudaBackend
    from numballama.cuda.ops import collectives
    from numballama.cuda.peers import PeerMemory

    config = ModelConfig(64, 96, 1, 4, 2, 50, 16)
    weights = converted(random_checkpoint(config).weights, "f16")
    types = {name: weight.type for name, weight in weights.items()}
    shares, ops = Shares.of(config, types, 2), set[str]()
    of_ranks = [rank_weights(weights, shares, rank) for rank in range(2)]
    backends = [CudaBackend(own) for own in of_ranks]
    memory = [PeerMemory(backend.device, rank, 2, 64) for rank, backend in enumerate(backends)]
    handles, page = [each.handle for each in memory], np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)
    for rank, backend in enumerate(backends):
        backend.join(memory[rank].connect(handles, shares.vocab, page, 0))
        exchange = collectives.WORKERS, collectives.exchange_size(2, 64)
        own = {name: weight.type for name, weight in of_ranks[rank].items()}
        words = collectives.WORDS_UP_TO
        for tokens, most, fusions in (
            (1, words, False), (1, 0, False), (12, words, True), (24, words, True), (104, words, True),
            (264, words, True), (1, words, True),
        ):  # fmt: skip
            with mock.patch.object(collectives, "WORDS_UP_TO", most):
                graph = graph_of(config, weights, KVLayout.of(config, config.context), tokens)
                program = backend.program(shard(graph, own, shares, rank, *exchange).graph, fusions)
                ops |= {step.op.kind for step in program.plan.steps}
        backend.prepare(program)
        assert backend.peers is not None
        link: Any = object()  # NCCL, which is not called
        backend.join(replace(backend.peers, communicator=link))
        graph = graph_of(config, weights, KVLayout.of(config, config.context), 3, "all")
        backend.program(shard(graph, own, shares, rank, *exchange).graph)
        backend.close()
        memory[rank].free()
    return ops


def main(arguments: Sequence[str]) -> None:
    major, _, minor = arguments[0].partition(".")
    capability, out = (int(major), int(minor)), Path(arguments[1])
    from numballama.cuda import backend as cuda

    found: dict[Specialization, dict[str, Any]] = {}
    older, names, with_heads = arguments[0] in OLDER, set[str](), set[tuple[str, bool]]()

    def is_wanted(name: str, types: Sequence[str]) -> bool:
        if "all" in arguments:
            return True
        if name in TMA and types[OUT_K] != "f32*" and (name, decodes(types)) not in with_heads:
            with_heads.add((name, decodes(types)))
            return True
        if "q5_k*" in types and name not in OF_Q5_K:
            return False
        if older:
            return name in FAMILIES and name not in names
        return name in EVERY_TYPE or name not in names or (name in ALSO_BLOCKS and "q4_k*" in types)

    def compile_kernel(kernel: Specialization, of_device: tuple[int, int], cache: Path | None) -> Any:
        if kernel not in found and not is_wanted(kernel.name, kernel.types):
            return Cubin(b"", "", 0, 0, 0)
        names.add(kernel.name)
        code, ptx = compiled(kernel, capability)
        if kernel not in found:
            found[kernel] = {
                "kernel": kernel.name, "kinds": list(kernel.types), "threads": kernel.threads,
                "registers": code.registers, "stack": code.stack_bytes, "local": code.local_bytes,
                "cached": code.cached, "blocks": getattr(kernel.function.py_func, "min_blocks_per_sm", 1),
                "bytes": len(code.machine), "opcodes": opcodes(ptx),
            }  # fmt: skip
        return code

    HostDevice.shared_limit = 227 << 10  # as of sm_90: with less, tiles of some sizes are not used
    install(compile_kernel=compile_kernel, capability=capability)
    ops = set()
    for config, kind, kv, fusions, int8 in cases_for(arguments):
        weights = converted(random_checkpoint(config).weights, kind)
        layout = KVLayout.of(config, config.context, kv)
        backend = cuda.CudaBackend(weights)
        for tokens, logits in (
            (1, "rows"),
            (4, "rows"),
            (12, "rows"),
            (24, "rows"),
            (64, "all"),
            (104, "all"),
            (136, "all"),
        ):
            program = backend.program(graph_of(config, weights, layout, tokens, logits, int8), fusions)
            ops |= {step.op.kind for step in program.plan.steps}
            if tokens == 1:
                decode = program
        if capability == (9, 0):
            for choices in ((), *CHOICES):
                with contextlib.ExitStack() as stack:
                    for name, value in choices:
                        stack.enter_context(mock.patch.object(wgmma_gemm, name, return_value=value))
                    backend.program(graph_of(config, weights, layout, 264, "all", int8), fusions)
            for tokens in (24, 64, 136):
                with mock.patch.object(HostDevice, "capability", (10, 0)):  # newer cards have no wgmma
                    backend.program(graph_of(config, weights, layout, tokens, "all", int8), fusions)
        backend.prepare(decode)
        backend.prepare_launches([decode.pipeline.tail("logprobs")])
        backend.close()
    ops |= assemble_ranks()
    out.write_text(json.dumps({"kernels": list(found.values()), "ops": sorted(ops)}))


if __name__ == "__main__":
    main(sys.argv[1:])
