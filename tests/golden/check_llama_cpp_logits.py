"""GGUF files that we write, in llama.cpp: its logits against those of transformers in a golden folder's expected.npz.

    numballama export FOLDER FILE.gguf --to gguf                        # in numballama's environment
    python tests/golden/check_llama_cpp_logits.py FOLDER FILE.gguf …    # in llama-cpp-python's: pairs of them

Run by hand; llama-cpp-python 0.3.36.
"""

import sys
from pathlib import Path

import llama_cpp
import numpy as np

llama_cpp.llama_backend_init()
for folder, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    expected = np.load(Path(folder) / "expected.npz")
    ids, logits = expected["ids"], expected["logits"]
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(file.encode(), options)
    if not model:
        print(f"{Path(folder).name}: not loaded")
        continue
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.flash_attn_type, settings.type_k, settings.type_v = 64, 64, 0, 0, 0
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = int(token), at, 1, True
        batch.seq_id[at][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocab = logits.shape[1]
    got = np.array(
        [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), (vocab,)) for at in range(len(ids))]
    )
    print(f"{Path(folder).name}: largest difference {np.abs(got - logits).max():.2g} of {np.abs(logits).max():.2g}")
