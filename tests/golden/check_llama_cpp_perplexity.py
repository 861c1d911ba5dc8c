r"""llama.cpp's perplexity of a text, and with a base its KL divergence, to compare with `numballama perplexity`.

    numballama perplexity FILE.gguf TEXT --context 512 --chunks 4 --json > ours.json     # in numballama's environment
    python tests/golden/check_llama_cpp_perplexity.py FILE.gguf TEXT --context 512 --chunks 4 [--kl BASE.gguf] \
        [--ours ours.json]                                                       # in llama-cpp-python's

The windows are those of llama.cpp's tools/perplexity, written here a second time from its description: n_ctx tokens
each, BOS in place of the first where the vocabulary adds one, predictions of the second half. The arithmetic is
llama.cpp's library. On the CPU it rounds activations to int8 for quantised weights: compare with `--activations int8`
too. Ends with 1 if the perplexities differ by more than `BAR`. Run by hand; llama-cpp-python 0.3.36.
"""

import argparse
import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

BAR = 0.005
"""Largest relative difference of the two perplexities."""


class LlamaCpp:
    """A model in llama.cpp, and the log probabilities that it gives."""

    def __init__(self, path: str, context: int) -> None:
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        assert self.model, f"{path} is not loaded"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = 2
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)

    def ids(self, text: bytes) -> list[int]:
        """Token ids of a text, BOS and EOS as the vocabulary asks for them."""
        out = (llama_cpp.llama_token * (len(text) + 2))()
        count = llama_cpp.llama_tokenize(self.vocab, text, len(text), out, len(out), True, False)
        return list(out[:count])

    def log_probabilities(self, ids: list[int], first: int) -> np.ndarray:
        """float64 [len(ids) - first, vocab] after the tokens from `first` on."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            self.batch.token[at], self.batch.pos[at] = token, at
            self.batch.n_seq_id[at], self.batch.seq_id[at][0], self.batch.logits[at] = 1, 0, at >= first
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, at), (self.size,))
            for at in range(first, len(ids))
        ]
        logits = np.array(rows, np.float64)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--kl", metavar="BASE")
    parser.add_argument("--ours", type=Path, help="the JSON of `numballama perplexity`")
    args = parser.parse_args()

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = LlamaCpp(args.model, args.context)
    base = LlamaCpp(args.kl, args.context) if args.kl else None
    ids = model.ids(args.text.read_bytes().removesuffix(b"\n"))
    first, nll, kl, same = args.context // 2, [], [], []
    for start in range(0, min(len(ids) // args.context, args.chunks or len(ids)) * args.context, args.context):
        window = ids[start : start + args.context]
        if llama_cpp.llama_vocab_get_add_bos(model.vocab):
            window[0] = llama_cpp.llama_vocab_bos(model.vocab)
        log_p = model.log_probabilities(window, first)[:-1]
        nll.extend(-log_p[np.arange(len(log_p)), window[first + 1 :]])
        if base is not None:
            log_base = base.log_probabilities(window, first)[:-1]
            kl.extend((np.exp(log_base) * (log_base - log_p)).sum(1))
            same.extend(log_base.argmax(1) == log_p.argmax(1))
    found = {"perplexity": float(np.exp(np.mean(nll))), "tokens": len(nll)}
    found["standard_error"] = float(found["perplexity"] * np.std(nll) / (len(nll) - 1) ** 0.5)
    if kl:
        found |= {"kl_mean": float(np.mean(kl)), "kl_max": float(np.max(kl)), "same_top": float(np.mean(same))}
    print(json.dumps(found))
    if args.ours is None:
        return 0
    ours = json.loads(args.ours.read_text())
    assert ours["tokens"] == found["tokens"], "both count the same tokens"
    difference = ours["perplexity"] / found["perplexity"] - 1
    print(f"ours {ours['perplexity']:.4f}, llama.cpp's {found['perplexity']:.4f}: {difference:+.3%}")
    return int(abs(difference) > BAR)


if __name__ == "__main__":
    sys.exit(main())
