"""`numballama export`."""

from __future__ import annotations

from pathlib import Path

import pytest

from numballama.config import INTERLEAVED, ModelConfig
from numballama.loader import open_checkpoint
from tests.helpers.command_line import call
from tests.helpers.random_models import save

WIDE = ModelConfig(64, 96, 2, 4, 2, 300, 16, tied_embeddings=False)


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = save(tmp_path, "llama2c-v1", WIDE)
    done = call(capsys, "export", path, tmp_path / "copy.gguf", "--to", "gguf", "--dtype", "q8_0")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["tensor", "from", "to", "bytes", "relative", "RMS", "error"]
    name, before, after, size, error = lines[1].split()
    assert (name, before, after, size) == ("tok_embeddings", "f32", "q8_0", f"{300 * 64 // 32 * 34:,}")
    assert 1e-3 < float(error) < 1e-2
    assert lines[-1].startswith(f"{tmp_path / 'copy.gguf'}: 16 matrices converted, 0 as they were")
    assert "do not say rope_pairing" in done.err
    assert (
        call(capsys, "export", path, tmp_path / "two.gguf", "--to", "gguf", "--quiet", "--rope-pairing", "half").err
        == ""
    )
    assert open_checkpoint(tmp_path / "two.gguf").config.rope_pairing == INTERLEAVED  # permuted
    failed = call(capsys, "export", path, tmp_path / "no", "--to", "gguf", "--quant", "int8")
    assert failed.code == 1 and "gguf cannot hold 'int8'" in failed.err and not (tmp_path / "no").exists()
    assert call(capsys, "export", path, tmp_path / "no").code == 2
