"""The packaged story model, restricted to schemas, expressions and grammars, through the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import numballama
from numballama import SamplingParams
from numballama.errors import Error
from numballama.generate import GenerationResponse
from numballama.model import Model

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALLS = """
start: TEXT call
TEXT: /[^<]{0,20}/
call: "<call>" %json {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
                      "required": ["n"], "additionalProperties": false} "</call>"
"""


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with numballama.compile(None, device="cpu", max_sequences=4, context=512, kv_tokens=320) as found:
        yield found


def read(model: Model, **options: Any) -> tuple[str, GenerationResponse]:
    responses = list(model.stream("Once upon a time", **options))
    return "".join(response.text for response in responses), responses[-1]


BOUNDS = st.tuples(st.integers(-50, 50), st.integers(0, 60)).map(lambda p: {"minimum": p[0], "maximum": p[0] + p[1]})
LEAVES = st.one_of(
    BOUNDS.map(lambda bounds: {"type": "integer", **bounds}),
    st.integers(0, 4).map(lambda least: {"type": "string", "minLength": least, "maxLength": least + 4}),
    st.sampled_from(["^[a-z]{2,5}$", "^(cat|dog)s?$", "^[0-9]{3}-[0-9]{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(st.sampled_from(["red", "blue", 3, True, None, "é"]), min_size=1, unique=True).map(
        lambda values: {"enum": values}
    ),
)
SCHEMAS = st.one_of(
    LEAVES,
    st.dictionaries(st.sampled_from(["a", "name", "x y"]), LEAVES, min_size=1).map(
        lambda found: {"type": "object", "properties": found, "required": [*found], "additionalProperties": False}
    ),
    LEAVES.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3}),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, temperature=st.sampled_from([0, 0.8, 5.0]), seed=st.integers(0, 2**32))
def test_every_finished_text_is_valid(model: Model, schema: dict[str, Any], temperature: float, seed: int) -> None:
    settings = {"temperature": temperature, "top_k": 0, "top_p": 1, "seed": seed, "max_tokens": 120}
    text, last = read(model, json_schema=schema, **settings)
    if last.finish_reason == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:
        assert last.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_schemas_expressions_and_grammars(model: Model, temperature: float) -> None:
    options = {"temperature": temperature, "top_p": 1.0, "seed": 3, "max_tokens": 100}
    text, last = read(model, json_schema=json.dumps(PERSON), **options)
    jsonschema.validate(json.loads(text), PERSON)
    assert (last.finish_reason, last.stop_reason) == ("stop", None)
    text, _ = read(model, regex=r"(\d{4})-[a-f]+ [^a-z]{2}\.", **options)
    assert re.fullmatch(r"(\d{4})-[a-f]+ [^a-z]{2}\.", text, re.ASCII | re.DOTALL) or len(text) > 40
    text, _ = read(model, grammar='root ::= "- " ("yes" | "no") "\\n" [0-9]{2}', **options)
    assert re.fullmatch(r"- (yes|no)\n[0-9]{2}", text)
    text, _ = read(model, grammar=CALLS, **options)
    found = re.fullmatch(r"[^<]{0,20}<call>(.*)</call>", text, re.DOTALL)
    assert found and 0 <= json.loads(found[1])["n"] <= 99
    text, last = read(model, json_schema="json_object", **{**options, "max_tokens": 30})
    assert text.startswith("{") and (last.finish_reason == "length" or isinstance(json.loads(text), dict))


def test_forced_text_needs_no_runs(model: Model) -> None:
    """With log probabilities each token is sampled, so that is the same without forced tokens."""
    regex = "My name is (Tom|Lily|Anna) and I like (red|blue) balls very much because they are round[.]"
    runs, texts = [], []
    for options in ({"logprobs": 0}, {}):
        with model.engine() as engine:
            before = engine.stats()
            request = engine.submit("Once", SamplingParams(regex=regex, temperature=0, **options), reuse_prefix=False)
            responses = list(request)
            after = engine.stats()
        texts.append("".join(response.text for response in responses))
        runs.append(after.steps - before.steps)
        assert after.generated_tokens - before.generated_tokens == len(responses)
        assert responses[-1].finish_reason == "stop"
    assert texts[0] == texts[1] and re.fullmatch(regex, texts[1])
    assert runs[1] <= runs[0] // 2


def test_a_space_in_front_is_part_of_the_text(model: Model) -> None:
    assert "".join(r.text for r in model.stream(None, regex=" (a|b)", temperature=0)) in (" a", " b")


def test_where_a_text_ends(model: Model) -> None:
    eos = model.tokenizer.eos_id if model.tokenizer else None
    biased = {"temperature": 0, "logit_bias": {eos: 100}, "max_tokens": 20}
    text, last = read(model, regex="[a-z]{3}x*", **biased)
    assert re.fullmatch("[a-z]{3}", text) and (last.finish_reason, last.stop_reason) == ("stop", eos)
    text, last = read(model, regex="[a-z]{3}x*", min_tokens=8, **biased)  # held back while something else may come
    assert re.fullmatch("[a-z]{3}x{3,}", text)
    text, last = read(model, regex="[a-z]{3}", min_tokens=8, **biased)
    assert re.fullmatch("[a-z]{3}", text) and (last.finish_reason, last.stop_reason) == ("stop", None)
    text, last = read(model, regex="[a-z]{30}", temperature=0, max_tokens=4)
    assert len(text) < 30 and last.finish_reason == "length"
    text, last = read(model, regex="abcdef", stop="de", temperature=0)
    assert (text, last.finish_reason, last.stop_reason) == ("abc", "stop", "de")
    with pytest.raises(Error, match="ignore_eos cannot be used with regex"):
        read(model, regex="a", ignore_eos=True)


def test_several_texts_log_probabilities_and_preemption(model: Model) -> None:
    """The three texts of a request need more pages than there are, however the two requests fall in time."""
    params = SamplingParams(regex="[a-z]{200}", temperature=1.0, seed=4, n=3, logprobs=2, max_tokens=210)
    prompt = "Lily and Tom went to the park. " * 6
    engine = model.engine()  # nobody steps before both are there
    requests = [engine.submit(prompt + name, params, reuse_prefix=False) for name in ("A", "B")]
    texts: dict[tuple[int, int], str] = {}
    for number, request in enumerate(requests):
        for response in request:
            assert response.logprobs is not None and len(response.logprobs.top) == 2
            texts[number, response.index] = texts.get((number, response.index), "") + response.text
    assert sum(request.preemptions for request in requests) > 0, "the test is about something"
    assert len(texts) == 6
    assert all(re.fullmatch("[a-z]{200}", text) for text in texts.values())


def test_a_neighbour_is_not_disturbed(model: Model) -> None:
    """Nor by a grammar that is refused. Runs of one and of two rows use the same kernels."""
    params = SamplingParams(temperature=0, max_tokens=60)
    other = SamplingParams(temperature=0, max_tokens=60, seed=1)
    with model.engine() as engine:
        plain = [engine.submit("Once upon a time", params), engine.submit("The dog", other)]
        expected = ["".join(response.text for response in request) for request in plain]
        again = engine.submit("Once upon a time", params, reuse_prefix=False)
        bound = engine.submit("The dog", other.override({"json_schema": PERSON}), reuse_prefix=False)
        with pytest.raises(Error, match="'not' at #"):
            engine.submit("The dog", other.override({"json_schema": {"not": {}}}))
        with pytest.raises(Error, match="unclosed group"):
            engine.submit("The dog", other.override({"regex": "("}))
        assert "".join(response.text for response in again) == expected[0]
        jsonschema.validate(json.loads("".join(response.text for response in bound)), PERSON)


def test_lists_of_prompts_and_chats(model: Model) -> None:
    every = [SamplingParams(regex="a+b", temperature=0), SamplingParams(max_tokens=3), SamplingParams(regex="[0-9]{2}")]
    first, _, third = model.generate(["x", "y", "z"], params=every)
    assert re.fullmatch("a+b", first) or len(first) > 100
    assert re.fullmatch("[0-9]{2}", third)
    chat = model.chat(template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert json.loads(chat.send("Hello", json_schema={"enum": ["yes", "no"]}, temperature=0)) in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex cannot be followed at once"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar cannot be followed at once"),
        ({"json_schema": 3}, "json_schema must be a mapping or JSON text, found 3"),
        ({"regex": 3}, "regex must be text, found 3"),
        ({"grammar": b"start"}, "grammar must be text"),
        ({"grammar": "start: b\n"}, "grammar cannot be followed"),
    ],
)
def test_what_submit_refuses(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        model.generate("Once", **options)
