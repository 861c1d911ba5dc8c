"""GGUF that we write from a Hugging Face directory, in llama.cpp: its ids, special tokens and chat template.

    numballama export COPY FILE.gguf --to gguf                           # a COPY that check_hf_tokenizer.py wrote
    python tests/golden/check_llama_cpp_tokenizer.py COPY FILE.gguf …    # in llama-cpp-python's: pairs of them

Run by hand; llama-cpp-python 0.3.36.
"""

import json
import sys
from pathlib import Path

import llama_cpp as lc
from check_hf_tokenizer import ANSWERS, texts

lc.llama_backend_init()
for folder, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    ours = json.loads((Path(folder) / ANSWERS).read_text())
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    options = lc.llama_model_default_params()
    options.use_extra_bufts = False
    model = lc.llama_model_load_from_file(file.encode(), options)
    vocabulary, room = lc.llama_model_get_vocab(model), (lc.llama_token * 4096)()
    wrong = 0
    for text, ids in zip(texts(ours["special"]), ours["ids"], strict=True):
        data = text.encode()
        count = lc.llama_tokenize(vocabulary, data, len(data), room, 4096, True, True)
        wrong += list(room[:count]) != ids
    template = lc.llama_model_chat_template(model, None)
    assert (template.decode() if template else None) == settings.get("chat_template")
    for name, token in (("bos", lc.llama_vocab_bos(vocabulary)), ("eos", lc.llama_vocab_eos(vocabulary))):
        spelled = lc.llama_vocab_get_text(vocabulary, token).decode()
        assert spelled == settings.get(f"{name}_token", spelled), (name, spelled)  # llama.cpp assumes one in any case
    assert bool(lc.llama_vocab_get_add_bos(vocabulary)) == settings["add_bos_token"]
    print(f"{file}: {len(ours['ids']):,} texts, {wrong} with other ids; special tokens and chat template are the same")
