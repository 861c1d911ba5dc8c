"""What each rank has: even where it can be, at borders of blocks, and a reason where a model cannot be shared."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.errors import Error, UnsupportedError
from numballama.parallel.shares import Part, Shares
from numballama.quantization.types import F32, TYPE_TRAITS, WeightType

LLAMA_2_7B = NAMED_SHAPES["Llama-2-7B"]


def types_of(config: ModelConfig, kind: str = "f32", group: int = 0, **others: str) -> dict[str, WeightType]:
    """Types of a model's weights: matrices are `kind`, or what `others` says for a kind of weight; vectors float32."""
    kinds = {name: others.get(name.rpartition(".")[2], kind) for name in config.weight_shapes()}
    return {
        name: WeightType(kinds[name], group if kinds[name] == "int8" else 0) if len(shape) == 2 else F32
        for name, shape in config.weight_shapes().items()
    }


def sizes(shares: tuple[range, ...]) -> list[int]:
    return [len(share) for share in shares]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_well_known_models_are_shared_evenly(ranks: int) -> None:
    for name in ("Llama-2-7B", "Llama-3.2-1B", "TinyLlama-1.1B"):
        config = NAMED_SHAPES[name]
        shares = Shares.of(config, types_of(config, "f16"), ranks)
        assert set(sizes(shares.heads)) == {config.n_heads // ranks}
        assert set(sizes(shares.kv)) == {max(config.n_kv_heads // ranks, 1)}
        assert set(sizes(shares.hidden)) == {config.hidden_dim // ranks}
        assert max(sizes(shares.vocab)) - min(sizes(shares.vocab)) <= 32


def test_super_blocks_split_the_feed_forward_network_unevenly() -> None:
    """11,008 columns are 43 super-blocks."""
    shares = Shares.of(LLAMA_2_7B, types_of(LLAMA_2_7B, "q4_k", w2="q6_k"), 2)
    assert shares.hidden == (range(22 * 256), range(22 * 256, 43 * 256))
    assert shares.heads == (range(16), range(16, 32)), "heads are 128 columns, two to a block"
    assert sizes(Shares.of(LLAMA_2_7B, types_of(LLAMA_2_7B, "q4_0"), 2).hidden) == [5504, 5504]


def test_super_blocks_split_heads_unevenly() -> None:
    """Six heads of 128 are three super-blocks: two ranks have four and two."""
    config = ModelConfig(768, 1024, 1, 6, 6, 100, 8)
    shares = Shares.of(config, types_of(config, "f16", wo="q4_k"), 2)
    assert shares.heads == shares.kv == (range(4), range(4, 6))
    assert sizes(Shares.of(config, types_of(config, "q8_0"), 2).heads) == [3, 3]


def test_kv_heads_that_are_fewer_than_ranks_are_on_several() -> None:
    config = NAMED_SHAPES["TinyLlama-1.1B"]
    shares = Shares.of(config, types_of(config), 8)
    assert shares.kv == tuple(range(head, head + 1) for head in (0, 0, 1, 1, 2, 2, 3, 3))
    assert shares.heads == tuple(range(first, first + 4) for first in range(0, 32, 4))


def test_what_a_rank_has_of_each_weight() -> None:
    config = replace(ModelConfig(64, 96, 2, 8, 4, 50, 8), qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    shares = Shares.of(config, types_of(config), 2)
    parts = {name: shares.part(f"layers.1.{name}", 1) for name in config.layer_shapes()}
    rows = {"wq": (32, 64), "bq": (32, 64), "wk": (16, 32), "wv": (16, 32), "bk": (16, 32), "bv": (16, 32)}
    rows |= dict.fromkeys(("w1", "w3", "b1", "b3"), (48, 96))
    assert {name: (p.begin, p.end) for name, p in parts.items() if p.axis == 0} == rows
    assert {name: (p.begin, p.end) for name, p in parts.items() if p.axis == 1} == {"wo": (32, 64), "w2": (48, 96)}
    whole = {"attn_norm", "ffn_norm", "q_norm", "k_norm", "bo", "b2"}
    assert {name for name, part in parts.items() if part == Part(None)} == whole
    assert shares.part("tok_embeddings", 1) == shares.part("norm", 0) == Part(None)
    assert shares.part("output", 1) == Part(0, 25, 50)


@given(st.data())
def test_shares_cover_everything_once_at_borders_of_blocks(data: st.DataObject) -> None:
    kinds = [name for name, traits in TYPE_TRAITS.items() if not traits.fallback]
    wo, w2 = (data.draw(st.sampled_from(kinds)) for _ in range(2))
    kv_heads, group, head_dim = (
        data.draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3, 4, 6, 8), (1, 2, 4), (64, 96))
    )
    block = [TYPE_TRAITS[name].block_size for name in (wo, w2)]
    config = ModelConfig(
        256, block[1] * data.draw(st.integers(1, 50)), 2, kv_heads * group, kv_heads, data.draw(st.integers(1, 999)), 8,
        head_dim=head_dim,
    )  # fmt: skip
    ranks, int8 = data.draw(st.integers(1, 9)), data.draw(st.booleans())
    types = types_of(config, "q8_0", 32, wo=wo, w2=w2)
    try:
        shares = Shares.of(config, types, ranks, int8)
    except UnsupportedError:
        heads_fit = kv_heads % ranks == 0 or (ranks % kv_heads == 0 and kv_heads * group % ranks == 0)
        too_few = config.hidden_dim // block[1] < ranks or config.vocab_size < ranks
        misaligned = kv_heads // ranks * group * head_dim % 256 or ranks > kv_heads
        int8_groups = int8 and "int8" in (wo, w2)
        assert not heads_fit or too_few or (block[0] > 1 and misaligned) or int8_groups
        return
    for whole, parts in ((config.hidden_dim, shares.hidden), (config.vocab_size, shares.vocab)):
        assert [n for part in parts for n in part] == list(range(whole)) and all(parts)
    assert [n for part in shares.heads for n in part] == list(range(config.n_heads)) and all(shares.heads)
    for rank in range(ranks):
        queries, kv = shares.heads[rank], shares.kv[rank]
        assert {head // group for head in queries} == set(kv), "a rank has the KV heads of its query heads"
        assert len(queries) % len(kv) == 0
        borders = shares.elements("heads", rank), shares.elements("hidden", rank)
        assert all(border.start % size == 0 for border, size in zip(borders, block, strict=True))
    assert max(sizes(shares.hidden)) <= math.ceil(config.hidden_dim / ranks * 1.125 / block[1]) * block[1]


REFUSED: list[tuple[str, dict[str, Any], int]] = [
    (
        "3 ranks cannot share 32 query heads and 4 KV heads: each rank needs as many KV heads as the others, or one KV "
        "head and as many of its 8 query heads as the others; possible are 1, 2, 4, 8, 16, 32",
        {"n_heads": 32, "n_kv_heads": 4},
        3,
    ),
    ("64 ranks cannot share 32 query heads", {"n_heads": 32, "n_kv_heads": 32}, 64),
    ("4 ranks cannot share a vocabulary of 3 tokens", {"vocab_size": 3}, 4),
    ("4 ranks cannot share w2 of f32: its 3 columns", {"hidden_dim": 3}, 4),
]


@pytest.mark.parametrize(("message", "changes", "ranks"), REFUSED)
def test_what_cannot_be_shared_says_why(message: str, changes: dict[str, Any], ranks: int) -> None:
    config = replace(LLAMA_2_7B, **changes)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        Shares.of(config, types_of(config), ranks)


def test_blocks_that_are_wider_than_a_share_are_refused() -> None:
    config = ModelConfig(256, 512, 1, 4, 4, 100, 8)
    with pytest.raises(UnsupportedError, match="4 ranks cannot share w2 of q4_k: its 512 columns can be cut every 256"):
        Shares.of(config, types_of(config, w2="q4_k"), 4)
    message = r"2 ranks cannot share wo of q4_k: .* every 256, and the heads of a rank .2. have 128"
    with pytest.raises(UnsupportedError, match=message):
        Shares.of(config, types_of(config, wo="q4_k"), 2)
    with pytest.raises(UnsupportedError, match=r"wo of q4_k: .* the heads of a rank .1. have 64 columns"):
        Shares.of(replace(config, n_kv_heads=2), types_of(config, wo="q4_k"), 4)


def test_weights_of_an_unknown_kind_are_refused() -> None:
    types = types_of(LLAMA_2_7B) | {"layers.0.experts": F32}
    with pytest.raises(UnsupportedError, match="a model with weights experts cannot be shared by 2 ranks"):
        Shares.of(LLAMA_2_7B, types, 2)


@pytest.mark.parametrize("ranks", [0, -1, 1.5, True])
def test_a_number_of_ranks_that_is_none(ranks: Any) -> None:
    with pytest.raises(Error, match="ranks must be"):
        Shares.of(LLAMA_2_7B, types_of(LLAMA_2_7B), ranks)


def test_int8_groups_stay_whole_where_activations_have_them() -> None:
    """Six heads of 48 with groups of 32: three heads would end inside of a group."""
    config = NAMED_SHAPES["stories15M"]
    types = types_of(config, "int8", 32)
    assert sizes(Shares.of(config, types, 2).heads) == [3, 3]
    assert sizes(Shares.of(config, types, 2, int8_activations=True).heads) == [4, 2]
