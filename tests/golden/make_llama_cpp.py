"""Greedy text of llama.cpp for a GGUF file: python make_llama_cpp.py MODEL.gguf PROMPT TOKENS > FILE

Run by an interpreter that has llama-cpp-python 0.3.36. `use_extra_bufts=False` keeps it from repacking Q8_0 for AMX,
which crashes on models as small as ours.
"""

import ctypes
import sys

import llama_cpp as lc
import numpy as np

path, prompt, count = sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3])
lc.llama_backend_init()
parameters = lc.llama_model_default_params()
parameters.n_gpu_layers, parameters.use_extra_bufts = 0, False
model = lc.llama_model_load_from_file(path, parameters)
vocabulary = lc.llama_model_get_vocab(model)
options = lc.llama_context_default_params()
options.n_ctx, options.type_k, options.type_v = 512, lc.GGML_TYPE_F32, lc.GGML_TYPE_F32
context = lc.llama_init_from_model(model, options)
ids = (lc.llama_token * 512)()
known = lc.llama_tokenize(vocabulary, prompt, len(prompt), ids, 512, True, True)
batch = lc.llama_batch_init(512, 0, 1)


def feed(tokens: list[int], start: int) -> int:
    """The likeliest token after these."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
        batch.logits[i] = i == len(tokens) - 1
    assert lc.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), shape=(lc.llama_vocab_n_tokens(vocabulary),))
    return int(logits.argmax())


token, text, piece = feed(list(ids[:known]), 0), b"", ctypes.create_string_buffer(64)
for position in range(known, known + count):
    if lc.llama_vocab_is_eog(vocabulary, token):
        break
    length = lc.llama_token_to_piece(vocabulary, token, piece, 64, 0, False)
    text += piece.raw[:length]
    token = feed([token], position)
sys.stdout.write(text.decode())
