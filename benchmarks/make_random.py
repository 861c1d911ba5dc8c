"""Write a model of a named shape with random weights: speed does not depend on what a model knows.

python benchmarks/make_random.py TinyLlama-1.1B q8_0 OUT.gguf [TOKENIZER.model]

Shapes: numballama.config.NAMED_SHAPES. Types: f32, f16, bf16, q8_0, q4_0, q4_1, q4_k, q5_k, q6_k, and q4_k_m and
q5_k_m, mixtures with q6_k as llama.cpp makes them.
"""

import math
import sys

import numpy as np

from numballama import loader
from numballama.checkpoint import Weight
from numballama.config import NAMED_SHAPES, ModelConfig
from numballama.formats.gguf.writer import write_gguf
from numballama.quantization.convert import convert
from numballama.quantization.types import F32, TYPE_TRAITS, WeightType


def mixture(kind: str, name: str, config: ModelConfig) -> str:
    """The type of a matrix: mixtures have q6_k for the classifier, and for v and w2 of about half of the layers."""
    if kind not in ("q4_k_m", "q5_k_m"):
        return kind
    base = kind.removesuffix("_m")
    _, _, short = name.rpartition(".")
    if short in ("wv", "w2"):
        layer, eighth = int(name.split(".")[1]), config.n_layers // 8
        more = layer < eighth or layer >= 7 * config.n_layers // 8 or (layer - eighth) % 3 == 2
        return "q6_k" if more else base
    return "q6_k" if name == "output" or (name == "tok_embeddings" and config.tied_embeddings) else base


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Weight:
    """Blocks of random bits, scaled so that their elements are about as large as those of the other types."""
    data = rng.integers(0, 256, WeightType(kind).nbytes(math.prod(shape)), np.uint8)
    blocks = data.view(TYPE_TRAITS[kind].record)
    blocks["d"] = np.float16(0.1 / 32 / 32 * shape[-1] ** -0.5).view(np.uint16)
    for field in {"m", "dmin"} & set(TYPE_TRAITS[kind].record.names or ()):
        blocks[field] = np.float16(0.1 / 32 * 0.23 * shape[-1] ** -0.5).view(np.uint16)
    return Weight(shape, WeightType(kind), data.reshape(shape[0], -1))


def main() -> None:
    shape, kind, target = sys.argv[1:4]
    config, rng = NAMED_SHAPES[shape], np.random.default_rng(0)
    noise = rng.standard_normal(1 << 22, dtype=np.float32)
    weights = {}
    for name, extents in config.weight_shapes().items():
        if len(extents) == 1:
            weights[name] = Weight(extents, F32, np.ones(extents, np.float32))
            continue
        own = mixture(kind, name, config)
        if own in ("q4_k", "q5_k", "q6_k"):  # nothing here encodes these types
            weights[name] = random_blocks(own, extents, rng)
        else:
            numbers = np.resize(noise, math.prod(extents)).reshape(extents) * np.float32(extents[-1] ** -0.5)
            weights[name] = convert(Weight(extents, F32, numbers), WeightType(own))
    # llama.cpp needs a vocabulary of the right size
    tokenizer = loader.load_tokenizer(sys.argv[4]) if len(sys.argv) > 4 else None
    write_gguf(target, config, weights, tokenizer=tokenizer, name=f"{shape}, random")


if __name__ == "__main__":
    main()
