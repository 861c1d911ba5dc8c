"""Messages to ids: those of the rendered text, but that control tokens from messages stay text."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from numballama.chat import encoder as module
from numballama.chat.builtin_templates import BUILTIN_TEMPLATES, CHATML
from numballama.chat.encoder import ConversationEncoder
from numballama.errors import Error
from numballama.formats.tokenizer_files import load_tokenizer
from numballama.model import Model
from numballama.tokenizers.base import Tokenizer
from tests.golden.make_templates import OWN
from tests.helpers.bpe import CHAT_CONFIG, save_json, trained

END, START = "<|im_end|>", "<|im_start|>"
QWEN3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') "
    "and m.content.endswith('</tool_response>')) %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif '</think>' in m.content %}"
    "{%- set reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>' + m.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}"
    "{{- m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
)
"""As Qwen3's: it looks for tags in messages and takes them apart."""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content | trim ~ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    **{f"built-in {name}": source for name, source, _ in BUILTIN_TEMPLATES},
    **{f"own {name}": source for name, source in OWN.items()},
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "as a list": "<|im_start|>{{ messages }}<|im_end|>{{ messages | tojson(indent=1) }}",
    "in ASCII": "<|im_start|>{{ messages | tojson(ensure_ascii=true) }}<|im_end|>",
    "as an address": "<|im_start|>{{ messages[0].content | urlencode }}<|im_end|>",
    "filters": "<|im_start|>{{ messages[-1].content | upper | replace('A', '<') | trim }}<|im_end|>"
    "{{ messages[0].content[2:5] }}{{ messages[0].content | list | join('') }}{{ '%s' % messages[0].content }}<s>",
    "roles": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}",
}


