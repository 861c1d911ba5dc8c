"""Requests as `SamplingParams`."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import pytest

from numballama.sampling import SamplingParams
from numballama.server import params
from numballama.server.errors import ApiError
from numballama.server.fields import parse
from numballama.server.http import dumps
from numballama.server.params import sampling_params
from numballama.server.protocol import CompletionRequest


def made(**body: Any) -> SamplingParams:
    return sampling_params(parse(CompletionRequest, dumps({"prompt": "a", **body})), 5, None)


def test_defaults() -> None:
    assert made() == SamplingParams(max_tokens=5, temperature=1, top_k=0, top_p=1)


def test_fields() -> None:
    found = made(
        temperature=0.5, top_k=-1, top_p=0, min_p=0.1, seed=3, stop="x", stop_token_ids=[4], ignore_eos=True, n=2,
        min_tokens=1, logit_bias={"7": -1}, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
    )  # fmt: skip
    assert found == SamplingParams(
        max_tokens=5, temperature=0.5, top_k=0, top_p=1e-9, min_p=0.1, seed=3, stop="x", stop_token_ids=[4],
        ignore_eos=True, n=2, min_tokens=1, logit_bias={7: -1}, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}}},
            {"json_schema": {"a": 1}},
        ),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": "start: A"}, {"grammar": "start: A"}),
        ({"json_schema": {"type": "null"}}, {"json_schema": {"type": "null"}}),
        ({"structured_outputs": {"json": "{}"}}, {"json_schema": "{}"}),
        ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
        ({"structured_outputs": {"choice": ["a.", "b"]}}, {"regex": r"(a\.)|(b)"}),
        ({"structured_outputs": {"grammar": "start: A"}}, {"grammar": "start: A"}),
    ],
)
def test_restrictions(body: dict[str, Any], expected: dict[str, Any]) -> None:
    with patch.object(params, "SamplingParams") as kind:
        made(**body)
    given = kind.call_args.kwargs
    assert {name: given[name] for name in ("json_schema", "regex", "grammar") if name in given} == expected


def test_choices_match_only_themselves() -> None:
    with patch.object(params, "SamplingParams") as kind:
        made(structured_outputs={"choice": ["a|b", "(c", "é\n"]})
    pattern = kind.call_args.kwargs["regex"]
    assert [bool(re.fullmatch(pattern, text)) for text in ("a|b", "(c", "é\n", "a", "b")] == [True] * 3 + [False] * 2


def test_errors_name_the_field_of_the_request() -> None:
    request = parse(CompletionRequest, dumps({"prompt": "a", "min_tokens": 9}))
    with pytest.raises(ApiError) as found:
        sampling_params(request, 5, None, "max_completion_tokens")
    assert found.value.param == "min_tokens"
    with pytest.raises(ApiError) as found:
        made(regex="a", ignore_eos=True)
    assert found.value.param == "ignore_eos"
    with pytest.raises(ApiError) as found:
        made(regex="a", structured_outputs={"regex": "b"})
    assert found.value.param == "structured_outputs"
    request = parse(CompletionRequest, dumps({"prompt": "a", "regex": "a"}))
    with pytest.raises(ApiError) as found:
        sampling_params(request, 5, None, regex="x")  # of a tool choice
    assert found.value.param == "regex"
