"""`SamplingParams`: defaults and checks. `SamplerState`: seeds, the window of the penalty, the argmax."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from numballama.cpu.sampling import choose_token
from numballama.errors import Error, UnsupportedError
from numballama.sampling import (
    MIN_TEMPERATURE,
    REPEAT_WINDOW,
    REPETITION_PENALTY,
    SETTINGS,
    TEMPERATURE,
    TOP_K,
    SamplerState,
    SamplingOptions,
    SamplingParams,
)
from tests.helpers.sampling import make_sampler


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        drawing = make_sampler(1000, temperature=1.5, top_k=0, top_p=1.0, seed=seed)
        return [choose_token(drawing, logits.copy()) for _ in range(20)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    assert tokens(-1) != tokens(-1), "-1 is a random seed, as in llama.cpp"
    assert tokens(-2) == tokens((1 << 64) - 2), "any other whole number is a seed"


def test_repeat_penalty_sees_a_window_of_the_latest_tokens() -> None:
    drawing = make_sampler(200, temperature=0, repeat_penalty=2.0)
    logits = np.zeros(200, np.float32)
    logits[5], logits[7] = 3, 2
    assert choose_token(drawing, logits.copy()) == 5
    assert choose_token(drawing, logits.copy()) == 7, "5 was remembered: 1.5 now"
    drawing.remember([9] * (REPEAT_WINDOW - 1))
    assert choose_token(drawing, logits.copy()) == 5, "the window has moved past 5, not yet past 7"
    drawing = make_sampler(200, temperature=0, repeat_penalty=2.0)
    drawing.remember([5, *[9] * (REPEAT_WINDOW - 1)])
    assert choose_token(drawing, logits.copy()) == 7
    drawing = make_sampler(200, temperature=0, repeat_penalty=2.0)
    drawing.remember([5, *[9] * REPEAT_WINDOW])
    assert choose_token(drawing, logits.copy()) == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_k": 1.5},
        {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": math.nan}, {"min_p": -0.01}, {"min_p": 1.5}, {"min_p": math.nan},
        {"repeat_penalty": 0.0}, {"repeat_penalty": -1.0}, {"repeat_penalty": math.inf}, {"repeat_penalty": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(Error, match=f"^{name} must be .*, found"):
        make_sampler(10, **settings)


def test_is_argmax_only_where_nothing_else_changes_the_choice() -> None:
    assert make_sampler(5, temperature=0).is_argmax
    assert not make_sampler(5, temperature=0, repeat_penalty=1.1).is_argmax
    assert not make_sampler(5).is_argmax


# SamplingParams


def test_defaults_are_those_of_the_interface() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (256, 0.8, 40, 0.95)
    assert (params.min_p, params.repetition_penalty, params.seed, params.stop) == (0, 1, None, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_params_are_values() -> None:
    """They can be compared, kept in a set, and do not depend on how a list was written."""
    one = SamplingParams(stop="a", stop_token_ids=[2, 1, np.int32(2)], seed=np.int64(3), logit_bias={})
    same = SamplingParams(stop=["a"], stop_token_ids={1, 2}, seed=3, logit_bias={})
    assert one == same and hash(one) == hash(same) and {one} == {same}
    assert one.stop == ("a",) and one.stop_token_ids == {1, 2} and type(one.seed) is int
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_repeat_penalty_is_another_name() -> None:
    assert SamplingParams(repeat_penalty=1.3) == SamplingParams(repetition_penalty=1.3)
    assert SamplingParams(repeat_penalty=1.3).override({"seed": 1}).repetition_penalty == 1.3
    assert SamplingParams(repeat_penalty=1.3).override({"repeat_penalty": 1.5}).repetition_penalty == 1.5
    assert SamplingParams(repetition_penalty=1.3).override({"repetition_penalty": 1.5}).repetition_penalty == 1.5
    with pytest.raises(Error, match="one setting"):
        SamplingParams(repeat_penalty=1.3, repetition_penalty=1.2)


def test_repeat_penalty_can_be_read_and_replaced() -> None:
    for params in (SamplingParams(repeat_penalty=1.3), SamplingParams(repetition_penalty=1.3)):
        assert params.repeat_penalty == params.repetition_penalty == 1.3
        assert dataclasses.replace(params, seed=1).repeat_penalty == 1.3
        assert dataclasses.replace(params, repetition_penalty=1.1).repeat_penalty == 1.1
        assert copy.deepcopy(params) == copy.copy(params) == pickle.loads(pickle.dumps(params)) == params
    assert SamplingParams().repeat_penalty == 1.0
    assert SamplingParams(repeat_penalty=SamplingParams(repeat_penalty=1.3).repeat_penalty).repeat_penalty == 1.3


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("max_new_tokens", "use max_tokens"), ("n_predict", "use max_tokens"), ("temp", "use temperature"),
        ("do_sample", "use temperature: 0 is greedy"), ("stop_sequences", "use stop"), ("topk", "use top_k"),
        ("eos_token_id", "use stop_token_ids"), ("repitition_penalty", "use repetition_penalty"),
        ("temprature", "use temperature"),
        ("stream", "the method stream"), ("num_return_sequences", "use n"), ("nonsense", "choose from max_tokens"),
    ],
)  # fmt: skip
def test_names_of_other_libraries_are_told_ours(name: str, ours: str) -> None:
    for call in (lambda: SamplingParams(**{name: 1}), lambda: SamplingParams().override({name: 1})):
        with pytest.raises(Error, match=f"unknown sampling option {name}[:;] .*{ours}"):
            call()


def test_values_of_other_libraries() -> None:
    """OpenAI's stop=None, vLLM's stop_token_ids=None, NumPy's numbers, tuples and generators of ids."""
    assert SamplingParams(stop=None, stop_token_ids=None, seed=None, max_tokens=None) == SamplingParams(max_tokens=None)  # type: ignore[arg-type]
    given = SamplingParams(max_tokens=np.int64(3), top_k=np.int32(4), temperature=np.float32(0.5), seed=np.uint8(7))
    assert given == SamplingParams(max_tokens=3, top_k=4, temperature=0.5, seed=7)
    assert all(type(value) in (int, float) for value in (given.max_tokens, given.top_k, given.temperature, given.seed))
    assert SamplingParams(stop_token_ids=(t for t in np.array([1, 2]))).stop_token_ids == {1, 2}
    assert SamplingParams(stop=("a", np.str_("b"))).stop == ("a", "b")


