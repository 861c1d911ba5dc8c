"""Runs that sample, queued ahead of the host, on a GPU: what it reads, rewinds and interrupts in between."""

# ruff: noqa: E402
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_host import require_gpu

require_gpu()

pytestmark = pytest.mark.gpu

import numballama
from numballama.cuda.decode_pipeline import LOOKAHEAD, Mailbox
from numballama.model import Model
from numballama.reference import ReferenceBackend
from tests.cuda.checks import close, feed
from tests.cuda.gpu import SHAPE, compiled_story, told
from tests.helpers.paging import give_pages
from tests.helpers.sampling import make_sampler


def reference_logits(model: Model, tokens: Sequence[int]) -> np.ndarray:
    backend = ReferenceBackend(model.weights)
    program = backend.program(model._build(len(tokens), "all"))
    give_pages(backend, model.kv)
    feed(program, tokens, 0)
    program.run(len(tokens))
    return program.value("logits")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "repeat_penalty": 1.4}], ids=str)
def test_reading_logits_between_steps(model: Model, options: dict[str, Any]) -> None:
    """What the host reads belongs to the last token that it was given, and reading changes nothing."""
    prompt = [1, 5, 9]
    want = told(model, make_sampler(300, **options), 30)
    sampler = make_sampler(300, **options)
    logits = reference_logits(model, [*prompt, *want])
    with model.exclusive() as session:
        tokens: list[Any] = [session.prefill(prompt, sampler)]
        while len(tokens) < 30:
            if len(tokens) % 4 == 2 and "repeat_penalty" not in options:
                for _ in range(2):
                    close(session.logits, logits[len(prompt) + len(tokens) - 2], f"logits after {len(tokens)} tokens")
            tokens.append(session.step(tokens[-1], sampler))
    assert tokens == want


def test_rewinding_and_other_tokens(model: Model) -> None:
    """After a rewind, or another token than the sampled one, decoding goes on from there."""
    prompt = [1, 5, 9]
    want = told(model, make_sampler(300, temperature=0), 30)
    sampler = make_sampler(300, temperature=0)
    other = (want[3] + 1) % 300
    fresh = told(model, make_sampler(300, temperature=0), 5, [*prompt, *want[:3], other])
    with model.exclusive() as session:
        session.prefill([*prompt, *want[:29]], sampler)
        for back in (1, 2, 5, 20):
            session.truncate(len(prompt) + 29 - back)
            for place in range(29 - back, 29):
                assert session.step(want[place], sampler) == want[place + 1]
        session.truncate()
        session.prefill(prompt, sampler)
        for token in want[:3]:
            session.step(token, sampler)
        tokens = [session.step(other, sampler)]
        while len(tokens) < 5:
            tokens.append(session.step(tokens[-1], sampler))
    assert tokens == fresh


def test_the_end_of_the_context(model: Model) -> None:
    """The last steps of a full cache are those of a run that stops earlier; nothing is written beyond."""
    count = SHAPE.context - 3 + 1
    full = told(model, make_sampler(300, seed=2), count)
    with pytest.raises(numballama.ContextError):
        told(model, make_sampler(300, seed=2), count + 1)
    assert told(model, make_sampler(300, seed=2), count - 5) == full[:-5]
    params = numballama.SamplingParams(seed=2, max_tokens=None)
    events = list(model.token_engine.submit([1, 5, 9], params, reuse_prefix=False))
    assert [event.token for event in events] == full and events[-1].stop_reason == "context"


def test_streams_in_turns_and_ctrl_c(models: Path) -> None:
    """Streams wait for the only slot or share the steps; an abandoned stream has no effect."""
    with compiled_story(models, "stories260K", kv_dtype="f32") as model:
        prompts = "Once upon a time", "The little dog"
        want = [[piece.token for piece in model.stream(prompt, max_tokens=30, seed=3)] for prompt in prompts]
        streams = [model.stream(prompt, max_tokens=30, seed=3) for prompt in prompts]
        got: list[list[int]] = [[], []]
        for _ in range(10):
            for which, stream in enumerate(streams):
                got[which] += [next(stream).token for _ in range(3)]
        assert got == want
        for after in (1, 2, 7):
            stream = model.stream(prompts[0], max_tokens=30, seed=3)
            for _ in range(after):
                next(stream)
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
            assert [piece.token for piece in model.stream(prompts[1], max_tokens=30, seed=3)] == want[1]


def test_an_interrupt_while_a_token_is_awaited(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled_story(models, "stories260K", kv_dtype="f32") as model:
        want = model.generate("Once upon a time", max_tokens=40, temperature=0)
        awaited, left = Mailbox.wait, [12]

        def interrupted(mailbox: Any, number: int, rows: int) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return awaited(mailbox, number, rows)

        monkeypatch.setattr(Mailbox, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            model.generate("Once upon a time", max_tokens=40, temperature=0)
        assert want.startswith(caught.value.text) and caught.value.text  # type: ignore[attr-defined]
        assert model.generate("Once upon a time", max_tokens=40, temperature=0) == want


def test_a_token_is_one_launch(model: Model) -> None:
    """Whatever the sampling; runs ahead of the last token are counted too."""
    for params in ({"seed": 1}, {"temperature": 0}):
        settings = numballama.SamplingParams(max_tokens=50, **params)  # type: ignore[arg-type]
        before = model.program.entries
        assert len(list(model.token_engine.submit([1, 5, 9], settings, reuse_prefix=False))) == 50
        assert model.program.entries - before <= 50 + LOOKAHEAD
