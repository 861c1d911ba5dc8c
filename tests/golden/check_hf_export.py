"""Directories that numballama writes, read by transformers: its logits for them against those of the golden model they
came from.

    numballama export FOLDER COPY --to safetensors          # in numballama's environment; also by way of a GGUF file
    python tests/golden/check_hf_export.py FOLDER COPY …    # in transformers': pairs of them

Run by hand; transformers 5.23.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

for folder, copy in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    expected = np.load(Path(folder) / "expected.npz")
    model, loading = AutoModelForCausalLM.from_pretrained(
        copy, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    with torch.no_grad():
        logits = model.eval()(torch.tensor(expected["ids"][None].astype(np.int64)), use_cache=False).logits[0].numpy()
    print(f"{copy}: {type(model).__name__}, largest difference {np.abs(logits - expected['logits']).max():.2g}")
