"""Write a model of a named shape with random weights: speed does not depend on what a model knows.

python benchmarks/make_random.py TinyLlama-1.1B q8_0 OUT.gguf        (shapes: numballama.config.NAMED_SHAPES)
"""

import math
import sys

import numpy as np

from numballama import loader, quant
from numballama.checkpoint import Weight
from numballama.config import BF16, F16, F32, NAMED_SHAPES, Q8_0
from numballama.formats import WRITERS

TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}


def main() -> None:
    shape, kind, target = sys.argv[1:4]
    config = NAMED_SHAPES[shape]
    noise = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    weights = {}
    for name, extents in config.weight_shapes().items():
        numbers = np.resize(noise, math.prod(extents)).reshape(extents) * np.float32(extents[-1] ** -0.5)
        matrix = len(extents) == 2
        weight = Weight(extents, F32, numbers if matrix else np.ones(extents, np.float32))
        weights[name] = quant.convert(weight, TYPES[kind]) if matrix else weight
    # llama.cpp wants a vocabulary: any of the right size will do
    tokenizer = loader.load_tokenizer(sys.argv[4]) if len(sys.argv) > 4 else None
    WRITERS["gguf"](target, config, weights, tokenizer=tokenizer, name=f"{shape}, random")


if __name__ == "__main__":
    main()
