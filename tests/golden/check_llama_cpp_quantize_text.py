"""What K-quants cost on a text: files by llama.cpp and by us from the same source, token by token.

    python -m tests.golden.check_llama_cpp_quantize_text SOURCE.gguf TEXT FOLDER [--types q4_k,q5_k] [--chunks 80]

Run by hand, with llama-cpp-python 0.3.36. FOLDER gets the files: "llama.cpp", without an importance matrix; "plain", of
`numballama export --no-calibrate`; "own", of the default, which reads texts that the model wrote itself. All run in
numballama. Printed are, of each file, ln of its perplexity over the source's, and its mean KL divergence from it; then
the differences of both from llama.cpp's file of the type. All have the standard error of the mean over tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
from pathlib import Path

import llama_cpp
import numpy as np

import numballama
from numballama.bench.perplexity import _windows, read_text
from numballama.cli.main import main as command_line
from numballama.engine.logprobs import log_softmax

TYPES = {
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q5_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
}


def write(source: Path, folder: Path, kind: str) -> dict[str, Path]:
    """Who → their file of this type. Those that are there are kept."""
    files = {who: folder / f"{source.stem}-{kind}-{who}.gguf" for who in ("llama.cpp", "plain", "own")}
    if not files["llama.cpp"].exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = TYPES[kind]
        done = llama_cpp.llama_model_quantize(
            str(source).encode(), str(files["llama.cpp"]).encode(), ctypes.byref(params)
        )
        assert done == 0, "llama.cpp cannot quantise this file"
    for who, more in (("plain", ["--no-calibrate"]), ("own", [])):
        if not files[who].exists():
            with contextlib.redirect_stdout(io.StringIO()):
                assert not command_line(
                    ["export", str(source), str(files[who]), "--to", "gguf", "--dtype", kind, *more]
                )
    assert len({path.stat().st_size // 4096 for path in files.values()}) == 1, "files of one size"
    return files


def measure(source: Path, files: dict[str, Path], text: str, context: int, chunks: int | None) -> dict[str, np.ndarray]:
    """File → [2, tokens]: nll less that of the source, and KL divergence from the source."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    with contextlib.ExitStack() as opened:
        base, *models = (
            opened.enter_context(numballama.compile(path, device="cpu", context=context))
            for path in (source, *files.values())
        )
        tokenizer = base.require_tokenizer()
        ids = [*tokenizer.bos, *tokenizer.encode(text, bos=False)]
        for window in _windows(base, ids, context, chunks):
            first = context // 2
            exact = [log_softmax(row) for part in base.iter_logits(window[:-1], first) for row in part]
            for name, model in zip(files, models, strict=True):
                rows = (row for part in model.iter_logits(window[:-1], first) for row in part)
                for target, log_base, row in zip(window[first + 1 :], exact, rows, strict=True):
                    log_p = log_softmax(row)
                    kl = float(np.exp(log_base) @ (log_base - log_p))
                    found[name].append((float(log_base[target] - log_p[target]), kl))
    return {name: np.array(values).T for name, values in found.items()}


def with_error(values: np.ndarray) -> str:
    return f"{values.mean():+.5f} ± {values.std() / np.sqrt(len(values) - 1):.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default="q4_k,q5_k,q6_k")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int)
    args = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    for kind in args.types.split(","):
        files = write(args.source, args.folder, kind)
        found = measure(args.source, files, read_text(args.text), args.context, args.chunks)
        print(f"{kind}: {next(iter(found.values())).shape[1]:,} tokens, {files['own'].stat().st_size:,} bytes")
        for who, values in found.items():
            less = values - found["llama.cpp"]
            line = f"  {who:10} ln ratio {with_error(values[0])}   KL {with_error(values[1])}"
            print(line if who == "llama.cpp" else f"{line}   less: {with_error(less[0])}, {with_error(less[1])}")


if __name__ == "__main__":
    main()
