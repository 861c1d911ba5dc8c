"""Hugging Face directories: `config.json` and weights in safetensors or `pytorch_model.bin`. RoPE is half-split.

Where `config.json` and the tensors contradict each other, the tensors count and a note says so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ...checkpoint import Checkpoint, LazyWeight, Weight
from ...config import ModelConfig
from ...errors import FormatError, UnsupportedError
from ...files import MappedFile
from ...memory import format_bytes
from ..json_reader import read_object
from ..tensor_names import TensorNames
from ..tensors import TensorInfo, view_weight
from . import weight_files
from .config import config_of
from .quantized import scheme_of, take, undeclared, with_older_config
from .tensor_map import missing, no_place, rename
from .text_files import read_text_files

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_MERGE = "peft's merge_and_unload, mlx_lm.fuse"
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
_CHUNK = 1 << 22
"""Bytes of two tensors that are compared at a time."""


def tensor_names(model_type: str = "llama") -> TensorNames:
    """Names of the tensors in models of this `model_type`."""
    return TensorNames(_TOP, _LAYER | LAYER_NAMES.get(model_type, {}), "model.layers")


def is_directory_of(directory: Path) -> bool:
    """Whether the directory holds a `config.json`, safetensors or an adapter."""
    return any((directory / name).exists() for name in (CONFIG, ADAPTER)) or bool(
        weight_files.visible(directory, ".safetensors")
    )


def read(directory: Path, load_tokenizer: bool = True, single_file: MappedFile | None = None) -> Checkpoint:
    """Open a directory, with its tokenizer unless `load_tokenizer` is False. `single_file` is the file of weights in
    the directory, if the caller gave the path of a file.

    Raises `FormatError` for damaged or missing files, `UnsupportedError` for configurations and tensor types that
    this version does not support. An unsupported tokenizer is left out, with a note.
    """
    adapter = _adapter(directory)
    if adapter and not (directory / CONFIG).exists():
        raise UnsupportedError(f"{directory}: {adapter}, not a model: merge it into its model first ({_MERGE})")
    if not (directory / CONFIG).exists():
        native = (directory / "params.json").exists()
        found = "params.json, of Meta's and Mistral's own programs" if native else "no such file"
        raise FormatError("weights without their config", path=directory, expected=CONFIG, found=found)
    keys = with_older_config(read_object(directory / CONFIG), directory)
    config, scheme, kind = config_of(keys), scheme_of(keys), keys.text("model_type")
    files = weight_files.find(directory, single_file)
    tensors, names, notes = rename(files.infos), tensor_names(kind), list(files.notes)
    if adapter:
        notes.append(f"beside the model is {adapter}, which is not applied: merge it first ({_MERGE})")
    config = _as_the_tensors_say(config, tensors, names, notes)
    weights: dict[str, Weight] = {}
    before: dict[str, str] = {}  # what matrices are in the file that others are computed from
    for name, shape in config.weight_shapes().items():
        if scheme and (quantised := take(scheme, tensors, names[name], shape)):
            weights[name], before[name] = quantised, f"quantised by {scheme.name}"
            continue
        if error := undeclared(directory, tensors, names[name]):
            raise error
        if (info := tensors.pop(file_name := names[name], None)) is None:
            known = {names[each] for each in config.weight_shapes()}
            raise missing(directory, file_name, shape, tensors.keys() - known)
        if info.shape != shape:
            raise info.wrong_shape(shape)
        weights[name] = view_weight(info, shape, weight_files.types_beside(info))
        if isinstance(weights[name], LazyWeight) and len(shape) == 2:
            before[name] = "not in C order" if info.strides else "in float64"
    for name, info in tensors.items():
        if not (scheme and name.endswith(".bias") and _is_zero(info)):  # GPTQ's tools write a bias for every matrix
            raise no_place(info, name, kind)
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
        notes=[*notes, *_conversions(weights, before), *text.notes],
    )


def _adapter(directory: Path) -> str | None:
    """What the adapter in the directory is; None if there is none."""
    if not (directory / ADAPTER).exists():
        return None
    values = read_object(directory / ADAPTER).values
    base = values.get("base_model_name_or_path") or values.get("model")
    return f"an adapter{f' of {base:.100}' if isinstance(base, str) else ''} ({ADAPTER})"


def _as_the_tensors_say(
    config: ModelConfig, tensors: dict[str, TensorInfo], names: TensorNames, notes: list[str]
) -> ModelConfig:
    """`config` with the embedding's rows as vocabulary, and tied only if no other classifier is there.

    Removes the classifier from `tensors`, or renames it, where the embedding is the same.
    """
    table, head = names["tok_embeddings"], names["output"]
    stems = {name.rpartition(".")[0] for name in (table, head)}
    parts = {stem: {n: t for n, t in tensors.items() if n.rpartition(".")[0] == stem} for stem in stems}
    ours, theirs = (parts[name.rpartition(".")[0]] for name in (table, head))
    if config.tied_embeddings and theirs:
        renamed = {name.replace(head[: -len("weight")], table[: -len("weight")]): t for name, t in theirs.items()}
        if not ours:  # transformers ties in this direction as well
            tensors |= renamed
        if not ours or (ours.keys() == renamed.keys() and all(_same(ours[name], renamed[name]) for name in ours)):
            for name in theirs:
                del tensors[name]
        else:
            config = replace(config, tied_embeddings=False)
            notes.append(f"{CONFIG} ties the embeddings, but {head} is another matrix: it is used, as in transformers")
    info = tensors.get(table)
    if info is not None and len(info.shape) == 2 and 0 < info.shape[0] != config.vocab_size:
        rows = info.shape[0]
        notes.append(
            f"vocab_size of {CONFIG} is {config.vocab_size:,}, the embedding has {rows:,} rows: the rows count"
        )
        config = replace(config, vocab_size=rows)
    return config


def _bytes(info: TensorInfo) -> np.ndarray:
    return np.frombuffer(info.file.data, np.uint8, info.nbytes, info.offset)


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes. Ends at the first difference."""
    if (one.type, one.shape, one.strides) != (other.type, other.shape, other.strides):
        return False
    if (one.file, one.offset) == (other.file, other.offset):  # PyTorch's files share storages
        return True
    a, b = _bytes(one), _bytes(other)
    return all(np.array_equal(a[at : at + _CHUNK], b[at : at + _CHUNK]) for at in range(0, len(a), _CHUNK))


def _is_zero(info: TensorInfo) -> bool:
    return len(info.shape) == 1 and not _bytes(info).any()


def _conversions(weights: dict[str, Weight], before: dict[str, str]) -> list[str]:
    """A note for each kind of matrices that are converted; `before` says what they are in the file."""
    sizes: dict[tuple[str, str], int] = {}
    for name, said in before.items():
        kind = said, weights[name].type.name
        sizes[kind] = sizes.get(kind, 0) + weights[name].nbytes
    return [
        f"matrices {said} run as {kind}, converted in memory: {format_bytes(size)}"
        for (said, kind), size in sizes.items()
    ]
