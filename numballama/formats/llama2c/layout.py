"""Common code of the llama2.c family of formats: a header with the sizes, then tensors without gaps.

Each format is a function from `ModelConfig` to `Layout`, the list of its tensors in file order. Reading, writing, error
messages and the tests of damaged files all use that list.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import BinaryIO

import numpy as np

from ...checkpoint import Checkpoint, Weight, require_weights
from ...config import ModelConfig
from ...errors import FormatError, UnsupportedError
from ...files import MappedFile, atomic_write
from ...memory import ceil_div
from ...quantization.convert import convert
from ...quantization.types import F32, WeightType
from ..limits import MAX_CONTEXT, MAX_LAYERS

FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "context")
"""The seven int32 of every header, in this order."""

NOT_IN_FILE = ("rope_pairing", "rope_theta", "norm_eps")
"""`ModelConfig` fields that none of the formats stores."""

MAX_GROUP = 1 << 16
"""Maximum number of elements in an int8 group."""

_FREQS = ("freqs_cos", "freqs_sin")
_FREQ_ROWS = 4096  # rows of those tables computed at a time


@dataclass(frozen=True)
class Tensor:
    """One tensor in C order. An int8 tensor has its data first, then its float32 scales."""

    name: str
    shape: tuple[int, ...]
    type: WeightType = F32

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.numel)


@dataclass(frozen=True)
class Run:
    """Consecutive tensors: once in the file, or, if `layers` > 0, once for each layer."""

    tensors: tuple[Tensor, ...]
    layers: int = 0

    @property
    def stride(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return self.stride * (self.layers or 1)


@dataclass(frozen=True)
class Layout:
    """Positions of all tensors in a file. Sizes are computed without a loop over layers, whose number is untrusted."""

    format: str
    config: ModelConfig
    header_size: int
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.header_size + sum(run.nbytes for run in self.runs)

    def sections(self) -> Iterator[tuple[Tensor, int]]:
        """Every tensor with its full name ("layers.0.wq") and its byte offset, in file order."""
        offset = self.header_size
        for run in self.runs:
            for layer in range(run.layers or 1):
                for tensor in run.tensors:
                    yield replace(tensor, name=_full_name(run, layer, tensor)), offset
                    offset += tensor.nbytes

    def locate(self, offset: int) -> str:
        """Name of the tensor at byte `offset`, for error messages. `offset` must be within the layout."""
        if offset < self.header_size:
            return "the header"
        offset -= self.header_size
        for run in self.runs:
            if offset >= run.nbytes:
                offset -= run.nbytes
                continue
            layer, offset = divmod(offset, run.stride)
            for tensor in run.tensors:
                if offset < tensor.nbytes:
                    name = _full_name(run, layer, tensor)
                    return name if not tensor.type.group or offset < tensor.numel else f"the scales of {name}"
                offset -= tensor.nbytes
        raise ValueError("offset beyond the layout")

    def end_of(self, size: int) -> int | str:
        """Where a file of `size` bytes differs from the layout: the tensor that it ends in, or the offset of extra
        bytes.
        """
        return self.locate(size) if size < self.nbytes else self.nbytes

    def misfit(self, size: int) -> str:
        """How a file of `size` bytes differs from this layout, in words."""
        if size < self.nbytes:
            return f"the file ends in {self.locate(size)}, {self.nbytes - size:,} bytes short"
        return f"{size - self.nbytes:,} bytes follow the last tensor"


def _full_name(run: Run, layer: int, tensor: Tensor) -> str:
    return f"layers.{layer}.{tensor.name}" if run.layers else tensor.name


def tensors_of(config: ModelConfig, weight_type: WeightType = F32) -> dict[str, Tensor]:
    """Short name ("wq", "tok_embeddings") → its tensor: norms and biases float32, matrices of `weight_type`.

    "output" is always among them, because some formats store it even if the config ties it.
    """
    table = (config.vocab_size, config.dim)
    shapes = config.layer_shapes() | {"norm": (config.dim,), "tok_embeddings": table, "output": table}
    return {name: Tensor(name, shape, weight_type if len(shape) == 2 else F32) for name, shape in shapes.items()}


def freqs_of(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The tables of RoPE cosines and sines that legacy files hold; they are not used."""
    cos, sin = (Tensor(name, (config.context, config.head_dim // 2)) for name in _FREQS)
    return cos, sin


# ---- reading ----


def parse_config(file: MappedFile, offset: int, what: str, tied: bool | None) -> ModelConfig:
    """Read the seven int32 at byte `offset`. `what` names the file in errors.

    `tied` None: the sign of vocab_size decides; negative means that the classifier is not tied. Raises `FormatError`
    with the offset of the first impossible field.
    """
    values = dict(zip(FIELDS, struct.unpack_from("<7i", file.data, offset), strict=True))
    if tied is None:
        tied = values["vocab_size"] > 0
        values["vocab_size"] = abs(values["vocab_size"])
    if fault := _fault(values):
        name, expected = fault
        where = offset + 4 * FIELDS.index(name)
        found = struct.unpack_from("<i", file.data, where)[0]
        message = f"{what} cannot have such a {name}"
        raise FormatError(message, path=file.path, where=where, expected=expected, found=found)
    return ModelConfig(**values, tied_embeddings=tied)


def _fault(values: Mapping[str, int]) -> tuple[str, str] | None:
    """(name, expected value) of the first impossible header field, or None. Python's ints do not overflow."""
    for name in FIELDS:
        if values[name] <= 0:
            return name, "a positive number"
    if values["n_layers"] > MAX_LAYERS:
        return "n_layers", f"at most {MAX_LAYERS:,}"
    if values["context"] > MAX_CONTEXT:
        return "context", f"at most {MAX_CONTEXT:,}"
    dim, n_heads = values["dim"], values["n_heads"]
    if dim % n_heads or dim // n_heads % 2:
        return "n_heads", f"a divisor of dim {dim} that gives heads of an even size"
    if n_heads % values["n_kv_heads"]:
        return "n_kv_heads", f"a divisor of n_heads {n_heads}"
    return None


def require_header(file: MappedFile, size: int, format_name: str) -> None:
    """Raise `FormatError` when the file is too short for the header of a format."""
    if file.size < size:
        raise FormatError(
            f"the file ends in the header of {format_name}",
            path=file.path,
            where=file.size,
            expected=f"at least {size} bytes",
            found=f"{file.size} bytes",
        )


def checkpoint(file: MappedFile, layout: Layout, *, int8_activations: bool = False) -> Checkpoint:
    """The checkpoint of `file`; its weights are views. Raises `FormatError` unless it has exactly the layout's size."""
    if layout.nbytes != file.size:
        raise FormatError(
            f"not a whole {layout.format} file: {layout.misfit(file.size)}",
            path=file.path,
            where=layout.end_of(file.size),
            expected=f"{layout.nbytes:,} bytes",
            found=f"{file.size:,} bytes",
        )
    views = {tensor.name: _view(file, tensor, offset) for tensor, offset in layout.sections()}
    return Checkpoint(
        path=file.path,
        format=layout.format,
        config=layout.config,
        weights={name: views[name] for name in layout.config.weight_shapes()},
        int8_activations=int8_activations,
        bos_is_stop_token=True,
        defaulted_fields=NOT_IN_FILE,
        notes=list(layout.notes),
    )


def _view(file: MappedFile, tensor: Tensor, offset: int) -> Weight:
    """A weight whose arrays are read-only views of the mapped file."""
    if not tensor.type.group:
        data = np.frombuffer(file.data, "<f4", tensor.numel, offset)
        return Weight(tensor.shape, tensor.type, data.reshape(tensor.shape))
    payload = np.frombuffer(file.data, np.int8, tensor.numel, offset).reshape(tensor.shape)
    n_scales = ceil_div(tensor.numel, tensor.type.group)
    return Weight(tensor.shape, tensor.type, payload, np.frombuffer(file.data, "<f4", n_scales, offset + tensor.numel))


# ---- writing ----


def pack_config(config: ModelConfig, format_name: str, signed_vocab: bool) -> bytes:
    """The seven int32 of a header. `signed_vocab`: a negative vocab_size says that the classifier is not tied.

    Raises `UnsupportedError` when these formats cannot express `config`.
    """
    values = {name: getattr(config, name) for name in FIELDS}
    wanted = {
        f"a {type(config).__name__}": type(config) is not ModelConfig,
        "a bias of attention's output projection": config.o_bias,
        "biases of the feed-forward network": config.mlp_bias,
        "norms of queries and keys": config.qk_norm,
        f"a sliding window of {config.window:,} tokens": 0 < config.window < config.context,
        f"RoPE scaled as {config.rope_scaling}": config.rope_scaling is not None,
    }
    if lacking := [what for what, there in wanted.items() if there]:
        raise UnsupportedError(f"{format_name} has no place for {', '.join(lacking)}")
    if config.q_dim != config.dim:
        raise UnsupportedError(
            f"{format_name} has heads of dim / n_heads = {config.dim / config.n_heads:g}, not {config.head_dim}"
        )
    if fault := _fault(values):
        raise UnsupportedError(f"{format_name} cannot hold {fault[0]} {values[fault[0]]}: it must be {fault[1]}")
    if signed_vocab and not config.tied_embeddings:
        values["vocab_size"] *= -1
    try:
        return struct.pack("<7i", *values.values())
    except struct.error:
        raise UnsupportedError(f"{format_name} stores its header as int32, too small for {values}") from None


def require_group(group_size: int) -> WeightType:
    """The int8 type with that group size; raises `UnsupportedError` when the formats cannot express it."""
    if not 1 <= group_size <= MAX_GROUP:
        raise UnsupportedError(f"an int8 group has 1 to {MAX_GROUP:,} elements, found a group size of {group_size}")
    return WeightType("int8", group_size)


def write_file(path: str | PathLike[str], header: bytes, layout: Layout, weights: Mapping[str, Weight]) -> list[str]:
    """Write a file of `layout`, completely or not at all. Returns notes on what the format cannot hold.

    Raises `Error` when `weights` are not those of the layout's config, or the file cannot be written.
    """
    config = layout.config
    require_weights(config, weights)
    with atomic_write(path) as file:
        file.write(header)
        for tensor, _ in layout.sections():
            if tensor.name in _FREQS:
                _write_freqs(file, tensor, config)
                continue
            weight = convert(weights[tensor.name], tensor.type)
            file.write(np.ascontiguousarray(weight.data).data)
            if weight.scales is not None:
                file.write(np.ascontiguousarray(weight.scales).data)
    usual = ModelConfig(**{name: getattr(config, name) for name in FIELDS})
    lost = [
        f"{name}={getattr(config, name)!r}" for name in NOT_IN_FILE if getattr(config, name) != getattr(usual, name)
    ]
    return [f"{layout.format} files cannot hold {', '.join(lost)}: give them again when opening {path}"] if lost else []


def _write_freqs(file: BinaryIO, tensor: Tensor, config: ModelConfig) -> None:
    """The cosines or sines of position · theta^(-2i / head_dim), angles in float32 as PyTorch makes them."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freqs = np.float32(1) / np.float32(config.rope_theta) ** exponents
    function = np.cos if tensor.name == "freqs_cos" else np.sin
    for start in range(0, config.context, _FREQ_ROWS):
        positions = np.arange(start, min(start + _FREQ_ROWS, config.context), dtype=np.float32)
        file.write(function(np.outer(positions, freqs).astype(np.float64)).astype("<f4").data)
