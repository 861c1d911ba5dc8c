"""Conversations: tokens that are computed again, interrupted answers, refused messages."""

from __future__ import annotations

import copy
import pickle
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import numballama
from numballama import Interrupted, SamplingParams
from numballama.chat.builtin_templates import CHATML
from numballama.chat.conversation import Chat
from numballama.chat.encoder import NO_BOS, SPELLED, TWICE_BOS
from numballama.errors import ContextError, Error
from numballama.model import Model
from tests.helpers.bpe import chat_model
from tests.helpers.random_models import MODELS

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


PAGE = 32
"""Tokens in a page of the KV cache. Whole pages are reused."""


def record_prompts(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of every prompt that reaches the runner from now on."""
    prompts: list[list[int]] = []
    start = model.token_engine.runner.start

    def recording(slot: int, params: Any, prompt: Any, *rest: Any) -> None:
        prompts.append(list(prompt))
        start(slot, params, prompt, *rest)

    monkeypatch.setattr(model.token_engine.runner, "start", recording)
    return prompts


def forget(model: Model) -> None:
    """Empty the KV cache."""
    with model.exclusive():
        pass


def test_a_turn_reads_only_what_is_new(model: Model) -> None:
    """And what is not in a whole page."""
    forget(model)
    chat = model.chat("Be brief.")
    assert chat.turn is None
    held = 0
    for text in ("hello", "and then?", "why <|im_end|> not?"):
        answer = chat.send(text, **GREEDY)
        turn = chat.turn
        assert turn is not None and turn.tokens == 8 and turn.finish_reason == "length"
        assert turn.reused_tokens == held // PAGE * PAGE
        assert turn.prefilled_tokens == turn.prompt_tokens - turn.reused_tokens < 40 + PAGE
        held = turn.prompt_tokens + 8 - 1  # the last token of an answer is never computed
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert chat.messages[0]["content"] == "Be brief." and chat.messages[3]["content"] == "and then?"


def test_what_the_cache_holds_changes_no_answer(model: Model) -> None:
    """A continued conversation gives the tokens that the same ids give from an empty cache."""
    chat = model.chat("Be brief, and be polite. Be brief, and be polite.")
    chat.send("hello", **GREEDY)
    said = [*chat._history, {"role": "user", "content": "more"}]
    rendered, ids = chat._encode(said)
    assert rendered == chat.template.render([{"role": "system", "content": chat.system or ""}, *said])
    assert ids[: len(chat._ids)] == chat._ids
    continued = [piece.token for piece in chat.stream("more", **GREEDY)]
    assert chat.turn is not None and chat.turn.reused_tokens >= PAGE
    forget(model)
    options: dict[str, Any] = {**GREEDY, "stop_token_ids": chat._stop_token_ids}
    for reuse in (True, False):
        stream = model.stream_ids(ids, **options, reuse_prefix=reuse)
        pieces = list(stream)
        assert [piece.token for piece in pieces] == continued and pieces[0].cached_tokens == 0


def test_other_streams_leave_a_conversation_its_pages(path: Path) -> None:
    """As long as there are enough. What begins alike is computed once, by whichever chat."""
    with numballama.compile(path, threads=1, context=256, kv_tokens=512) as model:
        system = "Be brief, and be polite. Be brief, and be polite."
        chat, other = model.chat(system), model.chat(system)
        first = chat.send("hello", **GREEDY)
        assert chat.turn is not None and chat.turn.reused_tokens == 0
        held = chat.turn.prompt_tokens + 8 - 1
        model.generate("something else", **GREEDY)
        assert chat.send("again", **GREEDY)
        assert chat.turn is not None and chat.turn.reused_tokens == held // PAGE * PAGE >= PAGE
        assert other.send("hello", **GREEDY) == first
        assert other.turn is not None and PAGE <= other.turn.reused_tokens < other.turn.prompt_tokens
        model.logits([1, 2, 3])
        assert other.send("x", **GREEDY) and other.turn.reused_tokens == 0, "this takes the whole cache"
        for number in range(6):
            model.generate(f"{number} " * 60, max_tokens=4, temperature=0)
        assert other.send("y", **GREEDY) and other.turn.reused_tokens == 0, "its pages were the oldest"


def test_streams_of_two_chats_in_turns(model: Model) -> None:
    alone = [list(model.chat().stream(text, **GREEDY)) for text in ("a b c", "d e f")]
    pairs = list(zip(*(model.chat().stream(text, **GREEDY) for text in ("a b c", "d e f")), strict=True))
    for which in (0, 1):
        assert [pair[which].token for pair in pairs] == [piece.token for piece in alone[which]]


def test_reset_and_system(model: Model) -> None:
    forget(model)
    chat = model.chat()
    first = chat.send("hello", **GREEDY)
    chat.send("more", **GREEDY)
    chat.reset()
    assert chat.messages == [] and chat.turn is None
    assert chat.send("hello", **GREEDY) == first
    assert chat.turn is not None and chat.turn.reused_tokens == (chat.turn.prompt_tokens - 1) // PAGE * PAGE
    chat.system = "A pirate speaks."
    assert chat.messages[0] == {"role": "system", "content": "A pirate speaks."}
    chat.send("more", **GREEDY)
    assert chat.turn.reused_tokens == 0 and len(chat.messages) == 5, "it begins otherwise"
    chat.system = ""
    assert chat.system is None
    with pytest.raises(Error, match="system message must be a string"):
        chat.system = 7  # type: ignore[assignment]


def test_a_conversation_that_does_not_fit(path: Path) -> None:
    with numballama.compile(path, context=40, threads=1) as model:
        chat = model.chat()
        chat.send("a", **GREEDY)
        before = chat.messages
        with pytest.raises(ContextError, match=r"would have \d+ tokens and the context holds 40: reset\(\)"):
            chat.send("long " * 40, **GREEDY)
        assert chat.messages == before
        chat.reset()
        answer = chat.send("a", temperature=0, max_tokens=1000)
        assert chat.turn is not None and (chat.turn.finish_reason, chat.turn.stop_reason) == ("length", "context")
        assert chat.turn.prompt_tokens + chat.turn.tokens == 41 and chat.messages[-1]["content"] == answer
        with pytest.raises(ContextError):
            chat.send("b", **GREEDY)


def test_a_stream_read_in_part_is_the_answer_so_far(model: Model) -> None:
    chat = model.chat()
    whole = [piece.text for piece in chat.stream("hello", **GREEDY)]
    chat.reset()
    stream = chat.stream("hello", **GREEDY)
    assert chat.messages == [], "nothing is said before the answer begins"
    parts = [next(stream).text for _ in range(3)]
    assert parts == whole[:3] and chat.messages[1]["content"] == "".join(parts)
    assert chat.turn is not None and (chat.turn.tokens, chat.turn.finish_reason) == (3, None)
    later = chat.stream("go on", **GREEDY)
    next(later)
    assert [message["content"] for message in chat.messages[:3]] == ["hello", "".join(parts), "go on"]
    with pytest.raises(Error, match="continued without"):
        next(stream)
    next(later)


@pytest.mark.parametrize("how", ["before", "after", "signal"])
def test_ctrl_c_keeps_what_was_said(model: Model, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    chat = model.chat()
    whole = [piece.text for piece in chat.stream("hello", **GREEDY)]
    chat.reset()
    runner, calls = model.token_engine.runner, []
    submit = runner.submit

    def interrupted(batch: Any) -> int:
        calls.append(None)
        if len(calls) == 5 and how == "signal":
            signal.raise_signal(signal.SIGINT)
        if len(calls) == 5 and how == "before":
            raise KeyboardInterrupt
        ticket = submit(batch)
        if len(calls) == 5 and how == "after":
            raise KeyboardInterrupt
        return ticket

    monkeypatch.setattr(runner, "submit", interrupted)
    with pytest.raises(Interrupted) as caught:
        chat.send("hello", **GREEDY)
    said = caught.value.text
    assert said and said == "".join(whole[:4])
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    monkeypatch.undo()
    assert chat.send("more", **GREEDY)
    assert len(chat.messages) == 4
    chat.reset()
    assert [piece.text for piece in chat.stream("hello", **GREEDY)] == whole


def test_stop_strings_and_the_end_of_a_turn(path: Path, tmp_path: Path) -> None:
    with numballama.compile(path, threads=1) as model:
        chat = model.chat()
        pieces = list(chat.stream("hello", **GREEDY))
        whole = "".join(piece.text for piece in pieces)
        chat.reset()
        stop = whole[4:7]
        assert chat.send("hello", **GREEDY, stop=stop) == whole[: whole.index(stop)]
        assert chat.turn is not None and (chat.turn.finish_reason, chat.turn.stop_reason) == ("stop", stop)
        assert chat.messages[-1]["content"] == whole[: whole.index(stop)]
        assert chat.send("more", **GREEDY)
        assert model.tokenizer is not None
        end = next(piece.token for piece in pieces[1:] if piece.token != pieces[0].token)
        chat.reset()
        chat._stop_token_ids |= {end}  # as if the vocabulary called it the end of a turn
        pieces = list(chat.stream("hello", **GREEDY))
        assert pieces[-1].token == end and pieces[-1].finish_reason == "stop" and pieces[-1].text == ""
        assert pieces[-1].stop_reason == end and chat.turn.stop_reason == end
        rendered, ids = chat._encode([*chat._history, {"role": "user", "content": "x"}])
        assert end not in ids[len(chat._ids) - 1 : len(chat._ids)] and rendered.startswith(chat._rendered)


def test_templates(path: Path, tmp_path: Path) -> None:
    own = chat_model(tmp_path, template="{{ messages[-1].content }}|")
    with numballama.compile(own, threads=1) as model:
        chat = model.chat()
        assert chat._encode([{"role": "user", "content": "abc"}])[0] == "abc|"
        assert chat.send("abc", **GREEDY)
        chat.send("abd", **GREEDY)
        assert chat.turn is not None and chat.turn.reused_tokens < 4, "the template shows the last message alone"
        assert model.chat(template=CHATML)._encode([{"role": "user", "content": "a"}])[0].startswith("<|im_start|>user")
        with pytest.raises(Error, match="does not compile"):
            model.chat(template="{{")
        empty = model.chat(template="{{ '' }}")
        with pytest.raises(Error, match="at least one token"):
            empty.send("x")


def test_a_saved_conversation_is_continued(model: Model) -> None:
    chat = model.chat("Be brief.")
    chat.send("hello", **GREEDY)
    saved = chat.messages
    ids = chat._encode([*chat._history, {"role": "user", "content": "more"}])[1]
    for other in (model.chat(messages=saved), model.chat("Another.")):
        other.messages = saved
        assert other.messages == saved and other.system == "Be brief." and other.turn is None
        encoded = other._encode([*other._history, {"role": "user", "content": "more"}])[1]
        assert model.tokenizer is not None and model.tokenizer.decode(encoded) == model.tokenizer.decode(ids)
        assert other.send("more", **GREEDY) and len(other.messages) == 5
    saved[1]["content"] = "changed"
    assert chat.messages[1]["content"] == "hello", "a copy"
    chat.messages = saved[1:]
    assert chat.system is None and len(chat.messages) == 2


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["text", 7, [7], ["text"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_messages_that_are_refused(model: Model, wrong: Any) -> None:
    with pytest.raises(Error, match=r"messages? must be"):
        model.chat(messages=wrong)
    with pytest.raises(Error, match="given twice"):
        model.chat("Be brief.", [{"role": "system", "content": "Be long."}])


def test_template_kwargs(path: Path, tmp_path: Path) -> None:
    own = chat_model(tmp_path, template="{{ messages[-1].content }}{% if enable_thinking %}think{% endif %}{{ tools }}")
    with numballama.compile(own, threads=1) as model:
        messages = [{"role": "user", "content": "abc"}]
        assert model.chat(enable_thinking=True)._encode(messages)[0] == "abcthinkNone"
        assert model.chat()._encode(messages)[0] == "abcNone"
        text = model.apply_chat_template(messages, tools=[{"a": 1}], tokenize=False, enable_thinking=True)
        assert text == "abcthink[{'a': 1}]"


def test_ignore_eos_goes_on_after_a_turn(model: Model) -> None:
    chat = model.chat()
    whole = list(chat.stream("hello", **GREEDY))
    end = next(piece.token for piece in whole[1:] if piece.token != whole[0].token)
    chat.reset()
    chat._stop_token_ids |= {end}
    assert [piece.token for piece in chat.stream("hello", **GREEDY, ignore_eos=True)] == [p.token for p in whole]
    chat.reset()
    assert len(list(chat.stream("hello", params=SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))) == 3


@pytest.mark.parametrize("wrong", [None, 7, b"x"])
def test_what_is_no_message(model: Model, wrong: Any) -> None:
    with pytest.raises(Error, match="a message must be a string"):
        model.chat().stream(wrong)
    with pytest.raises(Error, match="temperature"):
        model.chat().stream("x", temperature=-1)
    with pytest.raises(Error, match="n must be 1, found 2"):
        model.chat().send("x", n=2)
    with pytest.raises(Error, match="lone surrogate"):
        model.chat().send("\ud800")


def test_copies_and_pickles(model: Model) -> None:
    chat = model.chat("Be brief.")
    chat.send("hello", **GREEDY)
    for other in (copy.copy(chat), copy.deepcopy(chat)):
        assert other.messages == chat.messages and other.turn == chat.turn and other.system == "Be brief."
        other.send("more", **GREEDY)
        assert other.turn is not None and other.turn.reused_tokens > 0
        assert len(chat.messages) == 3 and chat.turn is not None and chat.turn.tokens == 8
    with pytest.raises(Error, match=r"a chat cannot be pickled: save chat\.messages"):
        pickle.dumps(chat)
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(Error, match=r"neither copied nor pickled: pass its path, and call numballama\.compile\(\)"):
            call(model)
    response = next(iter(model.stream("hello", max_tokens=1)))
    assert pickle.loads(pickle.dumps(response)) == response


def test_arguments_of_transformers(model: Model) -> None:
    """Those without an effect here are errors, not variables of the template."""
    messages = [{"role": "user", "content": "hi"}]
    refused: dict[str, Any] = {"return_tensors": "pt", "padding": True, "truncation": True}
    for name, value in refused.items():
        with pytest.raises(Error, match=f"{name} is not supported: "):
            model.apply_chat_template(messages, **{name: value})
        with pytest.raises(Error, match=f"{name} is not supported: "):
            model.chat(**{name: value})
    assert model.apply_chat_template(messages, return_dict=False, padding=False) == model.apply_chat_template(messages)
    assert model.apply_chat_template(messages, tokenize=False, chat_template="{{ eos_token }}x") == "<|im_end|>x"
    assert model.apply_chat_template(m for m in messages) == model.apply_chat_template(messages)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["user", "assistant"]), max_size=3), st.text(max_size=8), st.booleans())
@example(["user"], "<|im_end|>\n<|im_start|>system", True)
@example([], " It is \n", False)
def test_the_last_message_is_continued(model: Model, roles: list[str], text: str, named: bool) -> None:
    """Nothing follows its text, and control tokens in it are text as ever."""
    messages = [{"role": role, "content": "one <|im_end|>"} for role in roles]
    messages.append({"role": "assistant", "content": text})
    passed: dict[str, Any] = {"conversation" if named else "messages": messages}
    rendered = model.apply_chat_template(**passed, tokenize=False, continue_final_message=True)
    whole = model.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert isinstance(rendered, str) and isinstance(whole, str)
    assert whole.startswith(rendered) and rendered.endswith(f"assistant\n{text}")
    ids = model.apply_chat_template(**passed, continue_final_message=True)
    assert isinstance(ids, list) and model.tokenizer is not None
    closed = model.apply_chat_template(messages, add_generation_prompt=False)
    starts = model.tokenizer.special_tokens["<|im_start|>"]
    assert ids.count(starts) == closed.count(starts) == len(messages)  # type: ignore[union-attr]
    end = model.tokenizer.special_tokens["<|im_end|>"]
    assert ids.count(end) == len(roles)
    for prompted in (False, None):
        assert model.apply_chat_template(messages, prompted, continue_final_message="content") == ids


def test_contradictions_about_the_last_message(model: Model) -> None:
    messages = [{"role": "assistant", "content": "It is"}]
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"messages": messages, "add_generation_prompt": True, "continue_final_message": True},
            "contradict each other",
        ),
        ({"messages": messages, "conversation": messages}, "a conversation is wanted once"),
        ({}, "a conversation is wanted once"),
        ({"messages": [], "continue_final_message": True}, "the last message has no 'content'"),
        ({"messages": messages, "continue_final_message": "x"}, "the last message has no 'x'"),
        ({"messages": messages, "continue_final_message": 3}, "must be True, False or a key of messages, found 3"),
    ]
    for arguments, message in refused:
        with pytest.raises(Error, match=message):
            model.apply_chat_template(**arguments)
    with pytest.raises(Error, match=r"continue_final_message is not supported: model\.apply_chat_template has it"):
        model.chat(continue_final_message=True)
    whole = model.apply_chat_template(messages)
    for off in (False, None, ""):
        assert model.apply_chat_template(conversation=messages, continue_final_message=off) == whole


def test_a_template_without_bos_is_noted_once(tmp_path: Path) -> None:
    """transformers leaves BOS out, llama.cpp adds it."""
    path = chat_model(tmp_path)
    with numballama.compile(path, threads=1) as model:
        assert model.tokenizer is not None
        model.tokenizer.bos_id, model.tokenizer.add_bos = model.tokenizer.special_tokens["<|begin_of_text|>"], True
        messages = [{"role": "user", "content": "hi"}]
        ids = model.apply_chat_template(messages)
        assert model.tokenizer.bos_id not in ids
        model.apply_chat_template(messages)
        model.chat().send("hi", **GREEDY)
        assert model.notes.count(NO_BOS) == 1
        model.notes.clear()
        for prompt, count in (("hi", 0), ("<|begin_of_text|>hi", 1), ("<|begin_of_text|>hi", 1)):
            model.generate(prompt, max_tokens=1, special=True)
            assert model.notes.count(TWICE_BOS) == count
        model.notes.clear()
        model.chat(template="{{ bos_token }}" + CHATML).send("hi", **GREEDY)
        assert model.notes == []


def test_a_prompt_that_spells_control_tokens_is_noted_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.tokenizer is not None
    text, end = "a<|im_end|>b", model.tokenizer.special_tokens["<|im_end|>"]
    prompts = record_prompts(model, monkeypatch)
    model.generate("a<|b", max_tokens=1)
    model.generate(text, max_tokens=1, special=True)
    assert end in prompts[-1] and SPELLED not in model.notes
    for _ in range(2):
        model.generate(text, max_tokens=1)
        assert end not in prompts[-1]
    assert model.notes.count(SPELLED) == 1 and len(prompts) == 4


def test_without_a_tokenizer(models: Path) -> None:
    with numballama.compile(models / "stories260K.bin") as model, pytest.raises(Error, match="carries no tokenizer"):
        model.chat()


def test_a_sentencepiece_model_talks_llama_2(models: Path) -> None:
    """The first space of an answer goes, as in any text, and the template brings it back."""
    with numballama.compile(models / "stories260K.bin", models / "tok512.model") as model:
        chat = model.chat()
        answer = chat.send("Once upon a time there was a girl who had a dog. One day", temperature=0, max_tokens=20)
        assert answer and not answer.startswith(" ")
        assert chat.turn is not None
        before = chat.turn.prompt_tokens
        chat.send("And then?", temperature=0, max_tokens=5)
        assert chat.turn.reused_tokens >= before // PAGE * PAGE >= PAGE
        assert isinstance(chat, Chat) and isinstance(chat, numballama.Chat)


def test_smollm2_answers(models: Path) -> None:
    """The real model, if it is there: turns end by themselves, and the second knows the first."""
    path = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("no SmolLM2-135M-Instruct.Q4_1.gguf in NUMBALLAMA_TEST_MODELS")
    with numballama.compile(path) as model:
        chat = model.chat()
        assert "Paris" in chat.send("What is the capital of France?", temperature=0)
        assert chat.turn is not None and chat.turn.finish_reason == "stop"
        chat.send("Say it again.", temperature=0, max_tokens=20)
        assert chat.turn.prefilled_tokens < 20 < chat.turn.reused_tokens


def test_messages_of_any_iterable(model: Model) -> None:
    @dataclass
    class Said:
        role: str
        content: str

    chat = model.chat(messages=(Said("user", "a"), {"role": "assistant", "content": np.str_("b")}))  # type: ignore[arg-type]
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat.messages == expected and type(chat.messages[1]["content"]) is str
    chat.messages = (dict(message) for message in expected)  # type: ignore[assignment]
    assert chat.messages == expected
    for wrong in ({"role": "user", "content": "a"}, b"x"):
        with pytest.raises(Error, match="messages must be a list"):
            chat.messages = wrong  # type: ignore[assignment]
    assert chat.messages == expected


def test_templates_are_compiled_once(model: Model) -> None:
    assert model.chat().template is model.chat().template is not model.chat(template=CHATML + " ").template
    for number in range(20):
        model.chat(template=f"{{{{ {number} }}}}")
    assert len(model._encoders._made) <= model._encoders.MOST
    for wrong in (7, [CHATML], Path("t.jinja")):
        with pytest.raises(Error, match="a chat template must be a text in jinja2"):
            model.chat(template=wrong)  # type: ignore[arg-type]
