"""Checks of user arguments. Each returns the value in the type that the code uses, or raises `Error`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn, SupportsFloat, SupportsIndex, cast

import numpy as np

from .errors import Error, UnsupportedError


def whole_number(name: str, value: object, minimum: int | None = None) -> int:
    """`value` as an int. NumPy integers are accepted, 1.0 and True are not. Raises `Error` below `minimum`."""
    try:
        if isinstance(value, bool):  # `logprobs=True` is OpenAI's, and no number
            raise TypeError
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        raise Error(f"{name} must be a whole number, found {value!r:.200}") from None
    if minimum is not None and number < minimum:
        raise Error(f"{name} must be at least {minimum}, found {number}")
    return number


def real_number(name: str, value: object, minimum: float, maximum: float, expected: str) -> float:
    """`value` as a float in [minimum, maximum]. Raises `Error` that says `expected`, also for NaN."""
    try:
        if isinstance(value, bool | np.bool_):  # a flag in the wrong place
            raise TypeError
        number = float(cast("SupportsFloat | str", value))
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not minimum <= number <= maximum:
        raise Error(f"{name} must be {expected}, found {value!r:.200}")
    return number


def flag(name: str, value: object) -> bool:
    """`value` as a bool: True, False, 1, 0 or NumPy's. Raises `Error` for others: "false" would be true."""
    if isinstance(value, bool | int | np.bool_) and value in (0, 1):
        return bool(value)
    raise Error(f"{name} must be True or False, found {value!r:.200}")


