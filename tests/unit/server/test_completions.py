"""/v1/completions."""

from __future__ import annotations

import re
import threading
import time
from itertools import chain
from typing import Any

import numpy as np
import pytest

from numballama.model import Model
from numballama.server.answers import Completion
from tests.helpers.http_server import LONG, Running, eventually, read_until

PATH = "/v1/completions"
OPENING = "Once upon a time"
GREEDY: dict[str, Any] = {"prompt": OPENING, "temperature": 0, "max_tokens": 12}


def ids_of(model: Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text)


def completed(server: Running, **body: Any) -> dict[str, Any]:
    """A whole answer of the declared shape."""
    answer = server.post(PATH, GREEDY | body)
    assert answer.status == 200, answer.body
    Completion.model_validate(answer.json, strict=True)
    found: dict[str, Any] = answer.json
    return found


def streamed(server: Running, **body: Any) -> list[dict[str, Any]]:
    answer = server.post(PATH, GREEDY | body | {"stream": True})
    assert answer.status == 200, answer.body
    return answer.events


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


def test_a_prompt(server: Running, model: Model) -> None:
    answer = completed(server)
    assert answer["choices"][0]["text"] == model.generate(OPENING, 12, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["model"] == "story.gguf" and answer["id"].startswith("cmpl-")


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_is_not_streamed(server: Running, n: int) -> None:
    """llama.cpp #10914, PR #10997, #13780, PR #13785, #10720; `test_properties` has more of it."""
    body = {"temperature": 1, "seed": 7, "n": n, "stop": ["zebra", ", th"], "max_tokens": 20}
    whole, events = completed(server, **body), streamed(server, **body)
    for choice in whole["choices"]:
        assert joined(events, choice["index"]) == choice["text"]
        assert "zebra" not in choice["text"]
        ends = [c for event in events for c in event["choices"] if c["index"] == choice["index"] and c["finish_reason"]]
        assert [(c["finish_reason"], c["stop_reason"]) for c in ends] == [
            (choice["finish_reason"], choice["stop_reason"])
        ]
    assert all(len(event["choices"]) == 1 and "usage" not in event for event in events)


def test_usage_of_a_stream(server: Running) -> None:
    """sglang #954, ollama #4448, kubeai #283."""
    events = streamed(server, stream_options={"include_usage": True})
    assert [event["choices"] for event in events[-1:]] == [[]]
    assert all(event["usage"] is None and event["choices"] for event in events[:-1])
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert len({(event["id"], event["created"], event["object"]) for event in events}) == 1


def test_usage_is_what_was_counted(server: Running, model: Model) -> None:
    before = server.stats.generated_tokens
    usage = completed(server, prompt=[OPENING, "A dog"], n=2, temperature=1)["usage"]
    assert usage["prompt_tokens"] == len(ids_of(model, OPENING)) + len(ids_of(model, "A dog"))
    assert usage["completion_tokens"] == server.stats.generated_tokens - before
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_cached_tokens(server: Running, model: Model) -> None:
    prompt = ids_of(model, "Tom and Lily and the big red fire engine went to the zoo. " * 4)
    first, second = (completed(server, prompt=prompt) for _ in range(2))
    assert len(prompt) > 40
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(prompt) - 1) // 32 * 32
    assert first["choices"] == second["choices"]


def test_a_salt_shares_nothing(server: Running, model: Model) -> None:
    prompt = ids_of(model, "A cat and a bird and a fish lived in a house by the sea for years. " * 4)
    found = [completed(server, prompt=prompt, cache_salt=salt) for salt in ("a", "b", "b")]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in found]
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_kinds_of_prompts(server: Running, model: Model) -> None:
    """Texts and ids, one and many, give the same."""
    one, two = ids_of(model, OPENING), ids_of(model, "A dog")
    texts = completed(server, prompt=[OPENING, "A dog"])["choices"]
    assert completed(server, prompt=[one, two])["choices"] == texts
    assert completed(server, prompt=one)["choices"] == texts[:1]
    events = streamed(server, prompt=[OPENING, "A dog"])
    assert [joined(events, index) for index in (0, 1)] == [choice["text"] for choice in texts]


