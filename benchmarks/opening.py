"""How long `import numballama` and opening a large GGUF file take: `python benchmarks/opening.py [RUNS]`.

All in fresh processes. The import is compared with that of an empty module. The file is sparse: Llama-2-7B's shape in
Q4_1, 4.3 GB of which only the head lies on the disk, with a byte-level BPE of 49,152 tokens. Prints, for each step
after `import numballama`, seconds by the clock and by the processor, and the most memory that was resident.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import gguf
import numpy as np

VOCABULARY, DIM, HIDDEN, LAYERS = 49_152, 4096, 11_008, 32

IMPORT = """
import sys, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

MEASURE = """
import json, sys, time
import numballama
def now(): return time.perf_counter(), time.process_time()
start = now()
found = numballama.inspect(sys.argv[1])
opened = now()
text = str(found)
reported = now()
(most,) = (int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(json.dumps([*(b - a for a, b in zip(start, opened)), *(b - a for a, b in zip(start, reported)), most]))
assert "numba" not in sys.modules, "the report needs Numba"
"""


def vocabulary() -> tuple[list[str], list[str]]:
    """Pieces and merges of a BPE that joins any two letters, then such pairs with letters, as far as it goes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    pairs = [(a, b) for a in letters[:94] for b in letters[:94]]
    merges = (pairs + [(a + b, c) for a, b in pairs for c in letters[:94]])[: VOCABULARY - 256]
    return letters + [a + b for a, b in merges], [f"{a} {b}" for a, b in merges]


def write(path: Path) -> None:
    """The file, with holes where the weights would be."""
    out, (pieces, merges) = gguf.GGUFWriter(path, "llama"), vocabulary()
    out.add_vocab_size(VOCABULARY)
    out.add_context_length(4096)
    out.add_embedding_length(DIM)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(32)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(pieces)
    out.add_token_merges(merges)
    shapes = {"token_embd": (VOCABULARY, DIM), "output": (VOCABULARY, DIM), "output_norm": (DIM,)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}"] = (DIM, DIM)
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, DIM) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (DIM, HIDDEN)}
        shapes |= {f"blk.{layer}.{name}_norm": (DIM,) for name in ("attn", "ffn")}
    total = 0
    for name, shape in shapes.items():
        matrix = len(shape) == 2
        kind, nbytes = gguf.GGMLQuantizationType.Q4_1, int(np.prod(shape)) // 32 * 20
        if matrix:
            out.add_tensor_info(f"{name}.weight", (*shape[:-1], shape[-1] // 32 * 20), np.dtype("uint8"), nbytes, kind)
        else:
            nbytes = 4 * shape[0]
            out.add_tensor_info(f"{name}.weight", shape, np.dtype("float32"), nbytes)
        total += -(-nbytes // 32) * 32
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    out.close()
    with open(path, "r+b") as file:
        end = file.seek(0, 2)
        file.truncate(end + -end % 32 + total)


def measure_import(module: str, folder: str) -> float:
    """Seconds that a fresh process takes to import a module, which may lie in `folder`."""
    code = f"import sys; sys.path.append({folder!r})" + IMPORT.format(module=module)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.py").touch()
        for module in ("empty", "numballama"):  # compiles them
            measure_import(module, folder)
        times = [(measure_import("empty", folder), measure_import("numballama", folder)) for _ in range(3 * runs)]
        empty, package = (median(column) * 1e3 for column in zip(*times, strict=True))
        print(f"import numballama {package:.1f} ms, an empty module {empty:.1f} ms: {package - empty:.1f} ms more")
        path = Path(folder) / "large.gguf"
        write(path)
        print(f"{path.stat().st_size / 1e9:.2f} GB, {path.stat().st_blocks * 512 / 1e6:.1f} MB on the disk")
        found = []
        for _ in range(runs + 1):  # the first brings the modules into the page cache
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout))
        for at, name in ((0, "inspect"), (2, "inspect and print")):
            for offset, clock in ((0, "by the clock"), (1, "processor")):
                times = [run[at + offset] for run in found[1:]]
                print(f"{name:18} {clock:13} {min(times):.2f} to {max(times):.2f} s, median {median(times):.2f}")
        print(f"resident at most {max(run[4] for run in found) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