def strings(name: str, value: object) -> Sequence[str]:
    """One string or a sequence of strings, as a sequence. Raises `Error` for anything else."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise Error(f"{name} must be a string or a list of strings, found {value!r:.200}")
    return items


def require_supported(name: str, value: object, known: Iterable[str | None]) -> None:
    """Raise `UnsupportedError`, with the choices, for a `value` that is not among the `known` ones."""
    known = list(known)
    if not isinstance(value, str | None) or value not in known:  # `in` compares the elements of an array
        choices = ", ".join(each for each in known if each is not None)
        raise UnsupportedError(f"{name} {value!r:.200} is not supported; choose from {choices}")


def require_known(what: str, names: Iterable[str], known: Iterable[str], others: Mapping[str, str]) -> None:
    """Raise `Error` for a name that is not among the `known` ones. It says which is meant, where that can be guessed.

    `others`: names of other libraries → what to use instead.
    """
    known = list(known)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    meant = others.get(unknown[0])
    if meant is None and len(unknown) == 1:
        meant = next(iter(get_close_matches(unknown[0], known, 1, 0.75)), None)
    hint = "; choose from" if meant is None else f": use {meant}. Choose from"
    shown = ", ".join(name if name.isidentifier() and len(name) < 50 else f"{name!r:.50}" for name in unknown[:5])
    raise Error(f"unknown {what} {shown}{hint} {', '.join(known)}")


def check_how(priority: object, request_id: object, reuse_prefix: object, salt: object) -> int:
    """The options of a request: its priority as an int. Raises `Error` for other types, with which the engine could not
    go on for anybody."""
    for name, value in (("request_id", request_id), ("salt", salt)):
        if not isinstance(value, str | None):
            raise Error(f"{name} must be a string or None, found {value!r:.200}")
    flag("reuse_prefix", reuse_prefix)
    return whole_number("priority", priority)


# Options of `compile`

_CONTEXT = "context"
OTHER_OPTIONS = {
    # the model and its tokenizer
    "model": "model_path, the first argument",
    "path": "model_path, the first argument",
    "path_or_hf_repo": "model_path, the first argument",
    "pretrained_model_name_or_path": "model_path, the first argument",
    "repo_id": "model_path: 'owner/name'",
    "filename": "model_path: 'owner/name/file.gguf'",
    "gguf_file": "model_path: 'owner/name/file.gguf'",
    "tokenizer_path": "tokenizer",
    "revision": "model_path: the branch main is read; give the path of another one's files",
    "cache_dir": "the variable HF_HOME of the environment",
    "download_dir": "the variable HF_HOME of the environment",
    "token": "the variable HF_TOKEN of the environment, or hf auth login",
    "chat_format": "model.chat(template=…)",
    "chat_template": "model.chat(template=…)",
    "lora_path": "model_path, with the adapter merged into the model",
    "adapter_path": "model_path, with the adapter merged into the model",
    # sizes
    "n_ctx": _CONTEXT,
    "num_ctx": _CONTEXT,
    "ctx_size": _CONTEXT,
    "context_length": _CONTEXT,
    "context_size": _CONTEXT,
    "max_context": _CONTEXT,
    "max_model_len": _CONTEXT,
    "max_seq_len": _CONTEXT,
    "max_position_embeddings": _CONTEXT,
    "max_kv_size": "context, or kv_tokens for all sequences together",
    "n_parallel": "max_sequences",
    "n_seq_max": "max_sequences",
    "max_num_seqs": "max_sequences",
    "max_batch_size": "max_sequences",
    "batch_size": "max_sequences",
    "gpu_memory_utilization": "kv_tokens",
    # where it runs
    "n_gpu_layers": "device: the whole model is on 'cuda' or on 'cpu'",
    "num_gpu": "device: the whole model is on 'cuda' or on 'cpu'",
    "gpu_layers": "device: the whole model is on 'cuda' or on 'cpu'",
    "device_map": "device",
    "main_gpu": "device: 'cuda:1' is the second GPU",
    "tensor_split": "gpus",
    "tensor_parallel_size": "gpus",
    "n_threads": "threads",
    "num_threads": "threads",
    "num_thread": "threads",
    "n_threads_batch": "threads",
    "enable_prefix_caching": "reuse_prefix of model.stream_ids(); prompts that begin alike share the cache",
    # types
    "torch_dtype": "dtype: 'f32', 'f16', 'bf16', 'int8', 'q8_0' or 'q4_0'",
    "quantization": "dtype: 'int8', 'q8_0' or 'q4_0'; the types of a file are kept",
    "quantization_config": "dtype: 'int8', 'q8_0' or 'q4_0'; the types of a file are kept",
    "load_in_8bit": "dtype='q8_0'",
    "load_in_4bit": "dtype='q4_0'",
    "type_k": "kv_dtype",
    "type_v": "kv_dtype",
    "cache_type_k": "kv_dtype",
    "cache_type_v": "kv_dtype",
    "kv_cache_dtype": "kv_dtype",
    "kv_bits": "kv_dtype: 'q8_0' has 8 bits",
    # numbers of the model
    "rope_freq_base": "rope_theta",
    "rope_base": "rope_theta",
    "rms_norm_eps": "norm_eps",
    # settings of something else
    "seed": "seed of generate()",
    "verbose": "logging.getLogger('numballama')",
    "logits_all": "model.logits(ids)",
}
"""What other libraries call an option of `compile` → what to use here."""

NEEDLESS_OPTIONS = {
    "trust_remote_code": "no code of a model is ever executed",
    "n_batch": "chunks of prompts have the size that suits the device",
    "n_ubatch": "chunks of prompts have the size that suits the device",
    "max_num_batched_tokens": "chunks of prompts have the size that suits the device",
    "use_mmap": "files are always mapped",
    "use_mlock": "files are always mapped",
    "flash_attn": "attention never stores its scores",
    "attn_implementation": "attention never stores its scores",
    "enforce_eager": "every step is planned",
}
"""Options of other libraries that there is nothing to choose for → why."""


def refuse_options(
    given: Iterable[str], known: Sequence[str], sampling: Mapping[str, str], function: str = "compile"
) -> NoReturn:
    """Raise `Error` for names among `given` that are not `known` options of `compile`, or of another function.

    `sampling`: names of sampling options → what to use for them in `generate`.
    """
    unknown = [name for name in given if name not in known]
    if why := NEEDLESS_OPTIONS.get(unknown[0]):
        raise Error(f"unknown option of {function}() {unknown[0]}: leave it out, {why}")
    others = {name: f"{meant} (generate())" for name, meant in sampling.items()}
    require_known(f"option of {function}()", unknown, known, others | OTHER_OPTIONS)
    raise AssertionError(unknown)
