"""vocab.json and merges.txt, and the rules of the class that other files name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from numballama.errors import FormatError, UnsupportedError
from numballama.formats.tokenizer_files import load_tokenizer
from tests.golden.lines import lines
from tests.helpers.bpe import SPECIAL, save_json, trained

TEXTS = [*lines()[::600], "I'm 12345  e\u0301<think>x<|im_end|>", "<|im_start|>user\n  hi<|im_end|>\n"]


def write(folder: Path, pre: str, config: dict[str, Any], added: str, version: str = "#version: 0.2\n") -> Path:
    """The pair of files, in place of the tokenizer.json that is in `folder`, and its added tokens in `added`."""
    whole = json.loads(save_json(folder / pre, trained(pre, nfc=pre == "qwen2")).read_text(encoding="utf-8"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    own = folder / f"{pre}-{added}"
    own.mkdir(exist_ok=True)
    (own / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    (own / "merges.txt").write_text(version + "\n".join(merges) + "\n", encoding="utf-8")
    entries = {entry.pop("id"): entry for entry in whole["added_tokens"]}
    if added == "added_tokens_decoder":
        config = config | {added: entries}
    else:
        config = config | {"additional_special_tokens": SPECIAL}
        (own / "added_tokens.json").write_text(json.dumps({entry["content"]: id for id, entry in entries.items()}))
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    return own


@pytest.mark.parametrize("added", ["added_tokens_decoder", "added_tokens"])
@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("gpt-2", None)])
def test_ids_are_those_of_the_tokenizer_json(tmp_path: Path, pre: str, name: str | None, added: str) -> None:
    """As transformers reads them: the class says how text is split."""
    folder = write(
        tmp_path, pre, {"tokenizer_class": name, "eos_token": "<|im_end|>"}, added, "" if name else "#version"
    )
    tokenizer, whole = load_tokenizer(folder), load_tokenizer(tmp_path / pre)
    for text in TEXTS:
        for special in (False, True):
            ids = tokenizer.encode(text, special=special)
            assert ids == whole.encode(text, special=special) and tokenizer.decode(ids) == whole.decode(ids)
    assert (
        tokenizer.piece(tokenizer.eos_id or 0) == "<|im_end|>" and "do not say how text is split" in tokenizer.notes[0]
    )
    assert load_tokenizer(folder / "vocab.json").encode(TEXTS[0]) == whole.encode(TEXTS[0])


def test_flags_and_the_type_of_the_model(tmp_path: Path) -> None:
    """Without a tokenizer.json the flags count; EOS is the class's if no file names one."""
    folder = write(tmp_path, "qwen2", {"add_bos_token": True, "bos_token": SPECIAL[0]}, "added_tokens_decoder")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer, whole = load_tokenizer(folder), load_tokenizer(tmp_path / "qwen2")
    start, end = (whole.special_tokens[name] for name in SPECIAL[:2])
    assert tokenizer.encode(TEXTS[0]) == [start, *whole.encode(TEXTS[0])] and tokenizer.eos_id == end


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("merges.txt", None, FormatError, "vocab.json: a vocabulary without its merges; expected merges.txt"),
        ("merges.txt", b"a b\nzz \xc3\xa9", FormatError, r"merges\.txt: bad merges; at line 1; expected two tokens"),
        ("merges.txt", b"\xff", FormatError, r"merges\.txt: not UTF-8; at byte 0"),
        (
            "vocab.json",
            b"[1]",
            FormatError,
            r"vocab\.json: bad vocabulary; expected tokens with their ids; found \[1\]",
        ),
        ("vocab.json", b'{"a": -1}', FormatError, r"key a; expected a token id; found -1"),
        ("vocab.json", b'{"a"', FormatError, "not JSON"),
        ("vocab.json", b'{"\xe2\x96\x81a": 0}', UnsupportedError, "not a byte-level vocabulary.*give a tokenizer.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes | None, kind: type[Exception], message: str) -> None:
    folder = write(tmp_path, "gpt-2", {}, "added_tokens_decoder")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        load_tokenizer(folder)
