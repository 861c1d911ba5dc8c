"""The built-in chat templates: Llama 2's; test_template compares the others with their peers."""

from __future__ import annotations

import pytest

from numballama.chat.builtin_templates import BUILTIN_TEMPLATES, LLAMA2
from numballama.chat.template import ChatTemplate
from numballama.errors import Error
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.tokenizers.base import Tokenizer
from tests.golden.make_tokenizers import SMALL


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """A tokenizer in which <s> and </s> are BOS and EOS."""
    tokenizer = load_tokenizer(SMALL)
    tokenizer.bos_id, tokenizer.eos_id = (tokenizer.special_tokens[token] for token in ("<s>", "</s>"))
    return tokenizer


def test_each_is_recognised_by_tokens_that_it_writes(small: Tokenizer) -> None:
    """The special tokens that a vocabulary must have are those that the template writes."""
    for builtin in BUILTIN_TEMPLATES:
        rendered = ChatTemplate(builtin.source, small).render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        assert all(token in rendered for token in builtin.special_tokens), builtin.name


def test_llama_2s_is_metas(small: Tokenizer) -> None:
    """As chat_completion in Meta's llama repository puts it, and Hugging Face's template."""
    template = ChatTemplate(LLAMA2, small)
    turns = [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert template.render(turns) == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"
    system = [{"role": "system", "content": "S"}]
    assert template.render(system + turns[:1]) == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n a [/INST]"
    with pytest.raises(Error, match="refuses this conversation: user and assistant must take turns"):
        template.render(turns[:1] * 2)