def test_echo_and_log_probabilities_of_the_prompt(server: Running, model: Model) -> None:
    """What lm-eval sends: ids, echo, logprobs, one token."""
    ids = ids_of(model, "A little dog ran home.")
    choice = completed(server, prompt=[ids], echo=True, logprobs=2, max_tokens=1)["choices"][0]
    logits = model.logits(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = choice["logprobs"]
    assert choice["text"].startswith("A little dog ran home.")
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(ids) + 1 == len(found["text_offset"])
    for row, token in enumerate(ids[1:]):
        assert found["token_logprobs"][row + 1] == pytest.approx(expected[row, token], abs=1e-3)
        assert len(found["top_logprobs"][row + 1]) in (2, 3)
        assert max(found["top_logprobs"][row + 1].values()) == pytest.approx(expected[row].max(), abs=1e-3)
    for offset, token in list(zip(found["text_offset"], found["tokens"], strict=True))[2:]:
        assert choice["text"][offset:].startswith(token)
    streams = [e["choices"][0] for e in streamed(server, prompt=[ids], echo=True, logprobs=2, max_tokens=1)]
    assert "".join(each["text"] for each in streams) == choice["text"]
    assert list(chain(*(each["logprobs"]["tokens"] for each in streams))) == found["tokens"]
    assert list(chain(*(each["logprobs"]["token_logprobs"] for each in streams))) == pytest.approx(
        found["token_logprobs"], abs=1e-3
    )


def test_echo_alone(server: Running) -> None:
    answer = completed(server, echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == OPENING and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    events = streamed(server, echo=True, max_tokens=0)
    assert joined(events) == OPENING and events[-1]["choices"][0]["finish_reason"] == "length"


def test_logits_of_a_prompt_have_a_limit(model: Model) -> None:
    from numballama.server.settings import Settings
    from tests.helpers.http_server import serving

    with serving(model, Settings(max_logits=5 * 4 * model.config.vocab_size)) as server:
        body = GREEDY | {"echo": True, "logprobs": 0}
        assert server.post(PATH, body | {"prompt": [1, 2, 3, 4, 5]}).status == 200
        assert server.post(PATH, body | {"prompt": [1, 2, 3, 4, 5, 6]}).error["param"] == "echo"


def test_clients_that_leave_do_not_have_logits_side_by_side(either: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that computes them goes on without its client; the next prompt waits for it."""
    running, most, go_on = [0], [0], threading.Event()

    def held(ids: list[int], top: int) -> list[None]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert go_on.wait(LONG)
        running[0] -= 1
        return [None] * len(ids)

    monkeypatch.setattr(either.service.model, "prompt_logprobs", held)
    connections = [either.begin(PATH, GREEDY | {"echo": True, "logprobs": 0}) for _ in range(3)]
    eventually(lambda: either.service.active == 3 and running[0], "the first prompt")
    for connection in connections[:2]:
        connection.close()
    eventually(lambda: either.service.active == 1, "the end of two requests")
    time.sleep(0.1)
    assert most == [1]
    go_on.set()
    assert read_until(connections[2], b"\r\n").startswith(b"HTTP/1.1 200")
    connections[2].close()
    assert most == [1]


def test_log_probabilities(server: Running, model: Model) -> None:
    choice = completed(server, logprobs=3)["choices"][0]
    responses = list(model.stream(OPENING, 12, temperature=0, logprobs=3))
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(
        [r.logprobs.logprob for r in responses if r.logprobs], abs=1e-3
    )
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    events = streamed(server, logprobs=3)
    assert (
        list(chain(*(e["choices"][0]["logprobs"]["text_offset"] for e in events))) == choice["logprobs"]["text_offset"]
    )


@pytest.mark.parametrize("prompt", [OPENING, "The café 🐕"])
def test_offsets_of_a_stream_are_those_of_the_whole(server: Running, prompt: str) -> None:
    """Text that a stop string may begin with is held back, and so are bytes of a character: their tokens have come."""
    body: dict[str, Any] = {"prompt": prompt, "logprobs": 0, "echo": True, "max_tokens": 40, "n": 2}
    body |= {"temperature": 1.5, "seed": 7, "stop": ["  ", " tqx", " aqx", ",qx"]}
    for choice in completed(server, **body)["choices"]:
        parts = [e["choices"][0] for e in streamed(server, **body) if e["choices"][0]["index"] == choice["index"]]
        offsets = chain(*(each["logprobs"]["text_offset"] for each in parts if each["logprobs"]))
        assert list(offsets) == choice["logprobs"]["text_offset"]


def test_stop(server: Running) -> None:
    choice = completed(server, stop=" little")["choices"][0]
    assert choice["text"] == ", there was a"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " little")
    token = server.post("/tokenize", {"content": "girl"}).json["tokens"][0]
    choice = completed(server, stop_token_ids=[token])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)


@pytest.mark.parametrize("n", [1, 2])
def test_min_tokens_hold_stop_strings_back(either: Running, n: int) -> None:
    body: dict[str, Any] = {"stop": [","], "n": n, "max_tokens": 60}
    assert completed(either, **body)["choices"][0]["text"] == ""
    choices = completed(either, **body, min_tokens=7)["choices"]
    for choice in choices:
        assert choice["text"].startswith(", there was a little girl") and choice["text"].count(",") == 1
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ",")
        assert joined(streamed(either, **body, min_tokens=7), choice["index"]) == choice["text"]


def test_settings_have_an_effect(server: Running) -> None:
    plain = completed(server)["choices"][0]["text"]
    token = server.post("/tokenize", {"content": "girl"}).json["tokens"][0]
    assert "girl" in plain and "girl" not in completed(server, logit_bias={str(token): -100})["choices"][0]["text"]
    for changed in ({"repetition_penalty": 2.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert completed(server, max_tokens=60, **changed) != completed(server, max_tokens=60)
    for greedy in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1.0}):
        assert completed(server, temperature=1, **greedy)["choices"][0]["text"] == plain
    one, two = (completed(server, temperature=1, seed=seed)["choices"] for seed in (1, 1))
    assert one == two
    assert len(completed(server, max_completion_tokens=3, logprobs=0)["choices"][0]["logprobs"]["tokens"]) == 3


def test_defaults_are_those_of_openai(server: Running, model: Model) -> None:
    answer = server.post(PATH, {"prompt": OPENING, "seed": 3}).json
    assert answer["usage"]["completion_tokens"] == 16
    expected = model.generate(OPENING, 16, temperature=1, top_p=1, top_k=0, seed=3)
    assert answer["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [["a"]]}, "prompt.0.0"),
        ({"prompt": [1, "a"]}, "prompt.0"),
        ({"prompt": [1] * 513}, "prompt"),
        ({"prompt": "a " * 3000}, "prompt"),
        ({"prompt": [[1] * 512] * 2, "n": 16}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_wrong_fields(server: Running, body: dict[str, Any], param: str | None) -> None:
    answer = server.post(PATH, GREEDY | body)
    if param is None:  # an empty text begins with BOS, as for the peers
        assert answer.status == 200
        return
    assert answer.status == 400
    assert answer.error["param"] == param and answer.error["type"] == "invalid_request_error"


def test_a_prompt_that_does_not_fit_is_named_so(server: Running) -> None:
    """vLLM #35541, #40926: such a request hung."""
    assert server.post(PATH, GREEDY | {"prompt": [1] * 513}).error["code"] == "context_length_exceeded"


FAR_TOO_LONG = "A cat sat. " * 4000
MESSAGES = [{"role": "user", "content": FAR_TOO_LONG}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"prompt": FAR_TOO_LONG}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/responses", {"input": FAR_TOO_LONG}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
    ],
)
def test_a_prompt_far_beyond_the_context_is_named_so_too(server: Running, path: str, body: dict[str, Any]) -> None:
    """It is beyond the limit of all prompts together as well, which is not what its client has to know."""
    error = server.post(path, body).error
    assert error["code"] == "context_length_exceeded" and error["param"] == next(iter(body))
    assert re.match(r"the prompt has [\d,]+ tokens and the context 512; shorten it, ", error["message"])


def test_prompts_that_fit_may_be_too_many_together(server: Running) -> None:
    many = server.post(PATH, GREEDY | {"prompt": [[1] * 500] * 17}).error
    assert many["code"] == "invalid_value" and many["message"].startswith("n times the tokens of all prompts is 8,500")


@pytest.mark.parametrize("field", ["regex", "structured_outputs"])
def test_a_text_that_cannot_follow_its_grammar_is_the_requests_fault(server: Running, field: str) -> None:
    """Its states grow with each vowel, which the trial of the grammar does not reach."""
    regex = r"[\s\S]*[aeiou][\s\S]{60}y"
    body = GREEDY | {"max_tokens": 200, field: regex if field == "regex" else {"regex": regex}}
    answer = server.post(PATH, body)
    assert answer.status == 400 and answer.error["param"] == field
    assert answer.error["message"].startswith(f"{field} is too complex to follow here")
    assert server.post(PATH, body | {"stream": True}).events[-1]["error"]["param"] == field
