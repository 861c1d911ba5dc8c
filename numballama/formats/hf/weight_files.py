"""The files of a Hugging Face directory that hold its weights, and the tensors in them.

Which files count is transformers' rule: `model.safetensors`, then `model.safetensors.index.json`, then
`pytorch_model.bin`, then `pytorch_model.bin.index.json`. Also found are an index without its file next to it, shards
without their index, and, where there is nothing of these, a single safetensors file of another name. Names that begin
with a dot, such as macOS's `._model.safetensors`, are not the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import FormatError
from ...files import MappedFile, map_file, unfinished
from ...quantization.types import WeightType
from .. import safetensors
from ..json_reader import read_object
from ..meta import torch_zip
from ..tensor_names import is_buffer
from ..tensors import TensorInfo

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_KINDS = ((".safetensors", SINGLE, INDEX), (".bin", TORCH_SINGLE, TORCH_INDEX))
"""Suffix, the one file, and the index of several; the first kind that a directory has counts."""
_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,200}\.(safetensors|bin)")

TYPES = safetensors.WEIGHT_TYPES | torch_zip.STORAGES
"""Element types of both containers that weights may have."""


def types_beside(info: TensorInfo) -> Mapping[str, tuple[WeightType, type[np.generic]]]:
    """`TYPES` of the container in which the tensor is."""
    return torch_zip.STORAGES if info.type.endswith("Storage") else safetensors.WEIGHT_TYPES


@dataclass
class Tensors:
    """Name in the files → tensor, and what the user should know about the choice of the files."""

    infos: dict[str, TensorInfo]
    notes: list[str] = field(default_factory=list)


def visible(directory: Path, suffix: str) -> list[str]:
    """Sorted names of the files with this suffix, without hidden ones."""
    return sorted(path.name for path in directory.glob(f"*{suffix}") if not path.name.startswith("."))


def has_weights(directory: Path) -> bool:
    """Whether the directory holds files that `find` can choose from."""
    indexes = (directory / INDEX, directory / TORCH_INDEX)
    names = visible(directory, ".bin")
    return (
        bool(visible(directory, ".safetensors"))
        or any(n.startswith("pytorch_model") for n in names)
        or any(index.exists() for index in indexes)
    )


def find(directory: Path, single_file: MappedFile | None = None) -> Tensors:
    """All tensors of the directory, or of the file that the caller gave and those that belong to it.

    Raises `FormatError` when files are missing, damaged, or it is not clear which of several is meant.
    """
    if single_file is not None:
        return _around(directory, single_file)
    others = visible(directory, ".safetensors")
    for suffix, single, index in _KINDS:
        names = visible(directory, suffix)
        if single in names:
            found = Tensors(tensors_of(map_file(directory / single)))
            if (directory / index).exists():
                found.notes.append(f"{index} is beside {single} and not used, as in transformers: it may be stale")
        elif (directory / index).exists():
            found = _indexed(directory, directory / index)
        elif shards := _complete([name for name in names if suffix != ".bin" or name.startswith("pytorch_model")]):
            found = _merged(directory, shards)
        else:
            continue
        if suffix == ".bin" and others:
            found.notes.append(f"{', '.join(others[:3])} beside PyTorch's files: not used, as in transformers")
        return found
    if len(others) == 1:
        return Tensors(tensors_of(map_file(directory / others[0])))
    names = others or visible(directory, ".bin")
    raise FormatError(
        "it is not clear which file holds the weights",
        path=directory,
        expected=f"{SINGLE}, {INDEX}, one file *.safetensors, {TORCH_SINGLE} or {TORCH_INDEX}, or the path of a file",
        found=unfinished(directory)
        or ", ".join([*names, *(each for each in visible(directory, "") if each not in names)][:12])
        or "no files",
    )


def tensors_of(file: MappedFile) -> dict[str, TensorInfo]:
    """The tensors of a file of either container, recognised by its content. Nothing in it is executed."""
    if torch_zip.looks_like(file):
        return torch_zip.TorchFile(file, is_buffer).tensors
    return safetensors.directory(file)


def _around(directory: Path, file: MappedFile) -> Tensors:
    """The tensors of a given file: one of several stands for all of them."""
    name = file.path.name
    if name not in (SINGLE, TORCH_SINGLE):
        for _, _, index in _KINDS:
            if (directory / index).exists() and name in _files_of(directory / index):
                return _indexed(directory, directory / index)
        if (match := _SHARD.fullmatch(name)) and (shards := _complete(visible(directory, match["suffix"]), match)):
            return _merged(directory, shards)
    return Tensors(tensors_of(file))


def _complete(names: Iterable[str], of: re.Match[str] | None = None) -> list[str]:
    """The shards of a model among the names, all of them; none if several models, or no whole one, are there."""
    found = [match for name in names if (match := _SHARD.fullmatch(name))]
    groups = {(m["stem"], m["count"]) for m in found} if of is None else {(of["stem"], of["count"])}
    if len(groups) != 1:
        return []
    (group,) = groups
    shards = sorted(m.group() for m in found if (m["stem"], m["count"]) == group)
    return shards if len(shards) == int(group[1]) else []


def _table(index: Path) -> dict[str, str]:
    """Tensor → file name. Raises `FormatError` unless every file is in the directory of the index."""
    keys = read_object(index)
    if (table := keys.inner("weight_map")) is None:
        raise keys.fault("weight_map", "an object")
    for name, file in table.values.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise table.fault(name, "the name of a .safetensors or .bin file beside the index")
    return table.values


def _files_of(index: Path) -> list[str]:
    return list(dict.fromkeys(_table(index).values()))


def _indexed(directory: Path, index: Path) -> Tensors:
    """All tensors of the files that an index names. Where its table and the files differ, the files count."""
    table = _table(index)
    found = _merged(directory, dict.fromkeys(table.values()), table)
    found.notes.clear()
    wrong = [name for name, file in table.items() if name in found.infos and found.infos[name].file.path.name != file]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        found.notes.append(f"{index.name} names another file for {wrong[0][:100]}{more} than the one that holds it")
    return found


def _merged(directory: Path, names: Iterable[str], table: dict[str, str] | None = None) -> Tensors:
    """The tensors of several files. Of two with one name, the one in the file that `table` names counts."""
    tensors: dict[str, TensorInfo] = {}
    names = list(names)
    for file_name in names:
        if not (directory / file_name).exists():
            raise FormatError(
                "a part of the model is missing",
                path=directory,
                expected=file_name,
                found=unfinished(directory) or "no such file",
            )
        for name, info in tensors_of(map_file(directory / file_name)).items():
            if name not in tensors or (table or {}).get(name, file_name) == file_name:
                tensors[name] = info
    together = [f"no index says which files belong together: all {len(names)} parts are read"]
    return Tensors(tensors, together if len(names) > 1 else [])
