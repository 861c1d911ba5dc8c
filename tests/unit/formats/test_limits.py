"""Limits on sizes in a header hold in every format that states them as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from numballama.errors import FormatError
from numballama.formats.limits import MAX_CONTEXT, MAX_LAYERS
from numballama.loader import open_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(
    ("source", "name", "key", "value", "limit"),
    [
        ("hf/tinyllama-0", "config.json", "num_hidden_layers", MAX_LAYERS + 1, MAX_LAYERS),
        ("hf/tinyllama-0", "config.json", "max_position_embeddings", MAX_CONTEXT + 1, MAX_CONTEXT),
        ("meta/llama2", "params.json", "n_layers", MAX_LAYERS + 1, MAX_LAYERS),
        ("meta/llama2", "params.json", "max_seq_len", MAX_CONTEXT + 1, MAX_CONTEXT),
    ],
)
def test_claims_beyond_a_limit_are_refused(
    tmp_path: Path, source: str, name: str, key: str, value: int, limit: int
) -> None:
    folder = Path(shutil.copytree(GOLDEN / source, tmp_path / "model"))
    settings = json.loads((folder / name).read_text()) | {key: value}
    (folder / name).write_text(json.dumps(settings))
    with pytest.raises(FormatError, match=f"key {key}; expected a whole number from 1 to {limit:,}; found {value}"):
        open_checkpoint(folder)
