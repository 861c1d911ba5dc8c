"""llama2.c's formats: v0 without a magic (recognised by `kuiper.read`), v1 (float32) and v2 (int8) with one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from os import PathLike

from ...checkpoint import Checkpoint, Weight
from ...config import ModelConfig
from ...errors import FormatError, UnsupportedError
from ...files import MappedFile
from ...quantization.convert import DEFAULT_GROUP
from ...quantization.types import WeightType
from .layout import (
    MAX_GROUP,
    Layout,
    Run,
    checkpoint,
    freqs_of,
    pack_config,
    parse_config,
    require_group,
    require_header,
    tensors_of,
    write_file,
)

MAGIC = struct.pack("<I", 0x616B3432)
"""The first bytes of v1 and v2."""

_V0_HEADER = 28  # seven int32, nothing else
_HEADER = 256  # magic, int32 version, seven int32, uint8 shared_classifier, v2: int32 group_size; then zeros
_CONFIG_AT, _SHARED_AT, _GROUP_AT = 8, 36, 37
_MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def legacy_layout(config: ModelConfig) -> Layout:
    """v0, all float32. KuiperLLama's fp32 is the same, with biases after each layer's q, k, v if `config.qkv_bias`."""
    t, n = tensors_of(config), config.n_layers
    biases = {"wq": "bq", "wk": "bk", "wv": "bv"} if config.qkv_bias else {}

    def layers(name: str) -> Run:
        return Run((t[name], t[biases[name]]) if name in biases else (t[name],), n)

    order = ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
    runs = [Run((t["tok_embeddings"],)), *map(layers, order), Run((t["norm"], *freqs_of(config)))]
    if not config.tied_embeddings:
        runs.append(Run((t["output"],)))
    return Layout("KuiperLLama fp32" if config.qkv_bias else "llama2.c v0", config, _V0_HEADER, tuple(runs))


def v1_layout(config: ModelConfig) -> Layout:
    """v1: all float32, the norms first."""
    return Layout("llama2.c v1", config, _HEADER, _norms_first(config))


def v2_layout(config: ModelConfig, group_size: int) -> Layout:
    """v2: as v1, with every matrix in int8."""
    return Layout("llama2.c v2", config, _HEADER, _norms_first(config, WeightType("int8", group_size)))


def _norms_first(config: ModelConfig, *matrix_type: WeightType) -> tuple[Run, ...]:
    t, n = tensors_of(config, *matrix_type), config.n_layers
    last = () if config.tied_embeddings else (Run((t["output"],)),)
    norms = (Run((t["attn_norm"],), n), Run((t["ffn_norm"],), n), Run((t["norm"],)))
    return (*norms, Run((t["tok_embeddings"],)), *(Run((t[name],), n) for name in _MATRICES), *last)


def read(file: MappedFile) -> Checkpoint:
    """Open a v1 or v2 file; both begin with `MAGIC`.

    Raises `FormatError` when the header or the size is wrong, and `UnsupportedError` for another version.
    """
    require_header(file, _HEADER, "llama2.c")
    version = struct.unpack_from("<i", file.data, len(MAGIC))[0]
    if version not in (1, 2):
        raise UnsupportedError(f"{file.path}: llama2.c version {version}; supported are 0 (no magic), 1 and 2")
    shared = file.data[_SHARED_AT]
    if shared > 1:
        raise FormatError(
            "bad shared_classifier in the header", path=file.path, where=_SHARED_AT, expected="0 or 1", found=shared
        )
    config = parse_config(file, _CONFIG_AT, f"llama2.c v{version}", tied=bool(shared))
    if version == 1:
        layout = v1_layout(config)
    else:
        group = struct.unpack_from("<i", file.data, _GROUP_AT)[0]
        if not 1 <= group <= MAX_GROUP:
            raise FormatError(
                "bad group_size in the header",
                path=file.path,
                where=_GROUP_AT,
                expected=f"1 to {MAX_GROUP:,}",
                found=group,
            )
        layout = v2_layout(config, group)
    return checkpoint(file, layout, int8_activations=version == 2)


def write_v0(path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight]) -> list[str]:
    """Write llama2.c v0 (float32), completely or not at all. Returns notes on what the format cannot hold.

    Raises `UnsupportedError` when the format cannot hold something that `config` needs, otherwise `Error`.
    """
    _refuse_biases(config, "llama2.c v0")
    return write_file(path, pack_config(config, "llama2.c v0", signed_vocab=True), legacy_layout(config), weights)


def write_v1(path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight]) -> list[str]:
    """Write llama2.c v1 (float32); otherwise as `write_v0`."""
    _refuse_biases(config, "llama2.c v1")
    return write_file(path, _header(1, config), v1_layout(config), weights)


def write_v2(
    path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight], group_size: int = DEFAULT_GROUP
) -> list[str]:
    """Write llama2.c v2 (int8 matrices, float32 norms); otherwise as `write_v0`.

    Any `group_size` works here. llama2.c's runq needs one that divides dim and hidden_dim, as a note says.
    """
    _refuse_biases(config, "llama2.c v2")
    require_group(group_size)
    header = _header(2, config, struct.pack("<i", group_size))
    notes = write_file(path, header, v2_layout(config, group_size), weights)
    if config.dim % group_size or config.hidden_dim % group_size:
        notes.append(f"groups of {group_size} cross rows of this model, which llama2.c's runq reads wrongly")
    return notes


def _header(version: int, config: ModelConfig, after_flag: bytes = b"") -> bytes:
    shape = pack_config(config, f"llama2.c v{version}", signed_vocab=False)
    header = MAGIC + struct.pack("<i", version) + shape + bytes([config.tied_embeddings]) + after_flag
    return header.ljust(_HEADER, b"\0")


def _refuse_biases(config: ModelConfig, format_name: str) -> None:
    if config.qkv_bias:
        raise UnsupportedError(f"{format_name} has no place for q/k/v biases; KuiperLLama fp32 has")
