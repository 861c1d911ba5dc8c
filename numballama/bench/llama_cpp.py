"""Measure llama.cpp on the same file, prompt length and threads, through llama-cpp-python where it is installed."""

from __future__ import annotations

import importlib
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

from .. import progress
from ..errors import Error, FormatError
from .sweep import Speed


def require_llama_cpp(path: Path | None = None, gpu: bool = False) -> Any:
    """The module `llama_cpp`. Raises `Error` if it is not there or, with `gpu`, is built without one, `FormatError` if
    `path` is not a GGUF file.
    """
    try:
        module = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:  # it raises RuntimeError for a library that does not load
        raise Error(f'--compare llama.cpp needs llama-cpp-python: pip install "llama-cpp-python" ({error})') from None
    if gpu and not module.llama_supports_gpu_offload():
        raise Error("this llama-cpp-python is built without a GPU: compare with --device cpu, or build it with CUDA")
    if path is not None:
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError:  # a directory
            magic = b""
        if magic != b"GGUF":
            raise FormatError(
                "llama.cpp reads GGUF files only: `numballama export MODEL FILE.gguf --to gguf` writes one",
                path=path,
                expected="GGUF",
                found=magic or "a directory",
            )
    return module


@cache
def _silent(llama: Any) -> Any:
    """A callback for log lines, which lives as long as the library may call it."""
    return llama.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """A GGUF file in llama.cpp. Fixed tokens through its C interface: no sampling and no text is in the times."""

    def __init__(self, path: Path, gpu: bool = False) -> None:
        llama = self._llama = require_llama_cpp(path, gpu)
        llama.llama_log_set(_silent(llama), None)
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 999 if gpu else 0
        self._model = llama.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise Error(f"{path}: llama.cpp {llama.__version__} does not load this file")
        self._vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Free the model."""
        self._llama.llama_model_free(self._model)

    def measure(self, context: int, threads: int, prompt_tokens: int, tokens: int, repeats: int) -> Speed:
        """Medians of `repeats` runs of one sequence, after one that does not count."""
        llama = self._llama
        settings = llama.llama_context_default_params()
        settings.n_ctx = max(context, prompt_tokens + tokens)
        settings.n_batch = max(settings.n_batch, prompt_tokens)
        settings.n_threads = settings.n_threads_batch = threads
        state = llama.llama_init_from_model(self._model, settings)
        if not state:
            raise Error(f"llama.cpp makes no context of {settings.n_ctx} tokens: memory may be short")
        batch = llama.llama_batch_init(prompt_tokens, 0, 1)

        def feed(count: int, position: int) -> None:
            batch.n_tokens = count
            for i in range(count):
                batch.token[i], batch.pos[i] = (7 + position + i) % self._vocab_size, position + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == count - 1
            if llama.llama_decode(state, batch) != 0:
                raise Error("llama.cpp failed to decode a batch")
            llama.llama_get_logits_ith(state, -1)  # waits for the result

        prefill_times: list[float] = []
        decode_times: list[float] = []
        try:
            with progress.progress_bar("llama.cpp") as report:
                for index in range(repeats + 1):
                    report("", index, repeats + 1)
                    llama.llama_memory_clear(llama.llama_get_memory(state), True)
                    start = time.perf_counter()
                    feed(prompt_tokens, 0)
                    first = time.perf_counter()
                    for position in range(prompt_tokens, prompt_tokens + tokens):
                        feed(1, position)
                    prefill_times.append(first - start)
                    decode_times.append(time.perf_counter() - first)
        finally:
            llama.llama_batch_free(batch)
            llama.llama_free(state)
        prefill, decode = statistics.median(prefill_times[1:]), statistics.median(decode_times[1:])
        return Speed(
            "llama.cpp", context, threads, 1, prompt_tokens, tokens, prompt_tokens / prefill, tokens / decode, prefill
        )
