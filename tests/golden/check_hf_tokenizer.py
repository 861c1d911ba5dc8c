"""A directory exported from a GGUF file with byte-level BPE, in transformers: its ids, chat and logits against ours.

    python tests/golden/check_hf_tokenizer.py write MODEL.gguf COPY     # in numballama's environment: exports, asks it
    python tests/golden/check_hf_tokenizer.py check COPY …              # in transformers': loads COPY and compares

Run by hand; transformers 5.23.0. The texts are those of `lines.py`, each as it is and between special tokens.
"""

import json
import sys
import unicodedata
from pathlib import Path

from lines import lines

MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4, naïvely 😀"},
    {"role": "user", "content": "And 3?"},
]
ANSWERS = "ours.json"


def texts(special: list[str]) -> list[str]:
    plain = list(lines())
    return plain + [f"{special[i % len(special)]}{line} {special[-1]}x" for i, line in enumerate(plain[::3])]


def write(model: Path, copy: Path) -> None:
    import numballama
    from numballama.chat.template import ChatTemplate
    from numballama.export import export_model
    from numballama.loader import open_checkpoint

    print(*export_model(model, copy, "safetensors", "f32").notes, sep="\n")
    own, read = (numballama.load_tokenizer(path) for path in (model, copy))
    special = sorted(own.special_tokens)
    ids = [own.encode(text, special=True) for text in texts(special)]
    plain = list(lines())
    assert [read.encode(text, special=True) for text in texts(special)] == ids, "read back, other ids"
    assert [read.encode(text) for text in plain] == [own.encode(text) for text in plain]
    assert (read.bos_id, read.eos_id, read.special_tokens) == (own.bos_id, own.eos_id, own.special_tokens)
    with numballama.compile(copy, device="cpu", kv_dtype="f32") as opened:
        prompt = ids[0][:24] + ids[7][:24]
        logits = opened.logits(prompt)[-1].tolist()
    template = open_checkpoint(copy).chat_template
    chat = None if template is None else ChatTemplate(template, read).render(MESSAGES)
    found = {"special": special, "ids": ids, "prompt": prompt, "logits": logits, "chat": chat}
    (copy / ANSWERS).write_text(json.dumps(found))


def check(copy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = json.loads((copy / ANSWERS).read_text())
    tokenizer = AutoTokenizer.from_pretrained(copy)
    pairs = list(zip(texts(ours["special"]), ours["ids"], strict=True))
    wrong = [text for text, ids in pairs if tokenizer(text).input_ids != ids]
    model, loading = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ours["prompt"]])).logits[0, -1]
    apart = (logits - torch.tensor(ours["logits"])).abs().max().item()
    print(f"{copy}: {type(tokenizer).__name__}: {len(pairs):,} texts, {len(wrong)} with other ids; "
          f"{type(model).__name__}: logits {apart:.2g} apart; chat template: {ours['chat'] is not None}")  # fmt: skip
    if ours["chat"] is not None:
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == ours["chat"]
    if type(tokenizer).__name__ == "Qwen2Tokenizer":  # it puts text into NFC first, whatever its tokenizer.json says
        assert not [text for text in wrong if unicodedata.is_normalized("NFC", text)]
    else:
        assert not wrong, wrong[:3]


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for name in sys.argv[2:]:
            check(Path(name))
