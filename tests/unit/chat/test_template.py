"""Chat templates: renderings compared with those of transformers, the built-in ones, refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from numballama.chat.builtin_templates import BUILTIN_TEMPLATES
from numballama.chat.template import MAX_TEMPLATE, ChatTemplate, choose, stop_token_ids
from numballama.errors import Error
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer
from tests.golden.make_templates import CONVERSATIONS, GOLDEN, OWN, VARIABLES
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import real, save_json, trained

PEERS: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
SOURCES = {f"built-in {name}": source for name, source, _ in BUILTIN_TEMPLATES}
SOURCES |= {f"own {name}": source for name, source in OWN.items()}


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """A tokenizer in which <s> and </s> are BOS and EOS."""
    tokenizer = load_tokenizer(SMALL)
    tokenizer.bos_id, tokenizer.eos_id = (tokenizer.special_tokens[token] for token in ("<s>", "</s>"))
    return tokenizer


@pytest.mark.parametrize("name", PEERS)
def test_renderings_are_the_peers(name: str, small: Tokenizer) -> None:
    if name in SOURCES:
        template = ChatTemplate(SOURCES[name], small)
    elif (path := real(name)) is None:
        pytest.skip(f"no real tokenizer {name} in NUMBALLAMA_TEST_MODELS; see tests.helpers.bpe.real")
    else:
        found = read_text_files(path.parent)
        assert found.tokenizer is not None
        template = choose(found.chat_template, found.tokenizer)
    expected, ids = iter(PEERS[name]["renderings"]), []
    for conversation in CONVERSATIONS:
        for prompt in (False, True):
            rendered = template.render(conversation, prompt, **VARIABLES)
            if name not in SOURCES:
                ids.append(found.tokenizer.encode(rendered, bos=False, special=True))
            # llama.cpp writes BOS when it encodes
            assert rendered.removeprefix("<s>" if name == "built-in Llama 3's" else "") == next(expected)
    assert len(PEERS[name]["renderings"]) == 2 * len(CONVERSATIONS)
    assert ids == PEERS[name].get("ids", [])


def test_the_vocabulary_chooses(small: Tokenizer, tmp_path: Path, models: Path) -> None:
    assert choose(None, load_tokenizer(models / "tok512.model")).name == "Llama 2's chat template"
    assert (
        choose(None, load_tokenizer(models / "tok512.bin")).render([{"role": "user", "content": "a"}])
        == "<s>[INST] a [/INST]"
    )
    chatml = load_tokenizer(save_json(tmp_path, trained(vocab_size=300)))
    assert choose(None, chatml).name == "ChatML chat template"
    assert choose("{{ 1 }}", chatml).source == "{{ 1 }}"
    assert stop_token_ids(chatml) == {chatml.special_tokens[token] for token in ("<|im_end|>", "<|endoftext|>")}
    assert small.special_tokens["</s>"] in stop_token_ids(small)
    library = trained(vocab_size=300)
    (tmp_path / "x").mkdir()
    bare = json.loads(library.to_str()) | {"added_tokens": []}
    (tmp_path / "x" / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(Error, match=r"carries no chat template.*ChatML, Llama 3's, Llama 2's"):
        choose(None, load_tokenizer(tmp_path / "x"))


def test_dates_and_refusals(small: Tokenizer) -> None:
    now = ChatTemplate("{{ strftime_now('%Y') }}", small).render([])
    assert now == time.strftime("%Y")
    with pytest.raises(Error, match="refuses this conversation: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must\n alternate') }}", small).render([])
    with pytest.raises(Error, match=r"does not compile.*unexpected"):
        ChatTemplate("{{ 'a }}", small)
    with pytest.raises(Error, match=r"fails: .*undefined.*UndefinedError"):
        ChatTemplate("{{ nothing.at.all }}", small).render([])
    with pytest.raises(Error, match=f"supported are {MAX_TEMPLATE:,}"):
        ChatTemplate(" " * (MAX_TEMPLATE + 1), small)
