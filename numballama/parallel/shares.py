"""`Shares`: which heads, which part of the feed-forward network and of the vocabulary each rank has.

Tensor parallelism as in Megatron-LM (Shoeybi et al., 2019): a rank has some rows of the projections that read the
residual stream (q, k, v, gate, up, the classifier), and of o and down the columns that these rows feed. Its result of o
or down is a part of a sum over all ranks. Everything else is whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from ..config import ModelConfig
from ..errors import UnsupportedError
from ..memory import ceil_div
from ..quantization.types import WeightType
from ..validation import whole_number

Dimension = Literal["heads", "kv", "hidden", "vocab"]
"""What is split: query heads, KV heads, the feed-forward network's hidden width, and the vocabulary."""

ROWS: dict[str, Dimension] = {
    "wq": "heads", "wk": "kv", "wv": "kv", "bq": "heads", "bk": "kv", "bv": "kv",
    "w1": "hidden", "w3": "hidden", "b1": "hidden", "b3": "hidden", "output": "vocab",
}  # fmt: skip
"""Weights of which a rank has some rows → the dimension along them. Of a bias these are its elements."""
COLUMNS: dict[str, Dimension] = {"wo": "heads", "w2": "hidden"}
"""Weights of which a rank has some columns."""
WHOLE = frozenset({"tok_embeddings", "attn_norm", "ffn_norm", "norm", "q_norm", "k_norm", "bo", "b2"})
"""Weights that every rank has. bo and b2 are added once, by rank 0."""

VECTOR = 32
"""Borders are multiples of this where shares stay nearly even, so that rows are whole vectors."""
NEARLY_EVEN = 8
"""Units that a rank has at least where they are optional: then the largest share is at most 1/8 above the least."""


EXCHANGED_TOKENS = 8
"""Tokens whose sums ranks exchange at once; a prompt's chunk takes several exchanges."""


class Part(NamedTuple):
    """Elements [begin, end) along an axis of a weight. Axis None: all of it."""

    axis: int | None
    begin: int = 0
    end: int = 0


