"""Decode and prefill speed of llama.cpp, as one line of JSON. Run by the interpreter that has llama-cpp-python.

python llama_cpp_bench.py MODEL.gguf THREADS PROMPT_TOKENS TOKENS [--turns SEQUENCES]

With `--turns` it answers each line of standard input by the seconds of the prompts and of the tokens after them, of
some sequences at once; by the processor's time if there is one thread (benchmarks/turns.py).
Fixed tokens are fed through the low-level interface, so that no sampling and no text is in the time.
"""

import json
import sys
import time

import llama_cpp

path, threads, prompt_tokens, tokens = sys.argv[1], *map(int, sys.argv[2:5])
sequences = int(sys.argv[sys.argv.index("--turns") + 1]) if "--turns" in sys.argv else 1

silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()
model_parameters = llama_cpp.llama_model_default_params()
model_parameters.n_gpu_layers = 0
model_parameters.use_extra_bufts = "--no-repack" not in sys.argv  # repacking Q8_0 for AMX crashes small models
model = llama_cpp.llama_model_load_from_file(path.encode(), model_parameters)
parameters = llama_cpp.llama_context_default_params()
parameters.n_ctx = parameters.n_batch = max(256, prompt_tokens + tokens) * sequences
parameters.n_seq_max = sequences
parameters.n_threads = parameters.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, parameters)
memory = llama_cpp.llama_get_memory(context)
batch = llama_cpp.llama_batch_init(sequences * prompt_tokens, 0, 1)

clock = time.process_time if "--turns" in sys.argv and threads == 1 else time.perf_counter


def feed(count: int, position: int) -> None:
    """Decode `count` tokens of each sequence from `position` on, with logits for the last of each."""
    batch.n_tokens = count * sequences
    for i in range(count * sequences):
        sequence, offset = divmod(i, count)
        batch.token[i], batch.pos[i] = 7 + (position + offset + sequence) % 400, position + offset
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, offset == count - 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_get_logits_ith(context, -1)  # waits for the result


def once() -> tuple[float, float]:
    """Seconds for the prompt and for the tokens after it."""
    llama_cpp.llama_memory_clear(memory, True)
    start = clock()
    feed(prompt_tokens, 0)
    first = clock()
    for position in range(prompt_tokens, prompt_tokens + tokens):
        feed(1, position)
    return first - start, clock() - first


once()
if "--turns" in sys.argv:
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)
    sys.exit()
prefill, decode = once()
print(
    json.dumps(
        {
            "decode_tokens_per_second": tokens / decode,
            "prefill_tokens_per_second": prompt_tokens / prefill,
            "version": llama_cpp.__version__,
        }
    )
)