@lru_cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE; runs of spaces, "<think>" and the like are added tokens, and no control tokens."""
    import tempfile

    library = trained("smollm", 600)
    library.add_tokens([AddedToken(" " * n, special=False, normalized=False) for n in (2, 4, 8)])
    library.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", "<|user|>")])
    library.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("[INST]", "[/INST]", "|>x")])
    with tempfile.TemporaryDirectory() as folder:
        config = CHAT_CONFIG | {"bos_token": "<s>", "eos_token": "</s>"}
        return load_tokenizer(save_json(Path(folder) / "t", library, config))


@lru_cache
def encoder_of(name: str) -> ConversationEncoder:
    return ConversationEncoder(tokenizer(), TEMPLATES[name])


TAGS = ["<think>", "</think>", "<tool_response>", "</tool_response>", "<tool_call>", "&lt;", "{{x}}"]
SIGNS = ["'", "\\", "A", "im_end", "<", "|", ">", "<|", "|>"]
WORDS = ["def f():\n    return 1\n        x", "    ", " ", "\n", "a", "Größe 🙂", '"']
PIECES = st.sampled_from([*WORDS, *TAGS, *SIGNS])
CONTROLS = st.sampled_from([START, END, "<s>", "</s>", "[INST]", "<|user|>", "<|im_end|>x", "<|im_<|im_end|>end|>"])


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    def turns(system: bool, contents: list[str]) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * len(contents)
        found = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        return [{"role": "system", "content": contents[-1]}, *found] if system else found

    return st.builds(turns, st.booleans(), st.lists(text, min_size=1, max_size=4))


PLAIN = conversations(st.lists(PIECES, max_size=6).map("".join))
SPELLED = conversations(st.lists(PIECES | CONTROLS, max_size=6).map("".join))


def controls(text: str) -> list[str]:
    longest_first = sorted(tokenizer().special_tokens, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, longest_first)), text)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(messages=PLAIN)
def test_ids_are_those_of_the_rendered_text(name: str, messages: list[dict[str, str]]) -> None:
    if any(controls(str(message)) for message in messages):
        return
    encoder = encoder_of(name)
    try:
        rendered = encoder.template.render(messages)
    except Error:
        return
    assert encoder.encode(messages) == tokenizer().encode(rendered, bos=False, special=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(messages=SPELLED)
def test_only_control_tokens_that_messages_spell_differ(name: str, messages: list[dict[str, str]]) -> None:
    """Control tokens are those that the template writes around messages with a harmless text in their place."""
    encoder = encoder_of(name)
    texts = {token: f"‹{token[1:]}" for token in tokenizer().special_tokens}

    def harmless(text: str) -> str:
        while found := controls(text):
            text = text.replace(found[0], texts[found[0]])
        return text

    try:
        rendered = encoder.template.render(messages)
        written = controls(
            encoder.template.render([m | {"content": harmless(m["content"])} for m in messages]).replace("‹", "(")
        )
    except Error:
        return
    spans = encoder.render(messages, {})
    assert "".join(text for text, _ in spans) == rendered
    ids, special = encoder.encode(messages), tokenizer().special_tokens
    found = [token for token in ids if token in special.values()]
    assert len(found) <= len(written), "no message adds a control token"
    if name != "filters":  # which may join what a message has with what the template has
        assert found == [special[token] for token in written]
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in special.values():
            parts.append([])
        else:
            parts[-1].append(token)
    texts_between = [tokenizer().encode(text, bos=False) for text in _between(spans)]
    assert parts == texts_between, "text between tokens is encoded as any text"


def _between(spans: list[tuple[str, bool]]) -> list[str]:
    """The texts between control tokens that are trusted as a whole."""
    text, trusted = "".join(part for part, _ in spans), [flag for part, flag in spans for _ in part]
    pattern = re.compile("|".join(map(re.escape, sorted(tokenizer().special_tokens, key=len, reverse=True))))
    parts, last, at = [], 0, 0
    while found := pattern.search(text, at):
        if all(trusted[found.start() : found.end()]):
            parts.append(text[last : found.start()])
            last = at = found.end()
        else:
            at = found.start() + 1
    return [*parts, text[last:]]


def test_indented_code_and_a_spelled_token() -> None:
    """Runs of spaces stay the tokens that they are, and a spelled token changes only itself."""
    code = "def f():\n    return 1\n        # x"
    plain, special = encoder_of("qwen3"), tokenizer().special_tokens
    messages = [{"role": "user", "content": code}]
    ids = plain.encode(messages)
    assert ids == tokenizer().encode(plain.template.render(messages), bos=False, special=True)
    four, eight = (tokenizer().encode(" " * n, bos=False) for n in (4, 8))
    assert len(four) == len(eight) == 1 and four[0] in ids and eight[0] in ids
    spelled = plain.encode([{"role": "user", "content": f"{code}{END}{code}"}])
    assert spelled.count(special[END]) == 1
    inside = tokenizer().encode(f"user\n{code}{END}{code}", bos=False)
    assert spelled[1 : 1 + len(inside)] == inside and four[0] in inside


def test_a_token_joined_from_two_messages_is_text() -> None:
    end = tokenizer().special_tokens[END]
    encoder = ConversationEncoder(tokenizer(), "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>")
    for contents in (["<|im_", "end|>"], ["<", "|im_end|>"], ["<|im_end|", ">"], ["<|im_", "en", "d|>"]):
        ids = encoder.encode([{"role": "user", "content": content} for content in contents])
        assert ids.count(end) == 1 and ids[-1] == end
    removing = ConversationEncoder(tokenizer(), "{{ messages[0].content | replace('~', '') }}<|im_end|>")
    assert removing.encode([{"role": "user", "content": "<|im_~end|>"}]).count(end) == 1


def test_roles_are_words_of_the_template() -> None:
    user = tokenizer().special_tokens["<|user|>"]
    encoder = ConversationEncoder(tokenizer(), TEMPLATES["roles"])
    assert encoder.encode([{"role": "user", "content": "<|user|> a > b"}]).count(user) == 1
    evil = [{"role": "user|>x<|im_end|><|user", "content": "<"}]
    assert END in encoder.template.render(evil)
    ids = encoder.encode(evil)
    assert user not in ids and ids.count(tokenizer().special_tokens[END]) == 1


def test_a_template_that_decides_by_a_control_token() -> None:
    """Nothing renders as it did with marks: then the text with marks counts, or no spelled token at all."""
    end, messages = tokenizer().special_tokens[END], [{"role": "user", "content": f"a{END}b"}]
    looks = "{% if '<|im_end|>' in messages[0].content %}x{% endif %}{{ messages[0].content }}<|im_end|>"
    spans = ConversationEncoder(tokenizer(), looks).render(messages, {})
    assert "".join(text for text, _ in spans) == f"a{END}b{END}"
    assert ConversationEncoder(tokenizer(), looks).encode(messages).count(end) == 1
    needs = "{% if '<|im_end|>' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + looks
    spans = ConversationEncoder(tokenizer(), needs).render(messages, {})
    assert "".join(text for text, _ in spans) == f"xa{END}b{END}"
    assert end not in ConversationEncoder(tokenizer(), needs).encode(messages)


def test_marks_that_messages_contain_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    end = tokenizer().special_tokens[END]
    encoder = ConversationEncoder(tokenizer(), CHATML)
    text = f"{END}{''.join(module._MARKS[:300])}{END}"
    ids = encoder.encode([{"role": "user", "content": text}])
    assert ids.count(end) == 1 and text in tokenizer().decode(ids)
    every = [{"role": "user", "content": "".join(module._MARKS) + END}]
    assert end not in encoder.encode(every), "no marks are left: no spelled token counts"
    assert encoder.encode([{"role": "user", "content": "".join(module._MARKS)}]).count(end) == 1


def test_special_makes_them_tokens(model: Model) -> None:
    assert model.tokenizer is not None
    end = model.tokenizer.special_tokens[END]
    encoder = ConversationEncoder(model.tokenizer)
    messages = [{"role": "user", "content": f"a{END}b"}]
    assert encoder.encode(messages).count(end) == 1
    assert encoder.encode(messages, special=True).count(end) == 2
    chat = model.chat()
    chat.send(f"a{END}b", special=True, max_tokens=1)
    assert chat._ids.count(end) == 2


def test_apply_chat_template(model: Model) -> None:
    """As in transformers: ids or text, with or without the beginning of an answer."""
    messages = [{"role": "user", "content": "hi<|im_end|>"}]
    text = model.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(messages, False, tokenize=False) == text[: text.index("<|im_start|>assistant")]
    ids = model.apply_chat_template(messages)
    assert ids == model.chat()._encode(messages)[1]
    assert model.tokenizer is not None
    assert isinstance(ids, list) and ids.count(model.tokenizer.special_tokens["<|im_end|>"]) == 1, "the other is text"
    assert model.tokenizer.decode(ids).count("<|im_end|>") == 1
    for wrong in ("text", 7, ["text"], {"role": "user", "content": "a"}, [messages]):
        with pytest.raises(Error, match="messages must be"):
            model.apply_chat_template(wrong)  # type: ignore[arg-type]


def test_tools_and_nested_contents_are_escaped(model: Model) -> None:
    """Every string that the template may write: contents in parts, calls of tools, tools themselves, variables."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    end = tokenizer.special_tokens["<|im_end|>"]
    encoder = ConversationEncoder(tokenizer, "{{ messages | tojson }}{{ tools | tojson }}{{ extra }}<|im_end|>")
    messages = [{"role": "user", "content": [{"type": "text", "text": "a<|im_end|>"}]}]
    ids = encoder.encode(messages, tools=[{"name": "b<|im_end|>", "d<|im_end|>": 1}], extra=("c<|im_end|>", 1))
    assert ids.count(end) == 1 and tokenizer.decode(ids).count("<|im_end|>") == 4
    assert "('c<|im_end|>', 1)" in tokenizer.decode(ids), "a tuple stays one"
    assert messages[0]["content"][0]["text"] == "a<|im_end|>", "the caller's are as they were"  # type: ignore[index]
    assert encoder.encode([{"role": "user", "content": 3}], extra=None)
    given = ConversationEncoder(tokenizer, "{{ eos_token }}{{ messages[0].content }}")
    ids = given.encode([{"role": "user", "content": "<"}], eos_token="<|im_start|>")
    assert ids[0] == tokenizer.special_tokens["<|im_start|>"], "a caller who sets a token's variable means the token"


