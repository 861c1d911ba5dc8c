"""numballama: LLaMA inference compiled from Python.

    import numballama

    model = numballama.compile(None)  # the story model inside this package, or a path
    print(model.generate("Once upon a time", temperature=0))

Importing this package is cheap: Numba is imported when a model is compiled.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ContextError, DeviceError, Error, FormatError, Interrupted, UnsupportedError

if TYPE_CHECKING:
    from .chat.conversation import Chat
    from .config import RopePairing
    from .explain.explanation import ExplainedText, Explanation
    from .generate import GenerationResponse
    from .generate import GenerationResponse as Piece
    from .inspection import Inspection
    from .model import Model
    from .quantization.policy import Dtype
    from .quantization.types import ActivationType, KVType
    from .sampling import SamplingParams
    from .tokenizers.base import Tokenizer

__version__ = "0.2.0"

__all__ = [
    "Chat",
    "ContextError",
    "DeviceError",
    "Error",
    "ExplainedText",
    "Explanation",
    "FormatError",
    "GenerationResponse",
    "Interrupted",
    "Model",
    "Piece",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
    "compile",
    "inspect",
    "load_tokenizer",
]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _explains_names(function: _Function) -> _Function:
    """The function, which raises `Error` for a keyword that it does not have. The error names ours."""
    known = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def checked(*positional: Any, **named: Any) -> Any:
        if not named.keys() <= set(known):
            from .sampling import OTHER_NAMES, SamplingOptions
            from .validation import refuse_options

            sampling = {**{name: name for name in SamplingOptions.__annotations__}, **OTHER_NAMES}
            refuse_options(named, known, sampling, function.__name__)
        return function(*positional, **named)

    return checked  # type: ignore[return-value]


@_explains_names
def compile(
    model_path: str | PathLike[str] | None,
    tokenizer: str | PathLike[str] | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    context: int | None = None,
    kv_dtype: KVType | None = None,
    threads: int | None = None,
    rope_pairing: RopePairing | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
    fusions: bool | Sequence[str] = True,
    activations: ActivationType = "f32",
    max_sequences: int = 1,
    gpus: int = 1,
    kv_tokens: int | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Open a model file, compile it for a device and return it ready to generate.

    Args:
        model_path: a model file, whose format is recognised by its content; a directory from Hugging Face or Meta; a
            hub id "owner/name", or "owner/name:Q4_K_M" for one of its GGUF files, which is downloaded; None for the
            small story model inside this package.
        tokenizer: path of a tokenizer, for model files that carry none (GGUF files do). Without one, only `logits`
            works.
        device: "cpu", "cuda" (an NVIDIA GPU; "cuda:1" for the second one), "reference" (NumPy: slow, defines the
            results) or "auto": the fastest device of this machine, which `notes` names.
        dtype: "f32", "f16", "bf16", "int8", "q8_0" or "q4_0" converts the linear weights; None keeps the file's types.
        context: tokens that a sequence may have; default the model's own, at most 4096.
        kv_dtype: type of the KV cache: "f32" (default on the CPU), "f16" (default on a GPU), "bf16" or "q8_0".
        threads: number of CPU workers; default: as many as this process may use.
        rope_pairing: "interleaved" or "half". Like `rope_theta` and `norm_eps`, it replaces the file's value, or gives
            one that the file lacks.
        fusions: which fusion passes join ops: all (True), none (False) or those named. The logits stay the same.
        activations: "f32", or "int8" to quantise the inputs of quantised weights to int8 in blocks, as llama.cpp does
            on the CPU. Prompts are then processed faster, and logits differ by the rounding. llama2.c v2 files always
            use int8, as llama2.c itself does.
        max_sequences: sequences that generate at the same time, up to 1,024; others wait.
        gpus: GPUs of this machine that share the model, from `device` on: see docs/ranks.md. A CPU's cores share it in
            any case: `threads`.
        kv_tokens: size of the KV cache in tokens, over all sequences; default max_sequences · context, or what fits in
            memory, which `notes` say.
        batch_invariant: whether logits have the same bits alone, in a batch of any size and with any chunks of a
            prompt. All runs then use one family of kernels, and prompts take longer: see docs/engine.md. Not for the
            reference. On a GPU `max_sequences` is at most 128, with float32 weights 8, and 1 becomes 2.

    Raises `FormatError` for a damaged file, `UnsupportedError` for what this version cannot do, `DeviceError` for a
    device that cannot be used, `Error` for arguments out of range or with other names (`n_ctx`), which names ours.
    """
    from .host import interrupts

    with interrupts.deferred():
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
        max_sequences=max_sequences,
        gpus=gpus,
        kv_tokens=kv_tokens,
        batch_invariant=batch_invariant,
    )


@_explains_names
def inspect(
    path: str | PathLike[str] | None,
    tokenizer: str | PathLike[str] | None = None,
    context: int | None = None,
    kv_dtype: KVType | None = None,
    dtype: Dtype | None = None,
    max_sequences: int = 1,
) -> Inspection:
    """Describe a model file: config, tensors, graph, plan and the memory that it takes. Reads no weights.

    `context` (tokens), `kv_dtype`, `dtype` and `max_sequences` are those that you would pass to `compile`: the result's
    `memory` is for them, and `memory_for()` answers for others. It prints as a report; a notebook draws it.
    Raises `FormatError` or `UnsupportedError` as `compile` does.
    """
    from .inspection import Inspection

    return Inspection(path, tokenizer, context=context, kv_dtype=kv_dtype, dtype=dtype, max_sequences=max_sequences)


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Open a tokenizer: a `tokenizer.json`, a sentencepiece or tiktoken `.model`, a llama2.c `.bin`, a GGUF file (also
    one without a model), a directory with one of these, or a hub id "owner/name".

    Raises `FormatError` for a file that is damaged or no tokenizer, `UnsupportedError` for a type of tokenizer that
    this version cannot read.
    """
    from . import hub
    from .formats.tokenizer_files import load_tokenizer

    return load_tokenizer(hub.resolve(path, hub.TOKENIZER_FILES))


_LAZY = {
    "Chat": ("chat.conversation", "Chat"),
    "ExplainedText": ("explain.explanation", "ExplainedText"),
    "Explanation": ("explain.explanation", "Explanation"),
    "GenerationResponse": ("generate", "GenerationResponse"),
    "Model": ("model", "Model"),
    "Piece": ("generate", "GenerationResponse"),  # the old name
    "SamplingParams": ("sampling", "SamplingParams"),
}
"""Name → module and attribute. They are imported when they are first used, so that importing the package is cheap."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
