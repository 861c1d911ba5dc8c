"""Which format a model uses, and what the format tells the server."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from numballama.chat.builtin_templates import CHATML
from numballama.chat.template import ChatTemplate
from numballama.errors import Error
from numballama.formats.hf.text_files import read_text_files
from numballama.server.tools import choose_format
from tests.golden.make_templates import REAL
from tests.helpers.bpe import real
from tests.helpers.tool_texts import FORMATS, QWEN, TEMPLATES, TOOLS, read

MISTRAL = {"[TOOL_CALLS]": 5, "[ARGS]": 32, "[CALL_ID]": 33, "[INST]": 3}


@pytest.mark.parametrize(
    ("template", "special", "name", "in_template"),
    [
        *((TEMPLATES[name], (), name, True) for name in ("hermes", "llama", "mistral")),
        ("{{ tools }} <|python_tag|>", (), "llama", True),
        (CHATML, ("<|im_start|>",), "json", False),
        (CHATML, ("<|im_start|>", "<tool_call>"), "hermes", False),
        (None, ("<|python_tag|>",), "llama", False),
        (None, (), "json", False),
        ("{{ tools }}", ("<|python_tag|>",), "json", False),
        (QWEN + "<function=name>", (), "json", False),
        ("{{ tools }}<tool_call>name<arg_key>a</arg_key>, arguments", (), "json", False),
        ("{{ tools }}<|python_tag|><function=name>", ("<|python_tag|>",), "json", False),
        ("[INST] {{ messages }} [/INST]", MISTRAL, "json", False),
    ],
)
def test_choice(template: str | None, special: Collection[str], name: str, in_template: bool) -> None:
    found = choose_format(template, special)
    assert (found.name, found.in_template) == (name, in_template)


@pytest.mark.parametrize("name", REAL)
def test_choice_for_real_templates(name: str) -> None:
    """Of real tokenizers, where there are any."""
    if (path := real(name)) is None:
        pytest.skip(f"no real tokenizer {name} in NUMBALLAMA_TEST_MODELS; see tests.helpers.bpe.real")
    files = read_text_files(path.parent)
    tokenizer, template = files.tokenizer, files.chat_template
    assert tokenizer is not None and template is not None
    found = choose_format(template, tokenizer.special_tokens)
    assert found.name == {"llama3_2": "llama"}.get(name, "hermes") and found.in_template
    assert (found.reasoning is not None) == (name == "qwen3")
    talk = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call_{n}", "function": {"name": "time", "arguments": '{"a": 1}'}} for n in (1, 2)],
        },
        *({"role": "tool", "tool_call_id": f"call_{n}", "content": f"it is {n}"} for n in (1, 2)),
    ]
    messages, tools = found.conversation(talk, TOOLS)
    text = ChatTemplate(template, tokenizer).render(messages, tools=tools)
    assert text.count('"name": "time"' + found.call_text.middle.removeprefix('"') + '{"a": 1}}') == 2
    assert "it is 1" in text and "it is 2" in text and "get_weather" in text


def test_tokens_to_show() -> None:
    """Control tokens of the vocabulary only; other added tokens are text anyway."""
    assert choose_format(TEMPLATES["mistral id"], MISTRAL).tokens_to_show == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}
    special = {"<|python_tag|>": 1, "<|eot_id|>": 2}
    assert choose_format(TEMPLATES["llama"], special).tokens_to_show == {"<|python_tag|>"}
    assert choose_format(TEMPLATES["qwen3"], ["<think>", "</think>", "<|im_end|>"]).tokens_to_show == {
        "<think>", "</think>",
    }  # fmt: skip
    assert choose_format(CHATML, ["<|im_end|>"]).tokens_to_show == set()


def test_reasoning_of_a_prompt() -> None:
    found = FORMATS["qwen3"]
    assert found.opens_reasoning("<|im_start|>assistant\n<think>\n") and found.opens_reasoning("<think>")
    assert not found.opens_reasoning("<think>\n\n</think>\n\n") and not found.opens_reasoning("assistant\n")
    assert not FORMATS["hermes"].opens_reasoning("<think>")
    assert choose_format(None, ["<think>", "</think>"]).reasoning == ("<think>", "</think>")


def test_instructions() -> None:
    text = FORMATS["json"].instructions(TOOLS)
    assert text is not None and '{"name": "NAME", "arguments": {…}}' in text
    assert '"The weather of a city", "parameters": {"type": "object", "properties": {"city"' in text
    assert FORMATS["json"].instructions([]) is None and FORMATS["hermes"].instructions(TOOLS) is None


def test_conversation() -> None:
    talk = [{"role": "user", "content": "?"}]
    messages, tools = FORMATS["hermes"].conversation(talk, TOOLS)
    assert tools is not None and messages == talk and tools[0] == TOOLS[0]
    assert tools[1]["function"] == {
        "name": "time", "description": "", "parameters": {"type": "object", "properties": {}},
    }  # fmt: skip
    assert FORMATS["hermes"].conversation(talk, []) == (talk, None)
    messages, tools = FORMATS["json"].conversation(talk, TOOLS)
    assert tools is None and [each["role"] for each in messages] == ["system", "user"]
    ids = {"id": "call_0123", "function": {"name": "time", "arguments": ""}}
    (message,), _ = FORMATS["mistral"].conversation([{"role": "assistant", "tool_calls": [ids]}], TOOLS)
    assert len(message["tool_calls"][0]["id"]) == 9


def test_without_tools_there_are_no_calls() -> None:
    text = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    assert read("hermes", text, tools=None).content == read("hermes", text, tools=[]).content == text
    with pytest.raises(Error, match=r"tools\[0\]"):
        FORMATS["hermes"].parser([{"type": "function"}])
