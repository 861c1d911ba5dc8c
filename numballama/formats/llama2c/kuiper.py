"""KuiperLLama's formats fp32 and int8 ("version 3"), and recognition of files without a magic number.

No field of a file distinguishes these formats from llama2.c v0. The header gives the exact size that each format would
have, so the size of the file decides.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
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
    Tensor,
    checkpoint,
    pack_config,
    parse_config,
    require_group,
    require_header,
    tensors_of,
    write_file,
)
from .llama2c import legacy_layout

_FP32_HEADER, _INT8_HEADER = 28, 32  # seven int32; int8: group_size as well


def int8_layout(config: ModelConfig, group_size: int) -> Layout:
    """The seven matrices and, if not tied, the classifier in int8; then embeddings and norms in float32."""
    t, n = tensors_of(config, WeightType("int8", group_size)), config.n_layers
    last = () if config.tied_embeddings else (Run((t["output"],)),)
    embeddings = Tensor("tok_embeddings", t["tok_embeddings"].shape)
    runs = (
        *(Run((t[name],), n) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        *last,
        Run((embeddings,)),
        Run((t["attn_norm"],), n),
        Run((t["ffn_norm"],), n),
        Run((t["norm"],)),
    )
    return Layout("KuiperLLama int8", config, _INT8_HEADER, runs)


def read(file: MappedFile) -> Checkpoint:
    """Open a file without a magic number as the format that matches its size.

    Raises `FormatError` when the header is impossible or no format has this size. The message lists the formats,
    closest first.
    """
    require_header(file, _FP32_HEADER, "llama2.c v0 or KuiperLLama")
    layouts = candidates(file)
    for layout in layouts:
        if layout.nbytes == file.size:
            return checkpoint(file, layout)
    layouts.sort(key=lambda layout: abs(layout.nbytes - file.size))
    sizes = "; ".join(
        f"{_describe(layout)}: {layout.nbytes:,} bytes ({layout.misfit(file.size)})" for layout in layouts
    )
    raise FormatError(
        "no format without a magic has this size for the shape in the header; either the file is damaged or it is no "
        "llama2.c or KuiperLLama checkpoint",
        path=file.path,
        where=layouts[0].end_of(file.size),
        expected=sizes,
        found=f"{file.size:,} bytes",
    )


def candidates(file: MappedFile) -> list[Layout]:
    """The layouts that a file with this header may have. Raises `FormatError` when the header is impossible."""
    config = parse_config(file, 0, "a file that begins with no known magic, so llama2.c v0 or KuiperLLama,", tied=None)
    found = []
    if file.size >= _INT8_HEADER:
        group = struct.unpack_from("<i", file.data, _FP32_HEADER)[0]
        # In a float32 file these are the bits of the first weight, which form a small integer only if it is almost 0.
        # So int8 comes first: its size can equal that of a float32 format by accident, but not with a valid group too.
        if 1 <= group <= MAX_GROUP:
            found.append(int8_layout(config, group))
            if config.tied_embeddings:
                note = "the header says that the embeddings are tied, but the file has a classifier: it is used"
                untied = replace(config, tied_embeddings=False)
                found.append(replace(int8_layout(untied, group), notes=(note,)))
    biases = (
        "q/k/v biases come from KuiperLLama's Qwen2 exporter, whose models want rope_pairing='half', "
        "rope_theta=1e6, norm_eps=1e-6"
    )
    found.append(legacy_layout(config))
    found.append(replace(legacy_layout(replace(config, qkv_bias=True)), notes=(biases,)))
    return found


def _describe(layout: Layout) -> str:
    classifier = "tied" if layout.config.tied_embeddings else "with a classifier"
    return f"{layout.format}, {classifier}{', with biases' if layout.config.qkv_bias else ''}"


def write_fp32(path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight]) -> list[str]:
    """Write KuiperLLama fp32: llama2.c v0, with q/k/v biases if `config` has them. In other respects as `write_v0`."""
    return write_file(path, pack_config(config, "KuiperLLama fp32", signed_vocab=True), legacy_layout(config), weights)


def write_int8(
    path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight], group_size: int = DEFAULT_GROUP
) -> list[str]:
    """Write KuiperLLama int8 (int8 matrices, float32 embeddings and norms); otherwise as `llama2c.write_v0`.

    Like KuiperLLama's exporter, it writes no classifier for tied models, although its own loader would read one.
    """
    if config.qkv_bias:
        raise UnsupportedError("KuiperLLama int8 has no place for q/k/v biases; KuiperLLama fp32 has")
    require_group(group_size)
    header = pack_config(config, "KuiperLLama int8", signed_vocab=True) + struct.pack("<i", group_size)
    return write_file(path, header, int8_layout(config, group_size), weights)
