"""Pre-tokenizers: each name that GGUF uses is checked against a peer's ids."""

from __future__ import annotations

import json
from typing import Any

from numballama.tokenizers.pretokenizers import PRE_TOKENIZERS
from tests.golden.make_tokenizers import GOLDEN, distinct

PEERS: dict[str, Any] = json.loads(GOLDEN.read_text())


def test_every_name_of_a_pre_tokenizer_has_a_witness() -> None:
    assert {f"small-{pre}" for pre in distinct()} <= set(PEERS)


def test_pre_tokenizers_differ() -> None:
    """The small vocabulary shows which one cut a text."""
    kinds = {tuple(PEERS[f"small-{pre}"]["lines"]) for pre in distinct()}
    assert len(kinds) == len({rules.patterns for rules in PRE_TOKENIZERS.values()})
