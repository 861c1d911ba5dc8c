"""Files without a magic number: their size decides, and errors list the candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from numballama.errors import FormatError
from numballama.loader import open_checkpoint
from tests.helpers.random_models import SMALL, save


def test_candidates_are_listed_closest_first(tmp_path: Path) -> None:
    path, _ = save(tmp_path, "kuiper-int8", replace(SMALL, tied_embeddings=True))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    listed = str(caught.value.expected).split("; ")
    assert listed[0].startswith("KuiperLLama int8, tied: ")
    assert listed[1].startswith("KuiperLLama int8, with a classifier: ")
    assert {entry.split(":")[0] for entry in listed[2:]} == {"llama2.c v0, tied", "KuiperLLama fp32, tied, with biases"}
