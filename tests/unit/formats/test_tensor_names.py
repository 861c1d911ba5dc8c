"""Names of tensors: each format has one for every weight, and no two weights share it."""

from __future__ import annotations

import pytest

from numballama.config import ModelConfig
from numballama.formats.gguf.reader import TENSOR_NAMES as GGUF_NAMES
from numballama.formats.hf.reader import tensor_names
from numballama.formats.meta.reader import TENSOR_NAMES as META_NAMES
from numballama.formats.tensor_names import TensorNames

PLAIN = ModelConfig(16, 24, 2, 2, 1, 40, 16, tied_embeddings=False)
EVERYTHING = ModelConfig(
    16, 24, 2, 2, 1, 40, 16, tied_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
)


@pytest.mark.parametrize(
    ("names", "config"), [(GGUF_NAMES, EVERYTHING), (tensor_names(), EVERYTHING), (META_NAMES, PLAIN)]
)
def test_every_weight_has_a_name_of_its_own(names: TensorNames, config: ModelConfig) -> None:
    found = [names[name] for name in config.weight_shapes()]
    assert len(set(found)) == len(found)


def test_names_of_known_files() -> None:
    assert GGUF_NAMES["layers.1.wq"] == "blk.1.attn_q.weight"
    assert tensor_names()["layers.1.w2"] == "model.layers.1.mlp.down_proj.weight"
    assert META_NAMES["output"] == "output.weight"