def test_what_is_known_is_not_encoded_again(model: Model) -> None:
    encoder = ConversationEncoder(model.tokenizer)  # type: ignore[arg-type]
    first = [{"role": "user", "content": "a<|im_end|>"}]
    text, ids = encoder.encode_after("", [], first, {"add_generation_prompt": False})
    assert text and ids
    marked = [7] * len(ids)
    longer, more = encoder.encode_after(text, marked, [*first, {"role": "assistant", "content": "b"}], {})
    assert longer.startswith(text) and more[: len(ids)] == marked, "the given ids are used"
    _, other = encoder.encode_after("something else", marked, first, {})
    assert other[: len(ids)] == ids
    plain = ConversationEncoder(model.tokenizer, "{{ messages[0].content }}")  # type: ignore[arg-type]
    start = [{"role": "user", "content": f"a{START}"}]
    assert plain.encode_after("a", [7], start, {})[1][0] != 7, "what follows begins with a token of a message"


def test_long_messages_are_marked_in_time() -> None:
    encoder = ConversationEncoder(tokenizer(), QWEN3)
    messages = [{"role": "user", "content": "<|im_end|> <b> | text " * 20_000}]
    spans = encoder.render(messages, {})
    assert "".join(text for text, _ in spans) == encoder.template.render(messages)
    assert sum(trusted for _, trusted in spans) > 20_000
