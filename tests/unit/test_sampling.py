"""`SamplingParams`: defaults and checks. `SamplerTable`: seeds, resuming, the window of the penalty, the argmax."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from numballama.cpu.sampling import choose_tokens
from numballama.errors import Error
from numballama.sampling import (
    HAS_COUNTS,
    MAX_BIASES,
    MIN_TEMPERATURE,
    REPEAT_WINDOW,
    REPETITION_PENALTY,
    SETTINGS,
    TEMPERATURE,
    TOP_K,
    SamplerTable,
    SamplingOptions,
    SamplingParams,
)
from tests.helpers.sampling import choose_token, make_sampler, mask_of


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        drawing = make_sampler(1000, temperature=1.5, top_k=0, top_p=1.0, seed=seed)
        return [choose_token(drawing, logits) for _ in range(20)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    assert tokens(-1) != tokens(-1), "-1 is a random seed, as in llama.cpp"
    assert tokens(-2) == tokens((1 << 64) - 2), "any other whole number is a seed"


def test_repeat_penalty_sees_a_window_of_the_latest_tokens() -> None:
    logits = np.zeros(200, np.float32)
    logits[5], logits[7] = 3, 2

    def after(prompt: list[int]) -> int:
        return choose_token(make_sampler(200, temperature=0, repeat_penalty=2.0, prompt=prompt), logits)

    assert after([]) == 5
    assert after([5, *[9] * (REPEAT_WINDOW - 1)]) == 7, "5 has 1.5 now"
    assert after([5, *[9] * REPEAT_WINDOW]) == 5, "the window has moved past 5"
    drawing = make_sampler(200, temperature=0, repeat_penalty=2.0, prompt=[5, *[9] * (REPEAT_WINDOW - 1)])
    assert [choose_token(drawing, logits) for _ in range(3)] == [7, 5, 5], (
        "7 is remembered, 5 is forgotten; then both are"
    )
    assert (logits[5], logits[7]) == (3, 2), "the model's logits stay"


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
    assert make_sampler(5, temperature=0).is_argmax(0)
    others: list[dict[str, Any]] = [
        {"repeat_penalty": 1.1}, {"temperature": 1}, {"presence_penalty": 1}, {"frequency_penalty": -1},
        {"logit_bias": {1: 2}}, {"logprobs": 0}, {"n_candidates": 4},
    ]  # fmt: skip
    for settings in others:
        assert not make_sampler(5, **{"temperature": 0, **settings}).is_argmax(0), settings
    table = make_sampler(5, temperature=0)
    table.set_mask(0, mask_of(np.ones(5, bool)))
    assert not table.is_argmax(0)
    table.set_mask(0, None)
    assert table.is_argmax(0)
    params = SamplingParams(temperature=0, min_tokens=2)
    table.assign(0, params, stop_token_ids=[1])
    assert not table.is_argmax(0)
    table.assign(0, params)
    assert table.is_argmax(0), "nothing is held back"


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
        {"seed": "x"}, {"stop": 3}, {"stop": [3]},
        {"stop_token_ids": 3}, {"stop_token_ids": "12"},
        {"stop_token_ids": ["a"]}, {"stop_token_ids": [-1]}, {"min_tokens": 257}, {"n": 17}, {"n": 1.5},
        {"presence_penalty": 2.1}, {"presence_penalty": math.nan}, {"frequency_penalty": -2.1},
        {"frequency_penalty": "x"}, {"logprobs": 21}, {"logprobs": -1}, {"logprobs": 1.5}, {"logit_bias": [1]},
        {"logit_bias": {-1: 0}}, {"logit_bias": {"1": 0}}, {"logit_bias": {1: 101}}, {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: None}},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(Error, match=f"{name}.* must "):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings", [{"json_schema": {}}, {"json_schema": "{}"}, {"regex": "a"}, {"grammar": "root ::= x"}], ids=str
)
def test_one_structure_at_a_time(settings: dict[str, Any]) -> None:
    (name,) = settings
    assert SamplingParams(**settings).is_constrained and not SamplingParams().is_constrained
    other = {"regex": "b"} if name != "regex" else {"grammar": "b"}
    with pytest.raises(Error, match="cannot be followed at once: pass only one"):
        SamplingParams(**settings, **other)
    with pytest.raises(Error, match=f"ignore_eos cannot be used with {name}"):
        SamplingParams(**settings, ignore_eos=True)
    with pytest.raises(Error, match=f"{name} must be "):
        SamplingParams(**{name: 3})


def test_biases_are_a_copy_and_bounded() -> None:
    given = {np.int32(3): 1}
    params = SamplingParams(logit_bias=given)
    given[np.int32(4)] = 2
    assert params.logit_bias == {3: 1.0}
    SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES), 1))
    with pytest.raises(Error, match=r"at most 1,024 tokens, found 1,025"):
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES + 1), 1))
    assert SamplingParams(min_tokens=300, max_tokens=None).min_tokens == 300


# The table


def test_settings_in_the_buffers() -> None:
    table = make_sampler(100, MIN_TEMPERATURE / 2, 500, repetition_penalty=1.5)
    settings = table.settings[0]
    assert settings[TEMPERATURE] == 0 and settings[TOP_K] == 100
    assert settings[REPETITION_PENALTY] == 1.5 and len(settings) == SETTINGS


def test_what_is_not_needed_is_not_allocated() -> None:
    table = SamplerTable(3, 1000)
    table.assign(1, SamplingParams())
    assert not table.output_counts.size and not table.bias_ids.size and not table.mask.size
    table.assign(2, SamplingParams(logit_bias={1: 1, 2: 2}))
    assert table.bias_ids.shape == (3, 2)
    table.assign(0, SamplingParams(presence_penalty=1), output=[5, 5])
    assert table.output_counts.shape == (3, 1000) and table.output_counts[0, 5] == 2
    table.assign(0, SamplingParams(frequency_penalty=1))
    assert not table.output_counts.any(), "a new generation has no output"
    table.set_mask(1, np.zeros(32, np.uint32))
    assert table.mask.shape == (3, 32)


def test_errors_of_a_generations_start_leave_the_slot() -> None:
    table = SamplerTable(2, 100)
    table.assign(1, SamplingParams(seed=3, presence_penalty=1), [1, 2], [3])
    before = [array[1].copy() for array in (table.settings, table.info, table.recent, table.state)]
    for params, stop_ids, match in (
        (SamplingParams(logit_bias={100: 1}), (), "token 100 is outside the vocabulary of 100 tokens"),
        (SamplingParams(logit_bias={1 << 40: 1}), (), "outside the vocabulary"),
    ):
        with pytest.raises(Error, match=match):
            table.assign(1, params, stop_token_ids=stop_ids)
    with pytest.raises(Error, match=r"a mask must be uint32 \[4\], found float64 \[4\]"):
        table.set_mask(1, np.zeros(4))  # type: ignore[arg-type]
    with pytest.raises(Error, match=r"found uint32 \[3\]"):
        table.set_mask(1, np.zeros(3, np.uint32))
    for array, want in zip((table.settings, table.info, table.recent, table.state), before, strict=True):
        np.testing.assert_array_equal(array[1], want)
    wide = SamplerTable(1, 3000)
    wide.assign(0, SamplingParams(min_tokens=1), stop_token_ids=range(MAX_BIASES))
    with pytest.raises(Error, match="at most 1,024 stop tokens, found 1,025"):
        wide.assign(0, SamplingParams(min_tokens=1), stop_token_ids=range(MAX_BIASES + 1))
    with pytest.raises(Error, match="cannot choose from 11 tokens of 10"):
        SamplerTable(1, 10, 11)


def test_a_mask_and_a_bias_end_with_their_generation() -> None:
    table = make_sampler(40, temperature=0, logit_bias={3: 50})
    logits = np.arange(40, dtype=np.float32)
    assert choose_token(table, logits) == 3
    table.set_mask(0, mask_of(np.arange(40) == 7))
    assert choose_token(table, logits) == 7
    table.assign(0, SamplingParams(temperature=0))
    assert choose_token(table, logits) == 39
    table.release(0)
    assert choose_token(table, logits) == 39 and table.is_argmax(0)


def test_accept_is_what_the_compiled_function_does() -> None:
    """The host's copy of a slot whose tokens a GPU samples stays what the CPU's would be."""
    for settings in ({"presence_penalty": 1.0}, {"temperature": 0}, {"repeat_penalty": 1.5, "frequency_penalty": 1.0}):
        sampled, followed = (make_sampler(50, **{"seed": 4, **settings}, prompt=[1, 2]) for _ in range(2))  # type: ignore[arg-type]
        for step in range(70):
            logits = np.random.default_rng(step).standard_normal(50).astype(np.float32)
            followed.accept(0, choose_token(sampled, logits))
            for name in ("recent", "counts", "generated", "state", "last_token", "output_counts"):
                np.testing.assert_array_equal(getattr(sampled, name), getattr(followed, name), err_msg=name)
        assert sampled.info[0, HAS_COUNTS] == ("temperature" not in settings)


def test_what_is_wanted_of_slots() -> None:
    table = SamplerTable(3, 50)
    table.assign(0, SamplingParams(logprobs=0))
    table.assign(1, SamplingParams(logprobs=7))
    assert [table.top_logprobs(slots) for slots in ([0], [0, 1], [2], [])] == [0, 7, -1, -1]


def test_rows_and_slots_that_do_not_fit() -> None:
    table = SamplerTable(2, 50)
    rows, wide = np.zeros((2, 50), np.float32), np.zeros((2, 51), np.float32)
    for logits, slots in (
        (wide, [0, 1]), (rows[0], [0]), (rows.astype(np.float64), [0, 1]), (rows, [0]), (rows, [0, 3]), (rows, [0, -1]),
        (rows, [1, 1]),
    ):  # fmt: skip
        with pytest.raises(Error, match=r"found|slots must be"):
            choose_tokens(table, logits, np.array(slots, np.int32))
    assert choose_tokens(table, rows, np.array([2, 2], np.int32)).tokens.tolist() == [-1, -1], "padding may repeat"