def test_bools_are_bools_and_no_numbers() -> None:
    assert SamplingParams(ignore_eos=1, special=np.bool_(0)) == SamplingParams(ignore_eos=True)  # type: ignore[arg-type]
    for wrong in ("false", None, 2, 1.0, [], np.ones(2)):
        with pytest.raises(Error, match="ignore_eos must be True or False"):
            SamplingParams(ignore_eos=wrong)  # type: ignore[arg-type]
    for name in ("max_tokens", "seed", "top_k"):
        with pytest.raises(Error, match=f"{name} must be a whole number, found True"):
            SamplingParams(**{name: True})


def test_override_names_what_is_unknown_and_what_there_is() -> None:
    params = SamplingParams(top_k=3)
    assert params.override({}) is params
    assert params.override({"seed": 4}) == SamplingParams(top_k=3, seed=4)
    with pytest.raises(Error, match=r"unknown sampling option top_n, heat; choose from max_tokens, .*top_k.*special"):
        params.override({"top_n": 1, "heat": 2, "seed": 1})
    with pytest.raises(Error, match=r"^temperature must be"):
        params.override({"temperature": -1})


def test_options_for_type_checkers_are_the_fields() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {*SamplingOptions.__annotations__, "max_tokens"} == fields | {"repeat_penalty"}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "3"}, {"min_tokens": -1}, {"n": 0}, {"seed": 1.5},
        {"seed": "x"}, {"stop": 3}, {"stop": [3]}, {"stop_token_ids": 3}, {"stop_token_ids": "12"},
        {"stop_token_ids": ["a"]}, {"stop_token_ids": [-1]},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(Error, match=f"{name} must be"):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_tokens": 1}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"logit_bias": {3: 1.0}},
        {"logprobs": 0}, {"logprobs": 5}, {"n": 2}, {"json_schema": {}}, {"json_schema": "{}"}, {"regex": "a"},
        {"grammar": "root ::= x"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_later_versions_are_refused_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(UnsupportedError, match=f"^{name} is not supported"):
        SamplingParams(**settings)


def test_settings_of_later_versions_that_have_no_effect() -> None:
    SamplingParams(min_tokens=0, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, n=1, logprobs=None)


def test_settings_in_the_buffers() -> None:
    state = SamplerState(SamplingParams(temperature=MIN_TEMPERATURE / 2, top_k=500, repetition_penalty=1.5), 100)
    assert state.settings[TEMPERATURE] == 0 and state.settings[TOP_K] == 100
    assert state.settings[REPETITION_PENALTY] == 1.5 and len(state.settings) == SETTINGS
