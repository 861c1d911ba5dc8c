"""Helpers of the tests on a GPU: shapes of models, random models, and ways to run them."""

# ruff: noqa: E402
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.helpers.cuda_host import require_gpu
from tests.helpers.random_models import configs

require_gpu()

import numballama
from numballama.config import HALF_SPLIT, INTERLEAVED, ModelConfig
from numballama.graph import PAGE_TABLE
from numballama.model import Model
from numballama.sampling import SamplerTable
from tests.cuda.checks import Pair
from tests.helpers.bounds import TOKENIZERS
from tests.helpers.paging import in_cache

SLACK = 8 << 20
"""Bytes of device memory that the driver may keep for itself: it allocates code and bookkeeping 2 MB at a time."""
SHAPE = ModelConfig(64, 96, 2, 4, 2, 300, 64)
"""Shape of the model in the fixture `model`."""
ROUNDED = 2.0**-5
"""Maximum error of a whole model's logits with 16-bit operands on tensor cores, as a fraction of the largest logit."""


KINDS = ("f32", "f16", "bf16", "int8", "int8 activations")


def pair_of(drawn: dict[str, Any], **options: Any) -> Pair:
    config = ModelConfig(**{**vars(drawn["config"]), "rope_pairing": drawn["pairing"]})
    int8 = drawn["kind"] == "int8 activations"
    kind = "int8" if int8 else drawn["kind"]
    return Pair(config, kind, drawn["kv"], drawn["seed"], drawn["group"], int8_activations=int8, **options)


MODELS = st.fixed_dictionaries({
    "config": configs(biases=True),
    "pairing": st.sampled_from([INTERLEAVED, HALF_SPLIT]),
    "kind": st.sampled_from(KINDS),
    "group": st.sampled_from([1, 3, 16, 32, 64]),
    "kv": st.sampled_from(["f32", "f16", "bf16", "q8_0"]),
    "seed": st.integers(0, 1000),
})  # fmt: skip


WIDE = ModelConfig(256, 640, 2, 8, 2, 777, 600, rope_pairing=HALF_SPLIT)
"""Rows of several chunks, which warps share; heads of 32 elements; blocks of all sizes fit."""
WHOLE_BLOCKS = ModelConfig(1280, 768, 1, 20, 4, 300, 600, rope_pairing=HALF_SPLIT)
"""Rows are whole blocks of 256; of the last two chunks of a row, part of one or none."""


LOGITS = np.random.default_rng(3).permutation(np.linspace(-6, 3, 50)).astype(np.float32)
"""Fifty logits, each in a separate bin of the histogram."""


def fill_cache(pair: Pair, program: Any) -> None:
    """Random keys and values at every position."""
    rng = np.random.default_rng(7)
    for state in set(pair.cuda.states) - {PAGE_TABLE}:
        numbers = rng.standard_normal(pair.kv.shape, dtype=np.float32)
        program.write(state, in_cache(numbers, pair.kv.dtype))


def greedy(model: Model, count: int = 200) -> list[int]:
    return [piece.token for piece in model.stream(None, max_tokens=count, temperature=0)]


def compiled_story(models: Path, name: str, **options: Any) -> Model:
    return numballama.compile(models / f"{name}.bin", models / TOKENIZERS[name], device="cuda", **options)


def told(model: Model, sampler: SamplerTable, count: int, prompt: Sequence[int] = (1, 5, 9)) -> list[int]:
    """Tokens that are generated after a prompt, from an empty cache."""
    with model.exclusive() as session:
        tokens: list[Any] = [session.prefill(list(prompt), sampler)]
        while len(tokens) < count:
            tokens.append(session.step(tokens[-1], sampler))
    return tokens
