"""numballama: LLaMA inference compiled from Python.

    import numballama

    model = numballama.compile(None)  # the story model inside this package, or a path
    print(model.generate("Once upon a time", temperature=0))

Importing this package is cheap: Numba is imported when a model is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from .errors import ContextError, DeviceError, Error, FormatError, Interrupted, UnsupportedError

if TYPE_CHECKING:
    from .chat.conversation import Chat
    from .inspection import Inspection
    from .model import Model, Piece
    from .tokenizers.base import Tokenizer

__version__ = "0.2.0"

__all__ = [
    "Chat",
    "ContextError",
    "DeviceError",
    "Error",
    "FormatError",
    "Interrupted",
    "Model",
    "Piece",
    "UnsupportedError",
    "__version__",
    "compile",
    "inspect",
    "load_tokenizer",
]


def compile(
    model_path: str | PathLike[str] | None,
    tokenizer: str | PathLike[str] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
    threads: int | None = None,
    rope_pairing: str | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
    fusions: bool | Sequence[str] = True,
    activations: str = "f32",
) -> Model:
    """Open a model file, compile it for a device and return it ready to generate.

    Parameters
    ----------
    model_path: a model file, its format recognised by content; a directory of Hugging Face or Meta; a hub id
        "owner/name", which is downloaded; None for the small story model inside this package.
    tokenizer: path of a tokenizer, when the model file carries none (GGUF files do). Without one, only `logits` works.
    device: "cpu", "cuda" (an NVIDIA GPU; "cuda:1" the second), "reference" (NumPy: slow, the oracle) or "auto", which
        takes the fastest there is and says which.
    dtype: None keeps the file's types; "f32", "f16", "bf16", "int8", "q8_0" or "q4_0" converts the linear weights.
    context: length of the KV cache in tokens; default the model's own, at most 4096.
    kv_dtype: type of the KV cache, "f32" (default on the CPU), "f16" (default on a GPU) or "bf16".
    threads: CPU workers; default all that this process may use.
    rope_pairing: "interleaved" or "half"; with `rope_theta` and `norm_eps`, replaces what a file says or leaves out.
    fusions: which passes of `fusion.FUSIONS` join ops: all (True), none (False) or those named. The logits stay the
    same.
    activations: what quantised weights are multiplied with on the CPU: "f32", or "int8" to round activations in blocks,
        as llama.cpp does: faster prompts, and logits that differ by as much as that rounding. llama2.c v2 files are
        computed with int8 activations in any case, as its own program does.

    Raises `FormatError` for a damaged file, `UnsupportedError` for what this version cannot do, `DeviceError` for a
    device that is not there, `Error` for arguments that make no sense.
    """
    from .model import Model

    return Model(
        model_path,
        tokenizer,
        device=device,
        dtype=dtype,
        context=context,
        kv_dtype=kv_dtype,
        threads=threads,
        rope_pairing=rope_pairing,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
        fusions=fusions,
        activations=activations,
    )


def inspect(path: str | PathLike[str] | None, tokenizer: str | PathLike[str] | None = None) -> Inspection:
    """What a model file holds: config, tensors, graph, plan and a memory estimate. No weights are read.

    Prints as a report. Raises `FormatError` or `UnsupportedError` as `compile` does.
    """
    from .inspection import Inspection

    return Inspection(path, tokenizer)


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, a sentencepiece or tiktoken `.model`, a llama2.c `.bin`, a GGUF file, which
    may hold nothing else, or a directory with one of these; or of a hub id "owner/name".

    Raises `FormatError` for a damaged file or one of another kind, `UnsupportedError` for a kind not read yet.
    """
    from . import hub
    from .formats.tokenizer_files import load_tokenizer

    return load_tokenizer(hub.resolve(path, hub.TOKENIZER_FILES))


def __getattr__(name: str) -> Any:
    if name in ("Model", "Piece"):
        from . import model

        return getattr(model, name)
    if name == "Chat":
        from .chat.conversation import Chat

        return Chat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
