"""A Llama as one writes it in plain PyTorch, for PyTorch's own parallelisms to be applied to.

Heads are counted from the tensors, so the projections may be cut along their outputs. B batch, S positions, E hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.job import Shape


def rotations(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, 1, head dim] of RoPE with base 10,000, in halves."""
    dim = shape.hidden // shape.heads
    frequency = 10_000.0 ** -(torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(shape.sequence), frequency).repeat(1, 2)[:, None]
    return angle.cos(), angle.sin()


def rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BSHD.chunk(2, dim=-1)
    return (x_BSHD * cos + torch.cat((-b, a), dim=-1) * sin).to(x_BSHD.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dim = shape.hidden // shape.heads
        self.query = nn.Linear(shape.hidden, shape.heads * self.dim, bias=False)
        self.key = nn.Linear(shape.hidden, shape.kv_heads * self.dim, bias=False)
        self.value = nn.Linear(shape.hidden, shape.kv_heads * self.dim, bias=False)
        self.output = nn.Linear(shape.heads * self.dim, shape.hidden, bias=False)
        self.rotation = rotations(shape)

    def forward(self, x_BSE: Tensor) -> Tensor:
        q, k, v = (linear(x_BSE).unflatten(-1, (-1, self.dim)) for linear in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, *self.rotation), rotate(k, *self.rotation), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-5), nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attention, self.mlp = Attention(shape), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Tokens [B, S] to logits [B, S, vocabulary]; a stage of a pipeline takes and gives the residual stream instead."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm: nn.Module | None = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head: nn.Module | None = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def stage(self, layers: range, first: bool, last: bool) -> "Llama":
        """Keep these layers, and embedding and head at the ends."""
        self.blocks = self.blocks[layers.start : layers.stop]
        if not first:
            self.embedding = None
        if not last:
            self.norm = self.head = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
