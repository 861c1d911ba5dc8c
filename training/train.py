"""Stage 3: train the student on the teacher's stories, and measure it beside the teacher.

python train.py TOKENS STORIES TEACHER.bin TEACHER-TOKENIZER.model OUT [--seconds 420] [--resume]

TOKENS is the folder that tokenise.py wrote, STORIES the one of sample.py. OUT gets the weights in float32 (in parts
below 16 MB), the loss curve and the figures as JSON. The number of steps is what fits the seconds at the measured
speed; it is written down, and `--steps` repeats it. A checkpoint is written every minute; `--resume` goes on from it.

Matrices of the layers are trained by Muon (Jordan et al., 2024): momentum made orthogonal by a Newton-Schulz iteration;
embeddings and norms by AdamW. The learning rate is constant, then falls linearly over the last 45 % of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (what the field calls it)
from model import Llama, Shape, load_llama2c, rope_table
from sentencepiece import SentencePieceProcessor
from torch import Tensor

STUDENT = Shape(dim=256, hidden_dim=704, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=4096, context=512)
MUON_RATE, ADAM_RATE, MOMENTUM, DECAY, FALL = 0.02, 0.004, 0.95, 0.01, 0.45
WARM_UP = 100


def orthogonal(momentum: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular values driven towards 1 (quintic Newton-Schulz, five rounds)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum SGD whose updates are orthogonal matrices. Weights of one shape are updated together."""

    def __init__(self, weights: list[Tensor]) -> None:
        shapes = {weight.shape for weight in weights}
        self.groups = [[w for w in weights if w.shape == shape] for shape in sorted(shapes)]
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.orthogonal = torch.compile(orthogonal) if weights[0].is_cuda else orthogonal

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([weight.grad for weight in group])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = self.orthogonal(gradient.lerp(momentum, MOMENTUM))
            scale = max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - rate * DECAY).add_(change.to(weight.dtype), alpha=-rate * scale)


def rate_at(step: int, steps: int) -> float:
    """The learning rate as a fraction: warm-up, constant, linear fall."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (FALL * steps))


@torch.inference_mode()
def bits_per_byte(model: Llama, rows: list[list[int]], size: int, batch: int = 64) -> float:
    """Bits of information in stories [BOS, tokens, end] by this model's prediction, over their bytes."""
    device = next(model.parameters()).device
    table, nats = rope_table(model.shape, device), 0.0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids = torch.full((len(part), max(map(len, part))), -100, device=device)
        for row, tokens in zip(ids, part, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=False):
            logits = model(ids[:, :-1].clamp_min(0), table)
        nats += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / size


def held_out(stories: Path, own: str, teachers: str, count: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Held-out stories in the student's and in the teacher's tokens, and their bytes."""
    texts = [t for t in (stories / "held-out.txt").read_text(encoding="utf-8").split("\0") if t][:count]
    student, teacher = (SentencePieceProcessor(model_file=path) for path in (own, teachers))
    rows = [[1, *ids, 2] for ids in student.encode(texts)]
    fits = [index for index, row in enumerate(rows) if len(row) <= STUDENT.context]
    texts, rows = [texts[i] for i in fits], [rows[i] for i in fits]
    return rows, [[1, *ids, 1][:257] for ids in teacher.encode(texts)], sum(len(t.encode()) for t in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("teacher_tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=512, help="sequences a step")
    parser.add_argument("--held-out", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    options.out.mkdir(parents=True, exist_ok=True)
    tokens = torch.from_numpy(np.load(options.tokens / "tokens.npy").astype(np.int16)).to(device)
    own_tokenizer = str(options.tokens / "tokenizer.model")
    rows, teacher_rows, size = held_out(options.stories, own_tokenizer, options.teacher_tokenizer, options.held_out)
    teacher_bits = bits_per_byte(load_llama2c(options.teacher).to(device), teacher_rows, size)
    print(f"teacher: {teacher_bits:.4f} bits a byte on {len(rows):,} held-out stories", flush=True)

    model = Llama(STUDENT)
    model.initialise(options.seed)
    model.to(device)
    table = rope_table(STUDENT, device)
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and name.startswith("layers")]
    others = [w for name, w in model.named_parameters() if not (w.dim() == 2 and name.startswith("layers"))]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(ids[:, :-1], table)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled = torch.compile(loss_of) if device.type == "cuda" else loss_of
    checkpoint = options.out / "checkpoint.pt"
    first, steps, curve = 0, options.steps, []
    if options.resume and checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        adam.load_state_dict(kept["adam"])
        muon.momenta = kept["momenta"]
        first, steps, curve = kept["step"], kept["steps"], kept["curve"]
    window = torch.arange(STUDENT.context + 1, device=device)
    started = saved = time.time()
    step = first
    while not steps or step < steps:
        generator = torch.Generator(device=device).manual_seed(options.seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - len(window), (options.batch, 1), device=device, generator=generator)
        rate = rate_at(step, steps or 10**9)
        loss = compiled(tokens[starts + window].long())
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adam.step()
        muon.step(MUON_RATE * rate)
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            curve.append((step, round(loss.item(), 4)))
        if step == first + 20:
            measured = time.time()
        if step == first + 100 and not steps:
            a_step = (time.time() - measured) / 80
            steps = step + int((options.seconds - (time.time() - started)) / a_step)
            print(f"{a_step * 1000:.0f} ms per step: {steps:,} steps", flush=True)
        if step % 500 == 0:
            bits = bits_per_byte(model, rows[:500], sum_bytes(own_tokenizer, rows[:500]))
            print(
                f"step {step:,}: loss {loss.item():.4f}, {bits:.4f} bits a byte, {time.time() - started:.0f} s",
                flush=True,
            )
        if time.time() - saved > 60:
            saved = time.time()
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "momenta": muon.momenta}
            torch.save(state | {"step": step, "steps": steps, "curve": curve}, checkpoint)

    student_bits = bits_per_byte(model, rows, size)
    seen = (steps - first) * options.batch * STUDENT.context
    figures = {
        "student_bits_per_byte": student_bits,
        "teacher_bits_per_byte": teacher_bits,
        "ratio": student_bits / teacher_bits,
        "held_out_stories": len(rows),
        "parameters": sum(w.numel() for w in model.parameters()),
        "steps": steps,
        "tokens_seen": seen,
        "tokens_unique": len(tokens),
        "seconds": time.time() - started,
        "shape": vars(STUDENT),
        "options": {
            name: value.name if isinstance(value, Path) else str(value) for name, value in vars(options).items()
        },
        "curve": curve,
    }
    (options.out / "figures.json").write_text(json.dumps(figures))
    print({name: value for name, value in figures.items() if name != "curve"})
    state = {name: weight.detach().float().cpu().numpy() for name, weight in model.named_parameters()}
    names = sorted(state)
    for part in range(2):
        np.savez(options.out / f"student-{part}.npz", **{name: state[name] for name in names[part::2]})


def sum_bytes(tokenizer: str, rows: list[list[int]]) -> int:
    """Bytes of the texts that these rows spell."""
    return sum(len(t.encode()) for t in SentencePieceProcessor(model_file=tokenizer).decode([r[1:-1] for r in rows]))


if __name__ == "__main__":
    main()
