"""Writes a Hugging Face directory: `config.json`, `generation_config.json`, `model.safetensors`, tokenizer files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import Weight, require_types, require_weights
from ...config import HALF_SPLIT, ModelConfig
from ...files import atomic_write_directory
from ...quantization.convert import convert
from ...quantization.types import F32
from .. import safetensors
from ..rope_permute import row_order
from .config import config_json
from .reader import CONFIG, tensor_names
from .weight_files import SINGLE

_DTYPES = {kind.name: name for name, (kind, element) in safetensors.WEIGHT_TYPES.items() if element is not np.float64}
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def write_safetensors(
    path: str | PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Weight],
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    files: Sequence[Path] = (),
    texts: Mapping[str, str] | None = None,
    token_ids: Mapping[str, int] | None = None,
) -> list[str]:
    """Write a directory that transformers loads, completely or not at all. `path` must not exist, or be an empty
    directory. Returns notes on what the format cannot hold.

    Matrices keep their type, f32, f16 or bf16. Norms and biases become f32. Rows of q and k are put in half-split
    order, which the format implies. `files` are copied into the directory; `texts` (path in the directory → content)
    are written there. `token_ids` are other ids of special tokens, "pad_token" → id.

    Raises `UnsupportedError` for other weight types or a config that no architecture has, `Error` when weights and
    config do not match or the directory cannot be written.
    """
    require_weights(config, weights)
    require_types(weights, _DTYPES, "safetensors")
    expected = config.weight_shapes()
    kinds = [weights[name].type.name for name, shape in expected.items() if len(shape) == 2]
    ids: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": (list(eos_ids) if len(eos_ids) > 1 else None)}
    if len(eos_ids) == 1:
        ids["eos_token_id"] = eos_ids[0]
    others = {f"{name}_id": token for name, token in (token_ids or {}).items()}
    ids |= {name: token for name, token in others.items() if name == "pad_token_id"}  # generation wants this one
    settings = config_json(config, _TORCH[max(set(kinds), key=kinds.count)], others | ids)
    names = tensor_names()
    tensors = [
        (names[name], _DTYPES[weights[name].type.name if len(shape) == 2 else F32.name], shape)
        for name, shape in expected.items()
    ]
    with atomic_write_directory(path) as directory:
        (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        generation = json.dumps({key: value for key, value in ids.items() if value is not None}, indent=2)
        (directory / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        for file in files:
            shutil.copyfile(file, directory / file.name)
        for name, text in (texts or {}).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        with open(directory / SINGLE, "xb") as out:
            out.write(safetensors.header(tensors, {"format": "pt"}))
            for name, shape in expected.items():
                data = weights[name].data if len(shape) == 2 else convert(weights[name], F32).data
                order = row_order(config, name, HALF_SPLIT)
                out.write(np.ascontiguousarray(data if order is None else data[order]).data)
    return []
