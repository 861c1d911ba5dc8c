"""Writes ggml_int8.npz: activations as ggml rounds them, and its products of them with blocks, on this machine's CPU.

    python tests/golden/make_ggml_int8.py        # in an environment with llama-cpp-python 0.3.36, x86 with AVX2

Calls the functions that llama.cpp's matrix products are made of, as they lie in its shared library. Rows of x: ordinary
ones of several magnitudes, ties, zeros, and numbers that are just as large as others' negatives.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

COLUMNS, ROWS = 512, 6
ACTIVATION_QUANT = {"q8_0": (32, 34), "q8_1": (32, 36), "q8_K": (256, 292)}
"""Name → numbers and bytes of a block."""
WEIGHTS = {
    "q8_0": (32, 34, (0,), "q8_0"),
    "q4_0": (32, 18, (0,), "q8_0"),
    "q4_1": (32, 20, (0, 2), "q8_1"),
    "q4_K": (256, 144, (0, 2), "q8_K"),
    "q6_K": (256, 210, (208,), "q8_K"),
    "q5_K": (256, 176, (0, 2), "q8_K"),
}
"""Name → numbers and bytes of a block, where its float16 factors lie, and what x is rounded to."""


def activations(rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((8, COLUMNS)) * np.array([1, 1, 1e-3, 30, 1e-7, 1, 1, 1])[:, None]
    x[5] = rng.integers(-254, 255, COLUMNS) / 2  # halves of a scale that is 1 where 127 is the largest
    x[5, ::32] = 127
    x[6, 64:192], x[6, 256:] = 0, 0
    x[7, 100], x[7, 130], x[7, 300], x[7, 320] = 5, -5, -6, 6
    return x.astype(np.float32)


def main() -> None:
    folder = Path(llama_cpp.__file__).parent / "lib"
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    library.ggml_cpu_init()
    rng = np.random.default_rng(7)
    x = activations(rng)
    kept = {"x": x}

    def at(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    for name, (numbers, nbytes) in ACTIVATION_QUANT.items():
        blocks = np.zeros((len(x), COLUMNS // numbers * nbytes), np.uint8)
        for row, out in zip(x, blocks, strict=True):
            library[f"quantize_row_{name}"](at(row), at(out), ctypes.c_int64(COLUMNS))
        kept[f"x_{name.lower()}"] = blocks
    for name, (numbers, nbytes, factors, rounded) in WEIGHTS.items():
        blocks = rng.integers(0, 256, (ROWS * COLUMNS // numbers, nbytes), np.uint8)
        for place in factors:
            blocks[:, place : place + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
        blocks = kept[f"w_{name.lower()}"] = blocks.reshape(ROWS, -1)
        dots = kept[f"dot_{name.lower()}"] = np.zeros((len(x), ROWS), np.float32)
        function, zero = library[f"ggml_vec_dot_{name}_{rounded}"], ctypes.c_size_t(0)
        for t, row in enumerate(kept[f"x_{rounded.lower()}"]):
            for r, weight in enumerate(blocks):
                function(COLUMNS, at(dots[t, r:]), zero, at(weight), zero, at(row), zero, 1)
    np.savez_compressed(Path(__file__).with_name("ggml_int8.npz"), **kept)


if __name__ == "__main__":
    main()
