"""Writing Hugging Face directories: completely or not at all, aligned, readable by the safetensors library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from numballama.checkpoint import LazyWeight, Weight
from numballama.errors import Error, UnsupportedError
from numballama.formats.hf.writer import write_safetensors
from numballama.loader import open_checkpoint
from numballama.quantization.convert import convert
from numballama.quantization.types import F16, F32, WeightType
from tests.helpers.random_models import SMALL, random_checkpoint


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    weights = random_checkpoint(SMALL).weights
    for kind in (F32, F16):
        path = tmp_path / str(kind)
        write_safetensors(path, SMALL, {n: convert(w, kind) if len(w.shape) == 2 else w for n, w in weights.items()})
        theirs = library.load_file(path / "model.safetensors")
        assert len(theirs) == len(weights)
        numbers = theirs["model.layers.1.mlp.down_proj.weight"]
        assert numbers.dtype == (np.float32 if kind == F32 else np.float16)
        np.testing.assert_allclose(numbers, weights["layers.1.w2"].data, atol=2e-3)
        q = theirs["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)  # interleaved here, halves there
        wanted = weights["layers.0.wq"].data.reshape(6, 2, 2, 24).swapaxes(1, 2).reshape(24, 24)
        np.testing.assert_allclose(q, wanted, atol=2e-3)
        with open(path / "model.safetensors", "rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0, "tensors are aligned"


def test_directories_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    weights = random_checkpoint(SMALL).weights
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(Error, match="exists and is not an empty directory"):
            write_safetensors(tmp_path / name, SMALL, weights)
    with pytest.raises(Error, match="cannot be written"):
        write_safetensors(tmp_path / "missing" / "below", SMALL, weights)

    def fail() -> Weight:
        raise Error("in the middle")

    broken = weights | {"output": LazyWeight(weights["output"].shape, F32, fail)}
    for name in ("new", "empty"):
        with pytest.raises(Error, match="in the middle"):
            write_safetensors(tmp_path / name, SMALL, broken)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}
    write_safetensors(tmp_path / "empty", SMALL, weights)
    assert open_checkpoint(tmp_path / "empty").config.dim == 24


def test_weights_and_config_belong_together(tmp_path: Path) -> None:
    weights = random_checkpoint(SMALL).weights
    with pytest.raises(Error, match="output in one but not the other"):
        write_safetensors(tmp_path / "x", replace(SMALL, tied_embeddings=True), weights)
    with pytest.raises(Error, match="norm has shape"):
        write_safetensors(tmp_path / "x", SMALL, weights | {"norm": Weight((1,), F32, np.ones(1, np.float32))})
    with pytest.raises(UnsupportedError, match="as int8/64; convert it to f32, f16, bf16"):
        write_safetensors(
            tmp_path / "x", SMALL, weights | {"output": convert(weights["output"], WeightType("int8", 64))}
        )