def _spread(size: int, unit: int, ranks: int) -> tuple[range, ...]:
    """`size` elements over the ranks: as even as whole units allow, the last unit may be short."""
    units = ceil_div(size, unit)
    borders = [min(ceil_div(units * rank, ranks) * unit, size) for rank in range(ranks + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(borders))


def _spread_in_vectors(size: int, unit: int, wanted: int, ranks: int) -> tuple[range, ...]:
    """Like `_spread` in units of lcm(unit, wanted), or of `unit` where these would make shares uneven."""
    coarse = math.lcm(unit, wanted)
    fine = size % (coarse * ranks) == 0 or ceil_div(size, coarse) >= NEARLY_EVEN * ranks
    return _spread(size, coarse if fine else unit, ranks)


@dataclass(frozen=True)
class Shares:
    """A model that `ranks` ranks share. `of` makes it.

    `heads`, `kv`, `hidden` and `vocab` have a range for each rank. KV heads overlap where there are fewer than ranks:
    then several ranks hold the same one.
    """

    config: ModelConfig
    ranks: int
    heads: tuple[range, ...]
    kv: tuple[range, ...]
    hidden: tuple[range, ...]
    vocab: tuple[range, ...]

    @classmethod
    def of(
        cls, config: ModelConfig, types: Mapping[str, WeightType], ranks: int, int8_activations: bool = False
    ) -> Shares:
        """The shares of a model with weights of these types.

        Borders in the columns of wo and w2 are those of their blocks. So are those of int8 groups if activations are
        quantised in these groups; otherwise only where that keeps shares even. Raises `UnsupportedError`, with the
        reason, where the ranks cannot share the model.
        """
        ranks = whole_number("ranks", ranks, 1)
        if unknown := sorted({_kind(name) for name in types} - {*ROWS, *COLUMNS, *WHOLE}):
            raise UnsupportedError(
                f"a model with weights {', '.join(unknown)} cannot be shared by {ranks} ranks: nothing says how these "
                "are split"
            )
        heads, kv = _heads(config, types, ranks, int8_activations)
        hidden = _hidden(config, types, ranks, int8_activations)
        if config.vocab_size < ranks:
            raise UnsupportedError(f"{ranks} ranks cannot share a vocabulary of {config.vocab_size} tokens")
        return cls(config, ranks, heads, kv, hidden, _spread_in_vectors(config.vocab_size, 1, VECTOR, ranks))

    def part(self, name: str, rank: int) -> Part:
        """What a rank has of a weight. Of a tied classifier, which is "output" here, it has rows of the embedding."""
        if (dimension := dimension_of(name)) is None:
            return Part(None)
        share = self.elements(dimension, rank)
        return Part(0 if _kind(name) in ROWS else 1, share.start, share.stop)

    def elements(self, dimension: Dimension, rank: int) -> range:
        """A rank's elements along a dimension; heads are head_dim elements each."""
        share: range = getattr(self, dimension)[rank]
        size = self.config.head_dim if dimension in ("heads", "kv") else 1
        return range(share.start * size, share.stop * size)

    @cached_property
    def exchange_size(self) -> int:
        """Numbers that all ranks exchange at once: a layer's sum of some tokens, or one token's logits at least."""
        return max(EXCHANGED_TOKENS * self.ranks * self.config.dim, self.config.vocab_size)


def _kind(name: str) -> str:
    """The name of a weight without its layer."""
    return name.rpartition(".")[2]


def dimension_of(weight: str) -> Dimension | None:
    """The dimension along which a weight is split. None if every rank has all of it."""
    return ROWS.get(_kind(weight)) or COLUMNS.get(_kind(weight))


def _columns(config: ModelConfig, types: Mapping[str, WeightType], kind: str) -> tuple[list[WeightType], int]:
    """The types of a weight in all layers, and its number of columns."""
    return [found for name, found in types.items() if _kind(name) == kind], config.layer_shapes()[kind][1]


def _block(types: Iterable[WeightType], int8_activations: bool) -> int:
    """Elements between the borders at which columns of all these types may be cut."""
    sizes = (t.group if t.group and int8_activations else t.traits.block_size for t in types)
    return math.lcm(*sizes)


def _heads(
    config: ModelConfig, types: Mapping[str, WeightType], ranks: int, int8_activations: bool
) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """Each rank's query heads and KV heads."""
    heads, kv_heads = config.n_heads, config.n_kv_heads

    def fits(ranks: int) -> bool:
        return kv_heads % ranks == 0 or (ranks % kv_heads == 0 and heads % ranks == 0)

    if not fits(ranks):
        possible = ", ".join(str(n) for n in range(1, heads + 1) if fits(n))
        raise UnsupportedError(
            f"{ranks} ranks cannot share {heads} query heads and {kv_heads} KV heads: each rank needs as many KV heads "
            f"as the others, or one KV head and as many of its {heads // kv_heads} query heads as the others; "
            f"possible are {possible}"
        )
    wo, _ = _columns(config, types, "wo")
    block = _block(wo, int8_activations)
    if ranks > kv_heads:  # several ranks hold a KV head
        own = heads // ranks
        if own * config.head_dim % block:
            raise _refuse_columns(config, wo, block, own, ranks)
        queries = tuple(range(rank * own, (rank + 1) * own) for rank in range(ranks))
        return queries, tuple(range(r * kv_heads // ranks, r * kv_heads // ranks + 1) for r in range(ranks))
    group = heads // kv_heads
    unit = block // math.gcd(block, group * config.head_dim)
    if ceil_div(kv_heads, unit) < ranks:
        raise _refuse_columns(config, wo, block, heads // ranks, ranks)
    kv = _spread(kv_heads, unit, ranks)
    return tuple(range(share.start * group, share.stop * group) for share in kv), kv


def _refuse_columns(
    config: ModelConfig, types: Iterable[WeightType], block: int, heads: int, ranks: int
) -> UnsupportedError:
    names = ", ".join(sorted({str(found) for found in types}))
    return UnsupportedError(
        f"{ranks} ranks cannot share wo of {names}: its columns can be cut every {block}, and the heads of a rank "
        f"({heads}) have {heads * config.head_dim} columns; take fewer ranks, or a type of smaller blocks (dtype=, "
        "--dtype)"
    )


def _hidden(
    config: ModelConfig, types: Mapping[str, WeightType], ranks: int, int8_activations: bool
) -> tuple[range, ...]:
    """Each rank's part of the feed-forward network."""
    w2, columns = _columns(config, types, "w2")
    block = _block(w2, int8_activations)
    if ceil_div(columns, block) >= ranks:
        groups = (found.group for found in w2 if found.group and columns % found.group == 0)
        wanted = math.lcm(*groups, VECTOR if columns % VECTOR == 0 else 1)
        return _spread_in_vectors(columns, block, wanted, ranks)
    names = ", ".join(sorted({str(found) for found in w2}))
    raise UnsupportedError(
        f"{ranks} ranks cannot share w2 of {names}: its {columns} columns can be cut every {block}, which is less than "
        "a part for each rank; take fewer ranks, or a type of smaller blocks (dtype=, --dtype)"
    )
