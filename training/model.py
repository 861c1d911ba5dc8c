"""The Llama architecture in PyTorch, for the teacher (sampling) and the student (training).

One file format for both: a llama2.c v0 checkpoint is read into it, and `export.py` writes from it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (what the field calls it)
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def rope_table(shape: Shape, device: torch.device) -> Tensor:
    """complex64 [context, head_dim / 2]: the rotation of each pair (2i, 2i+1) at each position."""
    rates = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.context, device=device), rates)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def turn(x: Tensor, table: Tensor) -> Tensor:
    """RoPE of x [batch, tokens, heads, head_dim] by table [tokens, head_dim / 2, 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part[None, :, None, :] for part in table.unbind(-1))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape.dim)), shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_dim = shape.n_kv_heads * shape.head_dim

        def linear(rows: int, columns: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=False)

        self.attn_norm, self.ffn_norm = Norm(shape), Norm(shape)
        self.wq, self.wo = linear(shape.dim, shape.dim), linear(shape.dim, shape.dim)
        self.wk, self.wv = linear(kv_dim, shape.dim), linear(kv_dim, shape.dim)
        self.w1, self.w3 = linear(shape.hidden_dim, shape.dim), linear(shape.hidden_dim, shape.dim)
        self.w2 = linear(shape.dim, shape.hidden_dim)

    def forward(self, x: Tensor, table: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        """x [batch, tokens, dim]. With a cache (k, v [batch, kv_heads, context, head_dim]) tokens are at `start` on."""
        shape, (batch, tokens, _) = self.shape, x.shape
        h = self.attn_norm(x)
        q = turn(self.wq(h).view(batch, tokens, shape.n_heads, -1), table).transpose(1, 2)
        k = turn(self.wk(h).view(batch, tokens, shape.n_kv_heads, -1), table).transpose(1, 2)
        v = self.wv(h).view(batch, tokens, shape.n_kv_heads, -1).transpose(1, 2)
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start : start + tokens] = new
            k, v = (kept[:, :, : start + tokens] for kept in cache)
        grouped = shape.n_kv_heads != shape.n_heads
        h = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None or tokens > 1, enable_gqa=grouped)
        x = x + self.wo(h.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """Tied embeddings. `forward` gives logits [batch, tokens, vocab]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = Norm(shape)

    def initialise(self, seed: int) -> None:
        """Small normal weights; what writes to the residual stream smaller still (Radford et al., GPT-2, 2019)."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("wo.weight", "w2.weight"))
                scale = 0.02 / (2 * self.shape.n_layers) ** 0.5 if last else 0.02
                weight.data.normal_(0, scale, generator=generator)

    def hidden(self, ids: Tensor, table: Tensor, caches: list | None = None, start: int = 0) -> Tensor:
        x = self.tok_embeddings(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, table[start : start + ids.shape[1]], caches[index] if caches else None, start)
        return self.norm(x)

    def forward(self, ids: Tensor, table: Tensor, caches: list | None = None, start: int = 0) -> Tensor:
        return self.hidden(ids, table, caches, start) @ self.tok_embeddings.weight.T


ORDER = ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")


def load_llama2c(path: Path) -> Llama:
    """The teacher: a llama2.c v0 checkpoint, float32, or float16 if the file is half as long (to travel light)."""
    raw = path.read_bytes()
    numbers = struct.unpack("<7i", raw[:28])
    shape = Shape(*numbers)
    expected = shape.vocab_size * shape.dim * 4
    dtype = np.float32 if len(raw) > 1.5 * expected else np.float16
    flat = torch.from_numpy(np.frombuffer(raw, dtype, offset=28).astype(np.float32))
    model, used = Llama(shape), 0

    def take(target: Tensor) -> None:
        nonlocal used
        target.data.copy_(flat[used : used + target.numel()].view(target.shape))
        used += target.numel()

    take(model.tok_embeddings.weight)
    for name in ORDER:
        for layer in model.layers:
            take(getattr(layer, name).weight)
    take(model.norm.weight)
    return model
