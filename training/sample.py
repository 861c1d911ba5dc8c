"""Stage 1: generate stories with the teacher, many at once, and write those that it finished.

python sample.py TEACHER.bin TOKENIZER.model OUT [--seconds 240] [--batch 8192] [--seed 1]

OUT gets stories-000.txt, … (stories end with a NUL byte) and held-out.txt (from seeds of its own). A story that the
context cut off is dropped. Nine batches of ten start from BOS alone; the tenth starts from openings, so that rare
beginnings are seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from model import Llama, load_llama2c, rope_table
from sentencepiece import SentencePieceProcessor
from torch import Tensor

BOS = 1
WORKERS = 6
NAMES = [
    "Lily",
    "Tom",
    "Max",
    "Sara",
    "Ben",
    "Mia",
    "Sam",
    "Anna",
    "Tim",
    "Lucy",
    "Jack",
    "Emma",
    "Leo",
    "Nina",
    "Bob",
    "Amy",
    "Jim",
    "Ella",
    "Mark",
    "Zoe",
    "Sue",
    "Pip",
    "Rex",
    "Kitty",
]
ANIMALS = [
    "cat",
    "dog",
    "bird",
    "fish",
    "bear",
    "frog",
    "duck",
    "fox",
    "rabbit",
    "mouse",
    "lion",
    "turtle",
    "pig",
    "cow",
    "bee",
    "squirrel",
    "monkey",
    "elephant",
    "owl",
]
PLACES = [
    "park",
    "forest",
    "garden",
    "kitchen",
    "beach",
    "farm",
    "school",
    "zoo",
    "store",
    "river",
    "mountain",
    "town",
    "castle",
    "yard",
    "pond",
    "house",
]
THINGS = [
    "ball",
    "boat",
    "hat",
    "kite",
    "drum",
    "book",
    "cake",
    "box",
    "flower",
    "toy",
    "car",
    "key",
    "bell",
    "doll",
    "rock",
    "leaf",
    "bike",
    "ladder",
    "mirror",
    "lamp",
]
TRAITS = [
    "little",
    "big",
    "brave",
    "shy",
    "happy",
    "sad",
    "silly",
    "lazy",
    "kind",
    "curious",
    "tiny",
    "angry",
    "clever",
    "old",
    "lonely",
    "proud",
    "gentle",
]
OPENINGS = (
    "Once there was a {trait} {animal} who lived near the {place}.",
    "One day, {name} found a {trait} {thing} in the {place}.",
    "{name} and {other} were best friends.",
    "It was a rainy day and {name} was",
    "{name} had a {thing}. It was very {trait}.",
    "There was a {trait} {thing} in the {place}.",
    "The {trait} {animal} wanted to",
    '"Look!" said {name}. "I see a {animal}!"',
    "{name} went to the {place} with Mom.",
    "In the {place} there lived a {animal}.",
    "Every day, {name} liked to play with a {thing}.",
    "{name} did not want to share the {thing}.",
)


def opening(rng: random.Random) -> str:
    """A beginning that the teacher goes on from."""
    return rng.choice(OPENINGS).format(
        name=rng.choice(NAMES),
        other=rng.choice(NAMES),
        animal=rng.choice(ANIMALS),
        place=rng.choice(PLACES),
        thing=rng.choice(THINGS),
        trait=rng.choice(TRAITS),
    )


class Teller:
    """A batch of stories at a time, at temperature 1: samples of the teacher's own distribution."""

    def __init__(self, model: Llama, batch: int, device: torch.device) -> None:
        self.model, self.batch, self.device = model, batch, device
        shape = model.shape
        kept = (batch, shape.n_kv_heads, shape.context, shape.head_dim)
        dtype = next(model.parameters()).dtype
        self.caches = [tuple(torch.zeros(kept, device=device, dtype=dtype) for _ in "kv") for _ in model.layers]
        self.table = rope_table(shape, device)
        self.choose = torch.compile(self._choose) if device.type == "cuda" else self._choose

    @staticmethod
    def _choose(logits: Tensor) -> Tensor:
        """A token with probability softmax(logits): the largest after Gumbel noise."""
        exponential = -torch.log(torch.rand_like(logits, dtype=torch.float32).clamp_min(1e-20))
        noise = -torch.log(exponential.clamp_min(1e-20))
        return (logits.float() + noise).argmax(-1)

    @torch.inference_mode()
    def tell(self, prompts: Tensor | None) -> Tensor:
        """ids [batch, context] after BOS; `prompts` [batch, n] are the first of them, the same length for all."""
        context = self.model.shape.context
        ids = torch.full((self.batch, context + 1), BOS, device=self.device, dtype=torch.int64)
        known = 0
        if prompts is not None:
            known = prompts.shape[1]
            ids[:, 1 : known + 1] = prompts
        for position in range(context):
            logits = self.model(ids[:, position : position + 1], self.table, self.caches, position)[:, 0]
            if position >= known:
                ids[:, position + 1] = self.choose(logits)
        return ids[:, 1:]


def write_finished(rows: np.ndarray, tokenizer: str, path: Path) -> tuple[int, int]:
    """Write the stories that came to an end by themselves; returns how many, and their bytes. Runs in a worker
    process.
    """
    whole = [row[: row.index(BOS)] for row in rows.tolist() if BOS in row]
    texts = SentencePieceProcessor(model_file=tokenizer).decode([row for row in whole if row])
    stories = [text.strip() for text in texts if text.strip() and "\0" not in text]
    data = ("\0".join(stories) + "\0").encode()
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)
    return len(stories), len(data)


def prompts_for(batch: int, tokenizer: SentencePieceProcessor, rng: random.Random, device: torch.device) -> Tensor:
    """A batch of openings of one length in tokens: the commonest among many drawn."""
    drawn = [tokenizer.encode(opening(rng)) for _ in range(2000)]
    lengths = [len(ids) for ids in drawn]
    length = rng.choice(lengths)
    fitting = [ids for ids in drawn if len(ids) == length]
    rows = list(itertools.islice(itertools.cycle(fitting), batch))
    return torch.tensor(rows, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--batches", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = SentencePieceProcessor(model_file=options.tokenizer)
    model = load_llama2c(options.teacher).to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    teller = Teller(model, options.batch, device)
    options.out.mkdir(parents=True, exist_ok=True)
    started, told = time.time(), 0
    jobs = []
    # text is made of ids in other processes, while the next batch is told
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for index in range(options.batches):
            # batch 0 is held out; its seed is used for nothing else
            path = options.out / ("held-out.txt" if index == 0 else f"stories-{index:03}.txt")
            if path.exists():
                continue  # told by an earlier run
            seed = options.seed * 1_000_003 + index
            torch.manual_seed(seed)
            openings = index % 10 == 9
            prompts = prompts_for(options.batch, tokenizer, random.Random(seed), device) if openings else None
            rows = teller.tell(prompts).to(torch.int32).cpu().numpy()
            jobs.append(pool.submit(write_finished, rows, options.tokenizer, path))
            told += options.batch
            seconds = time.time() - started
            if index % 10 == 0:
                print(f"batch {index}: {told:,} stories told, {seconds:.0f} s", flush=True)
            if seconds > options.seconds:
                break
        kept, size = (sum(column) for column in zip(*(job.result() for job in jobs), strict=True))
    report = {"told": told, "kept": kept, "bytes": size, "seconds": seconds, **vars(options)}
    print(json.dumps(report, default=str))
    (options.out / "sample.json").write_text(json.dumps(report, default=str, indent=1))


if __name__ == "__main__":
    main()
