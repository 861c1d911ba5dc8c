"""Write a checkpoint that numballama reads as a GGUF that llama.cpp reads, so that both run the same weights.

python make_gguf.py MODEL TOKENIZER.model OUT.gguf [f32|f16|bf16|q8_0|q4_0|q4_1]
"""

import sys

from numballama import loader
from numballama.formats.gguf.writer import write_gguf
from numballama.quantization.convert import convert
from numballama.quantization.types import BF16, F16, F32, Q4_0, Q4_1, Q8_0

TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0, "q4_1": Q4_1}


def main() -> None:
    source, tokenizer, target, kind = [*sys.argv[1:], "f32"][:4]
    checkpoint = loader.open_checkpoint(source, tokenizer)
    weights = {
        name: convert(weight, TYPES[kind] if len(weight.shape) == 2 else F32)
        for name, weight in checkpoint.weights.items()
    }
    write_gguf(target, checkpoint.config, weights, tokenizer=checkpoint.tokenizer)


if __name__ == "__main__":
    main()
