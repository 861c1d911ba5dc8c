"""Mutated files of every format: python -m tests.helpers.fuzz_formats [FORMAT …] --cases N | --total N [--seed N]

A case damages valid files of a format and opens the result. That must give a model or a `numballama.Error` within 2
seconds of processor time, with no more memory than the files' size and 100 MB. The first case that
does otherwise ends the run; its files stay where the message says, and the same seed makes it again. `test_fuzz.py`
runs a sample.

`models` stands for all formats of models, `tokenizers` for all of tokenizers and templates. `--total` is divided among
the formats, `--cases` is for each. A case takes 3 to 20 ms; `TMPDIR=/dev/shm` spares the disk.

A format is one line in `FORMATS`: a function that writes valid files into an empty folder and returns the path to
open, a file or the folder. Mutations know nothing of formats but that names are letters, digits and dots, and that
sizes, counts and types stand near names and in the first bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import numballama
from numballama.config import ModelConfig, RopeScaling
from numballama.errors import Error
from numballama.formats.gguf.writer import write_gguf
from numballama.formats.hf.writer import write_safetensors
from numballama.loader import open_checkpoint
from numballama.quantization.convert import convert
from numballama.quantization.types import BF16, BLOCKS, F16
from numballama.rope import rope_frequencies
from tests.helpers import fuzz_tokenizers
from tests.helpers.gguf_files import HALVES, letters, random_blocks, split
from tests.helpers.hf_files import tensors
from tests.helpers.quantized_files import write as write_quantized
from tests.helpers.random_models import random_checkpoint
from tests.helpers.random_models import save as save_random
from tests.helpers.torch_files import save_torch

SECONDS = 2.0
"""Processor time of a case: what it waits, on a machine with other work, does not count."""
BYTES = 100 << 20
HANG = 60
"""Seconds after which a case that does not return is shown and ended."""

Maker = Callable[[Path], Path]


def gguf_blocks(folder: Path) -> Path:
    """A file with a tensor of every type, a tokenizer and a chat template."""
    config, path = ModelConfig(256, 256, 2, 4, 2, 290, 16, tied_embeddings=False), folder / "m.gguf"
    weights, rng = dict(random_checkpoint(config).weights), np.random.default_rng(1)
    matrices = [name for name, weight in weights.items() if len(weight.shape) == 2]
    for name, kind in zip(matrices, ["f16", "bf16", "f32", *HALVES, "f16", "q4_k"], strict=False):
        weight = weights[name]
        if kind in BLOCKS:
            weights[name] = random_blocks(kind, weight.shape[0], weight.shape[1] // BLOCKS[kind][0], rng)
        elif kind != "f32":
            weights[name] = convert(weight, F16 if kind == "f16" else BF16)
    write_gguf(path, config, weights, letters(290), name="sample", chat_template="{{ x }}")
    return path


def gguf_small(folder: Path) -> Path:
    """The smallest file: mutations meet the directory more often."""
    config, path = ModelConfig(32, 32, 1, 2, 1, 270, 16), folder / "m.gguf"
    write_gguf(path, config, random_checkpoint(config).weights)
    return path


def gguf_scaled(folder: Path) -> Path:
    """RoPE scaling with numbers in the metadata and factors in tensors."""
    factors = (1.0, 2.0, 2.0, 5.0)
    scaling = RopeScaling("longrope", original_context=8, factors=factors, long_factors=factors, attention_factor=1.5)
    config, path = ModelConfig(16, 24, 1, 2, 1, 40, 16, rope_scaling=scaling), folder / "m.gguf"
    write_gguf(path, config, random_checkpoint(config).weights)
    return path


def gguf_split(folder: Path) -> Path:
    """Three parts, opened from the second."""
    config, whole = ModelConfig(32, 32, 2, 2, 1, 290, 16), folder / "whole.gguf"
    write_gguf(whole, config, random_checkpoint(config).weights, letters(290))
    parts = split(whole, 3)
    whole.unlink()
    return parts[1]


def binary(name: str) -> Maker:
    """A format of `formats.WRITERS` that is one file without tensor names."""
    return lambda folder: save_random(folder, name)[0]


def hugging_face(folder: Path) -> Path:
    """One file, bfloat16, with everything that a configuration can ask for."""
    config = ModelConfig(16, 24, 2, 2, 1, 40, 16, qkv_bias=True, o_bias=True, qk_norm=True, window=5, head_dim=6)
    weights = random_checkpoint(config).weights
    matrices = {n: convert(w, BF16) for n, w in weights.items() if len(w.shape) == 2}
    shutil.rmtree(folder)
    write_safetensors(folder, config, weights | matrices, bos_id=1, eos_ids=(2, 3))
    return folder


def golden(*names: str) -> Maker:
    """A model of tests/golden, which a peer's program wrote."""

    def copy(folder: Path) -> Path:
        shutil.copytree(Path(__file__).parents[1].joinpath("golden", *names), folder, dirs_exist_ok=True)
        (folder / "expected.npz").unlink()
        return folder

    return copy


