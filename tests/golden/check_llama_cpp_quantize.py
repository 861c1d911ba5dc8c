"""The error of our encoders beside that of ggml's, for random matrices and those of a checkpoint.

    python -m tests.golden.check_llama_cpp_quantize PATH/libggml-base.so [CHECKPOINT]

Run by hand; the library is one of llama-cpp-python 0.3.36 (in the folder `lib` of its package). Prints the relative RMS
error of each, and the same weighted by a random importance of columns, which both encoders were given.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from numballama.checkpoint import Weight
from numballama.loader import open_checkpoint
from numballama.quantization.convert import convert, dequantize
from numballama.quantization.search import SEARCHING
from numballama.quantization.types import F32, TYPE_TRAITS, WeightType


def ggml_encodes(library: ctypes.CDLL, name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """x as ggml encodes and we decode it."""
    traits = TYPE_TRAITS[name]
    blocks = np.zeros((len(x), x.shape[1] // traits.block_size * traits.block_bytes), np.uint8)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    encode = library.ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_init(traits.gguf_id)
    columns = None if importance is None else importance.ctypes.data
    encode(traits.gguf_id, x.ctypes.data, blocks.ctypes.data, 0, len(x), x.shape[1], columns)
    return dequantize(Weight(x.shape, WeightType(name), blocks))


def main(path: str, checkpoint: str | None = None) -> None:
    library, rng = ctypes.CDLL(path), np.random.default_rng(0)
    matrices = {
        "normal": (0.02 * rng.standard_normal((256, 2048))).astype(np.float32),
        "Student's t, 4": (0.02 * rng.standard_t(4, (256, 2048))).astype(np.float32),
    }
    for name, weight in open_checkpoint(checkpoint).weights.items() if checkpoint else ():
        if name.endswith("w2") and weight.shape[1] % 256 == 0:
            matrices[name] = np.array(dequantize(weight))
    print(f"{'matrix':16} {'type':5} {'ggml':>9} {'ours':>9}   weighted: {'ggml':>9} {'ours':>9}")
    for matrix, x in matrices.items():
        importance = np.exp(1.5 * rng.standard_normal(x.shape[1])).astype(np.float32)
        for name in sorted(SEARCHING):
            errors = []
            for weights in (None, importance):
                ours = dequantize(convert(Weight(x.shape, F32, x), WeightType(name), weights))
                for found in (ggml_encodes(library, name, x, weights), ours):
                    w = 1 if weights is None else weights
                    errors.append(np.sqrt((w * (found - x) ** 2).sum() / (w * x**2).sum()))
            a, b, c, d = errors
            print(f"{matrix:16} {name:5} {a:9.5f} {b:9.5f}             {c:9.5f} {d:9.5f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
