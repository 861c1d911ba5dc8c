"""Chat templates: renderings compared with those of transformers, the built-in ones, refusals."""

from __future__ import annotations

import copy
import itertools
import json
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numballama.chat.builtin_templates import BUILTIN_TEMPLATES
from numballama.chat.template import MAX_TEMPLATE, ChatTemplate, TemplateSet, choose, stop_token_ids
from numballama.errors import Error
from numballama.formats.hf.text_files import read_text_files
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer
from tests.golden.make_templates import (
    CASES,
    CONTINUED,
    CONTINUED_KEYS,
    CONTINUED_TEMPLATES,
    CONVERSATIONS,
    GOLDEN,
    OWN,
    TALK,
    TOKENS,
    VARIABLES,
    VARIABLES_TEMPLATE,
)
from tests.golden.make_tokenizers import SMALL
from tests.helpers.bpe import real, save_json, trained

PEERS: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
OF_CONTINUED = PEERS.pop("continued")["renderings"]
OF_VARIABLES = PEERS.pop("variables")["renderings"]
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


@pytest.mark.parametrize("number", range(len(CASES)))
def test_variables_are_transformers(number: int, small: Tokenizer) -> None:
    template = ChatTemplate(VARIABLES_TEMPLATE, small, tokens=TOKENS)
    given = {"add_generation_prompt": False, **CASES[number]}
    assert template.render(TALK, **given) == OF_VARIABLES[number]


def test_messages_of_other_libraries(small: Tokenizer) -> None:
    """Dataclasses and pydantic's models are messages; a template sees plain values only."""

    @dataclass
    class Part:
        text: str

    @dataclass
    class Said:
        role: str
        content: list[Part]

    class Model:
        def model_dump(self) -> dict[str, object]:
            return {"role": "assistant", "content": np.str_("b"), "refusal": None, "n": np.int64(3), "ok": np.bool_(0)}

    template = ChatTemplate("{{ messages }}{{ x }}{{ enum }}", small)
    rendered = template.render([Said("user", [Part("a")]), Model()], x=object(), enum=Kind.A)  # type: ignore[list-item]
    assert rendered == (
        "[{'role': 'user', 'content': [{'text': 'a'}]}, {'role': 'assistant', 'content': 'b', 'n': 3, 'ok': False}]"
        "<object>a"
    )
    for wrong in ("text", {"role": "user"}, 7, ["text"], [[{"role": "user"}]]):
        with pytest.raises(Error, match="messages must be a list of"):
            template.render(wrong)  # type: ignore[arg-type]
    deep: list[object] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(Error, match="nested 64 deep"):
        template.render([{"role": "user", "content": deep}])
    for tools in ("f", {"a": 1}, [print], ["f"], 7):
        with pytest.raises(Error, match=r"tools? must be a (list of )?JSON schema"):
            template.render([], tools=tools)


class Kind(str, Enum):
    A = "a"


def test_a_file_with_several_templates(small: Tokenizer) -> None:
    """transformers' choice: tool_use with tools, otherwise default; without that, an error that names them."""
    both = TemplateSet({"default": "D", "tool_use": "{{ 'T' }}", "rag": "{{ 'R' }}"}, {"pad_token": "[PAD]"})
    assert [both.choose(small, tools=tools).source for tools in (False, True)] == ["D", "{{ 'T' }}"]
    assert both.choose(small, "rag").source == "{{ 'R' }}" and both.choose(small, "default").source == "D"
    assert both.choose(small, "{{ pad_token }}").render([]) == "[PAD]"
    with pytest.raises(Error, match="no chat template 'nope'; it has 'default', 'tool_use', 'rag'"):
        both.choose(small, "nope")
    with pytest.raises(Error, match="the chat template 'rag' fails"):
        TemplateSet({"rag": "{{ a.b.c }}"}).choose(small, "rag").render([])
    some = TemplateSet({"tool_use": "T", "rag": "R"})
    assert some.choose(small, tools=True).source == "T"
    with pytest.raises(Error, match=r"chat templates 'tool_use', 'rag' and none named 'default'.*--chat-template"):
        some.choose(small)
    with pytest.raises(Error, match="'nope'; it has none with a name"):
        TemplateSet().choose(small, "nope")
    with pytest.raises(Error, match="must be a text in jinja2"):
        TemplateSet().choose(small, 7)  # type: ignore[arg-type]


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


def test_the_last_message_is_continued_as_in_transformers(small: Tokenizer) -> None:
    """Its text ends the prompt, or it is an error: over templates, messages and keys. The messages stay as they are."""
    cases = list(itertools.product(CONTINUED_TEMPLATES.items(), CONTINUED, CONTINUED_KEYS))
    for ((name, source), talk, key), expected in zip(cases, OF_CONTINUED, strict=True):
        before, template = copy.deepcopy(talk), ChatTemplate(source, small)
        if expected is None:
            with pytest.raises(Error, match=r"^[^\n]*$"):
                template.render(talk, False, key)
        else:
            assert template.render(talk, False, key) == expected, (name, talk, key)
        assert talk == before
    assert 0.1 < sum(text is not None for text in OF_CONTINUED) / len(cases) < 0.9
