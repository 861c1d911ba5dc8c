r"""SmolLM2-135M-Instruct here and in llama.cpp: the same tokens next, the same probabilities, the same answers?

    python tests/golden/check_smollm2.py ours FILE.gguf OURS.npz TEXT …         # in numballama's environment
    python tests/golden/check_smollm2.py llama.cpp FILE.gguf THEIRS.npz OURS.npz   # in llama-cpp-python's
    python tests/golden/check_smollm2.py compare THEIRS.npz OURS.npz            # in either; 1 if the bars are missed
    python tests/golden/check_smollm2.py layers FILE.gguf SHORT.gguf N          # its first N layers, as a model

The first takes the beginning of each text, has this package's tokenizer make ids of it and keeps the logits at every
position, and greedy answers to three chat prompts. The second runs the same ids through llama.cpp, with a KV cache in
float32 as ours. The third prints, over all positions, how often the likeliest token is the same and the mean
Kullback-Leibler divergence KL(llama.cpp || ours) of the two distributions, and the answers beside each other.

On the CPU llama.cpp rounds activations to int8 for quantised weights (blocks of 32: Q8_0, Q8_1), we do so only with
`--activations int8`. Its BLAS backend does not: from 32 tokens on it multiplies the block types' numbers as float32. So
the witness for the weights, their decoding and the whole model is llama.cpp built with that, on the same file:

    CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" \
        pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36

(or only its libraries, from the sources in its sdist, in a folder that LLAMA_CPP_LIB_PATH names). There the bars hold.
To tell rounding from a mistake without it, give llama.cpp the same weights as plain floats, written by `numballama
export FILE.gguf FLOAT.gguf --to gguf --dtype f32` (or f16).

Rounding makes steps of small differences, and layer after layer makes more of them: so see first how far llama.cpp is
from itself, with `--flash 0` (attention in other order) or `--flash 0 --chunk 1` (a token at a time), and how that and
we depend on the number of layers. Run by hand; llama-cpp-python 0.3.36.
"""

import argparse
import ctypes
from pathlib import Path
from typing import Any

import numpy as np

SAME_TOP, DIVERGENCE, POSITIONS = 0.98, 0.01, 500
"""The bars: at least this share, at most this many nats, over at least this many positions."""
WINDOW, ANSWER = 512, 40
"""Tokens taken of each text, and of each answer."""
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
)


def ours(model_path: str, target: str, texts: list[str], activations: str) -> None:
    """Ids, logits and answers of this package."""
    import numballama

    kept: dict[str, Any] = {"texts": np.array([Path(text).name for text in texts])}
    with numballama.compile(model_path, device="cpu", context=2 * WINDOW, activations=activations) as model:
        assert model.tokenizer is not None
        for i, text in enumerate(texts):
            ids = model.tokenizer.encode(Path(text).read_text(encoding="utf-8"))[:WINDOW]
            kept[f"ids{i}"], kept[f"logits{i}"] = np.array(ids, np.int32), model.logits(ids)
        for i, prompt in enumerate(PROMPTS):
            chat = model.chat()
            rendered = chat.template.render([{"role": "user", "content": prompt}])
            kept[f"chat{i}"] = np.array(model.tokenizer.encode(rendered, bos=False, special=True), np.int32)
            pieces = list(chat.stream(prompt, max_tokens=ANSWER, temperature=0))
            assert chat.turn is not None and chat.turn.prompt_tokens == len(kept[f"chat{i}"])
            kept[f"answer{i}"] = np.array("".join(piece.text for piece in pieces))
    np.savez(target, **kept)


def layers(model_path: str, target: str, count: int) -> None:
    """A model of the first layers of another: the same embedding, the same classifier."""
    from dataclasses import replace

    from numballama.formats.gguf.writer import write_gguf
    from numballama.loader import open_checkpoint

    opened = open_checkpoint(model_path)
    config = replace(opened.config, n_layers=count)
    weights = {name: opened.weights[name] for name in config.weight_shapes()}
    write_gguf(target, config, weights, tokenizer=opened.tokenizer, chat_template=opened.chat_template)


