"""Stage 2: train the student's tokenizer on the sampled stories, and encode them all.

python tokenise.py STORIES OUT [--vocab 4096]

Writes OUT/tokenizer.model and OUT/tokens.npy: uint16, every story as BOS, its tokens, EOS. No text is changed before it
is split (identity normalisation, spaces kept), and unknown characters become bytes, so that any text comes back as it
was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

BOS, EOS = 1, 2
WORKERS = 16


def stories(path: Path) -> list[str]:
    return [story for story in path.read_text(encoding="utf-8").split("\0") if story]


def encode(path: Path, model: str) -> np.ndarray:
    """uint16 tokens of one file of stories. Runs in a worker process."""
    tokenizer = SentencePieceProcessor(model_file=model)
    rows = tokenizer.encode(stories(path))
    return np.concatenate([np.array([BOS, *row, EOS], np.uint16) for row in rows])


def lines(paths: list[Path], limit: int) -> Iterator[str]:
    """Paragraphs of the first stories, as the trainer wants them."""
    count = 0
    for path in paths:
        for story in stories(path):
            for line in story.split("\n"):
                if line:
                    yield line
            count += 1
            if count >= limit:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=60_000, help="stories that the tokenizer is trained on")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    paths = sorted(options.stories.glob("stories-*.txt"))
    SentencePieceTrainer.train(
        sentence_iterator=lines(paths, options.limit),
        model_prefix=str(options.out / "tokenizer"),
        vocab_size=options.vocab,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=WORKERS,
        minloglevel=1,
    )
    model = str(options.out / "tokenizer.model")
    with ProcessPoolExecutor(WORKERS) as pool:
        tokens = np.concatenate(list(pool.map(encode, paths, [model] * len(paths))))
    np.save(options.out / "tokens.npy", tokens)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(tokens):,} tokens of {size:,} bytes: {size / len(tokens):.2f} bytes per token")


if __name__ == "__main__":
    main()
