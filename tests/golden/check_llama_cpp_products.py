"""Every matrix product of a llama.cpp run, done again here from the same input: with int8 activations, and without.

    python tests/golden/check_llama_cpp_products.py llama.cpp FILE.gguf RUN.npz TEXT   # llama-cpp-python's python
    python tests/golden/check_llama_cpp_products.py compare FILE.gguf RUN.npz          # numballama's

A whole model's logits depend on each rounding before them, and there is one in each product: a difference in the last
bit turns some, and after some layers the two are as far apart as two that round differently. One product from equal
input has no such past. The first command keeps what goes into and comes out of the products of a prompt of 128 tokens,
the second prints, for each kind of them, the largest error of any layer: root mean square, and largest number, of the
result's. 1 if it is above 1e-6 with int8 activations. Run by hand; llama-cpp-python 0.3.36, architecture llama.
"""

import argparse
import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, MOST = 128, 1e-6
PRODUCTS = {
    "wq": ("attn_norm-{}", "Qcur-{}"),
    "wk": ("attn_norm-{}", "Kcur-{}"),
    "wv": ("attn_norm-{}", "Vcur-{}"),
    "wo": ("kqv_out-{}", "attn_out-{}"),
    "w1": ("ffn_norm-{}", "ffn_gate-{}"),
    "w3": ("ffn_norm-{}", "ffn_up-{}"),
    "w2": ("ffn_swiglu-{}", "ffn_out-{}"),
    "output": ("result_norm", "result_output"),
}
"""Weight → what llama.cpp calls its input and its output; {} is the layer."""


def run(model_path: str, target: str, text: str) -> None:
    """The first tensor of each of those names, of the evaluation of a prompt."""
    import llama_cpp

    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    for name, result in (("name", ctypes.c_char_p), ("data", ctypes.c_void_p)):
        function = getattr(base, f"ggml_get_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], result
    wanted = re.compile("|".join(re.escape(n).replace(r"\{\}", r"\d+") for pair in PRODUCTS.values() for n in pair))
    kept = dict[str, Any]()

    def look(tensor: int, ask: bool, _: Any) -> bool:
        name = base.ggml_get_name(ctypes.c_void_p(tensor)).decode()
        if ask:
            return bool(wanted.fullmatch(name)) and name not in kept
        width, rows = ctypes.cast(tensor + 16, ctypes.POINTER(ctypes.c_int64))[:2]  # ne, after the type and the buffer
        data = ctypes.string_at(base.ggml_get_data(ctypes.c_void_p(tensor)), 4 * width * rows)
        kept[name] = np.frombuffer(data, np.float32).reshape(rows, width)
        return True

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, False  # or it repacks for AMX, and crashes where there is one
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), options)
    settings = llama_cpp.llama_context_default_params()
    callback = settings.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(look)
    settings.n_ctx = settings.n_batch = 512
    context = llama_cpp.llama_init_from_model(model, settings)
    assert callback and context
    data, ids = Path(text).read_bytes(), (llama_cpp.llama_token * (1 << 16))()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, False)
    assert count >= TOKENS, "a longer text is needed"
    batch = llama_cpp.llama_batch_init(TOKENS, 0, 1)
    batch.n_tokens = TOKENS
    for i in range(TOKENS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = ids[i], i, 1, True
        batch.seq_id[i][0] = 0
    kept.clear()  # what a warm-up left
    assert llama_cpp.llama_decode(context, batch) == 0
    np.savez(target, **kept)


def products(weight: Any, x: np.ndarray, activations: str) -> np.ndarray:
    """x · weightᵀ by the kernels of the CPU."""
    from numballama.cpu.backend import CpuBackend
    from numballama.ir import Graph
    from numballama.quantization.types import VEC_DOT_TYPE

    graph = Graph("product")
    inputs: Any = (graph.input("x", x.shape, "f32"),)
    if activations == "int8":
        inputs = graph.add(f"quantize_{VEC_DOT_TYPE[weight.type.name]}", *inputs, out=("q", "scales", "sums"))
    graph.add("linear", *inputs, graph.weight("w", weight.shape, weight.type.name), out="y")
    graph.outputs = ["y"]
    program = CpuBackend({"w": weight}).program(graph)
    program.inputs["x"][:] = x
    program.run(len(x))
    return program.value("y").copy()


def compare(model_path: str, source: str) -> bool:
    """Print the errors; whether int8 activations give what llama.cpp has."""
    from numballama.loader import open_checkpoint

    opened, found, worst = open_checkpoint(model_path), np.load(source), 0.0
    tied = opened.config.tied_embeddings
    for name, names in PRODUCTS.items():
        layers = [""] if name == "output" else [f"layers.{i}." for i in range(opened.config.n_layers)]
        for activations in ("int8", "f32"):
            mean = most = 0.0
            for i, layer in enumerate(layers):
                weight = opened.weights["tok_embeddings" if name == "output" and tied else layer + name]
                x, want = (found[each.format(i)] for each in names)
                error, size = products(weight, x, activations) - want.astype(np.float64), np.abs(want)
                mean = max(mean, float(np.sqrt((error**2).mean() / (size.astype(np.float64) ** 2).mean())))
                most = max(most, float(np.abs(error).max() / size.max()))
            print(f"{name:7} {weight.type!s:5} activations {activations:4}  rms {mean:.1e}  most {most:.1e}")
            worst = max(worst, mean) if activations == "int8" else worst
    return worst <= MOST


def main() -> int:
    """Run one of the two; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in (("llama.cpp", "model target text"), ("compare", "model source")):
        command = commands.add_parser(name)
        for path in paths.split():
            command.add_argument(path)
    given = parser.parse_args()
    if given.command == "compare":
        return 0 if compare(given.model, given.source) else 1
    run(given.model, given.target, given.text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
