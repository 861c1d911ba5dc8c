"""Which launches of programs are joined (`ops.joins`), on a device of sm_90 that does not exist; nothing is compiled.

    python -m tests.cuda.joined_steps     # JSON: name of the case → kernels of each step

It runs in a process of its own, as `install` changes the backend for good.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numballama.config import ModelConfig
from numballama.cuda.compiler import Cubin
from numballama.cuda.launch import Launch, Specialization
from numballama.graph import KVLayout
from numballama.ir import Graph
from tests.helpers.cuda_host import HostDevice, converted, graph_of, install
from tests.helpers.random_models import random_checkpoint

CONFIG = ModelConfig(128, 128, 2, 2, 2, 40, 320, head_dim=64)
LARGE_HEADS = ModelConfig(256, 128, 2, 2, 2, 40, 320, head_dim=128)
CASES = {
    "f16": (CONFIG, "f16", "f16", 64), "bf16": (CONFIG, "bf16", "f16", 64),
    "f16, cache bf16": (CONFIG, "f16", "bf16", 64), "f16, prompt": (CONFIG, "f16", "f16", 264),
    "f16, prompt, heads of 128": (LARGE_HEADS, "f16", "f16", 264),
    "f16, read twice": (CONFIG, "f16", "f16", 64),
}  # fmt: skip
"""Name → configuration, types of weights and cache, tokens."""


def compile_nothing(kernel: Specialization, capability: tuple[int, int], cache: Path | None) -> Any:
    """In the place of `compile_kernel`."""
    return Cubin(b"", "", 0, 0, 0)


def read_twice(graph: Graph) -> Graph:
    """The graph with what attention computes among its outputs."""
    graph.outputs.append(next(op.outputs[0] for op in graph.ops if op.kind == "attention_values"))
    return graph


def main() -> None:
    HostDevice.shared_limit = 227 << 10
    install(compile_kernel=compile_nothing, capability=(9, 0))
    from numballama.cuda.backend import CudaBackend

    found = {}
    for name, (config, kind, kv, tokens) in CASES.items():
        weights = converted(random_checkpoint(config).weights, kind)
        backend = CudaBackend(weights)
        graph = graph_of(config, weights, KVLayout.of(config, config.context, kv), tokens)
        program = backend.program(read_twice(graph) if "twice" in name else graph)
        found[name] = [
            [f"{work.name} {'' if 'out' not in work.arguments else work.arguments['out'].dtype}".strip()  # type: ignore[union-attr]
             for work in step if isinstance(work, Launch)]
            for step in program.launches
        ]  # fmt: skip
        backend.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