def hf_torch(folder: Path) -> Path:
    """PyTorch's files with an index, and a buffer."""
    golden("hf", "llama-0")(folder)
    arrays = tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    (folder / "model.safetensors").unlink()
    names = list(arrays)
    table = {}
    for part in range(2):
        name = f"pytorch_model-{part + 1:05}-of-00002.bin"
        save_torch(folder / name, {key: arrays[key] for key in names[part::2]}, protocol=2 + 2 * part)
        table |= dict.fromkeys(names[part::2], name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def hf_quantized(method: Literal["mlx", "gptq", "awq"]) -> Maker:
    """Matrices quantised by another tool, four bits in groups of 32."""

    def make(folder: Path) -> Path:
        shutil.rmtree(folder)
        write_quantized(folder, method, 4, 32, np.random.default_rng(1), order=method == "gptq")
        return folder

    return make


FORMATS: dict[str, Maker] = {
    "gguf": gguf_blocks,
    "gguf-small": gguf_small,
    "gguf-scaled": gguf_scaled,
    "gguf-split": gguf_split,
    "llama2c-v0": binary("llama2c-v0"),
    "llama2c-v1": binary("llama2c-v1"),
    "llama2c-v2": binary("llama2c-v2"),
    "kuiper": binary("kuiper"),
    "kuiper-int8": binary("kuiper-int8"),
    "hf": hugging_face,
    "hf-sharded": golden("hf", "qwen3-f16-sharded-0"),
    "hf-torch": hf_torch,
    "hf-mlx": hf_quantized("mlx"),
    "hf-gptq": hf_quantized("gptq"),
    "hf-awq": hf_quantized("awq"),
    "hf-settings": golden("hf", "llama3-0"),
    "hf-yarn": golden("hf", "llama-yarn-mscale-0"),
    "hf-longrope": golden("hf", "llama-longrope-0"),
    "meta": golden("meta", "llama2"),
    "meta-parts": golden("meta", "llama3.1-2-parts"),
    **fuzz_tokenizers.MAKERS,
}
"""Name → what writes a valid model of that format."""

KEPT = dict.fromkeys(("hf-settings", "hf-yarn", "hf-longrope"), ".safetensors")
"""Name → suffix of the files that are never damaged: `config.json` and `generation_config.json` are the others."""


# Mutations


@dataclass(frozen=True)
class Link:
    """A symbolic link to another file of the model, or to itself."""

    target: str


Files = dict[str, bytes | bytearray | Link | None]
"""Path within the folder → content; None is a folder in the file's place."""

_NAME = re.compile(rb"[A-Za-z_][\w./-]{4,80}")
_NUMBER = re.compile(rb"-?\d+(\.\d+)?|true|false|null")
_EXTREMES = [0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1]
_LITERALS = [b"0", b"-1", b"1", b"3", b"4294967296", b"9223372036854775808", b"1e999", b"0.5", b"null", b"true", b'"a"']
_LITERALS += [b"[]", b"{}", b"[[[[", b"NaN", b"9" * 400]


def _names(data: bytes | bytearray) -> list[re.Match[bytes]]:
    """The names in a file's first part, else in its last: between them lie numbers, in large files of any format."""
    return list(_NAME.finditer(bytes(data[: 1 << 16]))) or list(_NAME.finditer(bytes(data[-(1 << 16) :])))


def _place(rng: random.Random, data: bytearray) -> int:
    """Somewhere in a file, most often where sizes, counts and types are."""
    if rng.random() < 0.5 and (names := _names(data)):
        name = rng.choice(names)
        return min(max(0, name.start() - 8 + rng.randrange(name.end() - name.start() + 48)), len(data) - 1)
    return rng.randrange(min(len(data), rng.choice((16, 64, 512, 1 << 14, len(data)))))


def _flip(rng: random.Random, data: bytearray) -> None:
    data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray) -> None:
    data[_place(rng, data)] = rng.randrange(256)


