"""`batch_invariant=True`: logits have the same bits alone, beside others, and with any borders between chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import numballama
from numballama import SamplingParams
from numballama.engine.logprobs import prompt_logprobs
from numballama.errors import UnsupportedError
from numballama.generate import GenerationResponse
from numballama.model import Model
from tests.helpers.cuda_host import on_a_gpu

EVERYWHERE = pytest.mark.parametrize(
    ("device", "kind"),
    [
        *(("cpu", kind) for kind in (("f32", "f32"), ("q4_0", "f32"), ("q8_0", "int8"))),
        *(on_a_gpu("cuda", (kind, "f32")) for kind in ("f32", "q4_0", "bf16")),
    ],
)
"""(weights, activations) of the kernels of each device."""
PROMPTS = [
    "Once upon a time",
    "Lily",
    "One day, a cat and a dog went to the park to play with a red ball. The cat said",
]


@contextmanager
def opened(kind: tuple[str, str], batch_invariant: bool, device: str) -> Iterator[Model]:
    dtype, activations = kind
    with numballama.compile(
        None, device=device, dtype=dtype, activations=activations, context=128, threads=2, max_sequences=8,
        batch_invariant=batch_invariant,
    ) as model:  # fmt: skip
        yield model


def in_parts(model: Model, ids: list[int], parts: list[int]) -> np.ndarray:
    """Logits after the last token of each part, when the text is fed in these parts."""
    found, begin = [], 0
    with model.exclusive() as session:
        for length in parts:
            session.prefill(ids[begin : begin + length])
            found.append(session.logits.copy())
            begin += length
    return np.array(found)


@EVERYWHERE
def test_bits_do_not_depend_on_chunks(device: str, kind: tuple[str, str]) -> None:
    ids = np.random.default_rng(0).integers(3, 500, 96).tolist()
    parts = [1, 1, 2, 3, 4, 5, 1, 7, 64, 1, 1, 6]
    ends = np.cumsum(parts) - 1
    with opened(kind, True, device) as model:
        assert np.array_equal(in_parts(model, ids, parts), model.logits(ids)[ends])
    with opened(kind, False, device) as model:
        assert not np.array_equal(in_parts(model, ids, parts), model.logits(ids)[ends]), "then it would be easy"


def probabilities(request: Iterable[GenerationResponse]) -> list[tuple[int, float]]:
    found = [(each.token, each.logprobs.logprob) for each in request if each.logprobs is not None]
    assert len(found) == 12
    return found


@EVERYWHERE
def test_bits_do_not_depend_on_neighbours(device: str, kind: tuple[str, str]) -> None:
    """Requests that begin while others generate have the log probabilities of the same requests alone."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
    with opened(kind, True, device) as model, model.engine() as engine:
        alone = [probabilities(engine.submit(prompt, params)) for prompt in PROMPTS]
        first = engine.submit(PROMPTS[0], params)
        responses = iter(first)
        begun = [next(responses), next(responses)]
        rest = [engine.submit(prompt, params) for prompt in PROMPTS[1:]]
        together = [probabilities([*begun, *responses]), *(probabilities(request) for request in rest)]
    assert together == alone


@EVERYWHERE
def test_explanations_have_the_bits_of_all_runs(device: str, kind: tuple[str, str]) -> None:
    ids = np.random.default_rng(2).integers(3, 500, 70).tolist()
    with opened(kind, True, device) as model:
        explained = model.explain(ids, 3)
        found = [
            (each.logprob, [(other.id, other.logprob) for other in each.alternatives]) for each in explained.tokens[1:]
        ]
        assert found == prompt_logprobs(model.logits(ids), ids, 3)[1:]
        assert explained.lens is not None
        lens = explained.lens.logprobs[-1, :-1, :3].tolist()
        assert lens == [[np.float32(logprob) for _, logprob in top] for _, top in found]


@EVERYWHERE
@pytest.mark.parametrize("name", ["layers.1.q", "layers.3.probabilities", "layers.4.x_out"])
def test_values_do_not_depend_on_how_many_tokens_follow(device: str, kind: tuple[str, str], name: str) -> None:
    ids = np.random.default_rng(2).integers(3, 500, 70).tolist()
    with opened(kind, True, device) as model:
        whole = model.values(ids, name)
        for length in (1, 2, 7, 65):
            seen = whole[:length, :, :length] if whole.ndim == 3 else whole[:length]
            assert np.array_equal(model.values(ids[:length], name), seen), length


def test_the_reference_refuses() -> None:
    with pytest.raises(UnsupportedError, match="batch_invariant is not supported by the reference"):
        numballama.compile(None, device="reference", batch_invariant=True)