def theirs(model_path: str, target: str, source: str, flash: int, chunk: int) -> None:
    """The same ids in llama.cpp, `chunk` at a time."""
    import llama_cpp

    known, kept = np.load(source), dict[str, Any]()
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, False  # or it repacks for AMX, and crashes where there is one
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), options)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch = 2 * WINDOW, WINDOW
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = flash
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(WINDOW, 0, 1)
    shape = (llama_cpp.llama_vocab_n_tokens(vocabulary),)

    def logits(ids: list[int], start: int) -> np.ndarray:
        """After each of the ids, the first of which goes to position `start`."""
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, True
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape) for i in range(len(ids))]
        return np.array(rows)

    for i in range(len(known["texts"])):
        ids = known[f"ids{i}"].tolist()
        kept[f"logits{i}"] = np.concatenate([logits(ids[at : at + chunk], at) for at in range(0, len(ids), chunk)])
    for i in range(len(PROMPTS)):
        new, position, text = known[f"chat{i}"].tolist(), 0, b""
        piece = ctypes.create_string_buffer(64)
        for _ in range(ANSWER):
            token = int(logits(new, position)[-1].argmax())
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            length = llama_cpp.llama_token_to_piece(vocabulary, token, piece, 64, 0, False)
            text += piece.raw[:length]
            new, position = [token], position + len(new)
        kept[f"answer{i}"] = np.array(text.decode(errors="replace"))
    np.savez(target, **kept)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def compare(theirs_path: str, ours_path: str) -> bool:
    """Print how far they are apart; whether the bars are met."""
    first, second = np.load(theirs_path), np.load(ours_path)
    same, divergence, largest = list[np.ndarray](), list[np.ndarray](), 0.0
    for i in range(sum(name.startswith("logits") for name in first.files)):
        p, q = first[f"logits{i}"], second[f"logits{i}"]
        assert p.shape == q.shape, f"text {i}: {p.shape} and {q.shape}"
        largest = max(largest, float(np.abs(p - q).max()))
        same.append(p.argmax(-1) == q.argmax(-1))
        p, q = log_softmax(p), log_softmax(q)
        divergence.append((np.exp(p) * (p - q)).sum(-1))
    tops, nats = np.concatenate(same), np.concatenate(divergence)
    print(f"{len(tops)} positions, same top-1 {tops.mean():.2%}, KL mean {nats.mean():.2e}, ", end="")
    print(f"99 % {np.quantile(nats, 0.99):.2e}, most {nats.max():.2e}; logits differ by at most {largest:.2g}")
    for i in range(len(PROMPTS)):
        answers = [str(found[f"answer{i}"]) for found in (first, second)]
        print(f"\n{PROMPTS[i]}\n  {'the same' if answers[0] == answers[1] else 'llama.cpp'}: {answers[0]!r}")
        if answers[0] != answers[1]:
            print(f"  ours:      {answers[1]!r}")
    return len(tops) >= POSITIONS and bool(tops.mean() >= SAME_TOP) and bool(nats.mean() <= DIVERGENCE)


def main() -> int:
    """Run one of the three; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in (
        ("ours", "model target"),
        ("llama.cpp", "model target source"),
        ("compare", "theirs ours"),
        ("layers", "model target"),
    ):
        command = commands.add_parser(name)
        for path in paths.split():
            command.add_argument(path)
        if name == "ours":
            command.add_argument("texts", nargs="+")
            command.add_argument("--activations", default="f32", help="f32 or int8")
        if name == "llama.cpp":
            command.add_argument("--flash", type=int, default=-1, help="flash attention: 0, 1, -1 llama.cpp's choice")
            command.add_argument("--chunk", type=int, default=WINDOW, help="tokens at a time")
        if name == "layers":
            command.add_argument("count", type=int)
    given = parser.parse_args()
    if given.command == "ours":
        ours(given.model, given.target, given.texts, given.activations)
    elif given.command == "llama.cpp":
        theirs(given.model, given.target, given.source, given.flash, given.chunk)
    elif given.command == "layers":
        layers(given.model, given.target, given.count)
    else:
        return 0 if compare(given.theirs, given.ours) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