def _word(rng: random.Random, data: bytearray) -> None:
    """An integer becomes an extreme one, or one more, less, twice or half of what it was."""
    at, width = _place(rng, data), rng.choice((1, 2, 4, 8))
    old = int.from_bytes(data[at : at + width], "little")
    new = rng.choice((rng.choice(_EXTREMES), rng.randrange(64), old + 1, old - 1, old * 2, old // 2))
    data[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")


def _delete(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 4, 8, 32, 100))]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start, at = _place(rng, data), _place(rng, data)
    data[at:at] = data[start : start + rng.choice((1, 4, 8, 32, 100))]


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[_place(rng, data) if rng.random() < 0.5 else rng.randrange(len(data)) :]


def _grow(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.choice((1, 8, 4096)))


def _rename(rng: random.Random, data: bytearray) -> None:
    """A name becomes another of the file, or one that differs in a letter."""
    if names := _names(data):
        name, other = rng.choice(names), rng.choice(names)
        if rng.random() < 0.5:
            data[name.start() : name.end()] = other.group()
        else:
            data[rng.randrange(name.start(), name.end())] = rng.choice(b"0123456789abcdefXYZ._")


def _literal(rng: random.Random, data: bytearray) -> None:
    """In text, a number becomes another, or something else."""
    if b"{" in data[:16] and (numbers := list(_NUMBER.finditer(bytes(data[: 1 << 18])))):
        number = rng.choice(numbers)
        data[number.start() : number.end()] = rng.choice(_LITERALS)
    else:
        _word(rng, data)


_IN_FILE = (_flip, _byte, _word, _word, _word, _delete, _repeat, _cut, _grow, _rename, _rename, _literal, _literal)


def _among_files(rng: random.Random, files: Files) -> None:
    """A file goes missing, becomes empty, a folder, a link, or another file of the model; two change places."""
    name, other = rng.choice(list(files)), rng.choice(list(files))
    match rng.randrange(7):
        case 0:
            del files[name]
        case 1:
            files[name] = b""
        case 2:
            files[name] = None
        case 3:
            files[name] = Link(other)
        case 4:
            files[name] = files[other]
        case 5:
            files[name], files[other] = files[other], files[name]
        case 6:
            files[name + rng.choice(("", ".bak", "2"))] = files.pop(name)


def mutate(rng: random.Random, files: Files, kept: Files | None = None) -> None:
    """Damage the files once, twice or more often, except those in `kept`."""
    for name in kept or {}:
        files.pop(name, None)
    _mutate(rng, files)
    files |= kept or {}


def _mutate(rng: random.Random, files: Files) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not files:
            return
        if rng.random() < (0.2 if len(files) > 1 else 0.02):
            _among_files(rng, files)
            continue
        name = rng.choice(list(files))
        content = files[name]
        if isinstance(content, (bytes, bytearray)) and content:
            data = bytearray(content)
            rng.choice(_IN_FILE)(rng, data)
            files[name] = data


# A case


def examine(path: Path) -> None:
    """What a program does with a model file before it computes, and a look at every byte of the weights."""
    opened = open_checkpoint(path)
    for weight in opened.weights.values():
        if weight.nbytes != weight.type.nbytes(math.prod(weight.shape)):
            raise AssertionError(f"{weight.type} of shape {weight.shape} in {weight.nbytes} bytes")
        weight.data.view(np.uint8).max()
    if not all(map(math.isfinite, rope_frequencies(opened.config, 64))):
        raise AssertionError(f"frequencies of {opened.config}")
    if (tokenizer := opened.tokenizer) is not None:
        tokenizer.decode(range(tokenizer.vocab_size))
        with contextlib.suppress(Error):  # a vocabulary may lack what a text needs
            tokenizer.encode("Once upon a time 🙂\0 <s>", special=True)
    _ = numballama.inspect(path).memory


def _status(*fields: str) -> list[int]:
    """Bytes that Linux states of this process: "VmRSS" now, "VmHWM" at most since the peak was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return [int(values[field].split()[0]) * 1024 for field in fields]


@contextlib.contextmanager
def limits(size: int) -> Iterator[None]:
    """Raise `AssertionError` when what is done takes too much processor time or, on Linux, too much memory.

    `size` is that of the files in bytes.
    """
    measured = sys.platform == "linux"
    before = peak = 0
    if measured:
        before, peak = _status("VmRSS", "VmHWM")
        if peak > before + BYTES // 2:  # an earlier peak this high would hide, or pass for, one of this case
            Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    try:
        yield
    finally:
        seconds = time.process_time() - started
        grown = _status("VmHWM")[0] - before if measured else 0
    if seconds > SECONDS:
        raise AssertionError(f"took {seconds:.1f} s")
    if grown > size + BYTES:
        raise AssertionError(f"took {grown:,} bytes of memory for {size:,} bytes of files")


def write(folder: Path, files: Files) -> int:
    """Write the files again; returns their bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, Link):
            path.symlink_to(folder / content.target)
        else:
            path.write_bytes(content)
    return sum(len(content) for content in files.values() if isinstance(content, (bytes, bytearray)))


