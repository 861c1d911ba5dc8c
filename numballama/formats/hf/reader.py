"""Hugging Face directories: `config.json` and safetensors, one file or several with an index. RoPE is half-split."""

from __future__ import annotations

import re
from pathlib import Path

from ...checkpoint import Checkpoint, Weight
from ...errors import FormatError, UnsupportedError
from ...files import MappedFile, map_file
from .. import safetensors
from ..json_reader import read_object
from ..tensor_names import TensorNames
from ..tensors import TensorInfo
from .config import config_of
from .text_files import read_text_files

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_TOP = {"tok_embeddings": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "w1": "mlp.gate_proj.weight",
    "w2": "mlp.down_proj.weight",
    "w3": "mlp.up_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "bo": "self_attn.o_proj.bias",
    "b1": "mlp.gate_proj.bias",
    "b2": "mlp.down_proj.bias",
    "b3": "mlp.up_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
LAYER_NAMES: dict[str, dict[str, str]] = {}
"""`model_type` → names of layer weights that differ from `_LAYER`."""
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|lm_head\.weight")
"""Tensors in a file that are ignored: tables of RoPE, and the classifier of a model with tied embeddings."""


def tensor_names(model_type: str = "llama") -> TensorNames:
    """Names of the tensors in models of this `model_type`."""
    return TensorNames(_TOP, _LAYER | LAYER_NAMES.get(model_type, {}), "model.layers")


def is_directory_of(directory: Path) -> bool:
    """Whether the directory holds a `config.json` or safetensors."""
    return (directory / CONFIG).exists() or any(directory.glob("*.safetensors"))


def read(directory: Path, load_tokenizer: bool = True, single_file: MappedFile | None = None) -> Checkpoint:
    """Open a directory, with its tokenizer unless `load_tokenizer` is False. `single_file` is the file of weights in
    the directory, if the caller gave the path of a file.

    Raises `FormatError` for damaged or missing files, `UnsupportedError` for configurations and tensor types that
    this version does not support. An unsupported tokenizer is left out, with a note.
    """
    if not (directory / CONFIG).exists():
        raise FormatError("safetensors without their config", path=directory, expected=CONFIG, found="no such file")
    keys = read_object(directory / CONFIG)
    config, kind = config_of(keys), keys.text("model_type")
    tensors, names = _tensors(directory, single_file), tensor_names(kind)
    weights: dict[str, Weight] = {}
    for name, shape in config.weight_shapes().items():
        if (info := tensors.pop(file_name := names[name], None)) is None:
            raise FormatError(
                "a tensor is missing", path=directory, where=f"tensor {file_name}", expected=shape, found="none"
            )
        weights[name] = safetensors.view(info, shape)
    if extra := [name for name in tensors if not _UNUSED.fullmatch(name)]:
        raise UnsupportedError(f"{directory}: tensor {extra[0][:100]} has no place in a {kind} model of this version")
    text = read_text_files(directory, load_tokenizer)
    return Checkpoint(
        path=directory if single_file is None else single_file.path,
        format=f"Hugging Face, {kind}",
        config=config,
        weights=weights,
        tokenizer=text.tokenizer,
        chat_templates=text.chat_templates,
        template_tokens=text.template_tokens,
        tokenizer_error=text.tokenizer_error,
        stop_token_ids=text.stop_token_ids,
        notes=list(text.notes),
    )


def _tensors(directory: Path, single_file: MappedFile | None) -> dict[str, TensorInfo]:
    """All tensors of the directory by name."""
    index = directory / INDEX
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if index.exists() and (single_file is None or single_file.path.name in _shards(index).values()):
        return _sharded(directory, _shards(index))
    if single_file is None and SINGLE not in names and len(names) != 1:
        raise FormatError(
            "it is not clear which file holds the weights",
            path=directory,
            expected=f"{SINGLE}, {INDEX} or one file *.safetensors",
            found=f"{len(names)} files",
        )
    file = single_file or map_file(directory / (SINGLE if SINGLE in names else names[0]))
    return safetensors.directory(file)


def _shards(index: Path) -> dict[str, str]:
    """Tensor → file name. Raises `FormatError` unless every file is in the directory of the index."""
    keys = read_object(index)
    if (table := keys.inner("weight_map")) is None:
        raise keys.fault("weight_map", "an object")
    for name, file in table.values.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file):
            raise table.fault(name, "the name of a .safetensors file beside the index")
    return table.values


def _sharded(directory: Path, table: dict[str, str]) -> dict[str, TensorInfo]:
    parts: dict[str, tuple[MappedFile, dict[str, TensorInfo]]] = {}
    for name in dict.fromkeys(table.values()):
        if not (directory / name).exists():
            raise FormatError("a part of the model is missing", path=directory, expected=name, found="no such file")
        parts[name] = (file := map_file(directory / name)), safetensors.directory(file)
    tensors = {}
    for tensor, name in table.items():
        file, infos = parts[name]
        if tensor not in infos:
            raise FormatError(
                "a tensor is not in the file that the index names",
                path=file.path,
                where=f"tensor {tensor[:100]}",
                expected="the tensor",
                found=f"{len(infos)} others",
            )
        tensors[tensor] = infos[tensor]
    return tensors
