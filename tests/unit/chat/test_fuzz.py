"""A sample of the fuzzer of chat templates and request texts, and a test that its checks work."""

from __future__ import annotations

import random

import pytest

from numballama.chat.encoder import ConversationEncoder
from tests.helpers import fuzz_chat


@pytest.mark.slow
def test_random_templates_and_requests_end_in_an_error_or_in_ids() -> None:
    found = fuzz_chat.fuzz(600, 0)
    assert found.total() == 600
    for what in ("template rendered", "template does not compile (Error)", "template: fails (Error)", "prompt encoded"):
        assert found[what] > 5, found
    again = [fuzz_chat.mutated(random.Random(seed)) for seed in range(20)]
    assert again == [fuzz_chat.mutated(random.Random(seed)) for seed in range(20)] and len(set(again)) > 15


@pytest.mark.slow
def test_the_checks_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("name")

    monkeypatch.setattr(ConversationEncoder, "render", fails)
    with pytest.raises(AssertionError, match=r"seed 0, case \d+: KeyError\('name'\)"):
        fuzz_chat.fuzz(200, 0)
    monkeypatch.undo()
    monkeypatch.setattr(fuzz_chat, "SECONDS", -1.0)
    with pytest.raises(AssertionError, match=r"seed 0, case 0: .*took"):
        fuzz_chat.fuzz(1, 0)


def test_a_template_may_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rendering of a case draws the same; otherwise ids of one would be compared with the text of another."""
    monkeypatch.setattr(fuzz_chat, "mutated", lambda rng: "{{ 'abcdefgh' | random }}{{ messages | length }}")
    monkeypatch.setattr(fuzz_chat, "block", lambda rng: "{{ 'ab' | random }}")
    found = {fuzz_chat.examine_template(random.Random(seed)) for seed in range(60)}
    assert "template rendered" in found