OPENERS = dict.fromkeys(fuzz_tokenizers.MAKERS, fuzz_tokenizers.examine)
"""Name → what is done with the files, where it is not `examine`."""


CLASSES: Counter[tuple[str, str]] = Counter()
"""(format, class of an error) → how often `fuzz` met it."""

EVERY_S = 30.0
"""Seconds between two lines of progress."""

GROUPS = {
    "models": [name for name in FORMATS if name not in fuzz_tokenizers.MAKERS],
    "tokenizers": list(fuzz_tokenizers.MAKERS),
}


def fuzz(
    name: str,
    cases: int,
    seed: int,
    folder: Path,
    opener: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Run cases of a format; returns how many ended in a model and how many in an `Error`.

    Calls `progress` with the number of cases done, every `EVERY_S` seconds. Raises `AssertionError` naming the case for
    anything else. Its files are in `folder` then.
    """
    opener = opener or OPENERS.get(name, examine)
    model = folder / name
    model.mkdir(parents=True)
    path = FORMATS[name](model)
    valid: Files = {str(p.relative_to(model)): p.read_bytes() for p in sorted(model.rglob("*")) if p.is_file()}
    kept = {file: data for file, data in valid.items() if file.endswith(KEPT.get(name, "nothing"))}
    opener(path)
    opened = refused = 0
    said = time.monotonic()
    for case in range(cases):
        if progress is not None and time.monotonic() - said > EVERY_S:
            progress(case)
            said = time.monotonic()
        rng, files = random.Random(f"{name} {seed} {case}"), dict(valid)
        mutate(rng, files, kept)
        size = write(model, files)
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            with warnings.catch_warnings(), limits(size):
                warnings.simplefilter("error")
                try:
                    opener(path)
                    opened += 1
                except Error as error:
                    refused += 1
                    CLASSES[name, type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}, case {case}: {error!r}; see {model}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
    return opened, refused


def shares(total: int, names: list[str]) -> dict[str, int]:
    """The cases of each format when they are `total` together: equally many, the first ones one more."""
    return {name: total // len(names) + (place < total % len(names)) for place, name in enumerate(names)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("formats", nargs="*", help=f"of {', '.join([*GROUPS, *FORMATS])}; all by default")
    count = parser.add_mutually_exclusive_group(required=True)
    count.add_argument("--cases", type=int, help="cases of each format")
    count.add_argument("--total", type=int, help="cases of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    names = [name for given in asked.formats or GROUPS for name in GROUPS.get(given, [given])]
    if unknown := set(names) - set(FORMATS):
        parser.error(f"unknown format: {', '.join(sorted(unknown))}")
    table = shares(asked.total, names) if asked.cases is None else dict.fromkeys(names, asked.cases)
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="numballama-fuzz-"))
    done, begun = 0, time.perf_counter()
    for name, cases in table.items():
        print(f"{name} in {folder / name}", flush=True)
        started, computed = time.perf_counter(), time.process_time()

        def progress(case: int, done: int = done, cases: int = cases) -> None:
            speed = max(done + case, 1) / (time.perf_counter() - begun)
            left = (sum(table.values()) - done - case) / speed
            print(f"  {case:,} of {cases:,}; {speed:.0f} cases/s, {left / 60:.0f} min left", flush=True)

        opened, refused = fuzz(name, cases, asked.seed, folder, progress=progress)
        classes = ", ".join(f"{count:,} {kind}" for (of, kind), count in CLASSES.most_common() if of == name)
        seconds, computed = time.perf_counter() - started, time.process_time() - computed
        print(
            f"  {opened:,} opened, {refused:,} refused ({classes}), in {seconds:.0f} s; "
            f"{computed / max(cases, 1) * 1e3:.1f} ms of processor time a case",
            flush=True,
        )
        shutil.rmtree(folder / name)
        done += cases
    seconds = time.perf_counter() - begun
    print(f"{done:,} cases in {seconds:.0f} s: each a model or an Error; no crash, no hang")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
