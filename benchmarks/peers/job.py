"""What every engine is given: the model's shape, this rank's place, and the step's tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MICRO_BATCH = 4
"""Sequences a rank and step, whether a rank computes its own or shares in all of them."""
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Shape:
    """A Llama: RMSNorm, RoPE, SwiGLU, grouped queries, untied head. The first one is configs/model/s19.yaml."""

    vocab: int = 8192
    sequence: int = 512
    hidden: int = 384
    ffn: int = 1024
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2

    def overrides(self) -> list[str]:
        """What makes megalite's model=s19 this one."""
        sizes = ("vocab", "hidden", "ffn", "layers", "heads", "kv_heads")
        return ["model=s19", *(f"model.{size}={getattr(self, size)}" for size in sizes)]


SHAPES = {
    "s19": Shape(),
    "quickstart": Shape(vocab=4096, sequence=256, hidden=192, ffn=512, layers=4, heads=4),
    "s50": Shape(hidden=640, ffn=1728, layers=9, heads=10, kv_heads=5),
    "tiny": Shape(vocab=512, sequence=32, hidden=48, ffn=64),
}
"""quickstart: of that experiment's size; s50: 51M parameters; tiny: to see that everything runs, not how fast."""


@dataclass(frozen=True)
class Job:
    """`precision`: fp32 or bf16; `variant`: what stands behind the peer's name after a colon."""

    precision: str
    variant: str
    model: str
    rank: int
    ranks: int
    threads: int
    folder: str

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def rows(self) -> int:
        """Sequences of a step over all ranks."""
        return MICRO_BATCH * self.ranks

    def own(self, tokens_BS: Tensor) -> Tensor:
        """A data-parallel rank's part of the step's sequences."""
        return tokens_BS.chunk(self.ranks)[self.rank]
