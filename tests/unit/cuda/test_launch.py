"""Launches of all operators, bound without a GPU: their arguments have the names of their kernels' parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.helpers.cuda_host import missing_packages

if reason := missing_packages():
    pytest.skip(f"kernels cannot be compiled: {reason}", allow_module_level=True)

from numballama.cuda import compiler
from numballama.cuda.kernels.copy import copy
from numballama.cuda.launch import Array, Launch, LaunchContext, Matrix, named
from numballama.cuda.ops import attention, elementwise, sampling
from numballama.cuda.program import bind_step
from numballama.cuda.sampler_table import FIELDS
from numballama.cuda.weights import layout_of
from numballama.fusion import fuse
from numballama.graph import KVLayout
from numballama.plan import lower
from tests.cuda.assembly import CASES
from tests.helpers.cuda_host import converted, graph_of
from tests.helpers.random_models import random_checkpoint

ADDRESSES = itertools.count(1 << 20, 1 << 20)


def array(*shape: int, dtype: str = "f32") -> Array:
    return Array(next(ADDRESSES), shape, dtype)


CTX = LaunchContext(132, 227 << 10, array(1, dtype="i32"), array(65, 2, dtype="i32"), lambda n: array(n, dtype="i32"))


def launches_of_plans(ctx: LaunchContext) -> Iterator[Launch]:
    """Every launch of the models of `assembly`, for one token, a few, and many."""
    for config, kind, kv, fusions, int8 in CASES:
        weights = converted(random_checkpoint(config).weights, kind)
        layout = KVLayout.of(config, config.context, kv)
        for tokens, logits in ((1, "rows"), (4, "rows"), (64, "all")):
            graph = graph_of(config, weights, layout, tokens, logits, int8)
            plan = lower(fuse(graph, "cuda", fusions), "cuda", CTX.n_sms)
            operands: dict[str, Array | Matrix] = {
                name: layout_of(weight).operand(next(ADDRESSES)) for name, weight in weights.items()
            }
            for value in (*plan.graph.values.values(), *(value for step in plan.steps for value in step.scratch)):
                operands.setdefault(value.name, array(*value.shape, dtype=value.dtype))
            for step in plan.steps:
                for launch in bind_step(step, plan.graph, ctx, operands):
                    yield from (launch.variant_for(start) for start in (0, *launch.variant_starts))


def other_launches() -> Iterator[Launch]:
    """Launches that are not part of a plan's steps."""
    token, floats = array(1, dtype="i32"), array(1)
    table = {name: array(64, dtype=dtype) for name, (_, dtype) in FIELDS.items()} | {"last_token": token}
    out = {"next_token": token, "logprobs": floats, "normalizers": floats, "top_ids": token, "top_logprobs": floats}
    yield from sampling.sample(token, array(1, 40), token, table, out, logprobs=True)
    yield from sampling.advance(
        n_rows=token, next_token=token, slots=token, last_token=token, ids=token, positions=token, continues=1,
        count=array(1, dtype="i64"), words=4096, n_runs=64, max_rows=1,
    )  # fmt: skip
    yield from sampling.feed(tokens=token, ids=token, sequences=token, last_token=token)
    yield from copy(array(4096), array(4096))


def test_arguments_have_the_names_of_the_kernels_parameters() -> None:
    planned = (*launches_of_plans(CTX), *launches_of_plans(replace(CTX, wgmma=True)))
    kernels = {launch.specialization for launch in (*planned, *other_launches())}
    assert "attention_wgmma_256_kernel" in {kernel.name for kernel in kernels}
    for kernel in kernels:
        compiler.check_parameters(kernel)
    assert len({kernel.name for kernel in kernels}) > 25


@pytest.mark.parametrize(("head_dim", "width"), [(8, 64), (64, 64), (80, 96), (128, 128), (136, 256), (256, 256)])
@pytest.mark.parametrize("window", [0, 100])
def test_attention_of_prompts_by_wgmma(head_dim: int, width: int, window: int) -> None:
    """Heads of up to 256, with windows too, fit in a multiprocessor, of which each has a block where tiles are few."""
    ctx = replace(CTX, wgmma=True, tiles=array(2049, 2, dtype="i32"))
    cache, rows = array(9, 4, 32, head_dim, dtype="f16"), array(2048, dtype="i32")
    for tokens, blocks in ((64, (8, 17)), (2048, (8, 17)), (2304, (8, 18))):
        q, table = array(tokens, 8 * head_dim), array(1, 128, dtype="i32")
        first, *others = attention.attention(ctx, q, cache, rows, rows, table, cache, q, window, array(1, 8, 1, 2))
        assert (first.name, first.grid, first.only_for) == (f"attention_wgmma_{width}_kernel", blocks, "chunks")
        assert first.shared_bytes <= CTX.shared_limit
        assert {launch.only_for for launch in others} <= {"single rows", None}
    older, *_ = attention.attention(CTX, q, cache, rows, rows, table, cache, q, 0, array(1, 8, 1, 2))
    assert "wgmma" not in older.name


def test_types_of_arguments() -> None:
    launch = Launch(elementwise.ADD, (1,), 32, named(a=array(1, dtype="f16"), n=3, eps=1e-5))
    assert launch.specialization.parameters == (("a", "f16*"), ("n", "i64"), ("eps", "f32"))
    assert str(launch.specialization) == "add_kernel(a: f16*, n: i64, eps: f32)"


def test_the_variant_for_a_position() -> None:
    long = Launch(elementwise.ADD, (2,), 32, {})
    launch = Launch(elementwise.ADD, (1,), 32, {}, long_context_variant=(256, long))
    assert launch.variant_for(255) is launch and launch.variant_for(256) is launch.variant_for(9000) is long
    assert long.variant_for(9000) is long
    assert launch.variant_starts == [256] and long.variant_starts == []
    longer = replace(launch, long_context_variant=(100, launch))
    assert [longer.variant_for(position) for position in (99, 100, 256)] == [longer, launch, long]
    assert longer.variant_starts == [100, 256]


def test_a_weights_arguments() -> None:
    payload, scales = array(4, 64, dtype="int8"), array(4, 2)
    weight = Matrix((4, 64), payload, 64, scales, 2, 5)
    assert weight.arguments("table") == {
        "table": payload, "stride": 64, "scales": scales, "scale_stride": 2, "shift": 5,
    }  # fmt: skip
