"""Stage 4: export the trained student to numballama/story.gguf, and measure it as it ships.

python export.py OUT TOKENS STORIES        (the folders of train.py, tokenise.py and sample.py; needs numballama
installed)

Writes the Q8_0 GGUF into the package, and the figures and the loss curve beside this file, in card/.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import numballama
from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.formats.gguf.writer import write_gguf
from numballama.quantization.convert import convert
from numballama.quantization.types import F32, Q8_0

HERE = Path(__file__).parent
TARGET = HERE.parent / "numballama" / "story.gguf"
NAMES = {"tok_embeddings.weight": "tok_embeddings", "norm.weight": "norm"}


def bits_per_byte(model: numballama.Model, stories: list[str]) -> float:
    """Bits of information in stories by the model's prediction, their ends included, over their bytes."""
    nats, size = 0.0, 0
    for story in stories:
        ids = [*model.tokenizer.encode(story), model.tokenizer.eos_id]
        logits = model.logits(ids[:-1]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        nats += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
        size += len(story.encode())
    return nats / math.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--held-out", type=int, default=300)
    options = parser.parse_args()

    figures = json.loads((options.out / "figures.json").read_text())
    shape = figures["shape"]
    config = ModelConfig(**{name: shape[name] for name in shape})
    arrays = {
        name: part[name] for p in range(2) for part in [np.load(options.out / f"student-{p}.npz")] for name in part
    }
    weights = {}
    for name, array in arrays.items():
        own = NAMES.get(name, name.removesuffix(".weight"))
        weights[own] = Weight(array.shape, F32, np.ascontiguousarray(array))
    assert set(weights) == set(config.weight_shapes())
    quantized = {n: convert(w, Q8_0) if len(w.shape) == 2 else w for n, w in weights.items()}
    tokenizer = numballama.load_tokenizer(options.tokens / "tokenizer.model")
    card = HERE / "card"
    card.mkdir(exist_ok=True)
    about = {"general.license": "apache-2.0", "general.description": "Short stories; see training/ of numballama"}
    write_gguf(TARGET, config, quantized, tokenizer=tokenizer, name="numballama story", metadata=about)
    as_float = options.out / "student-f32.gguf"
    write_gguf(as_float, config, weights, tokenizer=tokenizer, name="numballama story, float32")

    texts = [
        t for t in (options.stories / "held-out.txt").read_text(encoding="utf-8", errors="ignore").split("\0") if t
    ]
    texts = [t for t in texts if len(t) < 1500][: options.held_out]
    with numballama.compile(as_float) as model:
        in_float = bits_per_byte(model, texts)
    with numballama.compile(TARGET) as model:
        in_q8_0 = bits_per_byte(model, texts)

    curve = figures.pop("curve")
    figures |= {"float_bits_per_byte": in_float, "q8_0_bits_per_byte": in_q8_0, "file_bytes": TARGET.stat().st_size}
    (card / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot = Figure(figsize=(7, 3.5), layout="constrained")
    axes = plot.subplots()
    axes.plot(*zip(*curve, strict=True), linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats a token", yscale="log", ylim=(1.3, 3))
    axes.grid(alpha=0.3, which="both")
    plot.savefig(card / "loss.svg")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
